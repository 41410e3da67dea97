"""Training speed side by side in one run: plain TRL, our presets with each feature alone, and what the machine can do.

    python benchmarks/train_speed.py --out runs/speed --gpus 1 --only lora8 full4 --budget_s 540
    python benchmarks/train_speed.py --out runs/speed --report        # tables and plot from what is there
    python benchmarks/train_speed.py --out runs/speed --device cpu --gpus 2 --budget_s 600   # tries it, tiny shapes

One lane per GPU imports the libraries once and forks a process for each arm of `speed/arms.py`; an arm of k GPUs takes
k lanes, and arms of one GPU run side by side.  Every arm is written to OUT/cells.json when it ends, and is not run
again, so a measurement that was cut off goes on where it stopped.  The limits (products, attention by backend, copies,
host link, collectives) are measured first, in OUT/rates.json.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "speed"), str(HERE / "planner")]

from arms import Arm, arms, dry_arms, shadowed  # noqa: E402
from measure import Measurement, run_to_the_end  # noqa: E402
from options import options_parser, parse  # noqa: E402
from rows import read  # noqa: E402
from tables import write_report  # noqa: E402


class SpeedMeasurement(Measurement):
    """The planner benchmark's orchestrator on this grid."""

    script = HERE / "speed" / "lane.py"

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.grid = dry_arms() if self.device == "cpu" else arms()

    def run(self) -> None:
        if self.pending():
            super().run()
        else:
            print("every arm asked for is there already", flush=True)

    def pending(self) -> list[Any]:
        wanted = [arm for arm in self.grid if arm.world <= self.options.gpus and chosen(arm, self.options.only)]
        again = {"timeout", "failed"} if self.options.again else set()
        return [arm for arm in wanted if self.results.get(arm.name, {}).get("status") in (None, *again)]

    def next_cell(self, waiting: list[Any]) -> Any:
        """As ever, but nothing longer than what did not fit."""
        for arm in [arm for arm in waiting if shadowed(arm, self.results, self.grid)]:
            waiting.remove(arm)
        found = super().next_cell(waiting)
        if found is None and waiting and not self.jobs and self.builder is not None and self.left() > 0:
            # only arms that offload are left, and DeepSpeed's CPUAdam is still being built
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.builder.wait(timeout=self.left())
            found = super().next_cell(waiting)
        return found

    def start(self, name: str, kind: str, lanes: list[Any], limit_s: float, cell: Any = None) -> Any:
        return super().start(name, kind, lanes, cell.limit_s(limit_s) if cell is not None else limit_s, cell)

    def calibrate(self) -> None:
        super().calibrate()
        if "attention" not in self.rates:
            self.finish([self.start("attention", "attention", self.lanes[:1], 60.0)])

    def build_cpu_adam(self) -> Any:
        """Only where an arm of this call offloads."""
        return super().build_cpu_adam() if any(arm.offloads for arm in self.pending()) else None

    def record(self, job: Any) -> None:
        if job.kind == "attention":
            found = [read(file) for file in job.files if file.exists()]
            self.rates["attention"] = found[0] if found else {"failed": job.killed or "see the log"}
            self.save()
            return
        super().record(job)

    def save(self) -> None:
        super().save()
        if self.results:
            self.report()
            if self.options.copy_to:
                for name in ("README.md", "speed.png"):
                    if (self.out / name).exists():
                        (self.options.copy_to / name).write_bytes((self.out / name).read_bytes())

    def report(self) -> None:
        """The pages, after every arm."""
        write_report(self.out)


def chosen(arm: Arm, words: list[str] | None) -> bool:
    """Whether `--only` names the arm's case, or a part of its name."""
    return not words or arm.case in words or any(word in arm.name for word in words if "-" in word)


def main() -> None:
    only = "cases (lora8), or parts of names that hold a dash"
    parser = options_parser(__doc__.splitlines()[0], gpus=1, cell_s=100.0, steps=7, only=only)
    parser.add_argument("--again", action="store_true", help="run arms that failed or took too long once more")
    parser.add_argument("--list", action="store_true", help="print the arms and end")
    parser.add_argument("--report", action="store_true", help="write the tables and the plot, and end")
    options = parse(parser)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.list:
        for arm in dry_arms() if options.device == "cpu" else arms():
            if chosen(arm, options.only):
                print(f"{arm.case:8} {arm.shape:5} {arm.world} GPU  {arm.length:6} tokens  {arm.title}")
        return
    if options.report:
        write_report(options.out)
        return
    run_to_the_end(SpeedMeasurement(options))


if __name__ == "__main__":
    main()
