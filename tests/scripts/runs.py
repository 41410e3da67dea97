"""The pytest side of `train_runs.py`: write the tiny model and the list of runs, launch, read the results."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.conftest import torchrun
from tests.tiny import write_tiny_model

SCRIPT = Path(__file__).with_name("train_runs.py")
TIMEOUT_S = 540.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """What a launch left behind: `results` by run name, the tiny `model`, and the folder `out` with all run folders."""

    results: Mapping[str, Mapping[str, Any]]
    model: Path
    out: Path

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        result = self.results[name]
        assert "error" not in result, f"{name}: {result['traceback']}"
        return result

    def losses(self, name: str) -> list[float]:
        """The loss of every step in order."""
        return list(self[name]["losses"].values())

    def folder(self, name: str) -> Path:
        """The output_dir of a run."""
        return self.out / name

    def weights(self, name: str) -> dict[str, Any]:
        """The gathered parameters of a run that had `weights`."""
        return torch_load(self.out / f"{name}.weights.pt")

    def streamed(self, name: str) -> list[dict[str, Any]]:
        """The tensors each rank streamed, of a run that had `stream`."""
        return [torch_load(self.out / f"{name}.stream.{rank}.pt") for rank in (0, 1)]

    def sends(self, name: str) -> list[dict[str, Any]]:
        """What each send came to on each rank, of a run that had `sends`."""
        return self._of_ranks(name, "sends")

    def published(self, name: str) -> list[dict[str, Any]]:
        """What each try of a snapshot came to on each rank, of a run that had `publishes`."""
        return self._of_ranks(name, "published")

    def _of_ranks(self, name: str, what: str) -> list[dict[str, Any]]:
        files = [self.out / f"{name}.{what}.{rank}.json" for rank in (0, 1)]
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def torch_load(path: Path) -> dict[str, Any]:
    import torch

    state: dict[str, Any] = torch.load(path)
    return state


def write_wide_model(path: Path, layers: int = 1) -> Path:
    """Layers whose half matrices are 2 MiB: DeepSpeed leaves anything below 1 MiB out of NVMe swapping."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    write_tiny_model(path)
    config = LlamaConfig.from_pretrained(path)
    config.update({"hidden_size": 1024, "intermediate_size": 1024, "initializer_range": 0.02})
    config.num_hidden_layers = layers
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def train_all(folder: Path, runs: Sequence[Mapping[str, Any]], *, processes: int = 2, tied: bool = True) -> Runs:
    """Train every one of `runs` (see `train_runs.py`) in one torchrun of `processes`; fails if the launch fails."""
    model = folder / "model"
    if not model.exists():
        write_tiny_model(model, tied=tied)
    spec = folder / "spec.json"
    spec.write_text(json.dumps({"model": str(model), "out": str(folder), "runs": list(runs)}), encoding="utf-8")
    done = torchrun(SCRIPT, nproc=processes, args=[str(spec)], timeout=TIMEOUT_S, env={})
    assert done.returncode == 0, done.stderr[-6000:]
    results = {run["name"]: json.loads((folder / f"{run['name']}.json").read_text(encoding="utf-8")) for run in runs}
    return Runs(results=results, model=model, out=folder)
