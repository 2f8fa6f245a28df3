"""Completions to rewards: which functions a config names, how often they may fail, and what is made of their values."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from gspo.data.example import Example
from gspo.data.reward_pool import Job, RewardPool
from gspo.data.rewards import REWARDS
from gspo.data.tasks import Task
from gspo.data.user_rewards import MATH_VERIFY, Called, Reward, attempt, load, one_by_one
from gspo.types import UserError


@dataclasses.dataclass(frozen=True)
class Judging:
    """How rewards are run. max_errors: share of the completions of a rollout on which one of them may fail. workers:
    processes for rewards that are loaded by name, each call of which may take timeout_s; 0: in this process, without a
    limit."""

    max_errors: float = 0.1
    workers: int = 0
    timeout_s: float = 10.0

    def __post_init__(self):
        for field, ok, remedy in (
            ("rewards_max_errors", 0 <= self.max_errors <= 1, "is a share, in [0, 1]"),
            ("reward_workers", self.workers >= 0, "must be >= 0 (0: in this process)"),
            ("reward_timeout_s", self.timeout_s > 0, "must be positive"),
        ):
            if not ok:
                value = getattr(self, field.partition("_")[2])
                raise UserError(f"{field}={value}: {remedy}")


class RewardsFailed(UserError):
    """A reward failed too often. Nothing else is wrong with the run: it may be saved, and go on later."""


class Scores(NamedTuple):
    """Of B completions, float32. rewards_B: the parts, weighted and added up. parts_BR: what each reward returned; 0
    where it failed, which failed_BR (bool) says."""

    rewards_B: np.ndarray
    parts_BR: np.ndarray
    failed_BR: np.ndarray


class Scorer:
    """The rewards of a run, by name, and their weights; () stands for 1 each. pool: who calls those that are loaded by
    name; None: this process."""

    def __init__(
        self,
        rewards: Sequence[Reward],
        weights: Sequence[float] = (),
        *,
        max_errors: float = 0.1,
        pool: RewardPool | None = None,
    ) -> None:
        self.names, self._rewards = [reward.name for reward in rewards], list(rewards)
        self.weights = np.asarray(weights if len(weights) else [1.0] * len(rewards), np.float32)
        self._max_errors, self._pool = max_errors, pool
        self._printed: set[str] = set()
        self._errors: dict[str, str] = {}  # of each reward, the last error seen here

    def __call__(self, texts: Sequence[str], examples: Sequence[Example], group: int = 1) -> Scores:
        """texts: B completions, `group` neighbours of one prompt each. examples: one for each of them.

        A function that raises, or returns what is no finite number, counts as 0 for that call's completions, and is
        named in the log with the first of them: one odd completion does not end a run."""
        if len(texts) != len(examples):
            raise ValueError(f"{len(texts)} completions for {len(examples)} examples")
        parts_BR = np.zeros((len(texts), len(self._rewards)), np.float32)
        failed_BR = np.zeros(parts_BR.shape, bool)
        calls = [(r, rows) for r, reward in enumerate(self._rewards) for rows in _calls(reward, len(texts), group)]
        done = self._made([Job(self.names[r], *_cut(rows, texts, examples)) for r, rows in calls], calls)
        for (r, rows), called in zip(calls, done, strict=True):
            parts_BR[rows, r], failed_BR[rows, r] = called.values, bool(called.error)
        self._report(texts, calls, done)
        return Scores(parts_BR @ self.weights, parts_BR, failed_BR)

    def _made(self, jobs: Sequence[Job], calls: Sequence[tuple[int, slice]]) -> list[Called]:
        """All calls, those for the pool together."""
        pooled = [i for i, (r, _) in enumerate(calls) if self._pool is not None and self._rewards[r].by_name]
        done = dict(zip(pooled, self._pool.run([jobs[i] for i in pooled]) if pooled else (), strict=True))
        return [
            done[i] if i in done else attempt(self._rewards[r], jobs[i].texts, jobs[i].examples)
            for i, (r, _) in enumerate(calls)
        ]

    def _report(self, texts: Sequence[str], calls: Sequence[tuple[int, slice]], done: Sequence[Called]) -> None:
        for r, name in enumerate(self.names):
            own = [(rows, called) for (of, rows), called in zip(calls, done, strict=True) if of == r]
            failed = [(rows, called.error) for rows, called in own if called.error]
            if failed:
                rows, error = failed[0]
                count = sum(rows.stop - rows.start for rows, _ in failed)
                self._errors[name] = f"{error}; completion {texts[rows.start]!r:.200}"
                logging.warning("reward %s failed on %d of %d completions, which count as 0: %s",
                                name, count, len(texts), self._errors[name])  # fmt: skip
            printed = next((called.printed for _, called in own if called.printed), "")
            if printed and name not in self._printed:
                self._printed.add(name)
                logging.warning("reward %s prints, which is not shown: a display may be drawn there. It began with: %s",
                                name, printed)  # fmt: skip

    def check(self, failed_BR: np.ndarray) -> None:
        """failed_BR: of the completions of all processes, so that all of them decide alike. Raises RewardsFailed where
        a reward failed on more of them than may be."""
        for name, failed_B in zip(self.names, failed_BR.T, strict=True):
            if failed_B.mean() > self._max_errors:
                error = self._errors.get(name, "seen by another process")
                raise RewardsFailed(
                    f"reward {name} failed on {int(failed_B.sum())} of {len(failed_B)} completions, more than "
                    f"rewards_max_errors={self._max_errors:g} of them: {error}"
                )

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


def make_scorer(
    names: Sequence[str],
    task: Task,
    weights: Sequence[float] = (),
    judging: Judging = Judging(),
    field: str = "rewards",
) -> Scorer:
    """The rewards of these names for a task; "task" is its own. Raises UserError for one that is not known, or cannot
    be loaded. field: of the config that names them."""
    rewards = [_reward(name, task, field) for name in names]
    if MATH_VERIFY in names and not judging.workers:
        raise UserError(
            f'{field}: "math_verify" computes with what the model wrote, which may never end; set reward_workers=1 or '
            "more, so that reward_timeout_s can end it"
        )
    pooled, pool = [reward.name for reward in rewards if reward.by_name], None
    if pooled and judging.workers:
        pool = RewardPool(pooled, task[0], field, workers=judging.workers, timeout_s=judging.timeout_s)
    return Scorer(rewards, weights, max_errors=judging.max_errors, pool=pool)


def _reward(name: str, task: Task, field: str) -> Reward:
    known: dict[str, Callable] = {"task": task.reward} | REWARDS
    if name in known:
        return one_by_one(name, known[name])
    if name == MATH_VERIFY or ":" in name:
        return load(name, task[0], field)
    raise UserError(
        f"{field}: no reward named {name!r}; choose from {', '.join(known)}, {MATH_VERIFY}, or your own as "
        "'module:function'"
    )


def _calls(reward: Reward, count: int, group: int) -> list[slice]:
    size = group if reward.by_group else 1
    return [slice(start, start + size) for start in range(0, count, size)]


def _cut(rows: slice, texts: Sequence[str], examples: Sequence[Example]) -> tuple[list[str], list[Example]]:
    return list(texts[rows]), list(examples[rows])
