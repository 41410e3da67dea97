"""The arguments this package adds to a TrainingArguments class; the whole list, frozen by a test."""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = ["PresetFields", "added_fields", "asks_for_answers", "metric_key", "steers", "trusts_remote_code"]


@dataclasses.dataclass
class PresetFields:
    """Mixin of the added fields; `hf_dsvllm.arguments.with_presets` joins it to a TrainingArguments class."""

    ds_preset: str | None = dataclasses.field(
        default=None,
        metadata={"help": "Preset of DeepSpeed, LoRA or QLoRA settings, e.g. zero3_offload, qlora or zero3+lora, or "
                  "auto for the planner's choice. `hf-dsvllm presets` lists them."},
    )  # fmt: skip
    ds_speed: list[str] | None = dataclasses.field(
        default=None,
        metadata={"help": "Speed features of the preset: a NAME adds one, no_NAME leaves one out, none leaves out all. "
                  "`hf-dsvllm presets show` lists them with what is on by default."},
    )  # fmt: skip
    nvme_path: str | None = dataclasses.field(
        default=None,
        metadata={"help": "Folder on a local NVMe disk for presets that offload to NVMe."},
    )
    gen_eval_file: list[str] | None = dataclasses.field(
        default=None,
        metadata={"help": "JSONL files of prompts with references (messages, prompt/completion or prompt/reference); "
                  "vLLM answers them during training. The file name is the task name."},
    )  # fmt: skip
    gen_eval_metrics: list[str] | None = dataclasses.field(
        default=None,
        metadata={"help": "Metrics for the answers: exact_match (default), normalized_match, contains, regex, "
                  "json_equal, number_match, rouge_l, bleu, chrf, code_tests, judge:URL?model=NAME, or your own "
                  "package.module:function or file.py:function."},
    )  # fmt: skip
    gen_eval_steps: int | None = dataclasses.field(
        default=None,
        metadata={"help": "Evaluate by generation every so many optimizer steps. Default: whenever the Trainer "
                  "evaluates, and always once at the end."},
    )  # fmt: skip
    gen_eval_on_start: bool = dataclasses.field(
        default=True,
        metadata={"help": "Evaluate by generation before the first step, for the score of the untrained model."},
    )
    gen_eval_max_new_tokens: int = dataclasses.field(
        default=256,
        metadata={"help": "Longest answer in tokens."},
    )
    gen_eval_limit: int | None = dataclasses.field(
        default=None,
        metadata={"help": "Use only the first so many prompts of each file."},
    )
    gen_eval_temperature: float = dataclasses.field(
        default=0.0,
        metadata={"help": "Sampling temperature; 0 is greedy and repeatable."},
    )
    gen_eval_timeout: float = dataclasses.field(
        default=900.0,
        metadata={
            "help": "Seconds one evaluation may take, server start included, before it is skipped with a warning."
        },
    )
    gen_eval_samples: int = dataclasses.field(
        default=1,
        metadata={"help": "Answers drawn for each prompt, with fixed seeds; above 1 the temperature must be above 0. "
                  "Scores are means over them, and pass_at_N is logged for metrics of right and wrong."},
    )  # fmt: skip
    gen_eval_lm_eval: list[str] | None = dataclasses.field(
        default=None,
        metadata={"help": "Tasks of lm-evaluation-harness to run against the same engine, by name or as a .yaml file, "
                  "e.g. gsm8k,arc_easy; needs hf-dsvllm[lm-eval]."},
    )  # fmt: skip
    gen_eval_expose: int | None = dataclasses.field(
        default=None,
        metadata={"help": "Port on 127.0.0.1 (0: any free one) where an OpenAI client can ask the model in training, "
                  "by the name training."},
    )  # fmt: skip
    gen_eval_placement: str = dataclasses.field(
        default="auto",
        metadata={"help": "Where vLLM runs: spare (GPUs the trainer does not use), shared (the main process's GPU), "
                  "cpu, remote (--gen_eval_server), or auto: the first of remote, spare and shared that there is."},
    )  # fmt: skip
    gen_eval_late: bool | None = dataclasses.field(
        default=None,
        metadata={"help": "Train on while vLLM answers; scores arrive some steps later and are logged under their own "
                  "step. Default: where vLLM has a GPU of its own or is remote, unless --save_strategy best waits for "
                  "the score."},
    )  # fmt: skip
    gen_eval_server: str | None = dataclasses.field(
        default=None,
        metadata={"help": "Address of a vLLM server that already runs, e.g. http://node7:8000, for placement remote. "
                  "Its key comes from the environment variable HF_DSVLLM_API_KEY."},
    )  # fmt: skip
    gen_eval_tensor_parallel: int | None = dataclasses.field(
        default=None,
        metadata={"help": "GPUs one vLLM engine spreads over. Default: as many as the model's 16-bit weights need."},
    )
    gen_eval_data_parallel: int | None = dataclasses.field(
        default=None,
        metadata={"help": "Copies of the vLLM engine, each on gen_eval_tensor_parallel GPUs, that share the prompts. "
                  "Default: as many as the GPUs hold that the trainer does not use, else one."},
    )  # fmt: skip
    gen_eval_weights: str = dataclasses.field(
        default="auto",
        metadata={"help": "How weights reach vLLM: disk (a snapshot it reads; works everywhere), stream (GPU to GPU: "
                  "by CUDA IPC on a shared GPU, where vLLM then sleeps between evaluations, by NCCL to a spare one; "
                  "disk if that fails) or auto: stream where both are on GPUs of this host, but adapters by disk to a "
                  "spare GPU."},
    )  # fmt: skip
    vllm_python: str | None = dataclasses.field(
        default=None,
        metadata={"help": "Python interpreter of another environment that has vLLM. Default: this one."},
    )
    vllm_args: str | None = dataclasses.field(
        default=None,
        metadata={"help": "More arguments for the vLLM server, as one quoted string."},
    )
    export_to: str | None = dataclasses.field(
        default=None,
        metadata={"help": "Folder for the merged and verified model at the end of training. Default: "
                  "OUTPUT_DIR/export; 'none' exports nothing."},
    )  # fmt: skip


def asks_for_answers(args: Any) -> bool:
    """Whether anything is to be evaluated by generation."""
    return bool(args.gen_eval_file or args.gen_eval_lm_eval)


def added_fields() -> tuple[str, ...]:
    """Names of the added arguments, in order."""
    return tuple(field.name for field in dataclasses.fields(PresetFields))


def steers(args: Any) -> bool:
    """Whether a generation score decides which checkpoint is best."""
    return metric_key(args).startswith("eval_gen_")


def trusts_remote_code(args: Any, model_args: Any) -> bool:
    """Whether the model's own Python code may run: `trust_remote_code` of TRL's trainer arguments, or of the model's.

    TRL 1.16 has it in SFTConfig and the like; earlier versions had it in ModelConfig, where one set by hand counts too.
    """
    return bool(getattr(args, "trust_remote_code", False) or getattr(model_args, "trust_remote_code", False))


def metric_key(args: Any) -> str:
    """`metric_for_best_model` as it is logged, with the Trainer's prefix."""
    wanted = args.metric_for_best_model or ""
    return wanted if wanted.startswith("eval_") else f"eval_{wanted}"
