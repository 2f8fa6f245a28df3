"""Token log-probs, and the one jitted update that every algorithm here shares.

The update knows nothing of GRPO or GSPO: it scores the completions, hands the arrays to an objective, and follows the gradient.
What is swapped is the objective (`gspo.objectives`); supervised fine-tuning is one more of them.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
import optax

from gspo.masked import Mean, masked_mean
from gspo.microbatch import accumulated_gradient, deal, num_parts, undeal_fields
from gspo.model.distribution import Sampling, entropy, log_prob, shape_logits
from gspo.model.routing import experts_changed, load_imbalance
from gspo.model.transformer import Transformer
from gspo.types import Batch, Params, TrainState

Metrics = dict[str, chex.Array]


class ObjectiveFn(Protocol):
    """(log-probs and the rest of a batch, all [B, C]) -> (loss as sum and count, metrics). See `gspo.objectives`."""

    def __call__(self, logp_BC, old_logp_BC, advantages_BC, mask_BC, **more) -> tuple[Mean, Metrics]: ...


class Scores(NamedTuple):
    """Completion log-probs and entropies (nats), float32 [B, C]. For MoE models the routers' free choices, and the log-probs that
    the routers give to the experts of the routes they were called with, at the columns that predict a token.
    """

    logp_BC: chex.Array
    entropy_BC: chex.Array
    routes_LBTX: chex.Array | None = None
    router_logp_LBCX: chex.Array | None = None


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
) -> Scores:
    """Log-prob of every completion column under `params`, shaped as the sampler shapes it. Values past a row's end are junk: mask them.

    routes_LBTX: experts whose router log-probs are wanted; with `replay`, the experts that run. Logits exist for `chunk` columns at a
    time, forward and backward (remat), so no [B, T, V] array is ever made.
    """
    B, T = tokens_BT.shape
    C, P = completion_width, T - completion_width
    out = model.apply({"params": params}, tokens_BT, P - prompt_lengths_B, routes_LBTX if replay else None)
    routers = (out.routes_LBTX, None)
    if out.routes_LBTX is not None and routes_LBTX is not None:
        predicting = slice(P - 1, T - 1)
        router_logp_LBCE = jax.nn.log_softmax(out.router_logits_LBTE[:, :, predicting], axis=-1)
        experts_LBCX = jnp.maximum(routes_LBTX[:, :, predicting].astype(jnp.int32), 0)  # -1, not recorded: a column that is masked
        routers = (out.routes_LBTX, jnp.take_along_axis(router_logp_LBCE, experts_LBCX, axis=-1))
    hidden_BCD = out.hidden_BTD[:, P - 1 : T - 1]  # column t predicts column t + 1
    target_BC = tokens_BT[:, P:]

    @jax.checkpoint
    def score_chunk(hidden_BcD, target_Bc):
        logits_BcV = model.apply({"params": params}, hidden_BcD, method="logits")
        logits_BcV = shape_logits(logits_BcV, sampling, keep=target_Bc)
        return log_prob(logits_BcV, target_Bc), entropy(logits_BcV)

    if chunk >= C:
        return Scores(*score_chunk(hidden_BCD, target_BC), *routers)
    pieces = -(-C // chunk)
    pad = pieces * chunk - C

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, pieces, chunk, *x.shape[2:]), 1, 0)

    _, scored = jax.lax.scan(lambda _, xs: (None, score_chunk(*xs)), None, (cut(hidden_BCD), cut(target_BC)))
    logp_BC, entropy_BC = (jnp.moveaxis(x, 0, 1).reshape(B, pieces * chunk)[:, :C] for x in scored)
    return Scores(logp_BC, entropy_BC, *routers)


def make_scorer(model: Transformer, *, completion_width: int, sampling: Sampling, chunk: int, micro_batch_size: int = 0):
    """Returns jitted `scorer(params, tokens_BT, prompt_lengths_B, routes_LBTX) -> Scores`: old or reference log-probs, computed in
    micro-batches of rows. Routes only say whose router log-probs are wanted; nothing is replayed.
    """

    def scorer(params, tokens_BT, prompt_lengths_B, routes_LBTX=None) -> Scores:
        def one(rows):
            tokens_BT, prompt_lengths_B, routes_LBTX = rows
            return score_completions(
                model, params, tokens_BT, prompt_lengths_B, completion_width, sampling=sampling, chunk=chunk, routes_LBTX=routes_LBTX
            )

        parts = num_parts(tokens_BT.shape[0], micro_batch_size)
        if parts == 1:
            return one((tokens_BT, prompt_lengths_B, routes_LBTX))
        routes = None if routes_LBTX is None else deal(routes_LBTX, parts, 1)
        return undeal_fields(jax.lax.map(one, (deal(tokens_BT, parts), deal(prompt_lengths_B, parts), routes)))

    return jax.jit(scorer)


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
    state_shardings: TrainState | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns jitted `step(state, batch) -> (state, metrics)`; the given state is donated.

    micro_batch_size: rows per forward and backward pass (0: all). The gradient does not depend on it: sums are accumulated, and
    divided once by the summed count. replay: the experts in batch.routes_LBTX run instead of the routers' choices. With or without
    replay, the routers' free choices are compared with batch.routes_LBTX.

    entropy_target (nats per token): with state.entropy_coef, an adaptive entropy bonus. The coefficient rises by entropy_step after
    an update that saw less entropy than the target and falls, not below 0, after one that saw more. Skywork-OR1 (2505.22312) §4.

    state_shardings: a TrainState of shardings, where the new state lies. Without it the partitioner may move arrays (norm scales onto
    the fsdp axis, say), and every function that is called with the state is compiled a second time. None on one device.
    """
    with_routers = "router_logp_LBCX" in getattr(objective, "needs", ())

    def evaluate(scores: Scores, batch: Batch) -> tuple[Mean, Metrics]:
        return objective(
            scores.logp_BC,
            batch.old_logp_BC,
            batch.advantages_BC,
            batch.loss_mask_BC,
            ref_logp_BC=batch.ref_logp_BC,
            entropy_BC=scores.entropy_BC,
            sampler_logp_BC=batch.sampler_logp_BC,
            router_logp_LBCX=scores.router_logp_LBCX,
            old_router_logp_LBCX=batch.old_router_logp_LBCX,
        )

    def loss_of_part(params, part: Batch, entropy_coef):
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
        )
        loss, _ = evaluate(scores, part)
        total = loss.total
        if entropy_target is not None:
            total -= entropy_coef * objective.aggregate(scores.entropy_BC, part.loss_mask_BC).total
        return total, (loss.count, scores)

    def step(state: TrainState, batch: Batch):
        if replay and batch.routes_LBTX is None:
            raise ValueError("replay=True, but batch.routes_LBTX is None: there is nothing to replay")
        loss_fn = partial(loss_of_part, entropy_coef=state.entropy_coef)
        grads, scores = accumulated_gradient(loss_fn, state.params, batch, micro_batch_size)
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
            metrics |= _router_metrics(model.spec.num_experts, scores.routes_LBTX, batch)
        return new_state, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=None if state_shardings is None else (state_shardings, None))


