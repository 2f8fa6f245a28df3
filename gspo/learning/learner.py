"""Token log-probs, and the one jitted update that every algorithm here shares.

The update knows nothing of GRPO or GSPO: it scores the completions, hands the arrays to an objective, and follows the
gradient. What is swapped is the objective (`gspo.objectives`); supervised fine-tuning is one more of them.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from gspo.learning.microbatch import accumulated_gradient, deal, num_parts, undeal_fields
from gspo.masked import Mean, masked_mean
from gspo.model.distribution import Sampling
from gspo.model.head import token_scores
from gspo.model.routing import (
    balance_loss,
    by_layer,
    changed,
    experts_changed,
    load_by_layer,
    recorded,
    router_kl,
    router_margin,
    variance_share,
    z_loss,
)
from gspo.model.transformer import Transformer
from gspo.types import Batch, Params, TrainState

Metrics = dict[str, chex.Array]


class ObjectiveFn(Protocol):
    """(log-probs and the rest of a batch, all [B, C]) -> (loss as sum and count, metrics). See `gspo.objectives`."""

    def __call__(self, logp_BC, old_logp_BC, advantages_BC, mask_BC, **more) -> tuple[Mean, Metrics]: ...


class Scores(NamedTuple):
    """Completion log-probs and entropies (nats), float32 [B, C]. For MoE models also, None where not asked for:

    routes_LBTX         the routers' free choices; margin_LBT: distance in logits from the last chosen expert to the
                        next
    router_logp_LBCX    log-probs the routers give to the experts of the given routes (else their own), where a token is
                        predicted
    router_logits_LBTE  the routers' logits; router_kl_LBT: KL from the old routers' softmax to theirs
    """

    logp_BC: chex.Array
    entropy_BC: chex.Array
    routes_LBTX: chex.Array | None = None
    margin_LBT: chex.Array | None = None
    router_logp_LBCX: chex.Array | None = None
    router_logits_LBTE: chex.Array | None = None
    router_kl_LBT: chex.Array | None = None


def score_completions(
    model: Transformer,
    params: Params,
    tokens_BT: chex.Array,
    prompt_lengths_B: chex.Array,
    completion_width: int,
    *,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    chunk: int = 128,
    routes_LBTX: chex.Array | None = None,
    replay: bool = False,
    old_router_logits_LBTE: chex.Array | None = None,
) -> Scores:
    """Log-prob of every completion column under `params`, shaped as the sampler shapes it. Values past a row's end are
    junk: mask them.

    routes_LBTX: experts whose router log-probs are wanted; with `replay`, the experts that run. Token logits exist for
    `chunk` columns at a time, forward and backward (remat), so no [B, T, V] array is ever made.
    """
    T = tokens_BT.shape[1]
    P = T - completion_width
    out = model.apply({"params": params}, tokens_BT, P - prompt_lengths_B, routes_LBTX if replay else None)
    routers = {}
    if out.routes_LBTX is not None:
        routers = _router_scores(model.spec, out, routes_LBTX, slice(P - 1, T - 1), old_router_logits_LBTE)
    hidden_BCD = out.hidden_BTD[:, P - 1 : T - 1]  # column t predicts column t + 1
    target_BC = tokens_BT[:, P:]

    kernel_DV = model.apply({"params": params}, method="head_kernel")
    logp_BC, entropy_BC = token_scores(
        hidden_BCD, target_BC, kernel_DV, sampling=sampling, chunk=chunk, layout=model.layout
    )  # fmt: skip
    return Scores(logp_BC, entropy_BC, **routers)


def _router_scores(spec, out, routes_LBTX, predicting: slice, old_logits_LBTE) -> dict[str, chex.Array]:
    """What `Scores` says of routers. What a caller does not use is never computed under jit."""
    logits_LBTE = out.router_logits_LBTE
    logp_LBCE = jax.nn.log_softmax(logits_LBTE[:, :, predicting], axis=-1)
    experts_LBTX = out.routes_LBTX if routes_LBTX is None else routes_LBTX
    experts_LBCX = jnp.maximum(
        experts_LBTX[:, :, predicting].astype(jnp.int32), 0
    )  # -1, not recorded: a column that is masked
    return {
        "routes_LBTX": out.routes_LBTX,
        "margin_LBT": router_margin(logits_LBTE, spec.experts_per_token),
        "router_logp_LBCX": jnp.take_along_axis(logp_LBCE, experts_LBCX, axis=-1),
        "router_logits_LBTE": logits_LBTE,
        "router_kl_LBT": None if old_logits_LBTE is None else router_kl(old_logits_LBTE, logits_LBTE),
    }


def make_scorer(
    model: Transformer,
    *,
    completion_width: int,
    sampling: Sampling,
    chunk: int,
    micro_batch_size: int = 0,
    keep: tuple[str, ...] = ("logp_BC", "entropy_BC", "routes_LBTX"),
):
    """Returns jitted `scorer(params, tokens_BT, prompt_lengths_B, routes_LBTX=None, replay=False) -> Scores`: old or
    reference log-probs, computed in micro-batches of rows. Fields of `Scores` that are not in `keep` come back as None.
    Routes say whose router log-probs are wanted and, with `replay` (static), which experts run.
    """

    def scorer(params, tokens_BT, prompt_lengths_B, routes_LBTX=None, replay: bool = False) -> Scores:
        def one(rows):
            tokens_BT, prompt_lengths_B, routes_LBTX = rows
            scores = score_completions(
                model, params, tokens_BT, prompt_lengths_B, completion_width, sampling=sampling, chunk=chunk,
                routes_LBTX=routes_LBTX, replay=replay,
            )  # fmt: skip
            return Scores(**{name: x if name in keep else None for name, x in scores._asdict().items()})

        parts = num_parts(tokens_BT.shape[0], micro_batch_size)
        if parts == 1:
            return one((tokens_BT, prompt_lengths_B, routes_LBTX))
        routes = None if routes_LBTX is None else deal(routes_LBTX, parts, 1)
        return undeal_fields(jax.lax.map(one, (deal(tokens_BT, parts), deal(prompt_lengths_B, parts), routes)))

    return jax.jit(scorer, static_argnames="replay")


def make_train_step(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    objective: ObjectiveFn,
    *,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    micro_batch_size: int = 0,
    chunk: int = 128,
    replay: bool = False,
    entropy_target: float | None = None,
    entropy_step: float = 0.0,
    router_aux_loss_coef: float = 0.0,
    router_z_loss_coef: float = 0.0,
    state_shardings: TrainState | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns jitted `step(state, batch) -> (state, metrics)`; the given state is donated.

    micro_batch_size: rows per forward and backward pass (0: all). The gradient does not depend on it: sums are
    accumulated, and divided once by the summed count. replay: the experts in batch.routes_LBTX run instead of the
    routers' choices. With or without replay, the routers' free choices are compared with batch.routes_LBTX.

    entropy_target (nats per token): with state.entropy_coef, an adaptive entropy bonus. The coefficient rises by
    entropy_step after an update that saw less entropy than the target and falls, not below 0, after one that saw more.
    Skywork-OR1 (2505.22312) §4.

    router_aux_loss_coef, router_z_loss_coef: weights of the routers' load-balance and z losses over completion tokens,
    means over rows.

    state_shardings: a TrainState of shardings, where the new state lies. Without it the partitioner may move arrays
    (norm scales onto the fsdp axis, say), and every function that is called with the state is compiled a second time.
    None on one device."""
    with_routers = "router_logp_LBCX" in getattr(objective, "needs", ())

    def evaluate(scores: Scores, batch: Batch) -> tuple[Mean, Metrics]:
        return objective(
            scores.logp_BC, batch.old_logp_BC, batch.advantages_BC, batch.loss_mask_BC, ref_logp_BC=batch.ref_logp_BC,
            entropy_BC=scores.entropy_BC, sampler_logp_BC=batch.sampler_logp_BC, router_logp_LBCX=scores.router_logp_LBCX,
            old_router_logp_LBCX=batch.old_router_logp_LBCX,
        )  # fmt: skip

    router_losses = router_aux_loss_coef > 0 or router_z_loss_coef > 0

    def loss_of_part(params, part: Batch, entropy_coef, count_per_row):
        scores = score_completions(
            model,
            params,
            part.tokens_BT,
            part.prompt_lengths_B,
            part.loss_mask_BC.shape[1],
            sampling=sampling,
            chunk=chunk,
            routes_LBTX=part.routes_LBTX if replay or with_routers else None,
            replay=replay,
            old_router_logits_LBTE=part.old_router_logits_LBTE,
        )
        loss, _ = evaluate(scores, part)
        total = loss.total
        if entropy_target is not None:
            total -= entropy_coef * objective.aggregate(scores.entropy_BC, part.loss_mask_BC).total
        if router_losses:
            total += count_per_row * _router_loss(scores, part, router_aux_loss_coef, router_z_loss_coef)
        return total, (loss.count, scores._replace(router_logits_LBTE=None))

    def step(state: TrainState, batch: Batch):
        if replay and batch.routes_LBTX is None:
            raise ValueError("replay=True, but batch.routes_LBTX is None: there is nothing to replay")
        # What the loss will be divided by, per row: a mean over rows stays one, whatever the objective's aggregation
        # counts.
        count_per_row = (
            objective.aggregate(jnp.zeros_like(batch.old_logp_BC), batch.loss_mask_BC).count if router_losses else 0.0
        )
        count_per_row /= jnp.maximum(jnp.sum(jnp.any(batch.loss_mask_BC, axis=1)), 1)
        loss_fn = partial(loss_of_part, entropy_coef=state.entropy_coef, count_per_row=count_per_row)
        shardings = None if state_shardings is None else state_shardings.params
        grads, scores = accumulated_gradient(loss_fn, state.params, batch, micro_batch_size, shardings)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new_state = state.replace(
            step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state
        )
        # Metrics see the whole minibatch at once, outside the gradient: exact under any split into micro-batches.
        loss, metrics = evaluate(scores, batch)
        metrics = metrics | {"loss": loss.value, "grad_norm": optax.global_norm(grads)}
        if entropy_target is not None:
            short = masked_mean(scores.entropy_BC, batch.loss_mask_BC).value < entropy_target
            coef = jnp.maximum(state.entropy_coef + jnp.where(short, entropy_step, -entropy_step), 0.0)
            new_state = new_state.replace(entropy_coef=coef)
            metrics["entropy_coef"] = coef
        if scores.routes_LBTX is not None:
            metrics |= _router_metrics(model.spec.num_experts, scores, batch)
        return new_state, metrics

    return jit_update(step, state_shardings)


