"""The reward model: the critic's module (a decoder with one number per position), read at the last token of a
completion, which has seen all of it. It is trained on preferences, and scores completions in reinforcement learning.
"""

from collections.abc import Callable

import chex
import flax.struct
import jax
import jax.numpy as jnp
import optax

from gspo.learning.critic import Critic
from gspo.learning.learner import jit_update
from gspo.learning.microbatch import accumulated_gradient, merge_record, num_parts, split_record
from gspo.masked import Mean, Metrics, over_updates
from gspo.model.packing import Packing
from gspo.types import Params, TrainState, array

PAIR = 2  # rows of a pair, which stay together
STATISTICS = "score_statistics"  # {"mean", "std"} of the scores of training data, saved beside the weights


@flax.struct.dataclass
class CompletionRows:
    """Frames of completions. margins_B: of pairs, where the chosen text stands before the rejected one; float32, that
    of the pair in both of its rows."""

    tokens_BT: chex.Array = array("BT")
    prompt_lengths_B: chex.Array = array("B")
    completion_lengths_B: chex.Array = array("B")
    margins_B: chex.Array | None = array("B", default=None)


@flax.struct.dataclass
class Scored:
    scores_B: chex.Array = array("B")


def completion_scores(
    model: Critic, params: Params, rows: CompletionRows, completion_width: int, rows_per_prompt: int = 1
) -> chex.Array:
    """[B] float32: r(x, y), read at the last token of each completion. rows_per_prompt: so many neighbours have their
    prompt in common, which then runs once (`gspo.model.packing`)."""
    P = rows.tokens_BT.shape[1] - completion_width
    first_B = P - rows.prompt_lengths_B
    if rows_per_prompt == 1:
        values_BT = model.apply({"params": params}, rows.tokens_BT, first_B)
    else:
        packing = Packing(P, rows_per_prompt)
        packed = packing.pack(rows.tokens_BT)
        values_BT = packing.unpack(model.apply({"params": params}, packed, first_B[::rows_per_prompt], packing=packing))
    last_B = P + rows.completion_lengths_B - 1
    return jnp.take_along_axis(values_BT, last_B[:, None], axis=1)[:, 0]


def make_reward_fn(
    model: Critic, *, completion_width: int, micro_batch_size: int = 0, rows_per_prompt: int = 1
) -> Callable[[Params, CompletionRows], chex.Array]:
    """Returns jitted `reward(params, rows) -> [B] float32`, so many rows at a time."""

    def reward(params: Params, rows: CompletionRows) -> chex.Array:
        def one(part: CompletionRows) -> Scored:
            return Scored(completion_scores(model, params, part, completion_width, rows_per_prompt))

        parts = num_parts(rows.tokens_BT.shape[0], micro_batch_size)
        if parts == 1:
            return one(rows).scores_B
        split = split_record(rows, parts, rows_per_prompt)
        return merge_record(jax.lax.map(one, split), rows_per_prompt).scores_B

    return jax.jit(jax.named_scope("reward")(reward))


def make_reward_step(
    model: Critic,
    optimizer: optax.GradientTransformation,
    loss_fn: Callable[[chex.Array, chex.Array], tuple[Mean, Metrics]],
    *,
    completion_width: int,
    micro_batch_size: int = 0,
    state_shardings: TrainState | None = None,
) -> Callable[[TrainState, CompletionRows], tuple[TrainState, Metrics]]:
    """Returns jitted `reward_step(state, pairs) -> (state, metrics)`; the state is donated.

    loss_fn: (scores_B, margins_B) -> (loss, metrics), `objectives.bradley_terry` say. micro_batch_size: rows at a time,
    an even number; 0: all. state_shardings: as in `make_train_step`."""

    def loss_of_part(params: Params, part: CompletionRows):
        scores_B = completion_scores(model, params, part, completion_width, PAIR)
        loss, _ = loss_fn(scores_B, part.margins_B)
        return loss.total, (loss.count, Scored(scores_B))

    def reward_step(state: TrainState, pairs: CompletionRows):
        shardings = None if state_shardings is None else state_shardings.params
        grads, scored = accumulated_gradient(loss_of_part, state.params, pairs, micro_batch_size, shardings, PAIR)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        _, metrics = loss_fn(scored.scores_B, pairs.margins_B)
        metrics = metrics | {"grad_norm": over_updates(optax.global_norm(grads))}
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return jit_update(jax.named_scope("update")(reward_step), state_shardings)