def _router_metrics(num_experts: int, free_LBTX, batch: Batch) -> Metrics:
    """Drift of the free choices from the rollout's, and expert load, over the real tokens of the batch."""
    T = batch.tokens_BT.shape[1]
    C = batch.loss_mask_BC.shape[1]
    P, column_T = T - C, jnp.arange(T)
    real_BT = (column_T >= (P - batch.prompt_lengths_B)[:, None]) & (column_T < (P + batch.completion_lengths_B)[:, None])
    variation, peak = load_imbalance(free_LBTX, real_BT, num_experts)
    metrics = {"routing/load_cv": variation, "routing/load_max_over_mean": peak}
    if batch.routes_LBTX is not None:
        share, tokens = experts_changed(batch.routes_LBTX, free_LBTX, real_BT)
        metrics |= {"routing/experts_changed": share.value, "routing/tokens_changed": tokens.value}
    return metrics


def make_ref_sync(mixup_alpha: float) -> Callable[[Params, Params], Params]:
    """Returns jitted `sync(params, ref_params)`: π_ref <- α π_θ + (1 - α) π_ref, in parameters. TR-DPO (2404.09656), TRL's names."""
    return jax.jit(lambda params, ref: jax.tree.map(lambda p, r: mixup_alpha * p + (1 - mixup_alpha) * r, params, ref))


def negative_log_likelihood(logp_BC, old_logp_BC, advantages_BC, mask_BC, **_):
    """The objective of supervised fine-tuning: -mean of log π over completion tokens. Ignores all that is not mask."""
    return masked_mean(-logp_BC, mask_BC), {"accuracy/token_prob": masked_mean(jnp.exp(logp_BC), mask_BC).value}
