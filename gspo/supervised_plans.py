"""What training on given data will do: the plans of `gspo.sft`, `gspo.reward_model` and `gspo.dpo`; and of
`gspo.label`, which makes such data."""

import dataclasses
from typing import ClassVar

from gspo.checks import need, positive
from gspo.model.distribution import Sampling
from gspo.plans import REWARD_MODEL_PREFIX, PolicyPlan, RunPlan
from gspo.run.identity import REWARD_MODEL
from gspo.types import UserError


@dataclasses.dataclass(frozen=True)
class SupervisedPlan(RunPlan):
    """Training on given data. batch_size: examples of an update; with packing, rows."""

    num_updates: int
    batch_size: int

    def __post_init__(self):
        positive(self, "num_updates", "batch_size")
        self.check_router_losses()


@dataclasses.dataclass(frozen=True)
class SFTPlan(SupervisedPlan):
    """Supervised fine-tuning: an example is a demonstration. packing: whether a row holds several. target_pass_at_1:
    what ends the run at an evaluation; None: nothing does."""

    packing: bool
    target_pass_at_1: float | None

    def __post_init__(self):
        super().__post_init__()
        self.update.check_rows(self.batch_size, "a batch (batch_size)")
        target = self.target_pass_at_1
        need(target is None or 0 < target <= 1, "target_pass_at_1", target, "must be in (0, 1]; None: no target")
        need(target is None or self.evaluation.every > 0, "target_pass_at_1", target, "set eval.every, to look at it")


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
        if self.lora:
            raise UserError(f"lora.rank={self.lora.rank}: all weights of a reward model are trained; set it to 0")
        if self.update.router_losses:
            raise UserError("router_aux_loss_coef, router_z_loss_coef: a reward model has no such loss; set them to 0")
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


@dataclasses.dataclass(frozen=True)
class LabelPlan(PolicyPlan):
    """Preferences from a judge, over two completions of each prompt that the policy in init_from draws. judge: the name
    of a reward that reads texts, or "model:FOLDER". label_temperature: 0: the better text is chosen; else drawn."""

    num_prompts: int  # of the training split; the next of the evaluation split
    num_eval_prompts: int
    prompts_at_a_time: int
    sampling: Sampling
    judge: str
    judge_template: str  # "": that of `gspo.judge`
    label_temperature: float

    def __post_init__(self):
        positive(self, "num_prompts", "num_eval_prompts", "prompts_at_a_time")
        need(bool(self.init_from), "init_from", self.init_from, "name the policy whose completions are compared")
        need(self.sampling.temperature > 0, "temperature", self.sampling.temperature,
             "two greedy completions are the same; give a positive one")  # fmt: skip
        need(self.label_temperature >= 0, "label_temperature", self.label_temperature,
             "must be >= 0 (0: the better text is chosen)")  # fmt: skip
        need(self.data.eval_split != self.data.train_split, "task.eval_split", self.data.eval_split,
             "the pairs of each split are a file of its name; name another than task.train_split")  # fmt: skip
        need(bool(self.judge), "judge", self.judge, "name a reward, or model:FOLDER")
        need(not self.judge.startswith(REWARD_MODEL_PREFIX), "judge", self.judge,
             "trained reward models are for `rewards` alone; name another reward, or model:FOLDER")  # fmt: skip
        if self.judge_template:
            check_template(self.judge_template)


def check_template(template: str) -> None:
    """Raises UserError where one of the three parts of a question is missing, or it has others."""
    parts = ("prompt", "first", "second")
    try:
        template.format(**dict.fromkeys(parts, ""))
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"judge_template: {error!s}; it may have {{prompt}}, {{first}} and {{second}}") from None
    missing = [f"{{{name}}}" for name in parts if f"{{{name}}}" not in template]
    if missing:
        raise UserError(f"judge_template: {', '.join(missing)} is not in it")
