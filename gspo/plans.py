"""What a run will do, as frozen records of plain values. `gspo.build` makes them from a config, and is the only one to
read it.

Each record checks itself where it is made. Its fields carry the names that the user writes, so that a mistake is one
line that names the field, before anything is compiled.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from gspo.checks import need, not_negative, one_of, positive
from gspo.data.scoring import Judging
from gspo.held import ReferencePlan, Storage
from gspo.learning.critic import CriticPlan
from gspo.learning.learner import UpdatePlan
from gspo.learning.mismatch import ROUNDINGS
from gspo.model.adapters import LoRA
from gspo.model.distribution import Sampling
from gspo.model.spec import ModelSpec
from gspo.objectives.advantages import ADVANTAGES
from gspo.run.identity import POLICY
from gspo.run.stored import BEST_METRIC
from gspo.types import UserError

REWARD_MODEL_PREFIX = "reward_model:"  # of the rewards that are trained models; what follows names their workdir


@dataclasses.dataclass(frozen=True)
class DataPlan:
    """Where prompts come from and how they become rows."""

    task: str
    options: Mapping[str, Any]
    train_split: str
    eval_split: str
    tokenizer: str
    max_prompt_length: int  # tokens, as the next
    max_completion_length: int
    overlong_prompts: str
    prompt_buckets: tuple[int, ...]
    seed: int
    system_prompt: str = ""
    stop: tuple[str, ...] = ()  # texts after which a completion ends

    def __post_init__(self):
        positive(self, "max_prompt_length", "max_completion_length")
        good = all(isinstance(text, str) and text for text in self.stop)
        need(good, "stop_strings", self.stop, "give texts that are not empty, as in ('</answer>',)")


@dataclasses.dataclass(frozen=True)
class MeshPlan:
    """Devices along each axis, and what is cut along which of them, in training and in rollouts."""

    sizes: Mapping[str, int]
    rules: str
    dispatch: str
    rollout_rules: str  # "": as in training; so the next
    rollout_dispatch: str


@dataclasses.dataclass(frozen=True)
class ModelPlan:
    """A model whose vocabulary is known only once its tokenizer is: vocab_size 0 stands for as many as that has."""

    fields: Mapping[str, Any]

    def __post_init__(self):
        self.spec(1)

    def spec(self, tokenizer_size: int) -> ModelSpec:
        """The model for a tokenizer of that many ids. Raises UserError where it has fewer rows than that."""
        rows = self.fields["vocab_size"]
        if 0 < rows < tokenizer_size:
            raise UserError(f"model.vocab_size={rows}: the tokenizer has {tokenizer_size} ids (0: as many as it has)")
        return ModelSpec(**{**self.fields, "vocab_size": rows or tokenizer_size})


@dataclasses.dataclass(frozen=True)
class RolloutPlan:
    """How completions are drawn in training. stale_rollouts, params, router_noise, expert_swap: a sampler that differs
    from the learner on purpose (`gspo.learning.mismatch`)."""

    num_prompts: int
    num_generations: int
    sampling: Sampling
    max_num_seqs: int  # 0: all rows at once
    params: str
    router_noise: float
    expert_swap: float
    stale_rollouts: int

    def __post_init__(self):
        positive(self, "num_prompts", "num_generations")
        if self.sampling.temperature == 0:
            raise UserError(
                f"temperature={self.sampling.temperature}: training needs a positive one; 0 (greedy) is for "
                "eval.temperature"
            )
        need(self.max_num_seqs >= 0, "max_num_seqs", self.max_num_seqs, "must be >= 0 (0: all rows at once)")
        one_of("mismatch.params", self.params, ROUNDINGS)
        if self.router_noise < 0 or not 0 <= self.expert_swap <= 1 or self.stale_rollouts < 0:
            raise UserError(
                "mismatch: router_noise and stale_rollouts must not be negative, and expert_swap lies in [0, 1]"
            )
        if self.max_num_seqs and (self.router_noise or self.expert_swap):
            raise UserError(
                f"max_num_seqs={self.max_num_seqs}: mismatch.router_noise and mismatch.expert_swap are drawn for all "
                "rows of a step together; set max_num_seqs=0"
            )

    @property
    def differs(self) -> bool:
        """Whether the sampler is made to differ from the learner."""
        return bool(self.params != "float32" or self.router_noise or self.expert_swap or self.stale_rollouts)

    @property
    def drawn(self) -> tuple[Sampling, int, int]:
        """How, how many for each prompt, how many at a time: what `steps.sampler_of` takes."""
        return self.sampling, self.num_generations, self.max_num_seqs

    @property
    def rows(self) -> int:
        return self.num_prompts * self.num_generations


@dataclasses.dataclass(frozen=True)
class ExperiencePlan:
    """From completions to a batch: rewards, what is added to them, what they are compared with, whose log-probs are
    old."""

    rewards: tuple[str, ...]
    reward_weights: tuple[float, ...]
    normalize_reward_models: bool
    clip_reward_models: float  # 0: not at all
    reward_model_storage: Storage
    scale_rewards: str
    advantage_weight_pos: float
    advantage_weight_neg: float
    reward_kl_coef: float
    overlong_len: int
    overlong_penalty_factor: float
    mask_truncated_completions: bool
    filter_groups: bool
    max_num_gen_batches: int
    old_logps: str
    replay: str
    router_kl: bool

    def __post_init__(self):
        need(len(self.rewards) > 0, "rewards", self.rewards, "name at least one, as in ('task',)")
        need(len(set(self.rewards)) == len(self.rewards), "rewards", self.rewards, "name each of them once")
        if len(self.reward_weights) not in (0, len(self.rewards)):
            raise UserError(
                f"reward_weights: {len(self.reward_weights)} weights for {len(self.rewards)} rewards; give one each, "
                "or () for 1 each"
            )
        need(self.clip_reward_models >= 0, "reward_model.clip", self.clip_reward_models, "must be >= 0 (0: no limit)")
        one_of("scale_rewards", self.scale_rewards, tuple(ADVANTAGES))
        one_of("old_logps", self.old_logps, ("sampler", "learner"))
        one_of("router_replay.mode", self.replay, ("disabled", "R2", "R3"))
        not_negative(self, "advantage_weight_pos", "advantage_weight_neg")
        not_negative(self, "reward_kl_coef", off="no penalty")
        if self.filter_groups:
            positive(self, "max_num_gen_batches", under="filter_groups.")

    @property
    def weights(self) -> tuple[float, ...]:
        """One for each of the rewards."""
        return self.reward_weights or (1.0,) * len(self.rewards)

    @property
    def reward_models(self) -> tuple[str, ...]:
        """Those of the rewards that are trained models."""
        return tuple(name for name in self.rewards if name.startswith(REWARD_MODEL_PREFIX))

    @property
    def reward_functions(self) -> dict[str, float]:
        """The others, which read texts, with their weights."""
        weights = dict(zip(self.rewards, self.weights, strict=True))
        return {name: weight for name, weight in weights.items() if name not in self.reward_models}


@dataclasses.dataclass(frozen=True)
class OptimizerPlan:
    """AdamW and its schedule, as `learning.optim.make_optimizer` takes them, over `total_steps` updates."""

    fields: Mapping[str, Any]
    total_steps: int


@dataclasses.dataclass(frozen=True)
class EvaluationPlan:
    """Evaluation on held-out prompts. every: rollouts or updates between two; 0: only at the end."""

    every: int
    num_prompts: int
    num_generations_eval: int
    temperature: float
    top_k: int
    top_p: float
    reward: str  # "": the task's own
    at_a_time: int  # prompts of one call of the sampler
    max_num_seqs: int  # rows that it decodes at a time; 0: all

    def __post_init__(self):
        positive(self, "num_prompts", "num_generations_eval", under="eval.")
        need(not self.reward.startswith(REWARD_MODEL_PREFIX), "eval.reward", self.reward,
             "its scores have no 1 that says solved; name a reward that has")  # fmt: skip
        try:
            _ = self.drawn
        except UserError as error:
            raise UserError(f"eval.{error}") from None

    @property
    def drawn(self) -> tuple[Sampling, int, int]:
        """As `RolloutPlan.drawn`."""
        sampling = Sampling(self.temperature, self.top_k, self.top_p)
        return sampling, self.num_generations_eval, self.max_num_seqs


@dataclasses.dataclass(frozen=True)
class CheckpointPlan:
    every: int
    keep_last: int
    keep_best: bool

    def __post_init__(self):
        need(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "at least one checkpoint must be kept")


@dataclasses.dataclass(frozen=True)
class LogPlan:
    num_samples: int
    samples_every: int
    tensorboard: bool
    wandb: bool
    wandb_project: str
    wandb_name: str  # "": the workdir's
    profile: tuple[int, ...] = ()  # rollouts whose trace is written
    tokens_every: int = 0  # rollouts between two of which all tokens are recorded; 0: never

    def __post_init__(self):
        need(self.tokens_every >= 0, "log.tokens_every", self.tokens_every, "must be >= 0 (0: no tokens are recorded)")


@dataclasses.dataclass(frozen=True)
class PolicyPlan:
    """A policy, what it reads, and how what it writes is judged: what training it and labelling what it writes share.

    written  the config as config.json keeps it
    missing  why a run cannot begin from init_from; "" where it can, or need not
    date     the day on which the run in the workdir began, ISO 8601; None where it begins
    """

    written: Mapping[str, Any]
    seed: int
    init_from: str
    missing: str
    date: str | None
    data: DataPlan
    mesh: MeshPlan
    model: ModelPlan
    judging: Judging


@dataclasses.dataclass(frozen=True)
class RunPlan(PolicyPlan):
    """What all kinds of training share. kind: what their checkpoints hold. best_metric: what ranks them. lora: the
    adapters that are trained; None: the weights are."""

    lora: LoRA | None
    optimizer: OptimizerPlan
    update: UpdatePlan
    evaluation: EvaluationPlan
    checkpoint: CheckpointPlan
    log: LogPlan
    kind: ClassVar[str] = POLICY
    best_metric: ClassVar[str] = BEST_METRIC

    @property
    def beside_model(self) -> dict[str, Any]:
        """What checkpoints say of weights that are not of the run's model."""
        return {}

    def check_router_losses(self) -> None:
        """Raises UserError where a dense model is to have some."""
        if self.update.router_losses and not self.model.fields["num_experts"]:
            raise UserError("router_aux_loss_coef, router_z_loss_coef: a dense model has no routers; set them to 0")


