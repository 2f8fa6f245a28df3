"""The papers, one small function each, and the door to them: `preset` and `make_objective`.

objective = preset("gspo", epsilon=3e-3, epsilon_high=4e-3)   # outside jit: strings become functions
loss, metrics = objective(LossInputs(logp_BC, old_logp_BC, advantages_BC, mask_BC))
"""

from gspo.objectives.compose import Loss, Objective, make_objective, negative_log_likelihood, preset
from gspo.objectives.pairs import DPO, bradley_terry, implicit_rewards
from gspo.objectives.presets import OBJECTIVES, clip_range, settings, warnings_of
from gspo.types import LossInputs

__all__ = [
    "DPO",
    "OBJECTIVES",
    "Loss",
    "LossInputs",
    "Objective",
    "bradley_terry",
    "clip_range",
    "implicit_rewards",
    "make_objective",
    "negative_log_likelihood",
    "preset",
    "settings",
    "warnings_of",
]
