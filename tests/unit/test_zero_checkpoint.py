"""Partitions that do not make one whole save are refused, never put together to wrong tensors."""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from xxhash import xxh3_128

from hf_dsvllm.errors import ExportError
from hf_dsvllm.tensors.pages import Pages
from hf_dsvllm.tensors.zero_adapter import write_adapter
from hf_dsvllm.tensors.zero_checkpoint import ZeroCheckpoint

TRAINED = {"first": torch.arange(7.0), "second": 10 + torch.arange(6.0).reshape(2, 3)}
FROZEN = {"fixed": 100 + torch.arange(5.0)}
INSIDE = "base_model.model.model"


def pieces(tensor: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """A flattened tensor as ZeRO-3 cuts it: one piece a rank, all of a size."""
    share = -(-tensor.numel() // ranks)
    padded = torch.cat([tensor.reshape(-1), torch.zeros(share * ranks - tensor.numel())])
    return [piece.clone() for piece in padded.split(share)]


def shapes(tensors: Mapping[str, torch.Tensor]) -> collections.OrderedDict[str, torch.Size]:
    return collections.OrderedDict((name, tensor.shape) for name, tensor in tensors.items())


def write_checkpoint(
    root: Path,
    *,
    stage: int = 3,
    ranks: int = 2,
    trained: Mapping[str, torch.Tensor] = TRAINED,
    frozen: Mapping[str, torch.Tensor] = FROZEN,
    aliases: Mapping[str, str] | None = None,
) -> Path:
    """ROOT/global_step1 as DeepSpeed lays it out."""
    folder = root / "global_step1"
    folder.mkdir(exist_ok=True)
    flat = torch.cat([tensor.reshape(-1) for tensor in trained.values()])
    for rank in range(ranks):
        optimizer: dict[str, Any] = {"zero_stage": stage}
        if stage == 3:
            own = torch.cat([pieces(tensor, ranks)[rank] for tensor in trained.values()])
            optimizer |= {"partition_count": ranks, "fp32_flat_groups": [own[:3].clone(), own[3:].clone()]}
        else:
            part = pieces(flat, ranks)[rank]
            optimizer |= {"partition_count": [ranks], "single_partition_of_fp32_groups": [part]}
        torch.save({"optimizer_state_dict": optimizer}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        model = {
            "module": {},
            "buffer_names": [],
            "param_shapes": [shapes(trained)],
            "shared_params": dict(aliases or {}),
            "frozen_param_shapes": shapes(frozen) if frozen else None,
            "frozen_param_fragments": {name: pieces(tensor, ranks)[rank] for name, tensor in frozen.items()},
            "global_steps": 1,
            "dp_world_size": ranks,
            "mp_world_size": 1,
            "ds_autoep_layers": None,
        }
        if stage == 3:
            torch.save(model, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        elif rank == 0:
            torch.save(model | {"frozen_param_fragments": dict(frozen)}, folder / "mp_rank_00_model_states.pt")
    return folder


def change(file: Path, **values: object) -> None:
    torch.save(torch.load(file, weights_only=False) | values, file)


@pytest.mark.parametrize(("stage", "ranks"), [(1, 1), (2, 2), (3, 1), (3, 2), (3, 4)])
def test_a_whole_save_is_put_together(tmp_path: Path, stage: int, ranks: int) -> None:
    write_checkpoint(tmp_path, stage=stage, ranks=ranks)
    with ZeroCheckpoint(tmp_path) as tensors:
        for name, tensor in {**TRAINED, **FROZEN}.items():
            assert torch.equal(tensors.get(name), tensor), name


@pytest.mark.parametrize("stage", [2, 3])
def test_what_was_read_is_no_memory_of_this_process(stage: int, tmp_path: Path) -> None:
    """The pages of 64 MiB in two files, each let go after its part was copied, in the dtype of the export."""
    trained = {"wide.weight": torch.randn(2048, 4096), "deep.weight": torch.randn(2048, 4096)}
    write_checkpoint(tmp_path, stage=stage, trained=trained, frozen={})

    def mapped() -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssFile:", "RssShmem:")))

    with ZeroCheckpoint(tmp_path) as tensors:
        before = mapped()
        for name, tensor in trained.items():
            assert torch.equal(tensors.get(name, dtype=torch.bfloat16), tensor.bfloat16())
        tensors.hashes()
        assert mapped() - before < 16 << 20


@pytest.mark.parametrize("stage", [2, 3])
def test_hashes_are_of_what_is_read_and_not_of_moments_and_copies(tmp_path: Path, stage: int) -> None:
    folder = write_checkpoint(tmp_path, stage=stage)
    model = folder / ("mp_rank_00_model_states.pt" if stage == 2 else "zero_pp_rank_0_mp_rank_00_model_states.pt")
    optimizer = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"

    def hashes(moment: float, copy: float, **weights: float) -> dict[str, str]:
        change(model, module={"copy": torch.full((9,), copy)}, buffer_names=["range"])
        state = torch.load(model, weights_only=False)
        state["module"]["range"] = torch.full((3,), weights.get("buffer", 0.0))
        state["frozen_param_fragments"]["fixed"].fill_(weights.get("frozen", 0))
        torch.save(state, model)
        state = torch.load(optimizer, weights_only=False)
        own = state["optimizer_state_dict"] | {"base_optimizer_state": torch.full((9,), moment)}
        own["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"][0].fill_(weights.get("trained", 0))
        torch.save({"optimizer_state_dict": own}, optimizer)
        with ZeroCheckpoint(tmp_path) as tensors:
            return tensors.hashes()

    first = hashes(1.0, 1.0)
    assert set(first) == {"xxh3_128", *(f"{file.name}#header" for file in folder.iterdir())}
    assert hashes(2.0, 3.0) == first
    for weights in ({"buffer": 1.0}, {"frozen": 1.0}, {"trained": 1.0}):
        changed = {name for name, digest in hashes(1.0, 1.0, **weights).items() if digest != first[name]}
        assert changed == {"xxh3_128"}


@pytest.mark.parametrize("ranks", [2, 3])
def test_hashes_are_of_tensors_whether_read_before_and_by_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    """Tensors of several parts, larger and smaller than a rank's piece; none is read a second time for its hash."""
    monkeypatch.setattr("hf_dsvllm.tensors.zero_checkpoint.PART", 5)
    write_checkpoint(tmp_path, ranks=ranks)
    with ZeroCheckpoint(tmp_path) as tensors:
        unread = tensors.hashes()
    with ZeroCheckpoint(tmp_path) as tensors:
        for name, tensor in {**TRAINED, **FROZEN}.items():
            assert torch.equal(tensors.get(name, dtype=torch.bfloat16), tensor.bfloat16())
        monkeypatch.setattr(Pages, "pieces", lambda *_: pytest.fail("read again"))
        assert tensors.hashes() == unread
        for name, tensor in TRAINED.items():
            parts = [xxh3_128(part.numpy().tobytes()).digest() for part in tensor.reshape(-1).split(5)]
            assert tensors._digests[name] == xxh3_128(b"".join(parts)).hexdigest()


@pytest.mark.parametrize("lost", [0, 1, 3])
@pytest.mark.parametrize("kind", ["model", "optim"])
def test_a_rank_whose_file_is_missing_is_named(tmp_path: Path, kind: str, lost: int) -> None:
    folder = write_checkpoint(tmp_path, ranks=4)
    file = folder / f"zero_pp_rank_{lost}_mp_rank_00_{kind}_states.pt"
    file.unlink()
    with pytest.raises(ExportError, match=f"by 4 ranks and lacks 1 of their 8 files, such as {file.name}: copy"):
        ZeroCheckpoint(tmp_path)


def two_world_sizes(folder: Path) -> None:
    write_checkpoint(folder.parent, ranks=2)


def two_stages(folder: Path) -> None:
    write_checkpoint(folder.parent, stage=2, ranks=4)


def another_stage_beside(folder: Path) -> None:
    file = folder / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    (folder / "mp_rank_00_model_states.pt").write_bytes(file.read_bytes())


def another_precision_beside(folder: Path) -> None:
    file = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    (folder / f"bf16_{file.name}").write_bytes(file.read_bytes())


def model_states_of_another_step(folder: Path) -> None:
    change(folder / "zero_pp_rank_2_mp_rank_00_model_states.pt", global_steps=2)


def model_states_of_another_world(folder: Path) -> None:
    for file in folder.glob("*_model_states.pt"):
        change(file, dp_world_size=8)


def model_states_of_another_model(folder: Path) -> None:
    change(folder / "zero_pp_rank_3_mp_rank_00_model_states.pt", frozen_param_shapes={"fixed": torch.Size([8])})


@pytest.mark.parametrize(
    ("mix", "said"),
    [
        (two_world_sizes, r"several saves \(zero_pp_rank_0_\S+ by 2 ranks at ZeRO-3, zero_pp_rank_2_\S+ by 4 ranks"),
        (two_stages, r"beside the files of 4 ranks at ZeRO-2: it is of another save"),
        (another_stage_beside, r"has mp_rank_00_model_states\.pt beside the files of 4 ranks at ZeRO-3"),
        (another_precision_beside, r"lacks 3 of their 8 files, such as bf16_"),
        (model_states_of_another_step, r"rank_2_\S+ is of another save than the files beside it \(global_steps of"),
        (model_states_of_another_world, r"saved by 8 ranks, not 4"),
        (model_states_of_another_model, r"rank_3_\S+ is of another save .* \(frozen_param_shapes of"),
    ],
)
def test_files_of_two_saves_are_not_mixed(tmp_path: Path, mix: Callable[[Path], None], said: str) -> None:
    mix(write_checkpoint(tmp_path, ranks=4))
    with pytest.raises(ExportError, match=said):
        ZeroCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("values", "how"),
    [
        ({"ds_autoep_layers": [{"checkpoint_format": "zero3_partitioned"}]}, "expert"),
        ({"autoep_layers": [{"num_experts": 4}]}, "expert"),
        ({"folding": {"tp_size": 2}}, "expert"),
        ({"mp_world_size": 2}, "tensor or pipeline"),
        ({"checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 2}}, "tensor or pipeline"),
        ({"checkpoint_parallel_dimensions": {"pp_degree": 2, "tp_degree": 1}}, "tensor or pipeline"),
    ],
)
def test_parallelism_besides_zero_is_refused(tmp_path: Path, values: dict[str, object], how: str) -> None:
    folder = write_checkpoint(tmp_path)
    change(folder / "zero_pp_rank_1_mp_rank_00_model_states.pt", **values)
    with pytest.raises(ExportError, match=f"split by {how} parallelism too"):
        ZeroCheckpoint(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "layer_0_expert_0_mp_rank_00_model_states.pt",
        "mp_rank_01_model_states.pt",
        "expp_rank_0_mp_rank_00_optim_states.pt",
        "zero_pp_rank_0_mp_rank_01_optim_states.pt",
    ],
)
def test_files_of_experts_and_of_tensor_parallel_ranks_are_refused(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path, stage=2)
    source = next(folder.glob("*_" + "_".join(name.split("_")[-2:])))
    (folder / name).write_bytes(source.read_bytes())
    with pytest.raises(ExportError, match=f"has {name} beside the files of 2 ranks at ZeRO-2"):
        ZeroCheckpoint(tmp_path)


def test_partitions_of_experts_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, stage=2)
    for file in folder.glob("*_optim_states.pt"):
        state = torch.load(file, weights_only=False)["optimizer_state_dict"]
        change(file, optimizer_state_dict=state | {"partition_count": [2, 1]})
    with pytest.raises(ExportError, match="split by expert parallelism"):
        ZeroCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("held", "said"),
    [(3, r"second in \S+ has 5 numbers, too few for its shape \(2, 3\)"), (5, "take 7 numbers .* rank 1 has 8")],
)
def test_a_partition_of_another_size_is_refused(tmp_path: Path, held: int, said: str) -> None:
    folder = write_checkpoint(tmp_path, frozen={})
    file = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    state = torch.load(file, weights_only=False)["optimizer_state_dict"]
    state["fp32_flat_groups"][1] = torch.zeros(held)
    change(file, optimizer_state_dict=state)
    with pytest.raises(ExportError, match=said):
        ZeroCheckpoint(tmp_path)


def test_frozen_pieces_that_are_too_short_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    change(folder / "zero_pp_rank_1_mp_rank_00_model_states.pt", frozen_param_fragments={"fixed": torch.zeros(2)})
    with pytest.raises(ExportError, match="pieces of the frozen fixed have not 3 numbers each"):
        ZeroCheckpoint(tmp_path)


def test_an_early_stage_with_too_few_numbers_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, stage=2)
    file = folder / "mp_rank_00_model_states.pt"
    # One more than the partitions hold, within what their alignment makes of it.
    change(file, param_shapes=[shapes({"first": torch.zeros(7), "second": torch.zeros(8)})])
    with pytest.raises(ExportError, match=r"second in \S+ has 7 numbers, too few for its shape \(8,\)"):
        ZeroCheckpoint(tmp_path)


def test_frozen_weights_that_are_kept_quantised_are_not_read_as_numbers(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, frozen={})
    for rank in range(2):
        file = tmp_path / "global_step1" / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        fragments = {"fixed": torch.ones(3, dtype=torch.int8)}
        change(file, frozen_param_shapes={"fixed": torch.Size([5])}, frozen_param_fragments=fragments)
    with ZeroCheckpoint(tmp_path) as tensors:
        assert torch.equal(tensors.get("first"), TRAINED["first"])
        with pytest.raises(ExportError, match=r"fixed is quantised \(torch\.int8\)"):
            tensors.get("fixed")


LOW, HIGH = f"{INSIDE}.q_proj.lora_A", f"{INSIDE}.q_proj.lora_B"
ADAPTER = {f"{LOW}.default.weight": torch.ones(2, 4), f"{HIGH}.default.weight": torch.ones(4, 2)}
EMBEDDINGS = {f"{INSIDE}.embed_tokens.weight": torch.arange(24.0).reshape(6, 4)}
OTHER = {f"{INSIDE}.up_proj.weight": torch.ones(4, 4)}


def saved_empty(checkpoint: Path, *names: str, config: Mapping[str, object] | None = None) -> Path:
    """The adapter's own file as ZeRO-3 leaves it: PEFT's names, nothing in them."""
    (checkpoint / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **(config or {})}))
    save_file({name: torch.empty(0) for name in names}, checkpoint / "adapter_model.safetensors")
    (checkpoint / "out").mkdir()
    return checkpoint / "out"


