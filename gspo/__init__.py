"""Reinforcement learning of Mixture-of-Experts language models in JAX: GRPO, GSPO and routing replay.

The public names, one by one. `gspo.rl` is where a reader starts; `from gspo import objectives` works on its own.
"""

from gspo import objectives
from gspo.learning.learner import UpdatePlan, make_train_step
from gspo.learning.sampler import make_sampler
from gspo.learning.scores import make_scorer, score_completions
from gspo.masked import Mean
from gspo.model.distribution import Sampling
from gspo.model.spec import ModelSpec
from gspo.model.transformer import Transformer
from gspo.objectives import OBJECTIVES, advantages, make_objective, negative_log_likelihood, preset
from gspo.types import Batch, LossInputs, Rollout, TrainState, UserError

__all__ = [
    "OBJECTIVES",
    "Batch",
    "LossInputs",
    "Mean",
    "ModelSpec",
    "Rollout",
    "Sampling",
    "TrainState",
    "Transformer",
    "UpdatePlan",
    "UserError",
    "advantages",
    "make_objective",
    "make_sampler",
    "make_scorer",
    "make_train_step",
    "negative_log_likelihood",
    "objectives",
    "preset",
    "score_completions",
]
