"""From curves to verdicts: what is measured of a run, how arms are compared seed by seed, when a claim is reproduced.

All arms of a seed share cold start, prompts and keys, so that arms are compared by the differences within seeds. A
claim is a weighted sum over arms of one number per run; its effect is the interquartile mean of these sums over the
seeds, with a bootstrap interval over seeds (Agarwal et al. 2021, arXiv 2108.13264, for one task). Collapses, which are
counted, are averaged over all seeds: an interquartile mean of zeros and ones is seldom their share.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from gspo.report.ledger import Curves

RESAMPLES = 10_000
WINDOW = 5  # rollouts over which training reward is smoothed before a collapse is looked for
COLLAPSED = 0.6  # of the largest value before
START = 5  # rollouts at the start, in which nothing has collapsed yet
LAST = 5  # rollouts at the end over which what fluctuates is averaged
TINY = 1e-6  # stands for a share of nothing where its logarithm is taken

# ---------------------------------------------------------------------------- numbers of one run


def smoothed(values_R: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """Mean over the last `window` values, of fewer at the start."""
    sums = np.cumsum(np.concatenate([[0.0], values_R]))
    first = np.maximum(np.arange(len(values_R)) + 1 - window, 0)
    return (sums[1:] - sums[first]) / (np.arange(len(values_R)) + 1 - first)


def reward_of(curve: Mapping[str, np.ndarray]) -> np.ndarray:
    """Training reward by rollout, without the line of the last evaluation."""
    reward_R = curve["reward"]
    return reward_R[~np.isnan(reward_R)]


def has_collapsed(curve: Mapping[str, np.ndarray]) -> float:
    """1.0 where training reward, smoothed over 5 rollouts, falls below 0.6 of its running maximum and does not come
    back, else 0.0."""
    smooth_R = smoothed(reward_of(curve))
    return float(smooth_R[-1] < COLLAPSED * smooth_R.max())


def final_reward(curve: Mapping[str, np.ndarray]) -> float:
    """Training reward, mean of the last 5 rollouts."""
    return float(reward_of(curve)[-LAST:].mean())


def held_out(curve: Mapping[str, np.ndarray]) -> float:
    """pass@1 on held-out prompts at the end."""
    return float(curve["pass@1"][-1])


def area(curve: Mapping[str, np.ndarray]) -> float:
    """Mean training reward over all rollouts: the area under the curve over its length."""
    return float(reward_of(curve).mean())


def mean_of(column: str, first: int | None = None) -> Callable[[Mapping[str, np.ndarray]], float]:
    """The mean over the run, or over its first rollouts."""
    return lambda curve: float(np.nanmean(curve[column][:first]))


def log10_of(column: str) -> Callable[[Mapping[str, np.ndarray]], float]:
    """log10 of the mean over the run: differences of it are orders of magnitude."""
    return lambda curve: float(np.log10(max(np.nanmean(curve[column]), TINY)))


STATISTICS = {
    "held-out pass@1": held_out,
    "final reward": final_reward,
    "area under the reward": area,
    "collapsed": has_collapsed,
    "orders of magnitude of clipped tokens": log10_of("clipped"),
    "experts changed per rollout": mean_of("experts_changed"),
    "experts changed per update": mean_of("experts_changed_per_update"),
    "experts changed per rollout at the start": mean_of("experts_changed", START),
    "experts changed per update at the start": mean_of("experts_changed_per_update", START),
    "log10 of the variance of log s": log10_of("sequence_variance"),
    "log10 of the variance of token log-ratios": log10_of("token_variance"),
}

# ---------------------------------------------------------------------------- numbers of many


def iqm(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Interquartile mean: a quarter of the values cut off at each end."""
    return stats.trim_mean(values, 0.25, axis=axis)


def middle_of(statistic: str) -> Callable[..., np.ndarray]:
    """What many runs are summed up by: the share of those that collapse, of all else the interquartile mean."""
    return np.mean if statistic == "collapsed" else iqm


