"""Live weights → a folder: an adapter as PEFT writes it, or a full model as transformers writes it.

Under ZeRO-3 every parameter is a shard; a plain `save_pretrained` writes empty tensors then.  Here they are gathered,
for adapters only the adapter's tensors.  `publish` is collective: every rank calls it, rank 0 writes.

A full model is never whole in host memory: each bucket of parameters goes to its place in the files while it is there.
Only where transformers changes more than names on the way to a checkpoint (it splits fused experts), the whole model is
put together on the CPU first.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from hf_dsvllm.adapters import vocabulary_was_resized
from hf_dsvllm.console import is_main_process, say
from hf_dsvllm.errors import ExportError
from hf_dsvllm.files import atomic_folder, write_json
from hf_dsvllm.live.sources import Source, conversions, plain_source
from hf_dsvllm.live.stream import gathered
from hf_dsvllm.precision import Precision, held_in_fp32
from hf_dsvllm.ranks import from_main
from hf_dsvllm.tensors.shards import CODES, ShardWriter
from hf_dsvllm.tensors.weights import SINGLE, TensorPlan

__all__ = ["Snapshot", "adapters_act", "point_to_latest", "prune", "publish"]

SNAPSHOTS = "snapshots"
LORA_OUTPUT = re.compile(r"\.lora_(embedding_)?B\.")  # PEFT: zero at the start, so that LoRA changes nothing
# Gathered at once under ZeRO-3: bounds the extra device memory while a full model is published.
_GATHER_BYTES = 1 << 30
# Written at once of parameters that lie here whole: that takes no memory, and more of it keeps the threads busy.
_WRITE_BYTES = 8 << 30
# Writes to one file wait for each other, so that a bucket should go to a few of them; a folder has _MANY_FILES at most.
_SHARD_BYTES = _GATHER_BYTES // 4
_MANY_FILES = 256


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Weights of one optimizer step on disk; `path` exists on every rank's node-local view of the run folder."""

    path: Path
    kind: Literal["adapter", "full"]
    step: int


def adapters_act(model: Any) -> bool:
    """Whether the model has LoRA that changes it already: trained before, or B not zero from the start.

    Under ZeRO-3 by this rank's shards: ask every rank.
    """
    outputs = [p for name, p in model.named_parameters() if LORA_OUTPUT.search(name)]
    held = [getattr(parameter, "ds_tensor", parameter) for parameter in outputs]
    return any(bool(tensor.any()) for tensor in held)


def publish(model: Any, run_dir: Path, *, step: int, dtype: torch.dtype, tokenizer: Any = None) -> Snapshot:
    """Write the weights of `model` (as the Trainer holds it, not the engine) to RUN/snapshots/step-<n>, atomically.

    Full models are written in `dtype`, adapters in the dtype they are trained in; NaN is written like any other value.
    A folder of the same step is replaced.  RUN/snapshots/latest.json points to the newest.

    Raises ExportError or OSError on rank 0 if a gathered tensor is empty or the disk is full, once every rank has done
    its part of the gathering.
    """
    adapter = hasattr(model, "peft_config")
    kind: Literal["adapter", "full"] = "adapter" if adapter else "full"
    target = run_dir / SNAPSHOTS / f"step-{step}"
    if adapter:
        _publish_adapter(model, target)
    else:
        _publish_full(model, target, dtype, tokenizer)
    snapshot = Snapshot(path=target, kind=kind, step=step)
    point_to_latest(run_dir, snapshot, trained_to=step)
    return snapshot


def point_to_latest(run_dir: Path, snapshot: Snapshot, *, trained_to: int) -> None:
    """Write RUN/snapshots/latest.json; rank 0 only.

    `trained_to` is the step training had reached: more than the snapshot's own where earlier weights were the best and
    training has ended with them.
    """
    if is_main_process():
        pointer = {"path": snapshot.path.name, "step": snapshot.step, "kind": snapshot.kind, "trained_to": trained_to}
        write_json(run_dir / SNAPSHOTS / "latest.json", pointer)


