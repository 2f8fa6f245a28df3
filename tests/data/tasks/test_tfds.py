"""Prepared tensorflow-datasets folders: gsm8k field by field, slices, mistakes as one line."""

import os
import shutil
from pathlib import Path

import pytest

from gspo.data.rewards import hash_answer, numeric_answer
from gspo.data.tasks import check_splits, make_task
from gspo.types import UserError

PREPARED = os.environ.get("TFDS_DATA_DIR")
needs_gsm8k = pytest.mark.skipif(
    not (PREPARED and (Path(PREPARED) / "gsm8k").is_dir()), reason="TFDS_DATA_DIR does not point at a prepared gsm8k"
)
ROWS = {
    "train": [
        ("Two boxes of 540 pens?", "540*2=<<540*2=1080>>1,080 pens.\n#### 1,080"),
        (" Owed? ", "5-8=<<5-8=-3>>-3\n#### -3"),
    ],
    "test": [("One?", "It is 1.\n#### 1")],
}


@pytest.fixture(scope="module")
def small_tfds(tmp_path_factory) -> str:
    """A folder that tfds itself prepared, without TensorFlow and without a download: a gsm8k of three problems."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class Gsm8k(tfds.core.GeneratorBasedBuilder):
        name = "gsm8k"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            fields = {field: tfds.features.Text() for field in ("question", "answer")}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(fields))

        def _split_generators(self, _manager):
            return {split: self._generate_examples(rows) for split, rows in ROWS.items()}

        def _generate_examples(self, rows):
            yield from ((i, {"question": question, "answer": answer}) for i, (question, answer) in enumerate(rows))

    folder = tmp_path_factory.mktemp("tfds")
    Gsm8k(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return str(folder)


def test_gsm8k_is_read_from_a_prepared_folder(small_tfds, monkeypatch):
    # Catches: bytes instead of text, calculator annotations left in or the number after them cut out, "1,080" against
    # "1080".
    monkeypatch.setenv("TFDS_DATA_DIR", small_tfds)
    task = make_task("tfds:gsm8k", split="train")
    examples = sorted(task, key=lambda example: example.prompt)
    assert [example.prompt for example in examples] == [
        "Question: Owed?\nAnswer:\n", "Question: Two boxes of 540 pens?\nAnswer:\n"
    ]  # fmt: skip
    assert [example.answer for example in examples] == ["-3", "1080"]
    assert examples[1].demonstration == "540*2=1,080 pens.\n#### 1,080"
    assert task.reward is hash_answer and task.reward("#### $1080.", examples[1]) == 1.0
    kept = make_task("tfds:gsm8k", split="test", keep_calculator=True, answer_format="free", data_dir=small_tfds)
    assert len(kept) == 1 and kept.reward is numeric_answer
    with_notes = make_task("tfds:gsm8k", split="train", keep_calculator=True)
    assert any("<<540*2=1080>>" in example.demonstration for example in with_notes)


def test_tfds_splits_may_be_sliced_and_other_data_sets_name_their_fields(small_tfds):
    # Catches: a slice that is ignored, so that a "train[:1]" smoke test reads everything.
    assert len(make_task("tfds:gsm8k", split="train[:1]", data_dir=small_tfds)) == 1
    assert len(make_task("tfds:gsm8k", split="train", size=1, data_dir=small_tfds)) == 1
    task = make_task(
        "tfds:gsm8k:1.0.0", split="test", data_dir=small_tfds, prompt_field="question", answer_field="answer"
    )
    assert (task[0].prompt, task[0].answer) == ROWS["test"][0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data_dir": "no/such/folder"}, ["no/such/folder", "TFDS_DATA_DIR", "download_and_prepare"]),
        ({"split": "tran"}, ["Unknown split 'tran'", "train"]),
        ({"split": "train[2:2]"}, ["empty data set"]),
        ({"size": 9}, ["task.options.size=9: ", "only 2 examples"]),
        ({"answer_format": "hsh"}, ["task.options.answer_format='hsh'", "'free'"]),
        ({"datadir": "x"}, ["task.options.datadir: ", "did you mean 'data_dir'?"]),
    ],
)
def test_mistakes_with_tfds_are_one_line(small_tfds, options, words):
    # Catches: a list of a thousand data set names, or a download that begins, where a folder is missing.
    with pytest.raises(UserError) as error:
        make_task("tfds:gsm8k", **{"split": "train", "data_dir": small_tfds, **options})
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("train", "evaluated", "size", "shared"),
    [
        ("train", "test", None, 0),
        ("train[:1]", "train[1:]", None, 0),
        ("train[:50%]", "train[50%:]", None, 0),
        ("train[:1]", "train", None, 1),
        ("train", "test+train", None, 2),
        ("train[:1]+test", "test[:1]", None, 1),
        ("train", "train[1:]", 1, 0),  # the first example of each
    ],
)
def test_slices_that_overlap_are_refused_with_the_number_of_shared_examples(small_tfds, train, evaluated, size, shared):
    # Catches: evaluation on training examples under another name, of which only the numbers would tell; disjoint
    # slices of one split that are refused for their name.
    options = {"train_split": train, "eval_split": evaluated, "data_dir": small_tfds, "size": size}
    if not shared:
        assert check_splits("tfds:gsm8k", **options, answer_format="free") is None
        return
    with pytest.raises(UserError) as error:
        check_splits("tfds:gsm8k", **options)
    start = f"task.eval_split={evaluated!r}: {shared} of its examples are in task.train_split={train!r} too"
    assert str(error.value).startswith(start) and "\n" not in str(error.value)
    assert f"set task.eval_split={train!r}" in str(error.value)
    assert check_splits("tfds:gsm8k", **options | {"eval_split": train}).startswith(
        "evaluation reads training examples"
    )


def test_a_damaged_folder_says_how_to_prepare_it_again(small_tfds, tmp_path):
    # Catches: a missing shard that is found out when its first example is drawn.
    shutil.copytree(small_tfds, tmp_path / "tfds")
    next((tmp_path / "tfds" / "gsm8k" / "1.0.0").glob("gsm8k-test*")).unlink()
    assert len(make_task("tfds:gsm8k", split="train", data_dir=str(tmp_path / "tfds"))) == 2
    with pytest.raises(UserError, match=r"cannot be read.*prepare it again"):
        make_task("tfds:gsm8k", split="test", data_dir=str(tmp_path / "tfds"))


@needs_gsm8k
@pytest.mark.parametrize("answer_format", ["hash", "free"])
def test_every_demonstration_of_the_real_test_split_earns_its_reward(answer_format):
    # Catches: any form of a number in the real data that the rewards do not read; annotations that were not removed.
    task = make_task("tfds:gsm8k", split="test", answer_format=answer_format)
    assert len(task) == 1319
    for example in task:
        assert task.reward(example.demonstration, example) == 1.0
        assert task.reward(example.demonstration.rpartition("####")[0] + "#### 123454321", example) == 0.0
        assert "<<" not in example.demonstration and example.answer.lstrip("-").isdigit()
