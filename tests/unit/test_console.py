"""What a person sees: decisions from the main process, our errors without a traceback, everything else with one."""

from __future__ import annotations

import pytest

from hf_dsvllm.console import friendly, friendly_errors, is_main_process, say
from hf_dsvllm.errors import ConfigError, PresetError, Problem


def test_a_decision_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    say("bf16: False → True")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "hf-dsvllm: bf16: False → True\n")


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert not is_main_process()
    say("anything")
    with pytest.raises(SystemExit), friendly_errors():
        raise PresetError("no")
    assert capsys.readouterr() == ("", "")


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


def test_a_decorated_main_keeps_its_name_arguments_and_result() -> None:
    @friendly
    def main(left: int, *, right: int) -> int:
        """Add."""
        return left + right

    assert main(1, right=2) == 3
    assert (main.__name__, main.__doc__) == ("main", "Add.")


def test_a_decorated_main_ends_friendly() -> None:
    @friendly
    def main() -> None:
        raise PresetError("unknown preset")

    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
