"""Policy-gradient objectives as compositions: ratio level × surrogate × aggregation, with weights and penalties around
them.

    loss_BC = − Π weights · surrogate( log_ratio(logp, old_logp), Â ) + Σ coefficient · penalty
    loss    = aggregate(loss_BC)

Each part is one small function, in `ratios`, `surrogates`, `aggregations`, `kl` and `corrections`; `presets` says which
of them make up which method. This file composes them. GRPO and GSPO differ in `log_ratio` and in the clip range that
goes with it, and in nothing else.

    objective = preset("gspo", epsilon=3e-3, epsilon_high=4e-3)                          # outside jit: names, numbers
    loss, metrics = objective(LossInputs(logp_BC, old_logp_BC, advantages_BC, mask_BC))  # inside jit: arrays only
    loss.value

To add a method: write its surrogate, name it in SURROGATES and its constants in CONSTANTS, give it a line in OBJECTIVES
and an oracle in tests/oracles.py."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Protocol

import chex
import jax
import jax.numpy as jnp

from gspo import masked
from gspo.masked import Mean, Metrics
from gspo.objectives import corrections, diagnostics
from gspo.objectives.aggregations import AGGREGATIONS, token_mean
from gspo.objectives.kl import KL_LOSSES, KL_WEIGHTS, certainty, k3, kl_penalty
from gspo.objectives.presets import settings
from gspo.objectives.ratios import LOG_RATIOS, log_ratio_token, router_shift
from gspo.objectives.surrogates import CONSTANTS, SURROGATES, Surrogate
from gspo.types import LossInputs, map_arrays


class Loss(Protocol):
    """What an update follows: all that `gspo.learning.learner` uses of an objective.

    needs      names of the optional arrays of `LossInputs` that the call must get: "ref_logp_BC", "entropy_BC", ...
    aggregate  (x_BC, mask_BC) -> Mean, the mean that the loss is
    """

    @property
    def needs(self) -> tuple[str, ...]: ...

    def aggregate(self, x_BC: chex.Array, mask_BC: chex.Array) -> Mean: ...

    def __call__(self, inputs: LossInputs) -> tuple[Mean, Metrics]: ...


@dataclasses.dataclass(frozen=True)
class Objective:
    """A `Loss`, put together from functions.

    log_ratio   (logp_BC, old_logp_BC, mask_BC) -> log_ratio_BC
    shifts      LossInputs -> shift_BC each, added to logp in the ratio
    surrogate   (log_ratio_BC, LossInputs) -> Surrogate
    weights     LossInputs -> weight_BC each, multiplied onto the surrogate; no gradient
    penalties   (coefficient, LossInputs -> penalty_BC) each, added to the loss
    aggregate   (loss_BC, mask_BC) -> Mean
    needs       names of the optional arrays that the call must get
    """

    log_ratio: Callable
    surrogate: Callable
    aggregate: Callable
    shifts: tuple[Callable, ...] = ()
    weights: tuple[Callable, ...] = ()
    penalties: tuple[tuple[float, Callable], ...] = ()
    needs: tuple[str, ...] = ()

    def __call__(self, inputs: LossInputs) -> tuple[Mean, Metrics]:
        """The loss to be minimised, as a `Mean`, and metrics that describe these arrays (see
        `gspo.objectives.diagnostics`). Computed in float32, or float64 if given. Raises ValueError where an array is
        missing."""
        missing = [name for name in self.needs if getattr(inputs, name) is None]
        if missing:
            raise ValueError(f"this objective needs {', '.join(missing)}")
        inputs = _cleaned(inputs)

        logp_BC = inputs.logp_BC
        for shift in self.shifts:
            logp_BC = logp_BC + shift(inputs)
        log_ratio_BC = self.log_ratio(logp_BC, inputs.old_logp_BC, inputs.mask_BC)
        gain = self.surrogate(log_ratio_BC, inputs)
        weight_BC = jnp.ones_like(inputs.logp_BC)
        for weight in self.weights:
            weight_BC = weight_BC * weight(inputs)
        policy_loss_BC = loss_BC = -weight_BC * gain.value_BC
        for coefficient, penalty in self.penalties:
            loss_BC = loss_BC + coefficient * penalty(inputs)
        loss = self.aggregate(loss_BC, inputs.mask_BC)

        metrics = {"loss": loss, "loss/policy": self.aggregate(policy_loss_BC, inputs.mask_BC)}
        metrics |= _metrics(inputs, log_ratio_BC, gain, weight_BC)
        return loss, jax.lax.stop_gradient(metrics)


def _cleaned(inputs: LossInputs) -> LossInputs:
    """Shapes checked, floats wide, and 0 wherever the mask is False: inf and NaN stay out of values and gradients."""
    chex.assert_rank(inputs.mask_BC, 2)
    chex.assert_type(inputs.mask_BC, bool)
    mask_BC = jnp.asarray(inputs.mask_BC)

    def clean(dims, x):
        if dims == "LBCX":
            chex.assert_shape(x, (None, *mask_BC.shape, None))
            return jnp.where(mask_BC[None, :, :, None], masked.at_least_float32(x), 0)
        chex.assert_equal_shape([x, mask_BC])
        return jnp.where(mask_BC, masked.at_least_float32(x), 0)

    return map_arrays(clean, inputs).replace(mask_BC=mask_BC)


def _metrics(inputs: LossInputs, log_ratio_BC, gain: Surrogate, weight_BC) -> Metrics:
    """Every metric that the given arrays allow; unused ones cost nothing under jit."""
    mask_BC = inputs.mask_BC
    metrics = (
        diagnostics.clip_shares(gain.low_BC, gain.high_BC, mask_BC, per_sequence=log_ratio_BC.shape != mask_BC.shape)
        | diagnostics.ratio_summary(log_ratio_BC, mask_BC)
        | diagnostics.drift(log_ratio_token(inputs.logp_BC, inputs.old_logp_BC, mask_BC), mask_BC)
        | diagnostics.advantage_moments(inputs.advantages_BC, mask_BC)
    )
    if inputs.entropy_BC is not None:
        metrics["entropy"] = masked.masked_mean(inputs.entropy_BC, mask_BC)
    if inputs.ref_logp_BC is not None:
        metrics["kl"] = masked.masked_mean(k3(inputs.logp_BC, inputs.ref_logp_BC), mask_BC)
    if inputs.sampler_logp_BC is not None:
        metrics |= diagnostics.sampler_gap(inputs.old_logp_BC, inputs.sampler_logp_BC, weight_BC, mask_BC)
    return metrics


def make_objective(**fields) -> Objective:
    """Names and numbers -> Objective. The fields, their defaults and what they mean: `presets.DEFAULTS`.

    Wrong names and numbers raise a one-line UserError that names the field, as `objective.<field>`, and the remedy.
    """
    s = settings(None, **fields)
    shifts, weights, penalties, needs = [], [], [], []
    aggregate = AGGREGATIONS[s["loss_agg_mode"]]
    if s["loss_agg_mode"] == "seq-mean-token-sum-norm":
        aggregate = partial(aggregate, length=s["loss_norm_length"])
    if s["router_shift_floor"] is not None:
        shifts.append(partial(router_shift, floor=s["router_shift_floor"]))
        needs += ["router_logp_LBCX", "old_router_logp_LBCX"]
    if s["sampler_is"] is not None:
        log_ratio, bound, _, _ = corrections.SAMPLER_IS[s["sampler_is"]]
        band = {"low": s["sampler_is_low"], "high": s["sampler_is_high"]}
        weights.append(partial(corrections.sampler_weight, log_ratio=log_ratio, bound=bound, **band))
        needs.append("sampler_logp_BC")
    if s["off_policy_mask_threshold"] is not None:
        weights.append(partial(corrections.off_policy_mask, threshold=s["off_policy_mask_threshold"]))
    if s["beta"]:
        estimator, weight = KL_LOSSES[s["kl_loss_type"]], KL_WEIGHTS[s["kl_importance"]]
        penalties.append((s["beta"], partial(kl_penalty, estimator=estimator, weight=weight)))
        needs.append("ref_logp_BC")
    if s["entropy_coef"]:
        penalties.append((s["entropy_coef"], certainty))
        needs.append("entropy_BC")
    return Objective(
        log_ratio=LOG_RATIOS[s["importance_sampling_level"]],
        surrogate=partial(SURROGATES[s["surrogate"]], **{name: s[name] for name in CONSTANTS[s["surrogate"]]}),
        aggregate=aggregate,
        shifts=tuple(shifts),
        weights=tuple(weights),
        penalties=tuple(penalties),
        needs=tuple(needs),
    )


def preset(name: str, **overrides) -> Objective:
    """The preset of that name, with single fields replaced. An override of None keeps the preset's value."""
    return make_objective(**settings(name, **overrides))


class NegativeLogLikelihood:
    """The `Loss` of supervised fine-tuning: −mean of log π over completion tokens. Ignores all that is not mask."""

    needs = ()
    aggregate = staticmethod(token_mean)

    def __call__(self, inputs: LossInputs) -> tuple[Mean, Metrics]:
        loss = masked.masked_mean(-inputs.logp_BC, inputs.mask_BC)
        return loss, {
            "loss": loss,
            "accuracy/token_prob": masked.masked_mean(jnp.exp(inputs.logp_BC), inputs.mask_BC),
        }


negative_log_likelihood = NegativeLogLikelihood()
