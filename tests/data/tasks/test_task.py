"""The door to all tasks: a name, a split, options; mistakes are one line."""

import pytest

from gspo.data.tasks import check_splits, make_task
from gspo.types import UserError


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("runing_sum", {}, ["task.name='runing_sum': unknown", "jsonl:<path>", "did you mean 'running_sum'?"]),
        ("gsm8k", {}, ["did you mean 'tfds:gsm8k'?"]),
        ("tfds", {}, ["task.name='tfds': unknown"]),
        ("running_sum:12", {}, ["task.name='running_sum:12': unknown"]),
        ("running_sum", {"num_digit": 3}, ["task.options.num_digit: ", "did you mean 'num_digits'?"]),
        ("running_sum", {"modulus": 11}, ["task.options.modulus=11: "]),
        ("running_sum", {"error_rate": 1.2}, ["task.options.error_rate=1.2: "]),
        (
            "running_sum",
            {"split": "train[:5]"},
            ["task.train_split, task.eval_split: ", "'train' and 'test'", "'train[:5]'"],
        ),
        ("arithmetic:product", {}, ["task.name='arithmetic:product': unknown"]),
        ("arithmetic", {"kind": "sum"}, ["task.options.kind='sum': choose one of product, largest"]),
        ("arithmetic", {"kind": "largest", "high": 14}, ["task.options.low=10, task.options.high=14: "]),
        ("arithmetic", {"low": -1}, ["task.options.low=-1, "]),
        ("arithmetic", {"size": 1000}, ["task.options.size=1000: task arithmetic has only "]),
        ("running_sum", {"size": 0}, ["task.options.size=0: ", "empty data set"]),
        ("jsonl:no/such.jsonl", {}, ["task.name='jsonl:no/such.jsonl': "]),
        ("tfds:mnist", {}, ["task.options.prompt_field, task.options.answer_field: "]),
    ],
)
def test_a_mistake_in_a_task_is_one_line_with_the_nearest_name(name, options, words):
    # Catches: tracebacks, and options that nothing reads.
    with pytest.raises(UserError) as error:
        make_task(name, **{"split": "train", **options})
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_procedural_tasks_may_have_any_options_where_their_splits_are_checked():
    # Catches: a check that refuses a task for options that are none of its business.
    for name in ("running_sum", "reasoning_gym:chain_sum"):
        options = {"train_split": "train", "eval_split": "test", "size": 5, "num_digits": 3}
        assert check_splits(name, **options) is None
        line = check_splits(name, **options | {"eval_split": "train"})
        assert line.startswith("evaluation reads training examples: task.eval_split='train'") and "\n" not in line
