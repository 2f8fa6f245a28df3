"""Folders of Parquet and Arrow files, laid out as `datasets` lays them out."""

import json

import pytest

from gspo.data.tasks import check_splits, make_task
from gspo.types import UserError

pa = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")


def table(*questions):
    return pa.table(
        {"question": list(questions), "solution": list(range(len(questions))), "level": ["easy"] * len(questions)}
    )


def stream(path, rows):
    """As `save_to_disk` writes it."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)


COLUMNS = {"prompt_field": "question", "answer_field": "solution"}


def saved_to_disk(folder):
    for split, rows in (("train", table("a", "b")), ("test", table("c"))):
        (folder / split).mkdir()
        stream(folder / split / "data-00000-of-00001.arrow", rows)
        stream(folder / split / "cache-0123456789abcdef.arrow", table("computed", "from", "it"))
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (folder / split / "state.json").write_text(json.dumps(state))
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')


def of_the_hub(folder):
    (folder / "data").mkdir()
    pa.parquet.write_table(table("a"), folder / "data" / "train-00000-of-00002.parquet")
    pa.parquet.write_table(table("b"), folder / "data" / "train-00001-of-00002.parquet")
    pa.parquet.write_table(table("c"), folder / "data" / "test-00000-of-00001.parquet")
    pa.parquet.write_table(table("x"), folder / "data" / "pretrain-00000-of-00001.parquet")


def in_the_cache(folder):
    stream(folder / "mine-train.arrow", table("a", "b"))
    stream(folder / "mine-test.arrow", table("c"))


def by_hand(folder):
    for split, rows in (("train", table("a", "b")), ("test", table("c"))):
        (folder / split).mkdir()
        with pa.OSFile(str(folder / split / "mine.arrow"), "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
            writer.write_table(rows)


@pytest.mark.parametrize("layout", [saved_to_disk, of_the_hub, in_the_cache, by_hand], ids=lambda f: f.__name__)
def test_a_split_is_found_wherever_datasets_puts_it(tmp_path, layout):
    # Catches: a file of the cache, or of a split whose name ends alike, read as data; parts in another order; columns
    # by position; a number as an answer; lost extra columns.
    layout(tmp_path)
    train, test = (make_task(f"dataset:{tmp_path}", split=split, **COLUMNS) for split in ("train", "test"))
    if layout is of_the_hub:  # "pretrain" does not end in "-train"
        assert make_task(f"dataset:{tmp_path}", split="pretrain", **COLUMNS)[0].prompt == "x"
    assert [example.prompt for example in train] == ["a", "b"] and [example.prompt for example in test] == ["c"]
    assert train[0].metadata == {"level": "easy"} and train[0].answer == "0"
    assert check_splits(f"dataset:{tmp_path}", train_split="train", eval_split="test", **COLUMNS) is None
    with pytest.raises(UserError, match=r"split 'dev': not found in .*; there are .*test"):
        make_task(f"dataset:{tmp_path}", split="dev", **COLUMNS)


def test_conversations_and_demonstrations_come_from_their_columns(tmp_path):
    # Catches: messages as Python text, an empty demonstration where a row has none.
    user, assistant = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
    rows = {"messages": [[user], [user, assistant]], "answer": ["x", "y"], "demonstration": ["hey", None]}
    pa.parquet.write_table(pa.table(rows), tmp_path / "all.parquet")
    one, two = make_task(f"dataset:{tmp_path}/all.parquet", split="train")
    assert (one.messages, one.prompt, one.answer, one.demonstration) == ((user,), "user: hi", "x", "hey")
    assert (two.messages, two.answer, two.demonstration) == ((user,), "y", "ho")


def test_mistakes_are_one_line(tmp_path):
    # Catches: a KeyError of a column in the middle of a run, pyarrow's traceback, one file for both splits.
    saved_to_disk(tmp_path)
    name = f"dataset:{tmp_path}"
    with pytest.raises(UserError, match=r"prompt_field='prompt': .* has only the columns question, solution, level"):
        make_task(name, split="train")
    with pytest.raises(UserError, match=r"answer_field='solutoin'.*did you mean 'solution'"):
        make_task(name, split="train", prompt_field="question", answer_field="solutoin")
    with pytest.raises(
        UserError, match=r"task\.options\.columns: .* has only answer_field, demonstration_field, prompt_field"
    ):
        make_task(name, split="train", columns="question")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"broken\.parquet cannot be read: ") as error:
        make_task(f"{name}/broken.parquet", split="train")
    assert "\n" not in str(error.value)
    one = f"{name}/train/data-00000-of-00001.arrow"
    with pytest.raises(UserError, match="training and evaluation would read the same file"):
        check_splits(one, train_split="train", eval_split="test")
    pa.parquet.write_table(pa.table({"prompt": ["a"], "answer": [None]}), tmp_path / "null.parquet")
    with pytest.raises(UserError, match=r"row 0: field 'answer' should be a text that is not empty, not None"):
        make_task(f"{name}/null.parquet", split="train")[0]
