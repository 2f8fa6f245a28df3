"""Names and numbers of objectives: the presets, the defaults, what is refused and what is warned about.

Plain data and host code: nothing here is seen by jit. `gspo.objectives` turns the result of `settings` into functions.
"""

import difflib
import math
from collections.abc import Callable
from typing import Any

from gspo.objectives.aggregations import AGGREGATIONS
from gspo.objectives.corrections import SAMPLER_IS
from gspo.objectives.kl import KL_LOSSES, KL_WEIGHTS
from gspo.objectives.ratios import LOG_RATIOS
from gspo.objectives.surrogates import CONSTANTS, SURROGATES
from gspo.types import UserError

# Every field of an objective, with its default. None: not set, or decided by another field.
DEFAULTS = {
    "importance_sampling_level": "sequence",  # LOG_RATIOS
    "surrogate": "clip",  # SURROGATES
    "epsilon": None,  # lower clip range; None: EPSILONS of the level, or the surrogate's own
    "epsilon_high": None,  # upper clip range, likewise
    "delta": None,  # "clip": bounds the loss where Â < 0, which makes it "dual_clip" (there 3 by default)
    "temperature_pos": 1.0,  # SAPO, Â > 0
    "temperature_neg": 1.05,  # SAPO, Â ≤ 0
    "cap": 5.0,  # MiniRL: largest weight of a token
    "loss_agg_mode": "seq-mean-token-mean",  # AGGREGATIONS
    "loss_norm_length": None,  # constant of "seq-mean-token-sum-norm"; None: the width of the frame
    "beta": 0.0,  # coefficient of the KL to the reference
    "kl_loss_type": "k3",  # KL_LOSSES
    "kl_importance": "none",  # KL_WEIGHTS
    "entropy_coef": 0.0,  # coefficient of the entropy bonus
    "sampler_is": None,  # SAMPLER_IS; None: the sampler is taken to be the old policy
    "sampler_is_low": None,  # band of the correction; None: the method's own
    "sampler_is_high": None,
    "off_policy_mask_threshold": None,  # δ of OPSM, 1e-4 in DeepSeek-V3.2; None: off
    "router_shift_floor": None,  # floor of RSPO's γ; None: off
}

# Clip ranges (ε, ε_high) where none is given: GSPO (2507.18071) §5.1 for the token and the sequence level.
EPSILONS = {
    "token": (0.2, 0.27),
    "sequence": (3e-4, 4e-4),
    "sequence_token": (3e-4, 4e-4),
    "sequence_sum": (0.2, 0.27),
}
OWN_EPSILONS = {"cispo": (1.0, 4.0), "gmpo": (0.4, 0.4)}

# Each preset: what its paper sets, over DEFAULTS. A comment says what belongs to the method outside of the loss.
OBJECTIVES = {
    "grpo": {"importance_sampling_level": "token"},
    "gspo": {"importance_sampling_level": "sequence"},
    "gspo_token": {"importance_sampling_level": "sequence_token"},
    # DAPO: also filter_groups, overlong_buffer.
    "dapo": {"importance_sampling_level": "token", "epsilon": 0.2, "epsilon_high": 0.28, "loss_agg_mode": "token-mean"},
    # Dr. GRPO: also scale_rewards = "none".
    "dr_grpo": {
        "importance_sampling_level": "token", "epsilon": 0.2, "epsilon_high": 0.2,
        "loss_agg_mode": "seq-mean-token-sum-norm",
    },
    "cispo": {
        "importance_sampling_level": "token", "surrogate": "cispo", "epsilon": 1.0, "epsilon_high": 4.0,
        "loss_agg_mode": "token-mean",
    },
    "gmpo": {"importance_sampling_level": "token", "surrogate": "gmpo", "epsilon": 0.4, "epsilon_high": 0.4},
    "sapo": {
        "importance_sampling_level": "token", "surrogate": "sapo", "temperature_pos": 1.0, "temperature_neg": 1.05,
    },
    # LUSPO is GSPO with every sequence weighted by its length: the aggregation says it all.
    "luspo": {
        "importance_sampling_level": "sequence", "epsilon": 2e-3, "epsilon_high": 2.5e-3,
        "loss_agg_mode": "seq-mean-token-sum",
    },
    # RSPO is GMPO on ratios that the router shift scales down.
    "rspo": {
        "importance_sampling_level": "token", "surrogate": "gmpo", "epsilon": 0.4, "epsilon_high": 0.4,
        "router_shift_floor": 0.8,
    },
    # MiniRL: also scale_rewards = "none".
    "minirl": {
        "importance_sampling_level": "token", "surrogate": "minirl", "epsilon": 0.2, "epsilon_high": 0.27, "cap": 5.0,
        "loss_agg_mode": "seq-mean-token-sum",
    },
    # PPO: also a critic and its advantages, `advantages.gae`.
    "ppo": {"importance_sampling_level": "token", "epsilon": 0.2, "epsilon_high": 0.2, "loss_agg_mode": "token-mean"},
    # REINFORCE: for one update per rollout. Its log-likelihood is a sum over the tokens of a sequence.
    "reinforce": {
        "importance_sampling_level": "token", "surrogate": "reinforce", "loss_agg_mode": "seq-mean-token-sum",
    },
}  # fmt: skip


