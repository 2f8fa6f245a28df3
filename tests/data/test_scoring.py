"""Rewards of a batch: weights, failures and how many there may be, and the same numbers from processes."""

import os
import sys
import time

import numpy as np
import pytest

from gspo.data.example import Example
from gspo.data.rewards import exact_match
from gspo.data.scoring import Judging, RewardsFailed, Scorer, make_scorer
from gspo.data.tasks import Task
from gspo.data.user_rewards import one_by_one
from gspo.types import UserError

EXACT = one_by_one("exact_match", exact_match)
TASK = Task("mine", 1, lambda _: Example("p", "a", metadata={"level": 1}), exact_match)


def test_rewards_are_the_weighted_sum_of_their_parts():
    # Catches: weights that are normalised, dropped or applied to the parts, which are logged as they came.
    examples = [Example("", "7"), Example("", "8")]
    rewards = [EXACT, one_by_one("half", lambda text, _: len(text) / 2)]
    scores = Scorer(rewards, [1.0, 0.5])(["7", "7"], examples)
    assert scores.rewards_B.dtype == scores.parts_BR.dtype == np.float32
    np.testing.assert_allclose(scores.parts_BR, [[1, 0.5], [0, 0.5]])
    np.testing.assert_allclose(scores.rewards_B, [1.25, 0.25])
    np.testing.assert_allclose(Scorer(rewards)(["7", "7"], examples).rewards_B, [1.5, 0.5])  # 1 each
    assert not scores.failed_BR.any()
    with pytest.raises(ValueError):
        Scorer([EXACT])(["7"], examples)  # rows and examples must come in pairs


def test_a_reward_that_fails_counts_as_zero_is_named_in_the_log_and_ends_a_run_past_its_share(caplog):
    # Catches: one odd completion that ends a run, a NaN that poisons the advantages of its group, a share that counts
    # another reward's failures, and one that is allowed counted as too many.
    def fragile(text: str, example: Example) -> float:
        return {"bad": 1 / 0 if text == "bad" else 1, "nan": float("nan"), "none": None}.get(text, 1.0)

    texts = ["fine", "bad", "nan", "none"]
    with caplog.at_level("WARNING", logger="absl"):
        scorer = Scorer([one_by_one("fragile", fragile), EXACT], max_errors=0.75)
        scores = scorer(texts, [Example("", "")] * 4)
    np.testing.assert_array_equal(scores.rewards_B, [1, 0, 0, 0])
    np.testing.assert_array_equal(scores.failed_BR, [[0, 0], [1, 0], [1, 0], [1, 0]])
    (record,) = caplog.records
    assert record.getMessage() == (
        "reward fragile failed on 3 of 4 completions, which count as 0: ZeroDivisionError: division by zero; "
        "completion 'bad'"
    )
    scorer.check(scores.failed_BR)
    stricter = Scorer([one_by_one("fragile", fragile), EXACT], max_errors=0.7)
    with pytest.raises(RewardsFailed, match="fragile failed on 3 of 4 completions, more than rewards_max_errors=0"):
        stricter.check(stricter(texts, [Example("", "")] * 4).failed_BR)
    with pytest.raises(RewardsFailed, match="seen by another process"):  # whose rows they were
        Scorer([EXACT], max_errors=0.0).check(np.ones((1, 1), bool))