@dataclasses.dataclass(frozen=True)
class RLPlan(RunPlan):
    """Reinforcement learning. objective: all settings of the preset and of the fields laid over it, defaults filled in
    (`objectives.settings`). critic: None where advantages come from the group. check_tolerance: None: by the dtype.
    """

    num_rollouts: int
    updates_per_rollout: int  # in one pass over it
    num_iterations: int  # passes over a rollout
    rollout: RolloutPlan
    experience: ExperiencePlan
    preset: str
    objective: Mapping[str, Any]
    critic: CriticPlan | None
    reference: ReferencePlan
    check_tolerance: float | None

    def __post_init__(self):
        positive(self, "num_rollouts", "updates_per_rollout", "num_iterations")
        rows, updates, experience = self.rollout.rows, self.updates_per_rollout, self.experience
        prompts, group, scale = self.rollout.num_prompts, self.rollout.num_generations, experience.scale_rewards
        need(rows % updates == 0, "updates_per_rollout", updates,
             f"must divide the {rows} rows of a rollout (num_prompts={prompts} x num_generations={group})")  # fmt: skip
        self.update.check_rows(rows // updates, "a minibatch")
        need(group > 1 or scale == "reinforce++" or self.critic is not None, "num_generations", group,
             "group advantages compare completions of a prompt; use 2 or more")  # fmt: skip
        need(scale == "group" or self.critic is None, "scale_rewards", scale,
             "a critic (critic.enable) stands in for the group; leave it at 'group'")  # fmt: skip
        width = self.data.max_completion_length
        need(0 <= experience.overlong_len < width, "overlong_buffer.len", experience.overlong_len,
             f"must be in 0..{width - 1} (0: no penalty)")  # fmt: skip
        if experience.filter_groups and self.data.prompt_buckets:
            raise UserError("filter_groups.enable: rows of several draws share one frame; leave prompt_buckets empty")
        if experience.filter_groups and group < 2:
            raise UserError("filter_groups.enable: one completion is never mixed; set num_generations to 2 or more")
        if self.objective["sampler_is"] and experience.old_logps != "learner":
            raise UserError("objective.sampler_is: it corrects for sampler against learner; set old_logps='learner'")
        if self.rollout.differs and experience.old_logps != "learner" and self.check_tolerance != math.inf:
            raise UserError(
                "mismatch: the sampler's log-probs are then not the old policy's; set old_logps='learner', or "
                "check_tolerance=inf to train on them all the same"
            )
        if self.reference.sync_steps and not self.needs_reference:
            raise UserError("sync_ref_model: nothing reads the reference; set objective.beta or reward_kl_coef")
        if not self.reference.storage.plain and (self.lora or not self.needs_reference):
            why = "that of a run with lora is adapters alone" if self.lora else "nothing reads the reference"
            raise UserError(f"ref_dtype, ref_offload: {why}; leave them at 'float32' and False")
        if self.lora and self.reference.sync_steps and self.reference.mixup_alpha != 1:
            raise UserError(
                f"ref_model_mixup_alpha={self.reference.mixup_alpha}: the reference of a run with lora is adapters, "
                "and a mixture of two A and two B is no mixture of their products; set it to 1"
            )
        warmup, rollouts = self.critic_warmup, self.num_rollouts
        need(0 <= warmup < rollouts, "critic.warmup_rollouts", warmup,
             f"must leave some of the {rollouts} rollouts to the policy")  # fmt: skip
        self._check_routers()

    def _check_routers(self) -> None:
        """Raises UserError for what only a Mixture of Experts has."""
        fields, rollout = self.model.fields, self.rollout
        self.check_router_losses()
        if fields["num_experts"]:
            if rollout.expert_swap and fields["experts_per_token"] == fields["num_experts"]:
                raise UserError("mismatch.expert_swap: all experts run, there is none to swap in")
            if self.update.router_z_loss_coef > 0 and fields["router"] == "sigmoid":
                raise UserError(
                    f"router_z_loss_coef={self.update.router_z_loss_coef}: it bounds the normaliser of a softmax, "
                    "which model.router='sigmoid' has not; set it to 0"
                )
            return
        if rollout.router_noise or rollout.expert_swap:
            raise UserError("mismatch.router_noise and mismatch.expert_swap: a dense model has no routers")
        if (
            self.experience.replay != "disabled"
            or self.objective["router_shift_floor"] is not None
            or self.experience.router_kl
        ):
            raise UserError(
                "router_replay.mode, router_shift_floor, log.router_kl: a dense model has no routers; switch them off"
            )

    @property
    def updates(self) -> int:
        """Of the optimizer, for one rollout."""
        return self.updates_per_rollout * self.num_iterations

    @property
    def beside_model(self) -> dict[str, Any]:
        own = self.critic and self.critic.model
        return {"critic": dict(own)} if own else {}

    @property
    def critic_warmup(self) -> int:
        """The first so many rollouts update no policy."""
        return self.critic.warmup_rollouts if self.critic else 0

    @property
    def rows_at_a_time(self) -> int:
        """Rows of a forward and backward pass, of all devices together."""
        return self.update.micro_batch_size or self.rollout.rows // self.updates_per_rollout

    @property
    def needs_reference(self) -> bool:
        """Whether anything reads a reference policy."""
        return bool(self.objective["beta"]) or self.experience.reward_kl_coef > 0
