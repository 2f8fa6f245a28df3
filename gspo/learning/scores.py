"""What a policy makes of given completions: token log-probs, entropies, and what its routers say."""

from collections.abc import Callable

import chex
import flax.struct
import jax
import jax.numpy as jnp

from gspo.learning.microbatch import merge_record, num_parts, split_record
from gspo.model.distribution import Sampling
from gspo.model.head import token_scores
from gspo.model.packing import Packing
from gspo.model.routing import compared, router_margin
from gspo.model.transformer import Output, Transformer
from gspo.types import Params, array


@flax.struct.dataclass
class Scores:
    """Completion log-probs and entropies (nats), float32 [B, C]. For MoE models also, None where not asked for:

    free_routes_LBTX    the routers' free choices, also where others were replayed
    margin_LBT          distance from the last chosen expert to the next, in what the router compares
    router_logits_LBTE  the routers' logits, float32; log σ(z) of sigmoid routers
    router_logp_LBCX    log-probs the routers give to the experts that ran, where a token is predicted
    router_kl_LBT       KL from the old routers' softmax to theirs: left to who knows the old ones
    balance_B, z_loss_B the routers' load-balance and z losses of each row: left to who knows which tokens count
    """

    logp_BC: chex.Array = array("BC")
    entropy_BC: chex.Array | None = array("BC", default=None)
    free_routes_LBTX: chex.Array | None = array("LBTX", default=None)
    margin_LBT: chex.Array | None = array("LBT", default=None)
    router_logp_LBCX: chex.Array | None = array("LBCX", default=None)
    router_logits_LBTE: chex.Array | None = array("LBTE", default=None)
    router_kl_LBT: chex.Array | None = array("LBT", default=None)
    balance_B: chex.Array | None = array("B", default=None)
    z_loss_B: chex.Array | None = array("B", default=None)


@flax.struct.dataclass
class Frames:
    """What is scored: the frames (see `gspo.types`), and experts that run in place of the routers' choices."""

    tokens_BT: chex.Array = array("BT")
    prompt_lengths_B: chex.Array = array("B")
    replayed_routes_LBTX: chex.Array | None = array("LBTX", default=None)


def score_completions(
    model: Transformer,
    params: Params,
    tokens_BT: chex.Array,
    prompt_lengths_B: chex.Array,
    completion_width: int,
    *,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    chunk: int = 128,
    replayed_routes_LBTX: chex.Array | None = None,
    rows_per_prompt: int = 1,
    segments_BT: chex.Array | None = None,
) -> Scores:
    """Log-prob of every completion column under `params`, shaped as the sampler shapes it. Values past a row's end are
    junk: mask them.

    replayed_routes_LBTX: experts that run in place of the routers' choices. Token logits exist for `chunk` columns at a
    time, forward and backward (remat), so no [B, T, V] array is ever made. What a caller does not use of the routers is
    never computed under jit.

    rows_per_prompt: so many neighbours have their prompt in common, and the routes that run in it. It runs once for
    them, forward and backward (`gspo.model.packing`); the scores are the same. segments_BT: as in `Batch`, for rows
    that share no prompt.
    """
    T = tokens_BT.shape[1]
    P = T - completion_width
    out, hidden_BCD = _run(
        model, params, tokens_BT, P, prompt_lengths_B, replayed_routes_LBTX, rows_per_prompt, segments_BT
    )
    target_BC = tokens_BT[:, P:]

    kernel_DV = model.apply({"params": params}, method="head_kernel")
    with jax.named_scope("head"):
        logp_BC, entropy_BC = token_scores(
            hidden_BCD, target_BC, kernel_DV, sampling=sampling, chunk=chunk, layout=model.layout
        )
    scores = Scores(logp_BC, entropy_BC)
    if out.free_routes_LBTX is None:
        return scores
    ran_LBTX = out.free_routes_LBTX if replayed_routes_LBTX is None else replayed_routes_LBTX
    return scores.replace(
        free_routes_LBTX=out.free_routes_LBTX,
        margin_LBT=router_margin(_compared(params, out.router_logits_LBTE), model.spec.experts_per_token),
        router_logp_LBCX=router_logp(out.router_logits_LBTE, ran_LBTX, completion_width),
        router_logits_LBTE=out.router_logits_LBTE,
    )


