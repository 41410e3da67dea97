"""The jobs of evaluation.py: their command lines, and what is read from their folders afterwards."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cells import HERE, last_error, read_json
from main_job import MAKE_EXTRACTION, free_port

SETS = ("one", "four", "learn")
OURS = ("--no_evaluation", "--dummy_engine")  # in `Job.flags`, not flags of the recipe
# 76 GiB of weights, fp32 master weights and gradients; activations, vLLM asleep and two CUDA contexts.
ALONE_8B_GIB = 90


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """`every`: steps between evaluations, `evaluations`: how many after the first; 0 as the options say.

    `needs_s`: with less time left the next call tries it.  `cache`: its folder of compiled code; `cold` empties it.
    `like`: the job that is the same without evaluation.  `after`: the job that must have ended before.  `gpu_gib`: what
    it takes of a GPU, by the planner's formulas, where a GPU of 80 GB may be too small.
    """

    name: str
    kind: str  # write, train, ask, learn
    gpus: int
    shape: str
    flags: tuple[str, ...] = ()
    way: str = ""
    trainers: int = 1
    limit_s: float = 240.0
    needs_s: float = 150.0  # 24 steps of 8B, 4 evaluations and two starts took 112 to 155 s
    gpu_gib: float = 0.0
    cache: str = "shared"
    cold: bool = False
    like: str | None = None
    after: str | None = None
    every: int = 0
    evaluations: int = 0


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """Those of the sets asked for, in the order they are tried: long ones first where several run at a time."""
    learn = [Job(name="learn", kind="learn", gpus=1, shape="", limit_s=540, needs_s=240)]
    of_set = {"one": one_gpu(), "four": four_gpus(), "learn": learn}
    found = [job for name in options.sets for job in of_set[name]]
    if options.device == "cpu":
        small = {"gpus": 1, "needs_s": 1, "limit_s": 420, "every": 0, "evaluations": 0}
        found = [dataclasses.replace(job, shape=job.shape and "tiny", **small) for job in found]
    return [job for job in found if not options.only or job.name in options.only]


def one_gpu() -> list[Job]:
    """Lines 2, 4 and 5: vLLM on the trainer's GPU; ways to answer; starts."""

    def ask(name: str, way: str, *flags: str, needs_s: float = 140, **more: Any) -> Job:
        more = {"cache": name, "cold": True, "limit_s": 300} | more
        return Job(name=name, kind="ask", gpus=1, shape="8b", way=way, flags=flags, needs_s=needs_s, **more)

    # Adam beside vLLM needs 18 bytes a parameter on one GPU, 147 GB for 8B; plain SGD has no states.
    full = ("--ds_preset", "zero2", "--optim", "sgd", "--learning_rate", "1.0")
    lora, stream = ("--learning_rate", "1e-3"), ("--gen_eval_weights", "stream")
    eager = {"cache": "start-eager"}
    compiled = {"cache": "start-compiled", "needs_s": 140}
    return [
        Job(name="full", kind="train", gpus=1, shape="8b", flags=(*full, *stream), gpu_gib=ALONE_8B_GIB),
        Job(name="lora", kind="train", gpus=1, shape="8b", flags=("--ds_preset", "lora", *lora, *stream)),
        Job(name="qlora", kind="train", gpus=1, shape="8b", flags=("--ds_preset", "qlora", *lora, *stream)),
        Job(name="lora-files", kind="train", gpus=1, shape="8b", flags=("--ds_preset", "lora", *lora)),
        ask("start-compiled-cold", "engine", "--compiled", **compiled),
        ask("start-compiled-warm", "engine", "--compiled", cold=False, after="start-compiled-cold", **compiled),
        ask("hf", "hf", "--batch", "64", "128", "256", "--most_s", "120", needs_s=210),
        ask("start-eager-cold", "engine", **eager),
        ask("start-eager-warm", "engine", cold=False, after="start-eager-cold", **eager),
        ask("alone-eager", "alone"),
        ask("alone-compiled", "alone", "--compiled"),
        ask("engine-wide", "engine", "--wide"),
        ask("engine-wide-compiled", "engine", "--wide", "--compiled"),
        ask("start-eager-cold-spawn", "engine", "--spawn"),
    ]