def interval(values_S: np.ndarray, confidence: float = 0.95, middle: Callable = iqm) -> tuple[float, float]:
    """Bootstrap interval of the middle over seeds, by percentiles, always with the same resamples."""
    if len(values_S) < 2 or np.ptp(values_S) == 0:
        return float(values_S.min()), float(values_S.max())
    rng = np.random.default_rng(0)
    found = stats.bootstrap(
        (values_S,), middle, confidence_level=confidence, n_resamples=RESAMPLES, method="percentile", vectorized=True,
        rng=rng,
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def band(values_SR: np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By rollout: interquartile mean over seeds, and its interval."""
    edges = np.array([interval(column, confidence) for column in values_SR.T])
    return iqm(values_SR, axis=0), edges[:, 0], edges[:, 1]


# ---------------------------------------------------------------------------- claims


class Claim(NamedTuple):
    """What somebody says, as a number with a threshold.

    statistic   a name of STATISTICS
    weights     arm -> weight in the sum, "GSPO": 1 and "GRPO": -1 say
    least       the smallest effect that counts: the claim says that the sum is above 0, by so much or more. Below 0:
                it says that nothing is lost, and a loss of up to so much does not count
    """

    number: str
    says: str
    source: str
    figure: str
    statistic: str
    weights: Mapping[str, float]
    least: float
    confidence: float = 0.95


class Verdict(NamedTuple):
    """effect and its interval; seeds that all arms have; word: reproduced, not reproduced, undecided, not run."""

    claim: Claim
    word: str
    effect: float
    low: float
    high: float
    seeds: tuple[int, ...]


def sums_by_seed(claim: Claim, curves: Callable[[str], Curves]) -> dict[int, float]:
    """seed -> the weighted sum, of the seeds that all arms of the claim have."""
    runs = {arm: curves(arm) for arm in claim.weights}
    seeds = sorted(set.intersection(*(set(own) for own in runs.values())))
    measure = STATISTICS[claim.statistic]
    return {s: sum(w * measure(runs[arm][s]) for arm, w in claim.weights.items()) for s in seeds}


def verdict(claim: Claim, curves: Callable[[str], Curves]) -> Verdict:
    """Reproduced: the interval lies above 0 and the effect is one that counts (of a claim that nothing is lost: the
    interval excludes a loss that counts). Not reproduced: the interval excludes an effect that counts. Else undecided:
    more seeds would tell."""
    sums = sums_by_seed(claim, curves)
    if len(sums) < 3:
        nothing = float("nan")
        return Verdict(claim, "not run", nothing, nothing, nothing, tuple(sums))
    values_S = np.array(list(sums.values()))
    middle = middle_of(claim.statistic)
    effect, (low, high) = float(middle(values_S)), interval(values_S, claim.confidence, middle)
    word = "undecided"
    if low > min(claim.least, 0) and effect >= claim.least:
        word = "reproduced"
    elif high < claim.least:
        word = "not reproduced"
    return Verdict(claim, word, effect, low, high, tuple(sums))


def arms_table(arms: Sequence[str], curves: Callable[[str], Curves]) -> tuple[list[list[str]], tuple[str, ...]]:
    """Rows and columns of a table: what arms with three seeds or more came to, means with their intervals."""
    columns = ("arm", "seeds", "held-out pass@1", "area under the reward", "collapsed", "clipped tokens [%]")
    rows = []
    for arm in arms:
        runs = list(curves(arm).values())
        if len(runs) < 3:
            continue
        cells = []
        for name in columns[2:5]:
            values = np.array([STATISTICS[name](run) for run in runs])
            low, high = interval(values, middle=middle_of(name))
            cells.append(f"{middle_of(name)(values):.2f} [{low:.2f}, {high:.2f}]")
        clipped = 100 * iqm(np.array([mean_of("clipped")(run) for run in runs]))
        rows.append([arm, str(len(runs)), *cells, f"{clipped:.2g}"])
    return rows, columns


def claims_table(verdicts: Sequence[Verdict]) -> tuple[list[list[str]], tuple[str, ...]]:
    """Rows and columns of a table."""
    columns = ("", "claim", "source", "measured", "at least", "effect [interval]", "seeds", "verdict")
    rows = []
    for v in verdicts:
        effect = "-" if v.word == "not run" else f"{v.effect:+.3f} [{v.low:+.3f}, {v.high:+.3f}]"
        sums = " ".join(f"{'+' if w > 0 else '-'} {arm}" for arm, w in v.claim.weights.items()).removeprefix("+ ")
        rows.append([v.claim.number, v.claim.says, v.claim.source, f"{v.claim.statistic}: {sums}", f"{v.claim.least:g}",
                     effect, str(len(v.seeds)), v.word])  # fmt: skip
    return rows, columns
