"""A DeepSpeed ZeRO checkpoint as named fp32 tensors, read straight from its partitions, one tensor at a time.

Reads what `deepspeed/utils/zero_to_fp32.py` reads (0.19.8; stages 1, 2 and 3) and gives bit for bit the same values,
but neither holds the model nor imports DeepSpeed: the partitions are mapped, and of the tensor in hand the file is
read, once: rounding and hash take each piece from the buffer it was read into.  The pickles in a checkpoint cannot run
code here: classes other than torch's containers are replaced by empty ones.
"""

from __future__ import annotations

import dataclasses
import math
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from xxhash import xxh3_128

from hf_dsvllm.errors import ExportError
from hf_dsvllm.hardware import usable_cpus
from hf_dsvllm.tensors.hashing import hash_files
from hf_dsvllm.tensors.pages import Pages, empty
from hf_dsvllm.tensors.staging import CPU
from hf_dsvllm.tensors.zero_files import check_files, check_models, files_of, hash_header, load, saved_by, step_folder

__all__ = ["ZeroCheckpoint"]

OPTIMIZER = "optimizer_state_dict"
# One thread reads, hashes and rounds so many numbers of a tensor (128 MiB in fp32): an output head of 0.6e9 that one
# thread made took 3.7 of the 8.4 s in which sixteen converted 8B.
PART = 32 << 20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    """A tensor's shape and the pieces of flat fp32 partitions that make it up, in order."""

    shape: tuple[int, ...]
    pieces: tuple[torch.Tensor, ...]

    @property
    def count(self) -> int:
        """Of its numbers."""
        return math.prod(self.shape)

    @property
    def parts(self) -> list[tuple[int, int]]:
        """(first, end) of what one thread reads at a time."""
        return [(begin, min(begin + PART, self.count)) for begin in range(0, self.count, PART)]


