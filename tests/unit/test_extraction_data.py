"""The demo's data: deterministic, held out, and answerable from its sentence."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "recipes" / "data" / "make_extraction.py"
KEYS = ["who", "qty", "item", "price", "due", "city", "gift"]


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    specification = importlib.util.spec_from_file_location("make_extraction", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    sys.modules["make_extraction"] = module
    specification.loader.exec_module(module)
    return module


def write(recipe: ModuleType, folder: Path, *extra: str) -> tuple[list[dict], list[dict]]:
    recipe.main(["--out", str(folder), "--train", "300", "--test", "80", *extra])
    return tuple(
        [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        for name in ("train.jsonl", "test.jsonl")
    )


def sentence(row: dict) -> str:
    return row["messages"][1]["content"]


def answer(row: dict) -> dict:
    return json.loads(row["messages"][2]["content"])


def test_the_same_arguments_give_the_same_bytes(recipe, tmp_path):
    write(recipe, tmp_path / "a")
    write(recipe, tmp_path / "b")
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_another_seed_gives_other_sentences(recipe, tmp_path):
    first, _ = write(recipe, tmp_path / "a", "--seed", "1")
    second, _ = write(recipe, tmp_path / "b", "--seed", "2")
    assert not set(map(sentence, first)) & set(map(sentence, second))


@pytest.mark.parametrize("difficulty", ["1", "2", "3"])
def test_train_and_test_share_no_sentence_and_no_pair_of_recipient_and_product(recipe, tmp_path, difficulty):
    train, test = write(recipe, tmp_path, "--difficulty", difficulty)
    assert (len(train), len(test)) == (300, 80)
    texts = [sentence(row) for row in train + test]
    assert len(set(texts)) == len(texts)
    seen = {(answer(row)["who"], answer(row)["item"]) for row in train}
    assert not seen & {(answer(row)["who"], answer(row)["item"]) for row in test}
    names = {word for row in train for word in answer(row)["who"].split()}
    new = [row for row in test if not set(answer(row)["who"].split()) & names]
    assert len(test) / 5 < len(new) < len(test) / 2


@pytest.mark.parametrize("difficulty", ["1", "2", "3"])
def test_every_answer_is_compact_json_in_key_order_and_copied_parts_stand_in_the_sentence(recipe, tmp_path, difficulty):
    train, test = write(recipe, tmp_path, "--difficulty", difficulty)
    for row in train + test:
        raw = row["messages"][2]["content"]
        fields = json.loads(raw)
        assert list(fields) == KEYS
        assert raw == json.dumps(fields, separators=(",", ":"))
        assert fields["who"] in sentence(row)
        assert fields["city"] is None or fields["city"] in sentence(row)
        assert (type(fields["qty"]), type(fields["gift"])) == (int, bool)


def test_without_dates_sentence_and_answer_have_none(recipe, tmp_path):
    dated, _ = write(recipe, tmp_path / "dated")
    train, test = write(recipe, tmp_path / "plain", "--no_dates")
    for row in train + test:
        assert list(answer(row)) == [key for key in KEYS if key != "due"]
        assert "202" not in sentence(row).replace(" ", "")
    assert max(map(len, map(sentence, train))) < max(map(len, map(sentence, dated)))


def test_sentences_stay_short(recipe, tmp_path):
    train, test = write(recipe, tmp_path, "--difficulty", "3")
    assert max(len(sentence(row)) for row in train + test) < 220
    assert max(len(row["messages"][2]["content"]) for row in train + test) < 150


def test_only_difficulty_one_has_neither_nulls_nor_misleading_details(recipe, tmp_path):
    easy, _ = write(recipe, tmp_path / "1", "--difficulty", "1")
    hard, _ = write(recipe, tmp_path / "3", "--difficulty", "3")
    assert not any(None in answer(row).values() for row in easy)
    assert any(answer(row)["city"] is None for row in hard)
    assert any(answer(row)["price"] is None for row in hard)
    assert not any("cancelled" in sentence(row) for row in easy)
    assert any("cancelled" in sentence(row) for row in hard)


def test_held_out_rule_keeps_about_one_pair_in_four_for_the_test(recipe):
    pairs = [
        recipe.is_held_out(first, last, item)
        for first in range(len(recipe.FIRST_NAMES))
        for last in range(len(recipe.LAST_NAMES))
        for item in range(len(recipe.all_items()))
    ]
    assert 0.2 < sum(pairs) / len(pairs) < 0.3


def test_plurals_of_all_products_are_regular_or_end_in_ves(recipe):
    assert recipe.plural("scarf") == "scarves"
    assert recipe.plural("red bookshelf") == "red bookshelves"
    assert recipe.plural("vase") == "vases"


def test_counts_below_one_are_refused(recipe, tmp_path, capsys):
    with pytest.raises(SystemExit):
        recipe.main(["--out", str(tmp_path), "--train", "0"])
    assert "at least 1" in capsys.readouterr().err
