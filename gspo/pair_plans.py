"""What training on preferences will do: the plans of `gspo.reward_model` and `gspo.dpo`."""

import dataclasses
from typing import ClassVar

from gspo.plans import SupervisedPlan, need, positive
from gspo.run.identity import REWARD_MODEL


@dataclasses.dataclass(frozen=True)
class PairPlan(SupervisedPlan):
    """Training on preferences: an example is a pair, two rows."""

    best_metric: ClassVar[str] = "eval/accuracy"

    def __post_init__(self):
        super().__post_init__()
        need(self.update.micro_batch_size % 2 == 0, "micro_batch_size", self.update.micro_batch_size,
             "the two rows of a pair stay together: must be even")  # fmt: skip
        self.update.check_rows(2 * self.batch_size, "a batch (two for each pair of batch_size)")


@dataclasses.dataclass(frozen=True)
class RewardModelPlan(PairPlan):
    """A reward model."""

    center_rewards_coefficient: float
    kind: ClassVar[str] = REWARD_MODEL

    def __post_init__(self):
        super().__post_init__()
        need(self.center_rewards_coefficient >= 0, "center_rewards_coefficient", self.center_rewards_coefficient,
             "must be >= 0 (0: no such term)")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DPOPlan(PairPlan):
    """Direct preference optimization."""

    beta: float
    label_smoothing: float

    def __post_init__(self):
        super().__post_init__()
        positive(self, "beta")
        need(0 <= self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing,
             "must be in [0, 0.5): from one half on, labels say nothing or the opposite")  # fmt: skip
