"""Policy-gradient objectives as compositions: ratio level × surrogate × aggregation, with weights and penalties around
them.

    loss_BC = − Π weights · surrogate( log_ratio(logp, old_logp), Â ) + Σ coefficient · penalty
    loss    = aggregate(loss_BC)

Each part is one small function, in `ratios`, `surrogates`, `aggregations`, `kl` and `corrections`; `presets` says which
of them make up which method. This file composes them. GRPO and GSPO differ in `log_ratio` and in the clip range that
goes with it, and in nothing else.

    objective = preset("gspo", epsilon=3e-3, epsilon_high=4e-3)                  # outside jit: strings become functions
    loss, metrics = objective(logp_BC, old_logp_BC, advantages_BC, mask_BC)      # inside jit: arrays only
    loss.value

To add a method: write its surrogate, name it in SURROGATES, give it a line in OBJECTIVES and an oracle in
tests/oracles.py."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from gspo import masked
from gspo.masked import Mean
from gspo.objectives import corrections, diagnostics
from gspo.objectives.aggregations import AGGREGATIONS
from gspo.objectives.kl import KL_LOSSES, KL_WEIGHTS, k3
from gspo.objectives.presets import OBJECTIVES, settings, warnings_of
from gspo.objectives.ratios import (
    LOG_RATIOS,
    log_ratio_sequence,
    log_ratio_sequence_sum,
    log_ratio_sequence_token,
    log_ratio_token,
    router_shift,
)
from gspo.objectives.surrogates import SURROGATES, Surrogate

__all__ = [
    "AGGREGATIONS", "KL_LOSSES", "KL_WEIGHTS", "LOG_RATIOS", "OBJECTIVES", "SURROGATES", "Inputs", "Objective", "Part",
    "log_ratio_sequence", "log_ratio_sequence_sum", "log_ratio_sequence_token", "log_ratio_token", "make_objective", "preset",
    "settings", "warnings_of",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Part:
    """A function with some keywords filled in. Unlike functools.partial it compares by value, so that jit does not
    retrace."""

    function: Callable
    keywords: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, function: Callable, **keywords) -> "Part":
        return cls(function, tuple(keywords.items()))

    def __call__(self, *args):
        return self.function(*args, **dict(self.keywords))


class Inputs(NamedTuple):
    """What a weight or a penalty may read: [B, C] float32, 0 where the mask is False. None: not given."""

    logp_BC: chex.Array
    old_logp_BC: chex.Array
    advantages_BC: chex.Array
    mask_BC: chex.Array
    ref_logp_BC: chex.Array | None = None
    entropy_BC: chex.Array | None = None
    sampler_logp_BC: chex.Array | None = None
    router_logp_LBCX: chex.Array | None = None
    old_router_logp_LBCX: chex.Array | None = None


def no_shift(x: Inputs):
    """0: ratios are those of the policies."""
    return jnp.zeros_like(x.logp_BC)


def shift_by_routers(x: Inputs, *, floor: float):
    """log γ of RSPO, added to the token log-ratios."""
    return router_shift(x.router_logp_LBCX, x.old_router_logp_LBCX, x.mask_BC, floor=floor)


def weight_of_sampler(x: Inputs, **keywords):
    """ρ = π_old/μ, bounded."""
    return corrections.sampler_weight(x.old_logp_BC, x.sampler_logp_BC, x.mask_BC, **keywords)


def weight_of_off_policy_mask(x: Inputs, *, threshold: float):
    """OPSM, against the sampler's log-probs where given."""
    sampled_logp_BC = x.old_logp_BC if x.sampler_logp_BC is None else x.sampler_logp_BC
    return corrections.off_policy_mask(x.logp_BC, sampled_logp_BC, x.advantages_BC, x.mask_BC, threshold=threshold)


def kl_penalty(x: Inputs, *, estimator: Callable, weight: Callable):
    """w · k_n, per token."""
    return weight(x.logp_BC, x.old_logp_BC, x.mask_BC) * estimator(x.logp_BC, x.ref_logp_BC)


