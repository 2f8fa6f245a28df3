"""Tasks: examples as functions of an index, splits that never meet, the toy's known pass@1, and mistakes as one
line."""

import builtins
import collections
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from gspo.data.rewards import hash_answer, numeric_answer
from gspo.data.tasks import make_task
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


# ---------------------------------------------------------------------------- running_sum


def test_running_sums_are_the_sums_of_the_digits_up_to_each_place():
    # Catches: sums of the prompt's value, an answer shifted by one, a modulus that is not applied.
    for modulus in (2, 7, 10):
        task = make_task("running_sum", split="train", size=50, num_digits=5, modulus=modulus)
        for example in map(task.__getitem__, range(50)):
            digits = [int(char) for char in example.prompt.removesuffix("=")]
            sums = [sum(digits[: t + 1]) % modulus for t in range(5)]
            assert example.answer == "".join(map(str, sums)) and len(digits) == 5
            assert task.reward(example.answer, example) == 1.0 and task.reward(example.answer[:-1], example) == 0.0


def test_an_example_depends_on_its_index_split_and_seed_alone():
    # Catches: a generator with a state, whose examples depend on what was read before: a resumed run would see other
    # data.
    task = make_task("running_sum", split="train", seed=3)
    forward = [task[i] for i in range(20)]
    again = make_task("running_sum", split="train", seed=3, size=20)
    assert [again[i] for i in reversed(range(20))] == forward[::-1] and list(again) == forward
    assert make_task("running_sum", split="train", seed=4)[0] != forward[0]
    with pytest.raises(IndexError):
        again[20]
    with pytest.raises(IndexError):
        again[-1]


def test_an_example_is_the_same_in_every_process_and_version():
    # Catches: examples that hang on Python's hash seed, as reasoning-gym's word tasks do; a change of the generator,
    # after which a checkpoint would be resumed on other data.
    example = make_task("running_sum", split="train")[7]
    assert (example.prompt, example.answer, example.demonstration) == ("810986333157=", "899862581274", "788751470163")


def test_train_and_test_never_share_a_prompt():
    # Catches: an evaluation on prompts that were trained on. Three digits: 1000 prompts, so both splits repeat theirs
    # often.
    splits = [{make_task("running_sum", split=split, size=3000, num_digits=3, seed=seed)[i].prompt for i in range(3000)}
              for split, seed in (("train", 0), ("test", 0), ("train", 1), ("test", 1))]  # fmt: skip
    assert not (splits[0] | splits[2]) & (splits[1] | splits[3])
    assert len(splits[0]) > 750 and 80 < len(splits[1]) < 200


def test_the_demonstrator_errs_at_the_stated_rate_and_goes_on_from_its_error():
    # Catches: errors that are corrected in the next step (pass@1 would not be (1 - e) ** n of a consistent policy),
    # wrong digits that are sometimes the right one, a rate per example instead of per step.
    error_rate, steps, size = 0.12, 12, 3000
    task = make_task("running_sum", split="train", size=size, num_digits=steps, error_rate=error_rate)
    wrong_steps, offsets, correct = 0, collections.Counter(), 0
    for example in map(task.__getitem__, range(size)):
        before = 0
        for digit, written in zip(example.prompt.removesuffix("="), map(int, example.demonstration), strict=True):
            offset = (written - before - int(digit)) % 10
            wrong_steps += offset != 0
            offsets[offset] += 1
            before = written
        correct += example.demonstration == example.answer
    total = size * steps
    assert wrong_steps / total == pytest.approx(error_rate, abs=4 * (error_rate * (1 - error_rate) / total) ** 0.5)
    expected = (1 - error_rate) ** steps
    assert correct / size == pytest.approx(expected, abs=4 * (expected * (1 - expected) / size) ** 0.5)
    mean = wrong_steps / 9
    assert all(abs(offsets[offset] - mean) < 5 * mean**0.5 for offset in range(1, 10))
    perfect = make_task("running_sum", split="train", error_rate=0.0)[0]
    assert perfect.demonstration == perfect.answer


