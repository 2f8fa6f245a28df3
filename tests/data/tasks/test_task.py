"""The door to all tasks: a name, a split, options; mistakes are one line."""

import pytest

from gspo.data.tasks import make_task
from gspo.types import UserError


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
