"""From curves to verdicts: what a collapse is, how arms are compared, which word a claim gets."""

import numpy as np
import pytest

from gspo.report import evidence
from gspo.report.evidence import Claim, arms_table, claims_table, has_collapsed, smoothed, verdict
from gspo.report.ledger import METRICS


def curve(rewards, **columns):
    """A run whose last line is an evaluation."""
    rewards = np.asarray(rewards, float)
    whole = {name: np.full(len(rewards) + 1, np.nan) for name in METRICS}
    whole["reward"][:-1] = rewards
    whole["pass@1"][-1] = columns.pop("end", rewards[-1])
    return whole | {name: np.append(np.full(len(rewards), value, float), np.nan) for name, value in columns.items()}


def ends(*values):
    """seed -> a run that ends so."""
    return {10 + i: curve([0.5] * 6, end=value) for i, value in enumerate(values)}


def judged(left, right, least=0.05, statistic="held-out pass@1"):
    arms = {"left": left, "right": right}
    return verdict(Claim("1", "it says", "there", "fig", statistic, {"left": 1.0, "right": -1.0}, least), arms.get)


def test_smoothing_is_the_mean_of_the_last_values_and_of_fewer_at_the_start():
    # Catches a window that looks ahead, and zeros that are taken for values before the first.
    values = np.array([1.0, 3.0, 5.0, 1.0, 0.0])
    np.testing.assert_allclose(smoothed(values, 3), [1, 2, 3, 3, 2])


@pytest.mark.parametrize(
    ("rewards", "collapsed"),
    [
        ([0.2, 0.5, 0.8, 0.8, 0.8, 0.8, 0.8] + [0.0] * 10, 1.0),
        ([0.2, 0.5, 0.8, 0.8, 0.8, 0.0, 0.0, 0.0, 0.0, 0.0] + [0.8] * 10, 0.0),  # it comes back
        ([0.9] + [0.6] * 20, 0.0),  # one good rollout is no maximum
        ([0.8] * 20 + [0.0], 0.0),  # one bad rollout is no collapse
        ([0.3] * 20, 0.0),
    ],
)
def test_a_collapse_falls_below_six_tenths_of_the_best_and_does_not_come_back(rewards, collapsed):
    # Catches a collapse counted from single rollouts, against the first value, or that was mended.
    assert has_collapsed(curve(rewards)) == collapsed


def test_arms_are_compared_within_seeds():
    # Catches intervals over all runs of both arms: seeds differ by far more than the arms do.
    better = ends(0.20, 0.41, 0.62, 0.83, 0.94)
    worse = ends(0.10, 0.30, 0.50, 0.70, 0.80)
    found = judged(better, worse)
    assert found.word == "reproduced"
    assert found.effect == pytest.approx(np.mean([0.11, 0.12, 0.13]))  # the middle ones
    assert 0.1 <= found.low < found.effect < found.high <= 0.14
    assert judged(worse, better).word == "not reproduced"


def test_only_seeds_that_all_arms_have_are_compared_and_fewer_than_three_prove_nothing():
    # Catches a seed paired with another one, and a verdict from two runs.
    left, right = ends(0.9, 0.9, 0.9, 0.1), ends(0.1, 0.1, 0.1)
    assert judged(left, right).seeds == (10, 11, 12)
    del right[11]
    found = judged(left, right)
    assert (found.word, found.seeds) == ("not run", (10, 12))


@pytest.mark.parametrize(
    ("differences", "least", "word"),
    [
        ((0.01, 0.02, 0.01, 0.02, 0.01), 0.05, "not reproduced"),  # above 0, and never as much as counts
        ((-0.3, 0.4, 0.5, -0.2, 0.3), 0.05, "undecided"),
        ((0.3, 0.4, 0.5, 0.2, 0.3), 0.05, "reproduced"),
        ((-0.01, 0.01, 0.0, -0.02, 0.01), -0.05, "reproduced"),  # nothing is lost
        ((-0.2, -0.3, -0.1, -0.2, -0.3), -0.05, "not reproduced"),
        ((-0.2, 0.1, 0.2, -0.1, 0.0), -0.05, "undecided"),
    ],
)
def test_a_verdict_needs_both_an_interval_and_an_effect_that_counts(differences, least, word):
    # Catches significance sold as size, and the absence of evidence sold as evidence of absence.
    left = ends(*(0.5 + d for d in differences))
    assert judged(left, ends(*[0.5] * 5), least).word == word


def test_orders_of_magnitude_are_differences_of_logarithms_of_means():
    # Catches a mean of logarithms, which a rollout without a clipped token would decide.
    left = {s: curve([0.5] * 6, clipped=0.2) for s in (1, 2, 3)}
    right = {s: curve([0.5] * 6, clipped=0.002) for s in (1, 2, 3)}
    right[1]["clipped"][0] = 0.0
    found = judged(left, right, 1.0, "orders of magnitude of clipped tokens")
    assert found.word == "reproduced"
    assert found.low == pytest.approx(2.0)


def test_collapses_are_averaged_over_all_seeds():
    # Catches a share of collapses that leaves out the seeds at both ends: of 2 in 10 the interquartile mean is 0.
    fell = [curve([0.8] * 10 + [0.0] * 10, clipped=0.1)] * 2 + [curve([0.8] * 20, clipped=0.1)] * 8
    never = {s: curve([0.8] * 20) for s in range(10)}
    found = judged(dict(enumerate(fell)), never, 0.1, "collapsed")
    assert found.effect == pytest.approx(0.2)
    rows, columns = arms_table(["left", "few"], {"left": dict(enumerate(fell)), "few": ends(0.1, 0.1)}.get)
    assert [row[0] for row in rows] == ["left"]  # two seeds are no result
    assert rows[0][columns.index("collapsed")].startswith("0.20 [0.00, 0.")


def test_an_interval_is_the_same_at_every_call_and_narrower_with_more_seeds():
    # Catches resamples that change the verdict from one drawing to the next.
    values = np.random.default_rng(0).normal(size=8)
    assert evidence.interval(values) == evidence.interval(values)
    low, high = evidence.interval(values)
    lower, higher = evidence.interval(np.tile(values, 8))
    assert low < lower < higher < high


def test_the_table_shows_what_was_not_run_as_such():
    # Catches a claim that is left out because it was not run.
    rows, columns = claims_table([judged(ends(0.9, 0.9), ends(0.1, 0.1)), judged(ends(*[0.9] * 3), ends(*[0.1] * 3))])
    assert [row[columns.index("verdict")] for row in rows] == ["not run", "reproduced"]
    assert rows[0][columns.index("effect [interval]")] == "-"
    assert "left - right" in rows[1][columns.index("measured")]
