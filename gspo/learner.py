"""Token log-probs, and the one jitted update that every algorithm here shares.

The update knows nothing of GRPO or GSPO: it scores the completions, hands the arrays to an objective, and follows the gradient.
What is swapped is the objective (`gspo.objectives`); supervised fine-tuning is one more of them.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
import optax

from gspo.masked import Mean, masked_mean
from gspo.model.distribution import Sampling, entropy, log_prob, shape_logits
from gspo.model.routing import experts_changed, load_imbalance
from gspo.model.transformer import Transformer
from gspo.types import Batch, Params, TrainState

Metrics = dict[str, chex.Array]


class ObjectiveFn(Protocol):
    """(log-probs and the rest of a batch, all [B, C]) -> (loss as sum and count, metrics). See `gspo.objectives`."""

    def __call__(self, logp_BC, old_logp_BC, advantages_BC, mask_BC, *, ref_logp_BC=None, entropy_BC=None) -> tuple[Mean, Metrics]: ...


class Scores(NamedTuple):
    """Completion log-probs and entropies (nats), float32 [B, C]; the routers' free choices (None for dense models)."""

    logp_BC: chex.Array
    entropy_BC: chex.Array
    routes_LBTX: chex.Array | None


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
) -> Scores:
    """Log-prob of every completion column under `params`, shaped as the sampler shapes it. Values past a row's end are junk: mask them.

    Logits exist for `chunk` columns at a time, forward and backward (remat), so no [B, T, V] array is ever made.
    """
    B, T = tokens_BT.shape
    C, P = completion_width, T - completion_width
    out = model.apply({"params": params}, tokens_BT, P - prompt_lengths_B, routes_LBTX)
    hidden_BCD = out.hidden_BTD[:, P - 1 : T - 1]  # column t predicts column t + 1
    target_BC = tokens_BT[:, P:]

    @jax.checkpoint
    def score_chunk(hidden_BcD, target_Bc):
        logits_BcV = model.apply({"params": params}, hidden_BcD, method="logits")
        logits_BcV = shape_logits(logits_BcV, sampling, keep=target_Bc)
        return log_prob(logits_BcV, target_Bc), entropy(logits_BcV)

    if chunk >= C:
        return Scores(*score_chunk(hidden_BCD, target_BC), out.routes_LBTX)
    pieces = -(-C // chunk)
    pad = pieces * chunk - C

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, pieces, chunk, *x.shape[2:]), 1, 0)

    _, scored = jax.lax.scan(lambda _, xs: (None, score_chunk(*xs)), None, (cut(hidden_BCD), cut(target_BC)))
    logp_BC, entropy_BC = (jnp.moveaxis(x, 0, 1).reshape(B, pieces * chunk)[:, :C] for x in scored)
    return Scores(logp_BC, entropy_BC, out.routes_LBTX)


def make_scorer(model: Transformer, *, completion_width: int, sampling: Sampling, chunk: int, micro_batch_size: int = 0):
    """Returns jitted `scorer(params, tokens_BT, prompt_lengths_B) -> Scores`: old or reference log-probs, in micro-batches of rows."""

    def scorer(params, tokens_BT, prompt_lengths_B) -> Scores:
        def one(rows):
            return score_completions(model, params, *rows, completion_width, sampling=sampling, chunk=chunk)

        B = tokens_BT.shape[0]
        parts = B // (micro_batch_size or B)
        if parts == 1:
            return one((tokens_BT, prompt_lengths_B))
        scores = jax.lax.map(one, (_deal(tokens_BT, parts), _deal(prompt_lengths_B, parts)))
        return Scores(*(_undeal(x) for x in scores[:2]), None if scores.routes_LBTX is None else _undeal(scores.routes_LBTX, 1))

    return jax.jit(scorer)


