"""Exports and adapters behind vLLM's OpenAI API: `command` runs them, `plan`, `share`, `life` and `gateway` say how."""
