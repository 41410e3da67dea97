"""`hf-dsvllm run SCRIPT …`: presets, adapters and evaluation for a Trainer script nobody has to edit.

`command` reads the command line and `parent` starts the launcher, both without torch.  Each rank is `python -m
hf_dsvllm.run SCRIPT …`: `rank` runs the script as `__main__`, `doors` holds every place where upstream is touched, and
`for_arguments`, `for_models` and `for_trainers` decide what happens there; `state` is what they know.
"""