def _deal(x: chex.Array, parts: int, axis: int = 0) -> chex.Array:
    """Rows -> [parts, rows / parts, ...], dealt like cards: part i holds rows i, i + parts, ... so a sharded row axis stays put."""
    shape = x.shape[:axis] + (x.shape[axis] // parts, parts) + x.shape[axis + 1 :]
    return jnp.moveaxis(x.reshape(shape), axis + 1, 0)


def _undeal(x: chex.Array, axis: int = 0) -> chex.Array:
    """Inverse of `_deal`."""
    x = jnp.moveaxis(x, 0, axis + 1)
    return x.reshape(x.shape[:axis] + (-1,) + x.shape[axis + 2 :])


def _map_rows(fn, batch: Batch) -> Batch:
    """fn(array, row axis) on every array of a batch: rows lie on axis 0, in routes on axis 1."""
    mapped = {name: None if x is None else fn(x, int(name == "routes_LBTX")) for name, x in vars(batch).items()}
    return Batch(**mapped)


def minibatch(batch: Batch, index: int, count: int) -> Batch:
    """The index-th of `count` equal, contiguous parts of a rollout batch."""
    return _map_rows(lambda x, axis: jnp.split(x, count, axis)[index], batch)


def make_train_step(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    objective: ObjectiveFn,
    *,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    micro_batch_size: int = 0,
    chunk: int = 128,
    replay: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns jitted `step(state, batch) -> (state, metrics)`; the given state is donated.

    micro_batch_size: rows per forward and backward pass (0: all). The gradient does not depend on it: sums are accumulated, and
    divided once by the summed count. replay: the experts in batch.routes_LBTX run instead of the routers' choices. With or without
    replay, the routers' free choices are compared with batch.routes_LBTX.
    """

    def loss_of_part(params, part: Batch):
        scores = score_completions(
            model,
            params,
            part.tokens_BT,
            part.prompt_lengths_B,
            part.loss_mask_BC.shape[1],
            sampling=sampling,
            chunk=chunk,
            routes_LBTX=part.routes_LBTX if replay else None,
        )
        loss, _ = objective(
            scores.logp_BC,
            part.old_logp_BC,
            part.advantages_BC,
            part.loss_mask_BC,
            ref_logp_BC=part.ref_logp_BC,
            entropy_BC=scores.entropy_BC,
        )
        return loss.total, (loss.count, scores)

    def accumulate(params, batch: Batch):
        """Gradient of the loss total, its count, and the scores of all rows."""
        B = batch.tokens_BT.shape[0]
        parts = B // (micro_batch_size or B)
        grad_fn = jax.grad(loss_of_part, has_aux=True)
        if parts == 1:
            grads, (count, scores) = grad_fn(params, batch)
            return grads, count, scores

        def body(carry, part):
            grads, count = carry
            more, (n, scores) = grad_fn(params, part)
            return (jax.tree.map(jnp.add, grads, more), count + n), scores

        zeros = (jax.tree.map(jnp.zeros_like, params), jnp.float32(0))
        (grads, count), scores = jax.lax.scan(body, zeros, _map_rows(lambda x, axis: _deal(x, parts, axis), batch))
        routes = None if scores.routes_LBTX is None else _undeal(scores.routes_LBTX, 1)
        return grads, count, Scores(_undeal(scores.logp_BC), _undeal(scores.entropy_BC), routes)

    def step(state: TrainState, batch: Batch):
        grads, count, scores = accumulate(state.params, batch)
        grads = jax.tree.map(lambda g: g / jnp.maximum(count, 1), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new_state = state.replace(
            step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state
        )
        # Metrics see the whole minibatch at once, outside the gradient: exact under any split into micro-batches.
        loss, metrics = objective(
            scores.logp_BC,
            batch.old_logp_BC,
            batch.advantages_BC,
            batch.loss_mask_BC,
            ref_logp_BC=batch.ref_logp_BC,
            entropy_BC=scores.entropy_BC,
        )
        metrics = metrics | {
            "loss": loss.value,
            "grad_norm": optax.global_norm(grads),
        }
        if scores.routes_LBTX is not None:
            metrics |= _router_metrics(model.spec.num_experts, scores.routes_LBTX, batch)
        return new_state, metrics

    return jax.jit(step, donate_argnums=0)


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


def negative_log_likelihood(logp_BC, old_logp_BC, advantages_BC, mask_BC, *, ref_logp_BC=None, entropy_BC=None):
    """The objective of supervised fine-tuning: -mean of log π over completion tokens. Ignores all that is not mask."""
    return masked_mean(-logp_BC, mask_BC), {"accuracy/token_prob": masked_mean(jnp.exp(logp_BC), mask_BC).value}