def _run(model: Transformer, params, tokens_BT, P: int, prompt_lengths_B, routes_LBTX, rows_per_prompt, segments_BT):
    """The model on frames, prompts shared or not -> (Output of the frames but for its hidden states, [B, C, D] hidden
    states that predict the completion)."""
    first_B = P - prompt_lengths_B
    if rows_per_prompt == 1:
        out = model.apply({"params": params}, tokens_BT, first_B, routes_LBTX, segments_BT=segments_BT)
        return out, out.hidden_BTD[:, P - 1 : -1]  # column t predicts column t + 1
    assert segments_BT is None, "rows that hold several examples share no prompt"
    packing = Packing(P, rows_per_prompt)
    routes = None if routes_LBTX is None else packing.pack(routes_LBTX, 1)
    out = model.apply({"params": params}, packing.pack(tokens_BT), first_B[::rows_per_prompt], routes, packing=packing)
    routers = (None if x is None else packing.unpack(x, 1) for x in (out.free_routes_LBTX, out.router_logits_LBTE))
    return Output(None, *routers), packing.predicting(out.hidden_BTD)


def _compared(params: Params, logits_LBTE: chex.Array) -> chex.Array:
    """What each layer's router compares, [L, B, T, E]."""
    selection = params["blocks"]["moe"].get("selection")
    return compared(logits_LBTE, None if selection is None else selection["bias"][:, None, None])


def router_logp(logits_LBTE: chex.Array, routes_LBTX: chex.Array, completion_width: int) -> chex.Array:
    """[L, B, C, X] log-probs that routers give to these experts, at the columns that predict a completion token. Junk
    where a route is -1, not recorded: a column that is masked."""
    T = logits_LBTE.shape[2]
    predicting = slice(T - completion_width - 1, T - 1)
    logp_LBCE = jax.nn.log_softmax(logits_LBTE[:, :, predicting], axis=-1)
    experts_LBCX = jnp.maximum(routes_LBTX[:, :, predicting].astype(jnp.int32), 0)
    return jnp.take_along_axis(logp_LBCE, experts_LBCX, axis=-1)


def make_scorer(
    model: Transformer,
    *,
    completion_width: int,
    sampling: Sampling,
    chunk: int,
    micro_batch_size: int = 0,
    rows_per_prompt: int = 1,
    keep: tuple[str, ...] = ("logp_BC", "entropy_BC", "free_routes_LBTX"),
) -> Callable[..., Scores]:
    """Returns jitted `scorer(params, tokens_BT, prompt_lengths_B, replayed_routes_LBTX=None) -> Scores`: old or
    reference log-probs, computed in micro-batches of rows. Fields of `Scores` that are not in `keep` come back as None.
    rows_per_prompt: as in `score_completions`.
    """
    dropped = {name: None for name in Scores.__dataclass_fields__ if name not in keep}

    def scorer(params, tokens_BT, prompt_lengths_B, replayed_routes_LBTX=None) -> Scores:
        def one(rows: Frames) -> Scores:
            scores = score_completions(
                model, params, rows.tokens_BT, rows.prompt_lengths_B, completion_width, sampling=sampling, chunk=chunk,
                replayed_routes_LBTX=rows.replayed_routes_LBTX, rows_per_prompt=rows_per_prompt,
            )  # fmt: skip
            return scores.replace(**dropped)

        rows = Frames(tokens_BT, prompt_lengths_B, replayed_routes_LBTX)
        parts = num_parts(tokens_BT.shape[0], micro_batch_size)
        with jax.named_scope("logprob"):
            if parts == 1:
                return one(rows)
            return merge_record(jax.lax.map(one, split_record(rows, parts, rows_per_prompt)), rows_per_prompt)

    return jax.jit(scorer)