def prune(run_dir: Path, keep: Sequence[Path]) -> None:
    """Delete the snapshots that are neither in `keep` nor pointed to by latest.json or best.json; rank 0 only.

    Never raises.  Where a pointer cannot be read, nothing is deleted: it may be the best one's.
    """
    if not is_main_process():
        return
    folder = run_dir / SNAPSHOTS
    try:
        kept = {path.name for path in keep} | {_pointed_to(folder / name) for name in ("latest.json", "best.json")}
        for old in folder.glob("step-*"):
            if old.name not in kept:
                shutil.rmtree(old, ignore_errors=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        say(f"no older snapshot is deleted from {folder} this time: {type(error).__name__}: {error}")


def _pointed_to(pointer: Path) -> str | None:
    try:
        return str(json.loads(pointer.read_text(encoding="utf-8"))["path"])
    except FileNotFoundError:
        return None


def _refuse_empty(tensors: Mapping[str, torch.Tensor]) -> None:
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    if empty:
        raise ExportError(f"{len(empty)} tensors are empty after gathering: {empty[:3]}")


# -- adapters -------------------------------------------------------------------------------------------------------


def _publish_adapter(model: Any, target: Path) -> None:
    state = _adapter_state(model)
    if is_main_process():
        _refuse_empty(state)
        with atomic_folder(target, replace=True) as folder:
            _write_adapter(model, state, folder)


def _adapter_state(model: Any) -> dict[str, torch.Tensor]:
    """The adapter's tensors on the CPU of rank 0, under the names PEFT's own state dict uses; empty on other ranks.

    The names to keep are PEFT's choice: its filter is run on the names alone, before anything is gathered.  Embeddings
    of another vocabulary than the base's belong to the adapter, trained or not: nobody else has their rows.
    """
    from peft import get_peft_model_state_dict

    resized = from_main(vocabulary_was_resized(model) if is_main_process() else False)
    parameters = dict(model.named_parameters(remove_duplicate=not resized))  # a tied output head under both names
    names = {name: torch.tensor(position) for position, name in enumerate(parameters)}
    kept = get_peft_model_state_dict(model, state_dict=names, save_embedding_layers=resized)
    ordered = list(parameters)
    sources = {saved: ordered[int(position)] for saved, position in kept.items()}
    wanted = [plain_source(source, parameters[source]) for source in dict.fromkeys(sources.values())]
    whole = {
        part.name: part.make().to("cpu", copy=True)
        for batch in gathered(wanted, _GATHER_BYTES)
        for part in (batch if is_main_process() else ())  # the other ranks only take part
    }
    return {saved: whole[source] for saved, source in sources.items()} if is_main_process() else {}


def _write_adapter(model: Any, state: dict[str, torch.Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({n: t.contiguous() for n, t in state.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
    config = model.peft_config[model.active_adapter if isinstance(model.active_adapter, str) else "default"]
    inference = config.inference_mode
    config.inference_mode = True
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode = inference


# -- full models ----------------------------------------------------------------------------------------------------


def _publish_full(model: Any, target: Path, dtype: torch.dtype, tokenizer: Any) -> None:
    """Rank 0 writes what is gathered; whatever happens to it, every rank goes through every bucket."""
    parts = [plain_source(name, parameter) for name, parameter in model.named_parameters()]
    sharded = any(hasattr(parameter, "ds_id") for part in parts for parameter in part.parameters)
    buckets = gathered(parts, _GATHER_BYTES if sharded else _WRITE_BYTES)
    problem: Exception | None = None
    if is_main_process():
        try:
            with atomic_folder(target, replace=True) as folder:
                _write_full(model, buckets, folder, dtype, tokenizer)
        except Exception as error:
            problem = error
            _let_go(problem)
    for _ in buckets:  # the rest, or on the other ranks all
        pass
    if problem is not None:
        raise problem


def _let_go(problem: BaseException | None) -> None:
    """An error keeps the variables of its functions, here those with the bucket: the next one needs that memory."""
    while problem is not None:
        traceback.clear_frames(problem.__traceback__)
        problem = problem.__cause__ or problem.__context__


def _write_full(model: Any, buckets: Iterable[list[Source]], folder: Path, dtype: torch.dtype, tokenizer: Any) -> None:
    tensors = _Tensors.of(model, dtype)
    written = _written_names(model, tensors, folder)
    if written is None:
        _save_whole(model, tensors, buckets, folder)
    else:
        _stream_to_files(tensors, written, buckets, folder)
    # The live model's dtype is the trainer's; the files hold `dtype`.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    write_json(folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch."), "use_cache": True})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Tensors:
    """What a model's state consists of: `source` is the name a tied parameter is gathered by, for each of its names.

    `parameters` has each once, sharded or whole; persistent `buffers` are whole, and written as they are.
    """

    source: dict[str, str]
    parameters: dict[str, torch.nn.Parameter]
    buffers: dict[str, torch.Tensor]
    precision: Precision

    @classmethod
    def of(cls, model: Any, dtype: torch.dtype) -> _Tensors:
        parameters = dict(model.named_parameters())
        first = {id(parameter): name for name, parameter in parameters.items()}
        source = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        persistent = set(model.state_dict().keys()) - set(source)
        buffers = {name: buffer.detach() for name, buffer in model.named_buffers() if name in persistent}
        precision = Precision(dtype=dtype, held=held_in_fp32(model))
        return cls(source=source | {name: name for name in buffers}, parameters=parameters, buffers=buffers,
                   precision=precision)  # fmt: skip

    @property
    def names(self) -> list[str]:
        """Of everything there is to write, once."""
        return [*self.parameters, *self.buffers]

    def dtype(self, name: str) -> torch.dtype:
        """Of tensor `name` once it is written."""
        if name in self.buffers:
            return self.buffers[name].dtype
        return self.precision.of(name, self.parameters[name].dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor, of which a shard may be here."""
        tensor = self.buffers[name] if name in self.buffers else self.parameters[name]
        return tuple(getattr(tensor, "ds_shape", tensor.shape))


def _written_names(model: Any, tensors: _Tensors, folder: Path) -> dict[str, list[str]] | None:
    """What `save_pretrained` calls each tensor, [] if it drops it; None where it does more than to give it a name.

    It is asked by saving numbers in the place of tensors: ties, ignored and renamed keys are its own affair, and
    `folder` has all its other files afterwards.
    """
    if not _changes_names_alone(model, tensors):
        return None
    from safetensors.torch import load_file

    names = tensors.names
    numbers = {name: torch.tensor([number], device="cpu") for number, name in enumerate(names)}
    model.save_pretrained(folder, state_dict={name: numbers[source] for name, source in tensors.source.items()})
    file = folder / SINGLE
    found: dict[str, list[str]] = {name: [] for name in names}
    for written, number in load_file(file).items():
        found[names[int(number)]].append(written)
    file.unlink()
    return found


def _changes_names_alone(model: Any, tensors: _Tensors) -> bool:
    """Whether what `save_pretrained` writes are the model's tensors as they are, whatever it calls them."""
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightRenaming

    own = getattr(model.save_pretrained, "__func__", None) is PreTrainedModel.save_pretrained
    if not own or getattr(model, "hf_quantizer", None) is not None:
        return False
    if not all(isinstance(step, WeightRenaming) for step in conversions(model)):
        return False
    if any(type(parameter.data) is not torch.Tensor for parameter in tensors.parameters.values()):
        return False  # a subclass: distributed, quantised
    return all(tensors.dtype(name) in CODES for name in tensors.names)


def _stream_to_files(
    tensors: _Tensors, written: Mapping[str, list[str]], buckets: Iterable[list[Source]], folder: Path
) -> None:
    """Each bucket to its place in the files while it is there."""
    plan = [
        TensorPlan(name=key, shape=tensors.shape(name), dtype=tensors.dtype(name))
        for name in tensors.names
        for key in written[name]
    ]
    total = sum(planned.size_bytes for planned in plan)
    shard_bytes = max(_SHARD_BYTES, -(-total // _MANY_FILES))
    with ShardWriter(folder, plan, max_shard_size_bytes=shard_bytes, remedy="free some space on its disk") as writer:
        for batch in _with_buffers(tensors, buckets):
            writer.write({key: tensor for name, tensor in batch.items() for key in written[name]})


def _save_whole(model: Any, tensors: _Tensors, buckets: Iterable[list[Source]], folder: Path) -> None:
    """By transformers alone, which wants all tensors at once."""
    state: dict[str, torch.Tensor] = {}
    for batch in _with_buffers(tensors, buckets):
        state |= {name: tensor.to("cpu", copy=True).to(tensors.dtype(name)) for name, tensor in batch.items()}
    whole = {name: state[source] for name, source in tensors.source.items()}
    model.save_pretrained(folder, state_dict=whole, max_shard_size="5GB")


def _with_buffers(tensors: _Tensors, buckets: Iterable[list[Source]]) -> Iterator[dict[str, torch.Tensor]]:
    """All tensors by their names, a bucket at a time, each of them seen to have something in it.

    A batch is emptied before the next bucket is gathered: who kept its tensors would keep their memory.
    """
    for bucket in buckets:
        batch = {part.name: part.make() for part in bucket}
        _refuse_empty(batch)
        yield batch
        batch.clear()
    _refuse_empty(tensors.buffers)
    yield tensors.buffers
