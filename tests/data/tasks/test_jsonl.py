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


def test_messages_take_the_place_of_a_prompt(tmp_path):
    # Catches: a conversation as the text of a Python list, the answer given away in the prompt, a system prompt that is
    # added twice or in the wrong place.
    user, assistant = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
    rows = [
        {"prompt": [user], "answer": "x", "level": 1},
        {"messages": [user, assistant]},
        {"prompt": "hi", "answer": "x"},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two, three = make_task(f"jsonl:{path}", split="train")
    assert (one.prompt, one.messages, one.answer, one.metadata) == ("user: hi", (user,), "x", {"level": 1})
    assert (two.messages, two.answer, two.demonstration, two.metadata) == ((user,), "ho", "ho", None)
    assert three.messages is None
    system = {"role": "system", "content": "Be brief."}
    for example in make_task(f"jsonl:{path}", split="train", system_prompt="Be brief."):
        assert example.messages == (system, user)
    path.write_text(json.dumps({"prompt": [system, user], "answer": "x"}) + "\n")
    with pytest.raises(UserError, match=r"task\.system_prompt: the data has system messages of its own"):
        make_task(f"jsonl:{path}", split="train", system_prompt="Be brief.")[0]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "a conversation of no messages"),
        (["hi"], "message 0 should have 'role' and 'content'"),
        ([{"role": "user"}], "message 0 should have texts as 'role' and 'content'"),
        ([{"role": "user", "content": "a"}, {"role": 1, "content": "b"}], "message 1 should have texts"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 0 should have texts"),
    ],
)
def test_messages_that_no_template_can_write_name_their_line(tmp_path, messages, words):
    # Catches: a template that writes "None", and an error of it in the middle of a run.
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": messages, "answer": "x"}) + "\n")
    with pytest.raises(UserError) as error:
        make_task(f"jsonl:{path}", split="train")
    assert all(word in str(error.value) for word in (f"{path}:1: field 'prompt'", words))