def settings(name: str | None, **overrides) -> dict[str, Any]:
    """Every field of an objective, checked and with all defaults filled in: what a run's first log line prints.

    name: a preset, or None for DEFAULTS alone. An override of None keeps the preset's value. Raises a one-line
    UserError that names the field and the remedy; over a preset also for a constant of another surrogate, aggregation
    or correction.
    Idempotent: settings(None, **settings(name)) equals settings(name).
    """
    for field in overrides:
        if field not in DEFAULTS:
            raise UserError(f"objective.{field}: no such field; {_nearest(field, DEFAULTS)}")
    chosen = OBJECTIVES[_choose("preset", name, OBJECTIVES)] if name is not None else {}
    s = DEFAULTS | chosen | {field: value for field, value in overrides.items() if value is not None}

    _choose("importance_sampling_level", s["importance_sampling_level"], LOG_RATIOS)
    _choose("surrogate", s["surrogate"], SURROGATES)
    _choose("loss_agg_mode", s["loss_agg_mode"], AGGREGATIONS)
    _choose("kl_loss_type", s["kl_loss_type"], KL_LOSSES)
    _choose("kl_importance", s["kl_importance"], KL_WEIGHTS)
    if s["surrogate"] == "clip" and s["delta"] is not None:
        s["surrogate"] = "dual_clip"
    if s["surrogate"] == "dual_clip" and s["delta"] is None:
        s["delta"] = 3.0
    low, high = OWN_EPSILONS.get(s["surrogate"], EPSILONS[s["importance_sampling_level"]])
    s["epsilon"] = low if s["epsilon"] is None else s["epsilon"]
    s["epsilon_high"] = high if s["epsilon_high"] is None else s["epsilon_high"]
    if s["sampler_is"] is not None:
        _, _, low, high = SAMPLER_IS[_choose("sampler_is", s["sampler_is"], SAMPLER_IS)]
        s["sampler_is_low"] = low if s["sampler_is_low"] is None else s["sampler_is_low"]
        s["sampler_is_high"] = high if s["sampler_is_high"] is None else s["sampler_is_high"]
    _check_numbers(s)
    if name is not None:  # else they may be all the fields there are
        _check_read(s, [field for field, value in overrides.items() if value is not None])
    return s


def _choose(field: str, value: Any, allowed) -> str:
    """value, if it is one of the allowed names; else a UserError with the nearest."""
    if isinstance(value, str) and value in allowed:
        return value
    raise UserError(f"objective.{field}: no {value!r}; {_nearest(value, allowed)}")


def _nearest(value: Any, allowed) -> str:
    near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.4)
    return (f"did you mean {near[0]!r}? " if near else "") + f"choose from {', '.join(allowed)}"


def _check_numbers(s: dict[str, Any]) -> None:
    """Raises a UserError for the first number out of its range, or for a combination that has no meaning."""

    def require(field: str, holds: Callable, remedy: str):
        value = s[field]
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not (is_number and holds(value)):
            raise UserError(f"objective.{field}: {value!r} will not do; {remedy}")

    for field in ("epsilon", "epsilon_high", "beta", "entropy_coef", "off_policy_mask_threshold", "sampler_is_low"):
        require(field, lambda v: v >= 0, "give a number of 0 or more")
    for field in ("temperature_pos", "temperature_neg", "cap"):
        require(field, lambda v: v > 0, "give a number above 0")
    require(
        "delta", lambda v: v > 1 + s["epsilon_high"], f"it must exceed 1 + epsilon_high = {1 + s['epsilon_high']:g}"
    )
    require("loss_norm_length", lambda v: v >= 1 and v == int(v), "give a whole number of tokens, or leave it out")
    require("router_shift_floor", lambda v: 0 < v <= 1, "give a number in (0, 1]; the paper's is 0.8")
    if s["sampler_is"] is not None:
        require("sampler_is_high", lambda v: v > s["sampler_is_low"], "it must exceed sampler_is_low")
    if s["delta"] is not None and s["surrogate"] != "dual_clip":
        raise UserError(
            f"objective.delta: the surrogate {s['surrogate']!r} has no such bound; leave it out or use 'clip'"
        )
    if s["surrogate"] == "gmpo" and s["importance_sampling_level"] != "token":
        raise UserError("objective.importance_sampling_level: 'gmpo' takes its own mean of token ratios; use 'token'")


