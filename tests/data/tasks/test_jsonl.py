"""Files of JSON lines: what is an example, and a mistake as one line."""

import json

import pytest

from gspo.data.tasks import check_splits, make_task
from gspo.types import UserError


def test_jsonl_lines_are_examples(tmp_path):
    # Catches: numbers as answers that break the string rewards; a byte-order mark in the first field's name; lost extra
    # fields.
    rows = [{"prompt": "1+1=", "answer": 2, "level": 3}, {"prompt": "é=", "answer": "e", "demonstration": "e!"}]
    path = tmp_path / "train.jsonl"
    path.write_text("\ufeff" + "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = make_task(f"jsonl:{tmp_path}/{{split}}.jsonl", split="train")
    assert len(task) == 2 and task[0].answer == "2" and task[0].metadata == {"level": 3}
    assert (task[1].prompt, task[1].demonstration, task[1].metadata) == ("é=", "e!", None)
    assert len(make_task(f"jsonl:{path}", split="anything", size=1)) == 1
    with pytest.raises(UserError, match=r"test\.jsonl"):
        make_task(f"jsonl:{tmp_path}/{{split}}.jsonl", split="test")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a"}', ["'answer' is missing"]),
        ('{"promt": "a", "answer": "b"}', ["'prompt' is missing", "did you mean 'promt'?"]),
        ('{"prompt": 3, "answer": "b"}', ["'prompt' should be a text"]),
        ('{"prompt": "", "answer": "b"}', ["'prompt' should be a text that is not empty"]),
        ('{"prompt": "a", "answer": null}', ["'answer' should be a text", "None"]),
        ('{"prompt": "a", "answer": "b", "demonstration": ["c"]}', ["'demonstration' should be a text"]),
        ('["a", "b"]', ["expected an object", "list"]),
        ('{"prompt": "a",', ["not a line of JSON"]),
        ("", ["not a line of JSON"]),
        ("[" * 100_000, ["not a line of JSON"]),
    ],
)
def test_a_bad_line_names_file_line_and_field(tmp_path, line, words):
    # Catches: a KeyError in the middle of a run, or lines that are skipped silently.
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "ok", "answer": "ok"}\n' + line + "\n")
    with pytest.raises(UserError) as error:
        make_task(f"jsonl:{path}", split="train")
    assert all(word in str(error.value) for word in [f"{path}:2:", *words]) and "\n" not in str(error.value)


def test_an_empty_file_is_an_empty_data_set(tmp_path):
    # Catches: a loop over nothing that trains for zero steps and reports success.
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="empty data set"):
        make_task(f"jsonl:{tmp_path / 'empty.jsonl'}", split="train")


def test_one_file_for_both_splits_is_refused_unless_they_are_named_alike(tmp_path):
    # Catches: a pass@1 on held-out prompts that were the training prompts; a link by which two names are one file.
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    (tmp_path / "test.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    (tmp_path / "linked.jsonl").symlink_to(tmp_path / "train.jsonl")
    one, many = f"jsonl:{tmp_path}/train.jsonl", f"jsonl:{tmp_path}/{{split}}.jsonl"
    assert check_splits(many, train_split="train", eval_split="test") is None
    for name, evaluated in ((one, "test"), (many, "linked")):
        with pytest.raises(UserError) as error:
            check_splits(name, train_split="train", eval_split=evaluated)
        assert str(error.value).startswith(f"task.name={name!r}: training and evaluation would read the same lines")
        assert all(word in str(error.value) for word in ("{split}", "task.eval_split='train'"))
        assert "\n" not in str(error.value)
    for name in (one, many):
        line = check_splits(name, train_split="train", eval_split="train")
        assert line.startswith("evaluation reads training examples: task.eval_split='train'")
