"""The papers, one small function each, and the door to them: `preset` and `make_objective`.

objective = preset("gspo", epsilon=3e-3, epsilon_high=4e-3)   # outside jit: strings become functions
"""

from gspo.objectives.compose import Objective, make_objective, preset
from gspo.objectives.presets import OBJECTIVES, settings, warnings_of
from gspo.objectives.surrogates import SURROGATES

__all__ = ["OBJECTIVES", "SURROGATES", "Objective", "make_objective", "preset", "settings", "warnings_of"]