def jit_update(step: Callable, state_shardings: TrainState | None) -> Callable:
    """jit of (state, batch) -> (state, metrics): the state is donated and stays where it lies, metrics are whole on
    every device."""
    if state_shardings is None:
        return jax.jit(step, donate_argnums=0)
    everywhere = NamedSharding(jax.tree.leaves(state_shardings)[0].mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, everywhere))


def _router_loss(scores: Scores, part: Batch, aux_coef: float, z_coef: float) -> chex.Array:
    """Sum over rows of the weighted router losses on completion tokens."""
    mask_BT = jnp.pad(part.loss_mask_BC, ((0, 0), (part.tokens_BT.shape[1] - part.loss_mask_BC.shape[1], 0)))
    balance_B = balance_loss(scores.router_logits_LBTE, scores.routes_LBTX, mask_BT)
    return jnp.sum(aux_coef * balance_B + z_coef * z_loss(scores.router_logits_LBTE, mask_BT))


def _router_metrics(num_experts: int, scores: Scores, batch: Batch) -> Metrics:
    """Drift of the free choices from the rollout's, expert load and margins, over the real tokens of the batch, whole
    and by layer."""
    T, C = batch.tokens_BT.shape[1], batch.loss_mask_BC.shape[1]
    P, column_T = T - C, jnp.arange(T)
    real_BT = (column_T >= (P - batch.prompt_lengths_B)[:, None]) & (
        column_T < (P + batch.completion_lengths_B)[:, None]
    )
    variation_L, peak_L = load_by_layer(scores.routes_LBTX, real_BT, num_experts)
    margin_L = by_layer(scores.margin_LBT, real_BT)
    metrics = {
        "routing/load_cv": jnp.mean(variation_L),
        "routing/load_cv_by_layer": variation_L,
        "routing/load_max_over_mean": jnp.mean(peak_L),
        "routing/load_max_over_mean_by_layer": peak_L,
        "routing/margin": jnp.mean(margin_L),
        "routing/margin_by_layer": margin_L,
    }
    if batch.routes_LBTX is not None:
        share, tokens = experts_changed(batch.routes_LBTX, scores.routes_LBTX, real_BT)
        known_BT = real_BT & recorded(batch.routes_LBTX)
        changed_LBT = changed(batch.routes_LBTX, scores.routes_LBTX)
        moved_BC = (jnp.any(changed_LBT > 0, axis=0) & known_BT)[:, P - 1 : T - 1]  # where a token is predicted
        metrics |= {
            "routing/experts_changed": share.value,
            "routing/experts_changed_by_layer": by_layer(changed_LBT, known_BT),
            "routing/tokens_changed": tokens.value,
            "routing/variance_share": variance_share(scores.logp_BC - batch.old_logp_BC, moved_BC, batch.loss_mask_BC),
        }
    if scores.router_kl_LBT is not None:
        kl_L = by_layer(scores.router_kl_LBT, real_BT)
        metrics |= {"routing/kl": jnp.mean(kl_L), "routing/kl_by_layer": kl_L}
    return metrics


def make_ref_sync(mixup_alpha: float) -> Callable[[Params, Params], Params]:
    """Returns jitted `sync(params, ref_params)`: π_ref <- α π_θ + (1 - α) π_ref, in parameters. TR-DPO (2404.09656),
    TRL's names."""
    return jax.jit(lambda params, ref: jax.tree.map(lambda p, r: mixup_alpha * p + (1 - mixup_alpha) * r, params, ref))


def negative_log_likelihood(logp_BC, old_logp_BC, advantages_BC, mask_BC, **_):
    """The objective of supervised fine-tuning: -mean of log π over completion tokens. Ignores all that is not mask."""
    return masked_mean(-logp_BC, mask_BC), {"accuracy/token_prob": masked_mean(jnp.exp(logp_BC), mask_BC).value}