def test_what_the_adapters_own_file_names_is_taken_from_the_frozen_weights(tmp_path: Path) -> None:
    tied = {"base_model.model.lm_head.weight": f"{INSIDE}.embed_tokens.weight"}
    write_checkpoint(tmp_path, trained=ADAPTER, frozen=EMBEDDINGS | OTHER, aliases=tied)
    out = saved_empty(tmp_path, f"{LOW}.weight", f"{HIGH}.weight", *EMBEDDINGS, *tied)
    found = load_file(write_adapter(tmp_path, out) / "adapter_model.safetensors")
    assert set(found) == {f"{LOW}.weight", f"{HIGH}.weight", *EMBEDDINGS, *tied}
    for name in (*EMBEDDINGS, *tied):
        assert torch.equal(found[name], EMBEDDINGS[f"{INSIDE}.embed_tokens.weight"])


def test_resized_embeddings_that_were_left_out_are_missed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, trained=ADAPTER, frozen={})
    out = saved_empty(tmp_path, f"{LOW}.weight", f"{HIGH}.weight", *EMBEDDINGS)
    with pytest.raises(ExportError, match=rf"1 tensors of \S+ adapter, such as {INSIDE}\.embed_tokens\.weight, are"):
        write_adapter(tmp_path, out)
    assert list(out.iterdir()) == []