def test_running_sums_are_made_faster_than_any_loop_reads_them():
    # Catches: an example that costs milliseconds, so that the scan of the prompts takes a minute. Measured: 13 us.
    task = make_task("running_sum", split="train")
    start = time.process_time()
    for i in range(2000):
        task[i]
    assert time.process_time() - start < 0.5


# ---------------------------------------------------------------------------- reasoning_gym


@pytest.fixture
def chain_sum():
    pytest.importorskip("reasoning_gym")
    return make_task("reasoning_gym:chain_sum", split="train", size=20, min_terms=2, max_terms=3)


def test_reasoning_gym_examples_are_scored_by_their_own_scorer_with_or_without_tags(chain_sum):
    # Catches: an answer inside of tags that scores 0, or thinking before the tags that is scored as part of the answer.
    example = chain_sum[3]
    assert example == chain_sum[3] and chain_sum.reward(example.answer, example) == 1.0
    wrong = str(int(example.answer) + 1)
    tagged = f"<think>{wrong}, or <answer>{wrong}</answer></think> <answer> {example.answer}\n</answer> done"
    assert chain_sum.reward(tagged, example) == 1.0
    assert chain_sum.reward(f"so <answer>{example.answer}", example) == 1.0  # cut off before the tag was closed
    assert chain_sum.reward(wrong, example) < 0.5
    assert (
        0.0 < chain_sum.reward(f"It is\n{example.answer}", example) < 1.0
    )  # the scorer's own partial credit, over lines


def test_reasoning_gym_splits_and_seeds_do_not_draw_the_same_problems(chain_sum):
    # Catches: neighbouring seeds. The package draws problem i of seed s from s + i, so seed 1 is seed 0 moved by one.
    options = {"size": 200, "min_terms": 6, "max_terms": 6, "min_digits": 6, "max_digits": 6}
    drawn = [
        {example.prompt for example in make_task("reasoning_gym:chain_sum", split=split, seed=seed, **options)}
        for split in ("train", "test")
        for seed in (0, 1)
    ]
    assert sum(map(len, drawn)) == len(set.union(*drawn)) == 800


@pytest.mark.parametrize(
    "name", ["countdown", "puzzle24", "n_queens", "spiral_matrix", "coin_flip", "complex_arithmetic"]
)
def test_no_scorer_evaluates_what_the_model_wrote(name, tmp_path, monkeypatch):
    # Catches: scorers of the package that call eval, or SymPy's parser, on the completion: code that runs, or
    # 9**9**9**9 that never ends; Fraction("1e999999999"); and "nan", which one scorer takes for the right answer.
    pytest.importorskip("reasoning_gym")
    monkeypatch.chdir(tmp_path)
    task = make_task(f"reasoning_gym:{name}", split="train", size=2)
    example = task[0]
    code = "__import__('pathlib').Path('pwned').touch()"
    for text in (
        code,
        f"<answer>[{code}]</answer>",
        "9**9**9**9",
        "(1\n+9**9**9**9)",
        "1e999999999",
        "1e9_999_999",
        "[" * 10**5,
        "nan",
    ):
        start = time.process_time()
        assert 0.0 <= task.reward(text, example) < 0.5
        assert time.process_time() - start < 2.0
    assert not list(tmp_path.iterdir())


def test_a_safe_expression_still_reaches_the_scorer_that_evaluates():
    # Catches: a guard so strict that no answer is ever right.
    pytest.importorskip("reasoning_gym")
    task = make_task("reasoning_gym:countdown", split="train", size=5)
    for example in task:
        assert task.reward(f"<answer>{example.metadata['metadata']['expression']}</answer>", example) == 1.0
        assert task.reward("1 + 1", example) < 0.5


