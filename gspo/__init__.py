"""Reinforcement learning of Mixture-of-Experts language models in JAX: GRPO, GSPO and routing replay.

The public names, one by one. `gspo.rl` is where a reader starts; `from gspo import objectives` works on its own.
"""

from gspo import objectives
from gspo.learning.learner import make_scorer, make_train_step, negative_log_likelihood, score_completions
from gspo.learning.sampler import make_sampler
from gspo.masked import Mean
from gspo.model.distribution import Sampling
from gspo.model.spec import ModelSpec
from gspo.model.transformer import Transformer
from gspo.objectives import advantages
from gspo.objectives.compose import OBJECTIVES, make_objective, preset
from gspo.types import Batch, Rollout, TrainState, UserError

__all__ = [
    "OBJECTIVES",
    "Batch",
    "Mean",
    "ModelSpec",
    "Rollout",
    "Sampling",
    "TrainState",
    "Transformer",
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
