"""Several short trainings in one torchrun, through `prepare`, `load_model`, `attach` and the plain Trainer.

    torchrun --nproc_per_node 2 train_runs.py SPEC.json

Importing the libraries takes longer than training the tiny model, so one launch does all the runs of a test module;
what the libraries keep in process-wide state is reset between them.  SPEC is {"model": folder, "out": folder, "runs":
[RUN]}, a RUN has `name`, `preset` and optionally `args` (TrainingArguments), `model_args` (TRL's ModelConfig), `resume`
(a checkpoint), `weights` (save the gathered parameters), `stream` and `sends` (see `streams.py`), `publishes` (see
`publishing.py`), `model` (another folder), `few` (train on the first global batch alone, so that the loss falls),
`fall_back` (lose DeepSpeed on the way), `restore` (a snapshot to load at the end), `canary` (ask the live model for
log-probabilities after every step; see canaries.py), `trl` (its SFTTrainer, whose loss never calls the output head),
`large` (ZeRO-3 lets next to nothing stay gathered, as where the model is larger than
`stage3_max_live_parameters`; a number: so many parameters, and twice as many at a time), `swaps` (every weight that can
be swapped goes to NVMe: DeepSpeed keeps the first 1e9 numbers in host memory).  ZeRO-3 runs come first: their arguments
are refused once an unsharded model has been loaded in the process.

OUT/<name>.json holds what came of it: losses by step, the live wiring, hashes of the 4-bit weights before and after,
the error if there was one.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from tests.scripts import publishing, streams

GLOBAL_BATCH = 4
STEPS = 8
LENGTH = 32
# Every run logs each step, sees the same batches and leaves the exporting to other tests.
ARGUMENTS = {
    "max_steps": STEPS,
    "logging_steps": 1,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "cosine",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "export_to": "none",
    "seed": 7,
}


def rows(few: bool) -> list[dict[str, list[int]]]:
    """Sixty-four sequences that count upwards in different steps: something a tiny model can learn."""
    sequences = [[4 + (start + (start % 5 + 1) * k) % 300 for k in range(LENGTH)] for start in range(64)]
    chosen = sequences[:GLOBAL_BATCH] if few else sequences
    return [{"input_ids": tokens, "labels": tokens} for tokens in chosen]


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    out = Path(spec["out"])
    environment = dict(os.environ)
    for run in spec["runs"]:
        try:
            result = train(run, Path(run.get("model", spec["model"])), out)
        except Exception as error:
            result = {"error": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}
        if os.environ["RANK"] == "0":
            (out / f"{run['name']}.json").write_text(json.dumps(result), encoding="utf-8")
        forget(environment)


def forget(environment: dict[str, str]) -> None:
    """Put back what a run leaves in the process: accelerate's singletons, the ZeRO-3 flag, environment variables."""
    from accelerate.state import AcceleratorState
    from transformers.integrations import unset_hf_deepspeed_config

    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)
    gc.collect()


def train(run: dict[str, Any], model: Path, out: Path) -> dict[str, Any]:
    """One run; what it returns is described at the top of this file."""
    from transformers import Trainer, default_data_collator
    from trl import ModelConfig

    from hf_dsvllm import DsvllmSFTConfig, DsvllmTrainingArguments, prepare
    from hf_dsvllm.live.restore import restore
    from hf_dsvllm.wiring import read_wiring

    processes = int(os.environ["WORLD_SIZE"])
    given = {"per_device_train_batch_size": GLOBAL_BATCH // processes} | ARGUMENTS | run.get("args", {})
    kind = DsvllmSFTConfig if run.get("trl") else DsvllmTrainingArguments
    args = kind(output_dir=str(out / run["name"]), ds_preset=run["preset"], **given)
    model_args = ModelConfig(
        **{"model_name_or_path": str(model), "lora_r": 4, "lora_dropout": 0.0} | run.get("model_args", {})
    )
    session = prepare(args, model_args)
    if run.get("large"):
        reuse = 1000 if run["large"] is True else run["large"]
        few = {"stage3_max_reuse_distance": reuse, "stage3_max_live_parameters": 1000 if reuse == 1000 else 2 * reuse}
        args.hf_deepspeed_config.config["zero_optimization"].update(few)
    if run.get("swaps"):
        args.hf_deepspeed_config.config["zero_optimization"]["offload_param"]["max_in_cpu"] = 0
    loaded = session.load_model()
    data = rows(run.get("few", False))
    if run.get("fall_back"):
        args.deepspeed_plugin = None
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"
    if run.get("trl"):
        trainer = sft_trainer(loaded, args, data, model)
    else:
        trainer = Trainer(
            model=loaded, args=args, train_dataset=data, eval_dataset=data[:6], data_collator=default_data_collator
        )
    session.attach(trainer)
    if "canary" in run:
        from tests.scripts.canaries import AfterEachStep

        trainer.add_callback(AfterEachStep(trainer, out / run["name"], ask=run["canary"]))
    before = four_bit_hashes(trainer.model)
    trainer.train(resume_from_checkpoint=run.get("resume"))
    wiring = read_wiring(trainer)
    if run.get("restore"):
        restore(trainer.model, Path(run["restore"]), "adapter" if hasattr(trainer.model, "peft_config") else "full")
    if run.get("weights"):
        save_weights(trainer.model, out / f"{run['name']}.weights.pt")
    if run.get("stream"):
        streams.save(trainer.model, out, run["name"])
    if run.get("sends"):
        streams.try_sends(trainer.model, out, run["name"])
    if run.get("publishes"):
        publishing.try_all(trainer.model, out, run["name"])
    return {
        "losses": {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row},
        "engine": wiring.engine,
        "zero_stage": wiring.zero_stage,
        "world_size": wiring.world_size,
        "adapter_modules": wiring.adapter_modules,
        "four_bit_modules": wiring.four_bit_modules,
        "optimizer": optimizer_name(trainer),
        "four_bit_before": before,
        "four_bit_after": four_bit_hashes(trainer.model),
        "quant_storage": model_args.bnb_4bit_quant_storage,
    }


def sft_trainer(model: Any, args: Any, data: list[dict[str, list[int]]], folder: Path) -> Any:
    """TRL's, on sequences that are tokenised already."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTTrainer

    args.dataset_kwargs = {"skip_prepare_dataset": True}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(data), processing_class=tokenizer)


def optimizer_name(trainer: Any) -> str:
    """The class that really steps, below accelerate's and DeepSpeed's wrappers."""
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return type(optimizer).__name__


@contextlib.contextmanager
def whole(parameter: torch.nn.Parameter) -> Any:
    """The parameter with all its elements, also under ZeRO-3; every rank takes part."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield


def save_weights(model: Any, path: Path) -> None:
    """The parameters one by one, by their full names, tied ones under each name: what a snapshot is compared with."""
    state = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        with whole(parameter):
            state[name] = parameter.detach().clone()
    if os.environ["RANK"] == "0":
        torch.save(state, path)


def four_bit_hashes(model: Any) -> dict[str, str]:
    """SHA-256 of the packed bytes of every 4-bit layer."""
    from bitsandbytes.nn import Linear4bit

    hashes = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            with whole(module.weight):
                packed = module.weight.detach().contiguous().view(torch.uint8).numpy().tobytes()
                hashes[name] = hashlib.sha256(packed).hexdigest()
    return hashes


if __name__ == "__main__":
    main()