def _check_read(s: dict[str, Any], fields: list[str]) -> None:
    """Raises a UserError for the first of the fields that the chosen parts do not read: setting it would do nothing."""
    for field in fields:
        readers = [surrogate for surrogate, constants in CONSTANTS.items() if field in constants]
        if readers and s["surrogate"] not in readers:
            raise UserError(
                f"objective.{field}: the surrogate {s['surrogate']!r} does not read it, as {', '.join(readers)} would; "
                "leave it out"
            )
    if "loss_norm_length" in fields and s["loss_agg_mode"] != "seq-mean-token-sum-norm":
        raise UserError(
            f"objective.loss_norm_length: loss_agg_mode {s['loss_agg_mode']!r} does not read it, as "
            "'seq-mean-token-sum-norm' would; leave it out"
        )
    for field in ("sampler_is_low", "sampler_is_high"):
        if field in fields and s["sampler_is"] is None:
            raise UserError(f"objective.{field}: there is no correction to bound; set sampler_is, or leave it out")


def clip_range(s: dict[str, Any]) -> str:
    """Where the surrogate cuts the ratio off, in words; "" where it does not. s: from `settings`."""
    if "epsilon" not in CONSTANTS[s["surrogate"]]:
        return ""
    if s["surrogate"] == "gmpo":
        return f"[-{s['epsilon']:g}, {s['epsilon_high']:g}] of the log-ratio"
    return f"[1 - {s['epsilon']:g}, 1 + {s['epsilon_high']:g}]"


def warnings_of(s: dict[str, Any], updates_per_rollout: int) -> list[str]:
    """One line for each setting that is allowed and probably not meant. s: from `settings`."""
    level, clips = s["importance_sampling_level"], s["surrogate"] in ("clip", "dual_clip", "minirl")
    per_sequence = level in ("sequence", "sequence_token")
    found = []
    if updates_per_rollout == 1 and s["surrogate"] != "reinforce":
        found.append(
            "updates_per_rollout is 1: every ratio is 1 and nothing is clipped, so that GRPO and GSPO are the same "
            "algorithm; "
            "the GSPO paper uses 4"
        )
    if updates_per_rollout > 1 and s["surrogate"] == "reinforce":
        found.append(
            "objective.surrogate is 'reinforce', which corrects for nothing once a rollout is used for a second update"
        )
    if clips and per_sequence and max(s["epsilon"], s["epsilon_high"]) >= 0.05:
        found.append(
            f"objective.epsilon is {s['epsilon']:g}/{s['epsilon_high']:g}, a value for token ratios: "
            "length-normalised sequence "
            "ratios hardly ever leave it. The GSPO paper has 3e-4/4e-4 for thousands of tokens; about 3e-3 suits 50"
        )
    if clips and not per_sequence and min(s["epsilon"], s["epsilon_high"]) < 0.01:
        found.append(
            f"objective.epsilon is {s['epsilon']:g}/{s['epsilon_high']:g}, a value for length-normalised sequence "
            "ratios: at "
            f"the level {level!r} nearly everything will be clipped; usual are 0.2/0.27"
        )
    if clips and s["epsilon_high"] < s["epsilon"]:
        found.append(
            "objective.epsilon_high is below objective.epsilon: usually it is above. Was only one of them set?"
        )
    if level != "token" and s["loss_agg_mode"] == "token-mean":
        found.append(
            f"objective.loss_agg_mode 'token-mean' weighs the sequences of the level {level!r} by their length; "
            "GSPO is 'seq-mean-token-mean'"
        )
    if s["loss_agg_mode"] == "seq-mean-token-sum-norm" and s["loss_norm_length"] is None:
        found.append(
            "objective.loss_norm_length is not set: the loss is divided by the width of the frame and changes with it"
        )
    if s["beta"] and s["kl_loss_type"] == "k1" and s["kl_importance"] != "differentiable":
        found.append(
            "objective.kl_loss_type 'k1' has no expected gradient as a loss; use 'k2', 'k3' or kl_importance "
            "'differentiable'"
        )
    return found