class ZeroCheckpoint:
    """The parameters and buffers of a checkpoint folder (with `latest` and `global_step*`), or of a `global_step*`.

    Names are the trained module's; a parameter with several names is there under the first, `aliases` has the others.
    Raises ExportError if files are missing, of several saves or another parallelism, or no ZeRO checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = step_folder(path)
        self._optimizer_files = files_of(self.folder, "*_optim_states.pt")
        self._model_files = files_of(self.folder, "*_model_states.pt")
        self.aliases: Mapping[str, str] = {}
        self._digests: dict[str, str] = {}  # of tensors that were read
        self._readers: ThreadPoolExecutor | None = None
        self._starting = threading.Lock()
        try:
            self._spans = dict(self._whole(self._read()))
            self._pages = Pages([*self._optimizer_files, *self._model_files])
        except ExportError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, pickle.UnpicklingError, RuntimeError) as error:
            raise ExportError(
                f"{self.folder} cannot be read as a ZeRO checkpoint ({type(error).__name__}: {error}): it is damaged, "
                "or made by a DeepSpeed or a parallelism (pipeline, experts) whose files are laid out otherwise."
            ) from error

    @property
    def names(self) -> tuple[str, ...]:
        """All floating point tensors, buffers first."""
        return tuple(self._spans)

    def __contains__(self, name: str) -> bool:
        return name in self._spans

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        return self._span(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """fp32, whatever the module was trained in: these are the optimizer's own weights."""
        self._span(name)
        return torch.float32

    def get(self, name: str, device: torch.device = CPU, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One whole tensor, in fp32 if no `dtype` is given; safe to call from several threads."""
        span = self._span(name)
        out = empty(span.count, dtype or torch.float32)
        known = name in self._digests
        found = self._beside_each_other(
            [partial(self._fill, name, begin, end, out[begin:end], hashed=not known) for begin, end in span.parts]
        )
        if not known:
            self._digests[name] = _joined(found)
        return out.reshape(span.shape).to(device)

    def flat(self, name: str, begin: int, end: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The elements `begin` to `end` of a flattened tensor, and nothing else read."""
        out = empty(end - begin, dtype or torch.float32)
        self._fill(name, begin, end, out, hashed=False)
        return out

    def hashes(self) -> dict[str, str]:
        """BLAKE3 of each file's header (`NAME#header`), and XXH3 of all weights by name, however they are partitioned.

        Those of tensors that were read already are known; others are read now.  Moments are left out, and copies of
        the weights.  XXH3 (128 bits) takes in 38 GB/s on a core and BLAKE3 3.7 (AMD EPYC); it tells every change, and
        is no seal against who wants two checkpoints to look alike.
        """
        lacking = [name for name in self._spans if name not in self._digests]
        parts = [(name, *part) for name in lacking for part in self._spans[name].parts]
        digests = iter(self._beside_each_other([partial(self._fill, *part, None, hashed=True) for part in parts]))
        for name in lacking:
            self._digests[name] = _joined(islice(digests, len(self._spans[name].parts)))
        weights = xxh3_128()
        for name in sorted(self._spans):
            weights.update(f"{name} {self._spans[name].shape} {self._digests[name]}\n".encode())
        headers = hash_files([*self._optimizer_files, *self._model_files], hash_header)
        return {f"{file.name}#header": digest for file, digest in headers.items()} | {"xxh3_128": weights.hexdigest()}

    def _fill(self, name: str, begin: int, end: int, out: torch.Tensor | None, *, hashed: bool) -> bytes:
        """The elements `begin` to `end` of a flattened tensor into `out`; the XXH3 of what was read, if `hashed`."""
        digest = xxh3_128()
        at = 0
        for piece in self._span(name).pieces:
            first, last = max(begin - at, 0), min(end - at, piece.numel())
            if first < last:
                if not piece.is_floating_point():
                    raise ExportError(
                        f"{name} is quantised ({piece.dtype}): train without zero_quantized_nontrainable_weights."
                    )
                for part in self._pages.pieces(piece[first:last]):
                    if hashed:
                        digest.update(memoryview(part.detach().view(torch.uint8).numpy()))
                    if out is not None:
                        out[at + first - begin :][: len(part)].copy_(part)
                    first += len(part)
            at += piece.numel()
        return digest.digest()

    def _beside_each_other(self, tasks: Sequence[Callable[[], bytes]]) -> list[bytes]:
        """The results of `tasks` in order; a single one is done by the caller."""
        if len(tasks) < 2:
            return [task() for task in tasks]
        with self._starting:
            if self._readers is None:
                self._readers = ThreadPoolExecutor(usable_cpus(), thread_name_prefix="export-read")
        return [future.result() for future in [self._readers.submit(task) for task in tasks]]

    def close(self) -> None:
        """Let go of the mapped files."""
        if self._readers is not None:
            self._readers.shutdown(cancel_futures=True)
        self._spans = {}

    def __enter__(self) -> ZeroCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _span(self, name: str) -> _Span:
        if name not in self._spans:
            raise ExportError(f"No tensor {name} in {self.folder}.")
        return self._spans[name]

    def _read(self) -> Iterator[tuple[str, _Span]]:
        optimizers = [load(file)[OPTIMIZER] for file in self._optimizer_files]
        stage, ranks = saved_by(self._optimizer_files, optimizers)
        check_files(self.folder, stage, ranks, [*self._optimizer_files, *self._model_files])
        models = [load(file) for file in self._model_files]
        check_models(self._model_files, models, ranks)
        first = models[0]
        self.aliases = dict(first.get("shared_params") or {})
        buffers = {name: first["module"].get(name) for name in first["buffer_names"]}
        buffers = {name: each for name, each in buffers.items() if each is not None and each.is_floating_point()}
        flats = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        for name, buffer in buffers.items():
            yield name, _Span(shape=tuple(buffer.shape), pieces=(buffer.float().reshape(-1),))
        yield from _frozen(models)
        if stage == 3:
            yield from _third_stage(first["param_shapes"], [each[flats] for each in optimizers])
        else:
            paddings = optimizers[0].get("param_alignment_paddings")
            yield from _early_stages(first["param_shapes"], [each[flats] for each in optimizers], paddings)

    def _whole(self, spans: Iterable[tuple[str, _Span]]) -> Iterator[tuple[str, _Span]]:
        """`spans`, each of which has all elements of its tensor."""
        for name, span in spans:
            held = sum(piece.numel() for piece in span.pieces)
            if held != math.prod(span.shape):
                raise ExportError(
                    f"{name} in {self.folder} has {held} numbers, too few for its shape {span.shape}: the files are of "
                    "several saves, or damaged; export another checkpoint."
                )
            yield name, span


def _frozen(models: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, _Span]]:
    """Frozen parameters are kept beside the optimizer: whole by rank 0, or in equal pieces under ZeRO-3."""
    shapes = models[0].get("frozen_param_shapes") or {}
    for name, shape in shapes.items():
        pieces = tuple(model["frozen_param_fragments"][name].detach().reshape(-1) for model in models)
        share = -(-math.prod(shape) // len(models))
        if any(piece.numel() != share for piece in pieces):
            raise ExportError(f"The pieces of the frozen {name} have not {share} numbers each: export a snapshot.")
        yield name, _Span(shape=tuple(shape), pieces=_cut(pieces, math.prod(shape)))


def _third_stage(
    groups: Sequence[Mapping[str, torch.Size]], ranks: Sequence[Sequence[torch.Tensor]]
) -> Iterator[tuple[str, _Span]]:
    """Each parameter is cut into one piece a rank, padded; a rank keeps its pieces one after the other."""
    offset = 0
    for name, shape in ((name, shape) for group in groups for name, shape in group.items()):
        count = math.prod(shape)
        share = -(-count // len(ranks))
        pieces = tuple(piece for flat in ranks for piece in _window(flat, offset, offset + share))
        yield name, _Span(shape=tuple(shape), pieces=_cut(pieces, count))
        offset += share
    for rank, flats in enumerate(ranks):
        held = sum(flat.numel() for flat in flats)
        if offset != held:
            raise ExportError(f"The parameters take {offset} numbers of each rank's partition; rank {rank} has {held}.")


def _early_stages(
    groups: Sequence[Mapping[str, torch.Size]],
    ranks: Sequence[Sequence[torch.Tensor]],
    paddings: Sequence[Sequence[int]] | None,
) -> Iterator[tuple[str, _Span]]:
    """Each group of parameters is one vector, cut into one piece a rank; parameters follow each other in it."""
    for number, (shapes, *flat) in enumerate(zip(groups, *ranks, strict=True)):
        offset, held = 0, sum(piece.numel() for piece in flat)
        gaps = [0] * len(shapes) if paddings is None else paddings[number]
        for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
            count = math.prod(shape)
            yield name, _Span(shape=tuple(shape), pieces=tuple(_window(flat, offset, offset + count)))
            offset += count + gap
        align = 2 * len(ranks)  # DeepSpeed pads the vector for the network's sake
        if -(-offset // align) != -(-held // align):
            raise ExportError(f"Group {number} of parameters takes {offset} numbers of partitions that hold {held}.")


def _window(flat: Sequence[torch.Tensor], begin: int, end: int) -> Iterator[torch.Tensor]:
    """The elements `begin` to `end` of vectors that follow each other."""
    at = 0
    for vector in flat:
        first, last = max(begin - at, 0), min(end - at, vector.numel())
        if first < last:
            yield vector[first:last]
        at += vector.numel()


def _cut(pieces: Sequence[torch.Tensor], count: int) -> tuple[torch.Tensor, ...]:
    """The first `count` elements of `pieces`: the rest is padding."""
    return tuple(_window(pieces, 0, count))


def _joined(digests: Iterable[bytes]) -> str:
    """XXH3 of the XXH3 of a tensor's parts, each of PART numbers."""
    return xxh3_128(b"".join(digests)).hexdigest()
