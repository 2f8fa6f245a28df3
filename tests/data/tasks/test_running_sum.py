"""The toy: sums, splits that never meet, the demonstrator's known pass@1."""

import collections
import time

import pytest

from gspo.data.tasks import make_task


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