def four_gpus() -> list[Job]:
    """Lines 3 and 4: vLLM on a GPU of its own, each run beside the same without evaluation; generate on shards."""
    stream = ("--gen_eval_weights", "stream", "--gen_eval_placement", "spare")
    sgd = ("--optim", "sgd", "--learning_rate", "1.0")
    adam = ("--learning_rate", "1e-4")

    def pair(
        preset: str, shape: str, trainers: int, gpu_gib: float = 0.0, optimizer: tuple[str, ...] = adam
    ) -> tuple[Job, Job]:
        """The run with vLLM, then the same alone: in one call where it can be, for cards differ."""
        flags = ("--ds_preset", preset, *(sgd if trainers == 1 else optimizer))
        name = f"{shape}-{preset}-{trainers}"
        size = {"kind": "train", "shape": shape, "trainers": trainers, "gpu_gib": gpu_gib}
        # So far apart that vLLM is there when the first of them comes: 8B took 52 to 72 s from the start, training 57 s
        # to its first step, at 1.1 to 1.9 s a step.  Two times 40 steps were too many for 218 s on H100s.
        size |= {"evaluations": 2, "every": 30 if shape == "8b" else 25}
        times = {"needs_s": 210, "limit_s": 300} if shape != "8b" else {"needs_s": 180, "limit_s": 260}
        with_it = Job(name=f"{name}+1", gpus=trainers + 1, flags=(*flags, *stream), like=name, **times, **size)
        times |= {"needs_s": times["needs_s"] - 50}
        return with_it, Job(name=name, gpus=trainers, flags=(*flags, "--no_evaluation"), **times, **size)

    def sharded(stage: int, gpus: int = 3) -> Job:
        """All prompts in one batch of each process."""
        flags = ("--zero", str(stage), "--batch", str(-(-512 // gpus)), "--new_tokens", "48" if stage == 3 else "64")
        how = {"shape": "8b", "way": "sharded", "flags": flags, "needs_s": 90}
        name = f"sharded-zero{stage}" + ("" if gpus == 3 else f"-{gpus}")
        return Job(name=name, kind="ask", gpus=gpus, trainers=gpus, **how)

    shared = "--gen_eval_weights stream --gen_eval_placement shared --gen_eval_tensor_parallel 4"
    wide = f"--ds_preset lora --learning_rate 1e-3 {shared} --gen_eval_on_start false --dummy_engine"
    how = {"kind": "train", "gpus": 4, "trainers": 4, "shape": "32b", "limit_s": 300, "needs_s": 200, "gpu_gib": 110}
    how |= {"every": 5, "evaluations": 2}
    sharded_base = wide.replace("--ds_preset lora", "--ds_preset zero3+lora")  # for GPUs of 80 GB: 61 GiB are 15
    lora = ("--ds_preset", "lora", "--learning_rate", "1e-3", "--gen_eval_weights", "stream", "--gen_eval_placement")
    copies = {"kind": "train", "shape": "8b"}  # two of the engine share the prompts
    in_copies = [
        Job(name="8b-lora-1+2", gpus=3, flags=(*lora, "spare"), **copies),
        Job(
            name="8b-lora-2-dp2", gpus=2, trainers=2, flags=(*lora, "shared", "--gen_eval_data_parallel", "2"), **copies
        ),
    ]
    # Those on three GPUs come after those on four, and beside them those on one.  Adam would take 115 GiB for 14B.
    return [
        *pair("zero2", "8b", 1, ALONE_8B_GIB)[:1],
        *pair("zero3", "8b", 1, ALONE_8B_GIB)[:1],
        *pair("zero2", "8b", 1, ALONE_8B_GIB)[1:],
        *pair("zero3", "8b", 1, ALONE_8B_GIB)[1:],
        in_copies[1],
        *pair("zero3", "8b", 3),
        *pair("zero2", "8b", 3),
        pair("zero3", "14b", 3, 90)[0],
        Job(name="32b-lora-4-tp4", flags=tuple(wide.split()), **how),
        Job(
            name="32b-lora-2-tp2",
            flags=tuple(wide.replace("parallel 4", "parallel 2").split()),
            **how | {"gpus": 2, "trainers": 2},
        ),
        Job(name="32b-zero3+lora-4-tp4", flags=tuple(sharded_base.split()), **how | {"gpu_gib": 60}),
        sharded(3),
        sharded(2),
        sharded(2, 2),
        sharded(3, 2),
        in_copies[0],
        *pair("zero2", "8b", 2, 95),
        pair("zero2", "14b", 3, 90, sgd)[0],
        pair("zero3", "14b", 3, 90)[1],
        pair("zero2", "14b", 3, 90, sgd)[1],
    ]


# -- command lines -----------------------------------------------------------------------------------------------------


def command(job: Job, options: argparse.Namespace, run: Path) -> list[str]:
    """What `job` starts; its results are in `run`."""
    if job.kind == "learn":
        return learn_command(options, run)
    if job.kind == "write":
        return [sys.executable, str(HERE / "standin.py"), "--shape", job.shape]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(job.trainers)]
    launcher += ["--master_port", str(free_port())]
    if job.kind == "ask":
        small = ["--prompts", "6", "--new_tokens", "4"] if options.device == "cpu" else []
        line = [str(HERE / "generation.py"), job.way, *job.flags, *small, "--shape", job.shape]
        line += ["--work", str(options.fast), "--out", str(run), "--device", options.device]
        given = options.vllm_args if job.way in ("engine", "alone") else ""
        line += [f"--vllm_args={given}"] if given else []
        return [*(launcher if job.way == "sharded" else [sys.executable]), *line]
    return [*launcher, str(HERE / "watched.py"), *train_flags(job, options, run)]


def train_flags(job: Job, options: argparse.Namespace, run: Path) -> list[str]:
    """Flags of recipes/sft.py; the two words of ours in `job.flags` are replaced."""
    data = options.work / f"data-{job.shape}"
    flags = [flag for flag in job.flags if flag not in OURS]
    every, steps = job.every or options.every, steps_of(job, options)
    flags += ["--model_name_or_path", str(options.fast / f"model-{job.shape}"), "--output_dir", str(run)]
    flags += ["--train_file", str(data / "train.jsonl"), "--max_steps", str(steps), "--max_length", str(options.length)]
    flags += ["--per_device_train_batch_size", str(options.micro_batch_size), "--lr_scheduler_type", "constant"]
    flags += ["--logging_steps", str(every), "--save_strategy", "no", "--report_to", "none"]
    flags += ["--seed", "0", "--disable_tqdm", "true", "--export_to", "none"]
    if "--no_evaluation" in job.flags:
        return flags
    vllm = options.vllm_args + (" --load-format dummy" if "--dummy_engine" in job.flags else "")
    # The first file is one prompt whose answer is one token: the seconds until the first token of the evaluation.
    flags += ["--gen_eval_file", str(data / "first.jsonl"), str(data / "prompts.jsonl")]
    flags += ["--gen_eval_steps", str(every), "--gen_eval_max_new_tokens", str(options.new_tokens)]
    flags += [f"--vllm_args={vllm.strip()}"] if vllm.strip() else []
    if options.device == "cpu":  # through files, whatever was asked: the rest of the way is the same
        for word in ("--gen_eval_weights", "--gen_eval_placement", "--gen_eval_tensor_parallel"):
            if word in flags:
                del flags[flags.index(word) : flags.index(word) + 2]
    return flags


def steps_of(job: Job, options: argparse.Namespace) -> int:
    """Optimizer steps of a training job."""
    return int((job.evaluations or options.evaluations) * (job.every or options.every))


def learn_command(options: argparse.Namespace, run: Path) -> list[str]:
    """8,000 samples of the extraction task, an evaluation every 100 steps, one checkpoint at the end, the page."""
    data, samples, tests = options.work / "extraction", str(options.samples), str(min(96, options.samples))
    make = [str(MAKE_EXTRACTION), "--out", str(data), "--train", samples, "--test", tests, "--difficulty", "2"]
    every = str(max(2, options.samples // 80))
    train = [str(HERE.parent / "recipes" / "sft.py"), "--ds_preset", options.preset, "--model_name_or_path"]
    train += [str(options.model), "--train_file", str(data / "train.jsonl"), "--test_file", str(data / "test.jsonl")]
    train += ["--output_dir", str(run), "--num_train_epochs", "1", "--per_device_train_batch_size", "8"]
    train += [
        "--learning_rate",
        "1e-4",
        "--lr_scheduler_type",
        "cosine",
        "--max_length",
        "512",
        "--logging_steps",
        "10",
    ]
    # Both at the end of the epoch: the loss is in the report because there is a checkpoint.
    train += ["--eval_strategy", "epoch", "--save_strategy", "epoch", "--gradient_checkpointing", "false"]
    train += ["--gen_eval_file", str(data / "test.jsonl"), "--gen_eval_metrics", "json_equal", "exact_match"]
    train += ["--gen_eval_steps", every, "--gen_eval_max_new_tokens", "112", "--report_to", "none"]
    train += ["--metric_for_best_model", "eval_gen_test_json_equal", "--load_best_model_at_end", "true"]
    train += ["--disable_tqdm", "true", "--seed", "0"]
    train += [f"--vllm_args={options.vllm_args}"] if options.vllm_args else []
    report = ["-m", "hf_dsvllm", "report", str(run)]
    lines = [shlex.join([sys.executable, *words]) for words in (make, train, report)]
    return ["bash", "-c", " && ".join(lines)]


# -- what a job left ---------------------------------------------------------------------------------------------------


def read_job(job: Job, run: Path) -> dict[str, Any]:
    """Whatever it managed to write."""
    if job.kind == "ask":
        files = sorted(run.glob("generation-*.json"))
        return read_json(files[0]) if files else {}
    scores = run / "evals" / "scores.jsonl"
    lines = scores.read_text(encoding="utf-8").splitlines() if scores.exists() else []
    evaluations = [json.loads(line) for line in lines]
    for one in evaluations:
        one.pop("comparisons", None)
    calls = json.loads((run / "calls.json").read_text(encoding="utf-8")) if (run / "calls.json").exists() else []
    for before, one in zip([None, *evaluations], evaluations, strict=False):
        since = before["answered_at"] if before else 0.0
        one["calls"] = summed([call for call in calls if since < call[1] < one["asked_at"]])
    return {"evaluations": evaluations, "measured": read_json(run / "measured.json")}


def status_of(job: Job, row: dict[str, Any], failure: str | None, log: str) -> str:
    """ "ok", or what is missing and why."""
    if failure is not None:
        return f"{failure}: {last_error(log)}"
    if not row.get("tokens_per_second" if job.kind == "ask" else "measured"):
        return f"exit code 0, and no result: {last_error(log)}"
    if job.kind != "ask" and "--no_evaluation" not in job.flags and len(row["evaluations"]) < 2:
        return f"exit code 0, and evaluations failed: {last_error(log)}"
    return "ok"


def summed(calls: Sequence[Sequence[Any]]) -> dict[str, list[float]]:
    """Number and seconds by name, of what came between two evaluations' questions; sleep was the earlier one's."""
    found: dict[str, list[float]] = {}
    for what, _, seconds in calls:
        if "/sleep" not in what and "/health" not in what:
            count, total = found.get(what, [0, 0.0])
            found[what] = [count + 1, round(total + seconds, 4)]
    return found