MODULE = """
import os, subprocess, sys, time

def slow(completion, example):
    if completion == "hang":
        while True: pass
    if completion == "sleep with a child":
        subprocess.Popen(["sleep", "60"]); time.sleep(60)
    if completion == "crash":
        os._exit(1)
    if completion == "loud":
        os.write(1, b"on the terminal"); os.system("echo on the terminal"); print("said")
    if completion == "pid":
        return float(os.getpid())
    if completion == "raise":
        raise ValueError("no")
    return float(len(completion))

def grouped(completions, level, **kwargs):
    return [len(completions) + len(c) * n for c, n in zip(completions, level)]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pool")
    (path / "slow_of_mine.py").write_text(MODULE)
    here = "import multiprocessing, os\nif multiprocessing.parent_process() is not None: "
    for name, there in (("fickle", "raise RuntimeError('not here')"), ("dying", "os._exit(1)")):
        (path / f"{name}_of_mine.py").write_text(f"{here}{there}\ndef f(completion, example): return 1.0\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setattr(sys, "path", list(sys.path))
        yield path
    for name in ("slow_of_mine", "fickle_of_mine", "dying_of_mine"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def pooled(folder):
    scorer = make_scorer(
        ["slow_of_mine:slow", "task", "slow_of_mine:grouped"], TASK, judging=Judging(workers=2, timeout_s=0.5)
    )
    yield scorer
    scorer.close()


def test_processes_give_the_numbers_that_this_one_gives(pooled, folder):
    # Catches: results that come back in the order in which they were finished, groups cut elsewhere, weights lost.
    texts, examples = [str(i) * (i % 5) for i in range(12)], [TASK[0]] * 12
    alone = make_scorer(["slow_of_mine:slow", "task", "slow_of_mine:grouped"], TASK)
    for one, other in zip(pooled(texts, examples, 4), alone(texts, examples, 4), strict=True):
        np.testing.assert_array_equal(one, other)
    assert pooled(texts, examples, 4).parts_BR[1].tolist() == [1, 0, 4 + 1]


def test_a_call_that_hangs_or_crashes_costs_its_completion_and_no_other(pooled, capfd, caplog):
    # Catches: a run that waits for ever, a process that is not replaced, the next call answered by the last one's
    # result, output on the terminal, children that live on.
    texts = ["hang", "a", "crash", "bb", "loud", "raise", "sleep with a child", "ccc"]
    start = time.monotonic()
    with caplog.at_level("WARNING", logger="absl"):
        scores = pooled(texts, [TASK[0]] * 8)
    assert time.monotonic() - start < 8
    assert scores.parts_BR[:, 0].tolist() == [0, 1, 0, 2, 4, 0, 0, 3]
    assert scores.failed_BR[:, 0].tolist() == [True, False, True, False, False, True, True, False]
    told = [record.getMessage() for record in caplog.records]
    assert told[0].startswith(
        "reward slow_of_mine:slow failed on 4 of 8 completions, which count as 0: took longer than "
    )
    assert told[1].endswith("It began with: said") and capfd.readouterr() == ("", "")
    assert os.popen("ps -eo args").read().count("sleep 60") == 0
    again = pooled(["dddd", "e", "ff"], [TASK[0]] * 3)
    assert again.parts_BR[:, 0].tolist() == [4, 1, 2] and not again.failed_BR.any()


def test_processes_end_with_the_scorer(folder):
    # Catches: processes that outlive the run.
    scorer = make_scorer(["slow_of_mine:slow"], TASK, judging=Judging(workers=1))
    pid = int(scorer(["pid"], [TASK[0]]).parts_BR[0, 0])
    os.kill(pid, 0)
    scorer.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    ("name", "why"),
    [("fickle_of_mine:f", "judge: 'fickle_of_mine:f': importing .* failed: RuntimeError: not here"),
     ("dying_of_mine:f", "its process ended")],
)  # fmt: skip
def test_a_process_that_cannot_load_the_rewards_is_one_line(folder, name, why):
    # Catches: a traceback of the pipe where a module that this process has imported crashes in another; and a field
    # that does not name the reward.
    scorer = make_scorer([name], TASK, judging=Judging(workers=1), field="judge")
    with pytest.raises(UserError, match=f"^reward_workers: a process that was to load the rewards did not: {why}$"):
        scorer(["a"], [TASK[0]])
    scorer.close()


def test_math_verify_wants_a_process_that_can_be_ended():
    # Catches: SymPy in the run's own process, where nothing can stop it.
    with pytest.raises(UserError, match=r"math_verify.*(reward_workers=1|pip install)"):
        make_scorer(["math_verify"], TASK)
