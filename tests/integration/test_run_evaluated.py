"""vLLM answers while TRL's own scripts train: each script that writes text, each kind of preset."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from tests.scripts.any.cases import ENGINE_LIMIT_S, Case, Outcome, ours, run_all, trl_words, write_place

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.vllm, pytest.mark.timeout(900)]

EVALUATED = ("sft-qlora", "dpo-zero2", "kto-zero3", "grpo-zero2")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Outcome]:
    folder = write_place(tmp_path_factory.mktemp("evaluated"))
    asked = ("--gen_eval_file", str(folder / "questions.jsonl"), "--gen_eval_max_new_tokens", "8")
    cases = []
    for name in EVALUATED:
        script, preset = name.split("-")
        argv = [*trl_words(folder, script, name), *ours(preset, *asked)]
        cases.append(Case(name=name, argv=argv, limit_s=ENGINE_LIMIT_S))
    return run_all(folder, cases)


@pytest.mark.parametrize("name", EVALUATED)
def test_vllm_answers_while_trls_scripts_train(name: str, outcomes: Mapping[str, Outcome]) -> None:
    done = outcomes[name].trained()
    scores = [json.loads(line) for line in (done.out / "evals" / "scores.jsonl").read_text().splitlines()]
    assert [row["step"] for row in scores] == [0, 2], done.log[-3000:]
    assert "vLLM answers questions" in done.wired