def entropy_bonus(x: Inputs):
    """−H(π_θ(·|x, y_<t)), a penalty on certainty."""
    return -x.entropy_BC


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss, put together from functions; frozen and hashable, so it may be a static argument or a closure of a jitted
    step.

    log_ratio   (logp_BC, old_logp_BC, mask_BC) -> log_ratio_BC
    shift       Inputs -> shift_BC, added to logp in the ratio
    surrogate   (log_ratio_BC, logp_BC, advantages_BC, mask_BC) -> Surrogate
    weights     Inputs -> weight_BC each, multiplied onto the surrogate; no gradient
    penalties   (coefficient, Inputs -> penalty_BC) each, added to the loss
    aggregate   (loss_BC, mask_BC) -> Mean
    needs       names of the optional arrays that the call must get: "ref_logp_BC", "entropy_BC", "sampler_logp_BC", ...
    """

    log_ratio: Callable
    shift: Callable
    surrogate: Callable
    weights: tuple[Callable, ...]
    penalties: tuple[tuple[float, Callable], ...]
    aggregate: Callable
    needs: tuple[str, ...] = ()

    def __call__(
        self,
        logp_BC: chex.Array,
        old_logp_BC: chex.Array,
        advantages_BC: chex.Array,
        mask_BC: chex.Array,
        *,
        ref_logp_BC: chex.Array | None = None,
        entropy_BC: chex.Array | None = None,
        sampler_logp_BC: chex.Array | None = None,
        router_logp_LBCX: chex.Array | None = None,
        old_router_logp_LBCX: chex.Array | None = None,
    ) -> tuple[Mean, diagnostics.Metrics]:
        """The loss to be minimised, as a `Mean`, and float scalars that describe these arrays (see
        `gspo.objectives.diagnostics`).

        logp_BC            log-probs of the completion tokens under the policy: what the gradient goes to
        old_logp_BC        the same under the policy that produced the rollout, fixed over all updates of the rollout
        mask_BC            bool, completion tokens that count; elsewhere the arrays may hold anything, inf and NaN
                           included
        ref_logp_BC        under the reference policy; entropy_BC: of the policy's distribution at each position
        sampler_logp_BC    under the distribution the tokens were drawn from
        router_logp_LBCX   log-probs of the old policy's experts under the routers now; old_router_logp_LBCX: then
        Floats of any kind; computed in float32, or float64 if given.
        """
        x = _cleaned(Inputs(
            logp_BC, old_logp_BC, advantages_BC, mask_BC,
            ref_logp_BC, entropy_BC, sampler_logp_BC, router_logp_LBCX, old_router_logp_LBCX,
        ))  # fmt: skip
        missing = [name for name in self.needs if getattr(x, name) is None]
        if missing:
            raise ValueError(f"this objective needs {', '.join(missing)}")

        log_ratio_BC = self.log_ratio(x.logp_BC + self.shift(x), x.old_logp_BC, x.mask_BC)
        gain = self.surrogate(log_ratio_BC, x.logp_BC, x.advantages_BC, x.mask_BC)
        weight_BC = jnp.ones_like(x.logp_BC)
        for weight in self.weights:
            weight_BC = weight_BC * weight(x)
        policy_loss_BC = loss_BC = -weight_BC * gain.value_BC
        for coefficient, penalty in self.penalties:
            loss_BC = loss_BC + coefficient * penalty(x)
        loss = self.aggregate(loss_BC, x.mask_BC)

        policy_loss = self.aggregate(policy_loss_BC, x.mask_BC)
        metrics = {"loss": loss.value, "loss/policy": policy_loss.value} | _metrics(x, log_ratio_BC, gain, weight_BC)
        return loss, jax.lax.stop_gradient(metrics)


def _cleaned(x: Inputs) -> Inputs:
    """Shapes checked, floats wide, and 0 wherever the mask is False: inf and NaN stay out of values and gradients."""
    chex.assert_rank(x.mask_BC, 2)
    chex.assert_type(x.mask_BC, bool)
    mask_BC = jnp.asarray(x.mask_BC)

    def clean(name, a):
        if a is None:
            return None
        if name.endswith("_LBCX"):
            chex.assert_shape(a, (None, *mask_BC.shape, None))
            return jnp.where(mask_BC[None, :, :, None], masked.wide(a), 0)
        chex.assert_equal_shape([a, mask_BC])
        return jnp.where(mask_BC, masked.wide(a), 0)

    arrays = {name: clean(name, a) for name, a in x._asdict().items() if name != "mask_BC"}
    return Inputs(mask_BC=mask_BC, **arrays)


def _metrics(x: Inputs, log_ratio_BC, gain: Surrogate, weight_BC) -> diagnostics.Metrics:
    """Every metric that the given arrays allow; unused ones cost nothing under jit."""
    metrics = (
        diagnostics.clip_shares(
            gain.low_BC, gain.high_BC, x.mask_BC, per_sequence=log_ratio_BC.shape != x.mask_BC.shape
        )
        | diagnostics.ratio_summary(log_ratio_BC, x.mask_BC)
        | diagnostics.drift(log_ratio_token(x.logp_BC, x.old_logp_BC, x.mask_BC), x.mask_BC)
        | diagnostics.advantage_moments(x.advantages_BC, x.mask_BC)
    )
    if x.entropy_BC is not None:
        metrics["entropy"] = masked.masked_mean(x.entropy_BC, x.mask_BC).value
    if x.ref_logp_BC is not None:
        metrics["kl"] = masked.masked_mean(k3(x.logp_BC, x.ref_logp_BC), x.mask_BC).value
    if x.sampler_logp_BC is not None:
        metrics |= diagnostics.sampler_gap(x.old_logp_BC, x.sampler_logp_BC, weight_BC, x.mask_BC)
    return metrics


def make_objective(**fields) -> Objective:
    """Names and numbers -> Objective. The fields, their defaults and what they mean: `presets.DEFAULTS`.

    Wrong names and numbers raise a one-line UserError that names the field, as `objective.<field>`, and the remedy.
    """
    s = settings(None, **fields)
    surrogate = SURROGATES[s["surrogate"]]
    constants = inspect.getfullargspec(surrogate).kwonlyargs
    shift, weights, penalties, needs = Part.of(no_shift), [], [], []
    aggregate = Part.of(AGGREGATIONS[s["loss_agg_mode"]])
    if s["loss_agg_mode"] == "seq-mean-token-sum-norm":
        aggregate = Part.of(aggregate.function, length=s["loss_norm_length"])
    if s["router_shift_floor"] is not None:
        shift = Part.of(shift_by_routers, floor=s["router_shift_floor"])
        needs += ["router_logp_LBCX", "old_router_logp_LBCX"]
    if s["sampler_is"] is not None:
        log_ratio, bound, _, _ = corrections.SAMPLER_IS[s["sampler_is"]]
        band = {"low": s["sampler_is_low"], "high": s["sampler_is_high"]}
        weights.append(Part.of(weight_of_sampler, log_ratio=log_ratio, bound=bound, **band))
        needs.append("sampler_logp_BC")
    if s["off_policy_mask_threshold"] is not None:
        weights.append(Part.of(weight_of_off_policy_mask, threshold=s["off_policy_mask_threshold"]))
    if s["beta"]:
        estimator, weight = KL_LOSSES[s["kl_loss_type"]], KL_WEIGHTS[s["kl_importance"]]
        penalties.append((s["beta"], Part.of(kl_penalty, estimator=estimator, weight=weight)))
        needs.append("ref_logp_BC")
    if s["entropy_coef"]:
        penalties.append((s["entropy_coef"], Part.of(entropy_bonus)))
        needs.append("entropy_BC")
    return Objective(
        log_ratio=LOG_RATIOS[s["importance_sampling_level"]],
        shift=shift,
        surrogate=Part.of(surrogate, **{name: s[name] for name in constants}),
        weights=tuple(weights),
        penalties=tuple(penalties),
        aggregate=aggregate,
        needs=tuple(needs),
    )


def preset(name: str, **overrides) -> Objective:
    """The preset of that name, with single fields replaced. An override of None keeps the preset's value."""
    return make_objective(**settings(name, **overrides))
