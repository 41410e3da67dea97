"""Evaluation files: the accepted forms, the errors, and the rendered prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_dsvllm.errors import EvalFileError
from hf_dsvllm.tasks import EvalSample, load_task, render_prompt
from tests.tiny import write_tiny_tokenizer

USER = {"role": "user", "content": "Capital of France?"}
ANSWER = {"role": "assistant", "content": "Paris"}


def write(path: Path, *rows: object) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def error_of(path: Path, **options: object) -> str:
    with pytest.raises(EvalFileError) as caught:
        load_task(path, **options)
    return str(caught.value)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize(
    ("row", "prompt", "reference"),
    [
        ({"messages": [USER, ANSWER]}, (USER,), "Paris"),
        ({"messages": [USER, ANSWER, USER, ANSWER]}, (USER, ANSWER, USER), "Paris"),
        ({"prompt": "France:", "completion": " Paris"}, "France:", " Paris"),
        ({"prompt": [USER], "completion": [ANSWER]}, (USER,), "Paris"),
        ({"prompt": [USER], "completion": "Paris"}, (USER,), "Paris"),
        ({"prompt": "France:", "reference": "Paris"}, "France:", "Paris"),
        ({"prompt": [USER], "reference": "Paris", "source": "atlas"}, (USER,), "Paris"),
    ],
)
def test_each_accepted_form_gives_prompt_and_reference(tmp_path, row, prompt, reference):
    task = load_task(write(tmp_path / "Capitals (v2).jsonl", row))
    assert task.name == "capitals_v2"
    assert task.metrics == ("exact_match",)
    assert task.samples == (EvalSample(id="1", prompt=prompt, reference=reference, line=1),)


def test_blank_lines_are_skipped_and_line_numbers_stay_true(tmp_path):
    good = {"prompt": "a", "reference": "b"}
    task = load_task(write(tmp_path / "x.jsonl", "", good, "   ", {**good, "id": "third"}))
    assert [(sample.line, sample.id) for sample in task.samples] == [(2, "2"), (4, "third")]


def test_byte_order_mark_windows_lines_and_unicode_separators_are_read(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes('\ufeff{"prompt": "a\u2028b", "reference": "c"}\r\n\r\n'.encode())
    assert load_task(path).samples[0].prompt == "a\u2028b"


def test_limit_keeps_the_first_samples_but_all_lines_are_checked(tmp_path):
    good = {"prompt": "a", "reference": "b"}
    assert len(load_task(write(tmp_path / "x.jsonl", good, good, good), limit=2).samples) == 2
    assert "line 3" in error_of(write(tmp_path / "y.jsonl", good, good, "{"), limit=1)
    assert "limit=0" in error_of(tmp_path / "x.jsonl", limit=0)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{not json}", "not JSON"),
        ('[{"prompt": "a", "reference": "b"}]', "write one object a line"),
        ("[", "write one object a line"),
        ("3", "a JSON int, not an object"),
        ({"text": "a whole document"}, "a `text` line has no reference"),
        ({"question": "a", "answer": "b"}, "its keys: answer, question"),
        ({"prompt": "a"}, "found neither"),
        ({"prompt": "a", "completion": "b", "reference": "c"}, "found completion and reference"),
        ({"prompt": "a", "reference": 3}, "must be a string, not int"),
        ({"prompt": "", "reference": "b"}, "`prompt` is empty"),
        ({"prompt": "a", "completion": [ANSWER]}, "both as text or both as messages"),
        ({"prompt": [USER], "completion": [USER]}, "must be the assistant's answer"),
        ({"messages": [USER]}, "has role 'user'"),
        ({"messages": [ANSWER]}, "only the answer"),
        ({"messages": []}, "non-empty list"),
        ({"messages": [{"role": "user"}, ANSWER]}, "needs a `content` string, not NoneType"),
        ({"messages": ["hello", ANSWER]}, "`messages[0]` must be an object"),
        ({"messages": [USER, ANSWER], "prompt": "a"}, "both `messages` and `prompt`"),
        ({"messages": [USER, ANSWER], "id": {}}, "id must be"),
        ({"messages": [USER, ANSWER], "tools": "["}, "`tools` is not JSON"),
        ({"messages": [USER, ANSWER], "tools": {"a": 1}}, "`tools` must be a list"),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": 3}, "must be an object"),
    ],
)
def test_a_bad_line_is_named_with_its_reason_and_the_accepted_forms(tmp_path, row, reason):
    path = write(tmp_path / "x.jsonl", row)
    message = error_of(path)
    assert f"{path}: 1 line cannot be used" in message
    assert "line 1: " in message
    assert reason in message
    assert '{"prompt": TEXT, "reference": TEXT}' in message or '"reference": TEXT}' in message


def test_all_bad_lines_are_reported_at_once_up_to_ten(tmp_path):
    message = error_of(write(tmp_path / "x.jsonl", *["{"] * 13, {"prompt": "a", "reference": "b"}))
    assert "13 lines cannot be used" in message
    assert "line 10:" in message
    assert "line 11:" not in message
    assert "… and 3 more" in message


def test_repeated_ids_are_refused(tmp_path):
    row = {"prompt": "a", "reference": "b", "id": "same"}
    assert "id 'same' already stands on line 1" in error_of(write(tmp_path / "x.jsonl", row, row))


def test_references_are_checked_by_the_metrics_while_loading(tmp_path):
    path = write(tmp_path / "x.jsonl", {"prompt": "a", "reference": "(b"}, {"prompt": "a", "reference": "b"})
    message = error_of(path, metrics=("regex",))
    assert "line 1: the reference '(b' is not a regular expression" in message
    assert load_task(path, metrics=("contains",)).metrics == ("contains",)


def test_metrics_must_exist_and_have_different_names(tmp_path):
    path = write(tmp_path / "x.jsonl", {"prompt": "a", "reference": "b"})
    assert "Did you mean json_equal" in error_of(path, metrics=("json_equals",))
    assert "more than one is called contains" in error_of(path, metrics=("contains", "contains"))
    assert "at least one metric" in error_of(path, metrics=())


def test_a_missing_file_names_the_nearest_in_its_folder(tmp_path):
    write(tmp_path / "eval.jsonl", {})
    assert "Nearest there: eval.jsonl" in error_of(tmp_path / "evel.jsonl")
    assert "nor does its folder" in error_of(tmp_path / "nowhere" / "eval.jsonl")
    assert "is a folder" in error_of(tmp_path)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    assert "holds no samples" in error_of(path)


def test_a_file_that_is_not_utf8_names_the_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"prompt": "a", "reference": "b"}\n{"prompt": "\xe9", "reference": "b"}\n')
    assert "line 2: not UTF-8" in error_of(path)


def test_messages_are_rendered_by_the_chat_template_up_to_the_answer(tokenizer):
    sample = EvalSample(id="1", prompt=(USER,), reference="Paris", line=1)
    ids = render_prompt(sample, tokenizer)
    assert all(type(token) is int for token in ids)
    assert tokenizer.decode(ids) == "<|im_start|>user\nCapital of France?<|im_end|>\n<|im_start|>assistant\n"
    whole = tokenizer.apply_chat_template([USER, ANSWER], return_dict=False)
    assert whole[: len(ids)] == ids


def test_text_is_tokenised_as_it_stands(tokenizer):
    sample = EvalSample(id="1", prompt="France:", reference="Paris", line=1)
    assert render_prompt(sample, tokenizer) == tokenizer("France:")["input_ids"]


def test_tools_and_template_arguments_reach_the_template(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ tools[0]['name'] }} {{ mood }} {{ messages[0]['content'] }}")
    row = {"messages": [USER, ANSWER], "tools": '[{"name": "search"}]', "chat_template_kwargs": {"mood": "calm"}}
    (sample,) = load_task(write(tmp_path / "x.jsonl", row)).samples
    assert tokenizer.decode(render_prompt(sample, tokenizer)) == "search calm Capital of France?"


def test_a_missing_chat_template_says_what_to_do(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(EvalFileError, match="--chat_template_path"):
        render_prompt(EvalSample(id="1", prompt=(USER,), reference="Paris", line=4), tokenizer)


def test_a_template_that_refuses_a_role_names_the_line(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system role') }}")
    with pytest.raises(EvalFileError, match=r"line 4 .*no system role"):
        render_prompt(EvalSample(id="1", prompt=(USER,), reference="Paris", line=4), tokenizer)
