"""Whether presets and speed features learn what plain TRL learns: losses of one short SFT, several seeds.

    python recipes/data/make_extraction.py --out DATA
    python benchmarks/parity.py --model FOLDER --data DATA/train.jsonl --out runs/parity --steps 200 --gpus 1

For each preset: the mean loss of the last quarter of the steps less that of plain TRL with the same seed, mean over
seeds, against the spread between plain TRL's own seeds (largest less smallest).  Seeds change the order of the data and
the adapters.  A preset passes if the difference is within the spread.  Results stay in OUT/cells.json and are not
measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "speed"), str(HERE / "planner"), str(HERE)]

from arms import Arm, arms  # noqa: E402
from train_speed import SpeedMeasurement  # noqa: E402

FULL = "plain:z2; zero2 no; zero2 no -all; zero3 no; none no"
LORA = "plain:lora; lora no; lora no -all; lora no +bf16_adapters; lora_zero2 no"
QLORA = "plain:qlora; qlora no; plain:qlora_z2; qlora no +fp32_adapters"
MORE = (
    "zero2 no -all +fused; zero2 no -all +padding_free; lora no -all +fused_adapters; zero2 sel; zero1 no; "
    "zero2_offload no; zero3_offload_optimizer no; qlora_zero2 no"  # after the others
)


def grid(seeds: int, world: int, length: int, micro: int, chosen: str | None = None) -> tuple[Arm, ...]:
    lines = [
        f"seed{seed} model {world} {length} b{micro} | {arm}"
        for some in ([chosen] if chosen else [f"{FULL}; {LORA}; {QLORA}", MORE])
        for seed in range(1, seeds + 1)
        for arm in map(str.strip, some.split(";"))
        if arm
        if world == 1 or not arm.startswith("none")
    ]
    return arms("\n".join(lines))


class Parity(SpeedMeasurement):
    """The same lanes; the arms train a real model."""

    script = HERE / "speed" / "parity_lane.py"

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.grid = grid(options.seeds, options.world, options.length, options.micro_batch_size, options.arms)

    def environment(self, **more: str) -> dict[str, str]:
        model, data = str(self.options.model.absolute()), str(self.options.data.absolute())
        return super().environment(PARITY_MODEL=model, PARITY_DATA=data, **more)

    def calibrate(self) -> None:
        """Speed is not compared here."""

    def report(self) -> None:
        """README.md after every arm."""
        (self.out / "README.md").write_text(page(verdicts(self.results), self.options), encoding="utf-8")


def verdicts(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each preset with its words: mean final loss, difference to plain TRL by seeds, spread of plain TRL's own.

    Plain TRL with the same kind of adapter, under DeepSpeed as the preset is where there is such a run.
    """
    finals: dict[tuple[str, str, str | None], dict[str, float]] = {}
    for record in results.values():
        if record["status"] != "ok":
            continue
        cell, losses = record["cell"], record["ranks"][0]["losses"]
        adapter = next((name for name in ("qlora", "lora") if name in cell["preset"]), None)
        key = (cell["kind"], " ".join((cell["preset"], *cell["words"])), adapter)
        finals.setdefault(key, {})[cell["case"]] = statistics.fmean(losses[-max(1, len(losses) // 4) :])
    rows = []
    for (kind, title, adapter), found in finals.items():
        beside = {t: f for (k, t, a), f in finals.items() if k == "plain" and a == adapter}
        sharded = [t for t in beside if ("z2" in t) == ("zero" in title)] if kind != "plain" else [title]
        plain = beside[next(iter(sharded or beside))] if beside else {}
        shared = sorted(set(found) & set(plain))
        if not shared:
            continue
        difference = statistics.fmean(found[seed] - plain[seed] for seed in shared)
        spread = max(plain.values()) - min(plain.values())
        rows.append(
            {
                "title": f"plain TRL {title}" if kind == "plain" else title,
                "seeds": len(shared),
                "loss": statistics.fmean(found.values()),
                "difference": difference,
                "spread": spread,
                "within": abs(difference) <= spread,
            }
        )
    return rows


def page(rows: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> str:
    how = (
        f"{options.steps} steps of {options.micro_batch_size * options.world} sequences, {options.device}. Final loss: "
        "the mean of the last quarter of the steps, over the seeds. Written by `python benchmarks/parity.py`."
    )
    heading = "| run | seeds | final loss | less plain TRL | spread of plain TRL's seeds | within |"
    lines = ["# Loss parity", "", how, "", heading, "|" + " --- |" * 6]
    for row in rows:
        lines.append(
            f"| {row['title']} | {row['seeds']} | {row['loss']:.5f} | {row['difference']:+.5f} | {row['spread']:.5f} | "
            f"{'yes' if row['within'] else 'no'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a small real model")
    parser.add_argument("--data", type=Path, required=True, help="JSONL to train on")
    parser.add_argument("--out", type=Path, required=True, help="folder of results; kept between calls")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--gpus", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, help="of each run; default: the CPUs shared out")
    parser.add_argument("--world", type=int, default=1, help="processes of one run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--micro_batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--budget_s", type=float, default=560.0)
    parser.add_argument("--cell_s", type=float, default=180.0, help="longest time of one run")
    parser.add_argument("--arms", help='instead of all, as in speed/arms.py: "plain:z2; zero2 no; plain:lora; lora no"')
    parser.add_argument("--only", nargs="*", help="parts of names that hold a dash, or seed1")
    parser.add_argument("--copy_to", type=Path, help="folder that results are copied to after every run")
    options = parser.parse_args()
    if options.arms and not any(arm.strip().startswith("plain:") for arm in options.arms.split(";")):
        parser.error("--arms needs one of plain TRL to compare with, such as plain:z2 or plain:lora")
    options.least_s, options.grow_gib, options.again = 15.0, 0, False
    options.threads = options.threads or max(1, (os.cpu_count() or 1) // options.gpus)
    options.out.mkdir(parents=True, exist_ok=True)
    measurement = Parity(options)
    try:
        measurement.run()
    finally:
        measurement.save()
        for lane in measurement.lanes:
            lane.process.kill()
    print(json.dumps(verdicts(measurement.results), indent=1))


if __name__ == "__main__":
    main()
