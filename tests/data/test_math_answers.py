"""math-verify as a reward: what it takes for equal, and that nothing the model writes holds it up."""

import time

import pytest

from gspo.data.example import Example
from gspo.data.math_answers import math_verify
from gspo.data.rewards import exact_match
from gspo.data.scoring import Judging, make_scorer
from gspo.data.tasks import Task

pytest.importorskip("math_verify")


@pytest.mark.parametrize(
    ("completion", "answer", "equal"),
    [
        (r"so it is $\frac{1}{2}$", "0.5", 1),
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", 1),
        (r"$\{3, 1, 2\}$", r"\{1,2,3\}", 1),
        ("The answer is 72.", "72", 1),
        ("The answer is 71.", "72", 0),
        (r"\boxed{x^2 + 2x + 1}", "(x+1)^2", 1),
        ("no idea", "72", 0),
        ("", "72", 0),
    ],
)
def test_answers_are_equal_as_mathematics(completion, answer, equal):
    # Catches: an answer of the data without dollar signs that is not parsed, a reversed comparison, text that raises.
    assert math_verify(completion, Example("", answer)) == equal


@pytest.mark.slow
def test_a_tower_of_powers_costs_its_own_completion():
    # Catches: SymPy's computation of 9^9^9^9^9, which hears no alarm, in the way of everything.
    task = Task("mine", 1, lambda _: Example("p", "4"), exact_match)
    scorer = make_scorer(["math_verify"], task, judging=Judging(1.0, workers=1, timeout_s=3))
    start = time.monotonic()
    scores = scorer([r"\boxed{9^{9^{9^{9^9}}}}", r"\boxed{2+2}", "((((" * 5000], [task[0]] * 3)
    assert scores.rewards_B[1] == 1 and scores.rewards_B[0] == 0 and time.monotonic() - start < 60
    scorer.close()