def test_a_scorer_that_raises_counts_as_zero():
    # Catches: prime_factorization's int("a") ending a run at the first completion that is no number.
    pytest.importorskip("reasoning_gym")
    task = make_task("reasoning_gym:prime_factorization", split="train", size=2)
    assert task.reward("two times three", task[0]) == 0.0
    assert task.reward(task[0].answer, task[0]) == 1.0


def test_unsafe_or_unrepeatable_data_sets_are_refused_with_the_reason(monkeypatch):
    # Catches: a run that cannot be resumed bit-equal because problems follow the order of a set.
    pytest.importorskip("reasoning_gym")
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(UserError, match="PYTHONHASHSEED=0"):
        make_task("reasoning_gym:word_ladder", split="train", size=2)
    with pytest.raises(UserError, match="evaluates what the model wrote"):
        make_task("reasoning_gym:simple_integration", split="train", size=2)


def test_without_the_package_one_line_says_how_to_install_it(monkeypatch):
    # Catches: a bare ModuleNotFoundError for an optional extra.
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("reasoning_gym"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r'pip install "reasoning-gym>=0.1.19"'):
        make_task("reasoning_gym:chain_sum", split="train")


# ---------------------------------------------------------------------------- tfds


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
        ({"size": 9}, ["size=9", "its 2 examples"]),
        ({"answer_format": "hsh"}, ["answer_format='hsh'", "'free'"]),
        ({"datadir": "x"}, ["no option 'datadir'", "did you mean 'data_dir'?"]),
    ],
)
def test_mistakes_with_tfds_are_one_line(small_tfds, options, words):
    # Catches: a list of a thousand data set names, or a download that begins, where a folder is missing.
    with pytest.raises(UserError) as error:
        make_task("tfds:gsm8k", **{"split": "train", "data_dir": small_tfds, **options})
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


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


# ---------------------------------------------------------------------------- jsonl


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


# ---------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("runing_sum", {}, ["unknown task 'runing_sum'", "jsonl:<path>", "did you mean 'running_sum'?"]),
        ("gsm8k", {}, ["did you mean 'tfds:gsm8k'?"]),
        ("tfds", {}, ["unknown task 'tfds'"]),
        ("running_sum:12", {}, ["unknown task"]),
        ("running_sum", {"num_digit": 3}, ["no option 'num_digit'", "did you mean 'num_digits'?"]),
        ("running_sum", {"modulus": 11}, ["modulus=11"]),
        ("running_sum", {"error_rate": 1.2}, ["error_rate=1.2"]),
        ("running_sum", {"split": "train[:5]"}, ["'train' and 'test'", "'train[:5]'"]),
        ("running_sum", {"size": 0}, ["size=0", "empty data set"]),
        ("jsonl:no/such.jsonl", {}, ["no/such.jsonl"]),
        ("tfds:mnist", {}, ["prompt_field"]),
    ],
)
def test_a_mistake_in_a_task_is_one_line_with_the_nearest_name(name, options, words):
    # Catches: tracebacks, and options that nothing reads.
    with pytest.raises(UserError) as error:
        make_task(name, **{"split": "train", **options})
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_mistake_in_a_reasoning_gym_task_is_one_line_with_the_nearest_name(chain_sum):
    # Catches: the package's bare asserts and TypeErrors.
    for name, options, word in (
        ("chain_sums", {}, "did you mean 'chain_sum'?"),
        ("chain_sum", {"min_term": 2}, "did you mean 'min_terms'?"),
        ("chain_sum", {"min_terms": -1}, "min_terms must be positive"),
    ):
        with pytest.raises(UserError) as error:
            make_task(f"reasoning_gym:{name}", split="train", **options)
        assert word in str(error.value) and "\n" not in str(error.value)


def test_an_empty_file_is_an_empty_data_set(tmp_path):
    # Catches: a loop over nothing that trains for zero steps and reports success.
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="empty data set"):
        make_task(f"jsonl:{tmp_path / 'empty.jsonl'}", split="train")
