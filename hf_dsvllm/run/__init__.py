"""`hf-dsvllm run SCRIPT …`: presets, adapters and evaluation for a Trainer script nobody has to edit.

Without torch: `command` reads the command line (`target`: what is run; `script_files`: where else arguments stand),
`launcher` chooses the processes, `parent` starts them and `dry` prints them.  Each rank is `python -m hf_dsvllm.run
SCRIPT …`: `rank` runs the script as `__main__`, `doors` holds every place where upstream is touched, `for_arguments`,
`for_models` and `for_trainers` decide what happens there, and `state` is what they know.
"""