def test_tensors_that_are_whole_in_the_adapters_own_file_are_kept(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, trained=ADAPTER, frozen={})
    out = saved_empty(tmp_path)
    save_file({f"{LOW}.weight": torch.empty(0), **EMBEDDINGS}, tmp_path / "adapter_model.safetensors")
    found = load_file(write_adapter(tmp_path, out) / "adapter_model.safetensors")
    assert set(found) == {f"{LOW}.weight", f"{HIGH}.weight", *EMBEDDINGS}
    assert torch.equal(found[next(iter(EMBEDDINGS))], next(iter(EMBEDDINGS.values())))


def test_a_saved_module_that_was_resized_is_written_once(tmp_path: Path) -> None:
    module = f"{INSIDE}.embed_tokens"
    trained = ADAPTER | {f"{module}.modules_to_save.default.weight": torch.ones(6, 4)}
    write_checkpoint(tmp_path, trained=trained, frozen={})
    names = [f"{module}.weight", f"{module}.modules_to_save.weight", f"{module}.original_module.weight"]
    out = saved_empty(tmp_path, f"{LOW}.weight", f"{HIGH}.weight", *names, config={"modules_to_save": ["embed_tokens"]})
    found = load_file(write_adapter(tmp_path, out) / "adapter_model.safetensors")
    assert set(found) == {f"{LOW}.weight", f"{HIGH}.weight", f"{module}.weight"}


def test_frozen_weights_that_the_adapter_does_not_have_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, trained=ADAPTER, frozen=OTHER)
    out = saved_empty(tmp_path, f"{LOW}.weight", f"{HIGH}.weight")
    read: list[int] = []
    pieces_of = Pages.pieces

    def counted(self: Pages, tensor: torch.Tensor, *size: int) -> Iterator[torch.Tensor]:
        read.append(tensor.numel())
        return pieces_of(self, tensor, *size)

    monkeypatch.setattr(Pages, "pieces", counted)
    write_adapter(tmp_path, out)
    assert sum(read) == sum(math.prod(tensor.shape) for tensor in ADAPTER.values())
