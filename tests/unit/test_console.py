"""What a person sees: decisions from the main process, our errors without a traceback, everything else with one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hf_dsvllm.console import friendly, friendly_errors, is_main_process, say, say_error
from hf_dsvllm.errors import ConfigError, GpuMemoryError, PresetError, Problem


def test_a_decision_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    say("bf16: False → True")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "hf-dsvllm: bf16: False → True\n")


def test_decisions_of_other_ranks_are_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert not is_main_process()
    say("anything")
    assert capsys.readouterr() == ("", "")


def test_an_error_on_another_rank_is_printed_with_its_number(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as caught, friendly_errors():
        raise PresetError("no")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "\nhf-dsvllm: error: rank 3: no\n\n"


def test_what_all_ranks_of_a_start_say_is_printed_by_the_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def printed(rank: int, message: str, attempt: int = 0) -> str:
        folder = tmp_path / f"attempt_{attempt}"
        folder.mkdir(exist_ok=True)
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / str(rank) / "error.json"))
        say_error(PresetError(message))
        return capsys.readouterr().err

    assert "error: rank 1: no preset" in printed(1, "no preset")
    assert printed(0, "no preset") == printed(2, "no preset") == ""
    assert "error: rank 2: another" in printed(2, "another")
    assert "error: no preset" in printed(0, "no preset", attempt=1)


def test_where_ranks_cannot_know_of_each_other_each_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "removed" / "attempt_0" / "1" / "error.json"))
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        say_error(PresetError("no"))
    assert capsys.readouterr().err.count("hf-dsvllm: error: ") == 2


def test_gpu_memory_shows_what_ran_out_where(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        try:
            raise MemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
        except MemoryError as cause:
            raise GpuMemoryError("the GPU ran out of memory") from cause
    except GpuMemoryError as error:
        say_error(error)
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "hf-dsvllm: error: the GPU ran out of memory"
    assert lines[2].startswith("    cause: MemoryError at test_console.py:")
    assert lines[2].endswith(": CUDA out of memory. Tried to allocate 2 GiB")


def test_an_error_of_ours_is_its_message_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, friendly_errors():
        raise ConfigError([Problem("a is 1", "set a to 2"), Problem("b is 3", "drop b")])
    assert caught.value.code == 2
    text = capsys.readouterr().err
    assert "hf-dsvllm: error: 2 problems in this configuration:" in text
    assert "1. a is 1\n    fix: set a to 2" in text
    assert "Traceback" not in text


def test_ctrl_c_is_exit_code_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, friendly_errors():
        raise KeyboardInterrupt
    assert caught.value.code == 130
    assert "interrupted" in capsys.readouterr().err


def test_an_error_that_is_not_ours_passes() -> None:
    with pytest.raises(ZeroDivisionError), friendly_errors():
        _ = 1 / 0


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["--output_dr", "x"], ["--output_dr is no argument of this script\n    fix: did you mean --output_dir"]),
        (["--zzz", "--yyy", "1"], ["2 problems", "--zzz is no", "--yyy is no", "--help lists all arguments"]),
        (["stray"], ["stray is no argument"]),
        (["--config", "absent.yaml"], ["1 problem", "absent.yaml", "--help"]),
        (["--load_best_model_at_end", "true"], ["1 problem", "requires the save and eval strategy to match"]),
    ],
)
def test_wrong_arguments_of_a_recipe_are_problems_with_a_fix_and_no_traceback(
    line: list[str], says: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from trl import SFTConfig, TrlParser

    with pytest.raises(SystemExit) as caught, friendly_errors():
        TrlParser((SFTConfig,)).parse_args_and_config(["--output_dir", str(tmp_path), "--use_cpu", "true", *line])
    assert caught.value.code == 2
    text = capsys.readouterr().err
    assert [part for part in says if part not in text] == []
    assert "Traceback" not in text


def test_a_decorated_main_keeps_its_name_arguments_and_result() -> None:
    @friendly
    def main(left: int, *, right: int) -> int:
        """Add."""
        return left + right

    assert main(1, right=2) == 3
    assert (main.__name__, main.__doc__) == ("main", "Add.")


def test_a_rank_ends_with_its_exit_functions_run_and_its_output_flushed(tmp_path: Path) -> None:
    """Of a process group of one; beside it a native thread that would abort the interpreter's end has no say."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import atexit, threading, time\n"
        "import torch.distributed as dist\n"
        "from hf_dsvllm import friendly\n"
        "@friendly\n"
        "def main():\n"
        f"    dist.init_process_group('gloo', init_method='file://{tmp_path}/store', rank=0, world_size=1)\n"
        "    atexit.register(print, 'exit function')\n"
        "    threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()\n"
        "    print('done', end=' ')\n"
        "main()\n"
        "print('never')\n",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "done thread\nexit function\n"), done.stderr


def test_a_decorated_main_ends_friendly() -> None:
    @friendly
    def main() -> None:
        raise PresetError("unknown preset")

    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
