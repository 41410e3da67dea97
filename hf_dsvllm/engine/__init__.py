"""The vLLM process: started, watched, fed with weights and asked, never imported."""
