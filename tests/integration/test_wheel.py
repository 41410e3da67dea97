"""The built wheel, installed from scratch with all its dependencies, is what users get: it must stand on its own."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import hf_dsvllm
from tests.tiny import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
ONE_STEP = (
    "--max_steps 1 --per_device_train_batch_size 2 --use_cpu true --bf16 false --report_to none --eval_strategy no"
)


def find_uv() -> str:
    found = shutil.which("uv") or shutil.which(str(ROOT / ".cache" / "uv" / "bin" / "uv"))
    if found is None:
        pytest.fail("uv is neither on PATH nor in .cache/uv: run `make setup`")
    return found


def run(command: list[str], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run outside the checkout, so that only what is installed can be imported; fail with the output."""
    env = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}} | variables
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def torch_options() -> list[str]:
    """The torch of this environment: from the folder of wheels that pip is told of, or from its own index."""
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.find-links"], capture_output=True, text=True
    )
    folders = (os.environ.get("PIP_FIND_LINKS") or asked.stdout).split()
    version = metadata.version("torch")
    local = [folder for folder in folders if list(Path(folder).glob(f"torch-{version}-*.whl"))]
    return ["--find-links", local[0]] if local else ["--torch-backend=auto"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist as a publisher would."""
    out = tmp_path_factory.mktemp("dist")
    run([find_uv(), "build", "--quiet", "--out-dir", str(out), str(ROOT)], cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of a clean environment that holds the wheel, its base dependencies and nothing else."""
    home = tmp_path_factory.mktemp("clean")
    uv = find_uv()
    run([uv, "venv", "--quiet", "--python", sys.executable, str(home / "venv")], cwd=home)
    python = str(home / "venv" / "bin" / "python")
    torch = f"torch=={metadata.version('torch')}"
    run([uv, "pip", "install", "--quiet", "--python", python, *torch_options(), str(wheel), torch], cwd=home)
    return home / "venv" / "bin"


def test_the_wheel_holds_the_package_its_type_marker_and_licence_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"hf_dsvllm", f"hf_dsvllm-{hf_dsvllm.__version__}.dist-info"}
    assert "hf_dsvllm/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "hf_dsvllm").rglob("*.py")}
    assert sources == {name for name in names if name.endswith(".py")}


def test_the_wheel_declares_what_pyproject_says(wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
    text = archive.read(name).decode()
    assert f"Version: {hf_dsvllm.__version__}\n" in text
    assert "License-Expression: Apache-2.0\n" in text
    for extra in project["optional-dependencies"]:
        assert f"Provides-Extra: {extra}\n" in text


def test_the_command_of_a_clean_installation_lists_the_presets(installed: Path, tmp_path: Path) -> None:
    listed = run([str(installed / "hf-dsvllm"), "presets"], cwd=tmp_path, COLUMNS="200").stdout
    for name in ("zero2", "zero3_offload", "qlora"):
        assert name in listed


def test_the_help_of_a_clean_installation_imports_no_torch(installed: Path, tmp_path: Path) -> None:
    done = run([str(installed / "python"), "-X", "importtime", str(installed / "hf-dsvllm"), "--help"], cwd=tmp_path)
    assert "presets" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "hf_dsvllm" in imported
    assert imported.isdisjoint({"torch", "transformers", "deepspeed", "trl", "peft"})


def test_the_public_names_of_a_clean_installation_resolve(installed: Path, tmp_path: Path) -> None:
    code = "import hf_dsvllm; print(hf_dsvllm.__file__); [getattr(hf_dsvllm, name) for name in hf_dsvllm.__all__]"
    done = run([str(installed / "python"), "-c", code], cwd=tmp_path)
    assert str(installed.parent) in done.stdout


def test_the_readmes_plan_and_run_work_from_a_clean_installation(installed: Path, tmp_path: Path) -> None:
    """The plan word for word; of the run its first words, with an adapter and one step on a CPU."""
    write_tiny_model(tmp_path / "my-model")
    plan = re.search(
        r"^(hf-dsvllm plan my-model .*?) +#", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert plan is not None
    words = shlex.split(plan[1].replace("4096", "128"))  # the tiny model reads no more
    assert "Use " in run([str(installed / words[0]), *words[1:]], cwd=tmp_path).stdout
    rows = [{"prompt": f"{number} plus one is", "completion": f" {number + 1}"} for number in range(8)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    line = (
        "hf-dsvllm run trl sft --model_name_or_path my-model --dataset_name data --output_dir runs/sft --ds_preset lora"
    )
    done = run([str(installed / "hf-dsvllm"), *shlex.split(line)[1:], *shlex.split(ONE_STEP)], cwd=tmp_path)
    assert "adapters in" in done.stdout + done.stderr
    assert (tmp_path / "runs" / "sft" / "export" / "model.safetensors").exists()


def test_vllm_is_no_base_dependency(installed: Path, tmp_path: Path) -> None:
    code = "import importlib.util as u; print([n for n in ('vllm', 'pytest') if u.find_spec(n)])"
    assert run([str(installed / "python"), "-c", code], cwd=tmp_path).stdout.strip() == "[]"
