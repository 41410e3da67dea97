"""A full model's tensors → files of safetensors, named as transformers names them in a checkpoint.

Never whole in host memory: each bucket of parameters goes to its place in the files while it is there.  Only where
transformers changes more than names on the way to a checkpoint (it splits fused experts), the whole model is put
together on the CPU first.
"""

from __future__ import annotations

import dataclasses
import json
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hf_dsvllm.errors import ExportError
from hf_dsvllm.files import write_json
from hf_dsvllm.live.sources import Source, conversions
from hf_dsvllm.precision import Precision, held_in_fp32
from hf_dsvllm.tensors.shard_file import CODES
from hf_dsvllm.tensors.shard_writer import ShardWriter
from hf_dsvllm.tensors.weights import SINGLE, TensorPlan

__all__ = [
    "ModelState",
    "changes_names_alone",
    "let_go",
    "refuse_empty",
    "stream_to_files",
    "write_beside_weights",
    "write_full",
    "written_names",
]

# Writes to one file wait for each other, so a bucket of 1 GiB should go to a few; a folder has _MANY_FILES at most.
_SHARD_BYTES = 256 << 20
_MANY_FILES = 256


def let_go(problem: BaseException | None) -> None:
    """An error keeps the variables of its functions, here those with the bucket: the next one needs that memory."""
    while problem is not None:
        traceback.clear_frames(problem.__traceback__)
        problem = problem.__cause__ or problem.__context__


def write_full(model: Any, buckets: Iterable[list[Source]], folder: Path, dtype: torch.dtype, tokenizer: Any) -> None:
    """Everything that loads again as `model`, its floating-point tensors in `dtype`, from its parameters in buckets."""
    tensors = ModelState.of(model, dtype)
    written = written_names(model, tensors, folder)
    if written is None:
        _save_whole(model, tensors, buckets, folder)
    else:
        stream_to_files(tensors, written, buckets, folder)
    write_beside_weights(folder, dtype, tokenizer)


def write_beside_weights(folder: Path, dtype: torch.dtype, tokenizer: Any) -> None:
    """The live model's dtype is the trainer's; the files hold `dtype`."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    write_json(folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch."), "use_cache": True})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """What a model's state consists of: `source` is the name a tied parameter is gathered by, for each of its names.

    `parameters` has each once, sharded or whole; persistent `buffers` are whole, and written as they are.
    """

    source: dict[str, str]
    parameters: dict[str, torch.nn.Parameter]
    buffers: dict[str, torch.Tensor]
    precision: Precision

    @classmethod
    def of(cls, model: Any, dtype: torch.dtype) -> ModelState:
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


def written_names(model: Any, tensors: ModelState, folder: Path) -> dict[str, list[str]] | None:
    """What `save_pretrained` calls each tensor, [] if it drops it; None where it does more than to give it a name.

    It is asked by saving numbers in the place of tensors: ties, ignored and renamed keys are its own affair, and
    `folder` has all its other files afterwards.
    """
    if not changes_names_alone(model, tensors):
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


def changes_names_alone(model: Any, tensors: ModelState) -> bool:
    """Whether what `save_pretrained` writes are the model's tensors as they are, whatever it calls them."""
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightRenaming

    own = getattr(getattr(model, "save_pretrained", None), "__func__", None) is PreTrainedModel.save_pretrained
    if not own or getattr(model, "hf_quantizer", None) is not None:
        return False
    if not all(isinstance(step, WeightRenaming) for step in conversions(model)):
        return False
    if any(type(parameter.data) is not torch.Tensor for parameter in tensors.parameters.values()):
        return False  # a subclass: distributed, quantised
    return all(tensors.dtype(name) in CODES for name in tensors.names)


def stream_to_files(
    tensors: ModelState,
    written: Mapping[str, list[str]],
    buckets: Iterable[list[Source]],
    folder: Path,
    *,
    workers: int | None = None,
    stream: torch.cuda.Stream | None = None,
) -> None:
    """Each bucket to its place in the files while it is there; `workers` and `stream` as ShardWriter takes them."""
    plan = [
        TensorPlan(name=key, shape=tensors.shape(name), dtype=tensors.dtype(name))
        for name in tensors.names
        for key in written[name]
    ]
    total = sum(planned.size_bytes for planned in plan)
    shard_bytes = max(_SHARD_BYTES, -(-total // _MANY_FILES))
    how: dict[str, Any] = {"workers": workers, "stream": stream, "remedy": "free some space on its disk"}
    with ShardWriter(folder, plan, max_shard_size_bytes=shard_bytes, **how) as writer:
        for batch in _with_buffers(tensors, buckets):
            writer.write({key: tensor for name, tensor in batch.items() for key in written[name]})


def _save_whole(model: Any, tensors: ModelState, buckets: Iterable[list[Source]], folder: Path) -> None:
    """By transformers alone, which wants all tensors at once."""
    state: dict[str, torch.Tensor] = {}
    for batch in _with_buffers(tensors, buckets):
        state |= {name: tensor.to("cpu", copy=True).to(tensors.dtype(name)) for name, tensor in batch.items()}
    whole = {name: state[source] for name, source in tensors.source.items()}
    model.save_pretrained(folder, state_dict=whole, max_shard_size="5GB")


def _with_buffers(tensors: ModelState, buckets: Iterable[list[Source]]) -> Iterator[dict[str, torch.Tensor]]:
    """All tensors by their names, a bucket at a time, each of them seen to have something in it.

    A batch is emptied before the next bucket is gathered: who kept its tensors would keep their memory.
    """
    for bucket in buckets:
        batch = {part.name: part.make() for part in bucket}
        refuse_empty(batch)
        yield batch
        batch.clear()
    refuse_empty(tensors.buffers)
    yield tensors.buffers


def refuse_empty(tensors: Mapping[str, torch.Tensor]) -> None:
    """ExportError if a tensor has nothing in it: a shard that was not gathered."""
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    if empty:
        raise ExportError(f"{len(empty)} tensors are empty after gathering: {empty[:3]}")
