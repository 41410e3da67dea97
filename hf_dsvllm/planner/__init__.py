"""The planner: what a run takes and how fast it is, before it starts; arithmetic only, no framework.

`request` reads the words, `search` tries every way, `footprint`, `activations`, `host` and `speed` hold the formulas,
`cards` the rates, `explain` the sentences.
"""
