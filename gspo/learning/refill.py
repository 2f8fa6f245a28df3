"""Completions of mixed length: S of the B rows are decoded at a time, and a row that has ended makes room for a waiting
one (continuous batching).

    while rows wait:
        refill    rows that have ended leave their slots, the next ones move in, each with its first token
        decode    one token for every slot, until an eighth of the slots have ended (all, where no row waits)

All slots write their keys and values at the same column of a ring, one slice per step as in the loop over all rows, but
each slot sees only the columns since its row moved in: the keys are turned by their positions already, so their order
is free. The ring is as wide as the longest row so far needs, in the steps of `cache_widths`. A slot holds a copy of its
prompt's keys and values. Tokens are drawn with the keys of their row and place: what a row says does not depend on its
slot, nor on how many there are.

In this file S are slots. In the arrays of their caches both rows (B) and prompts (Q) are slots.
"""

import dataclasses

import chex
import flax.struct
import jax
import jax.numpy as jnp

from gspo.learning.decoded import DecodeState, Decoding, cache_widths, empty_state, rollout_of
from gspo.model.cache import Caches
from gspo.model.layers import layers_of
from gspo.model.transformer import Output
from gspo.parallel.sharding import ONE_DEVICE, Layout
from gspo.types import Params, Rollout, UserError, array, map_arrays

ENDED_SHARE = 8  # slots are refilled when one in so many has ended: a refill costs part of a step


@flax.struct.dataclass
class Slots:
    """Carry of the loop. A slot that has no row, or whose row has ended, is decoded all the same; nothing is kept."""

    written: DecodeState  # by all rows, without caches. Lengths and ends: of the rows that have left
    caches: Caches
    column: chex.Array = array()  # int32, of the ring: where the next keys and values go
    waiting: chex.Array = array()  # int32, the first row that waits
    row_S: chex.Array = array("S")  # int32; B: none
    key_S: chex.Array = array("S")  # the row's own
    first_S: chex.Array = array("S")  # int32, column of the frame where the row's prompt begins
    begin_S: chex.Array = array("S")  # int32, column of the ring where its completion begins
    length_S: chex.Array = array("S")  # int32, tokens written
    last_S: chex.Array = array("S")  # int32, the last of them, not yet fed to the model
    ended_S: chex.Array = array("S")  # bool


def check_slots(max_num_seqs: int, layout: Layout) -> None:
    """Raises UserError where the devices of a layout cannot share so many slots."""
    devices = layout.parts("rows")
    cut = [name for name in layout.table if name != "rows" and layout.parts(name) > 1]
    if max_num_seqs and cut:
        raise UserError(
            f"max_num_seqs={max_num_seqs}: each device refills its own slots, with whole weights, but mesh."
            f"{layout.axes(cut[0])[0]} cuts them; set rollout_mesh_rules='single', or max_num_seqs=0"
        )
    if max_num_seqs % devices:
        raise UserError(
            f"max_num_seqs={max_num_seqs}: not divisible by the {devices} devices that share the rows; use a multiple "
            f"of {devices}, or fewer devices"
        )


def sample_in_slots(
    how: Decoding,
    num_slots: int,
    params: Params,
    prompt_QP: chex.Array,
    prompt_lengths_Q: chex.Array,
    key: chex.PRNGKey,
) -> Rollout:
    """What `make_sampler` returns does this where there are fewer slots than rows. On a mesh each device goes through
    its share of the rows with its share of the slots, and waits for no other until all of them have ended."""
    layout, alone = how.model.layout, dataclasses.replace(how, model=how.model.clone(layout=ONE_DEVICE))
    if not layout.several:
        return _sample(alone, num_slots, params, prompt_QP, prompt_lengths_Q, key, 0)
    axes, devices = layout.axes("rows"), layout.parts("rows")

    def on_one(params, prompt_QP, prompt_lengths_Q, key):
        first_row = jax.lax.axis_index(axes) * len(prompt_QP) * how.num_generations
        rollout = _sample(alone, num_slots // devices, params, prompt_QP, prompt_lengths_Q, key, first_row)
        return rollout.replace(decode_steps=jax.lax.pmax(rollout.decode_steps, axes))

    whole, rows = layout.spec(), layout.spec("rows")
    specs = Rollout(rows, rows, rows, rows, layout.spec(None, "rows"), rows, whole)
    mapped = jax.shard_map(
        on_one,
        mesh=layout.mesh,
        in_specs=(whole, rows, rows, whole),
        out_specs=specs if how.model.spec.num_experts else specs.replace(routes_LBTX=None),
        check_vma=False,
    )
    return mapped(params, prompt_QP, prompt_lengths_Q, key)


def _sample(
    how: Decoding,
    num_slots: int,
    params: Params,
    prompt_QP: chex.Array,
    prompt_lengths_Q: chex.Array,
    key: chex.PRNGKey,
    first_row: chex.Array | int,
) -> Rollout:
    """On one device, the rows first_row, first_row + 1, ... of a rollout."""
    Q, P = prompt_QP.shape
    model, C, G = how.model, how.max_completion_length, how.num_generations
    B, S, first_Q = Q * G, num_slots, P - prompt_lengths_Q
    chex.assert_shape(prompt_lengths_Q, (Q,))
    widths = cache_widths(C)
    out, prompts = model.apply({"params": params}, prompt_QP, first_Q, 0, widths[0], method="prefill")
    layers = None if model.spec.scanned else layers_of(params, model.spec)
    refill = _refill_of(how, params, key, first_row, first_Q, out.hidden_BTD[:, -1], prompts)
    decode = _decode_of(how, params, layers, B, P)
    least = max(1, S // ENDED_SHARE)

    def fits(s: Slots):
        return jnp.all(_ended(s, B, C) | (s.length_S <= s.caches[0].width))

    def is_left(s: Slots):
        return fits(s) & ((s.waiting < B) | ~jnp.all(_ended(s, B, C)))

    def goes_on(s: Slots):
        return fits(s) & (jnp.sum(_ended(s, B, C)) < jnp.where(s.waiting < B, least, S))

    def turn(s: Slots) -> Slots:
        return jax.lax.while_loop(goes_on, decode, refill(s))

    s = jax.lax.while_loop(is_left, turn, _empty_slots(how, out, prompts, key, B, S))
    for width in widths[1:]:
        s = jax.lax.while_loop(is_left, turn, _widened(s, width))
    return rollout_of(_left(s), prompt_QP, prompt_lengths_Q, jnp.repeat(first_Q, G))


def _empty_slots(how: Decoding, out: Output, prompts: Caches, key: chex.PRNGKey, B: int, S: int) -> Slots:
    """No row has moved in yet."""

    def empty(dims, x):
        return jnp.zeros([S if letter in "BQ" else n for letter, n in zip(dims, x.shape, strict=True)], x.dtype)

    zero_S = jnp.zeros((S,), jnp.int32)
    written = empty_state(how.model.spec, out, (), B, how.max_completion_length, how.pad_id)
    return Slots(
        written=written.replace(step=jnp.int32(1)),  # the first token costs no pass
        caches=tuple(map_arrays(empty, cache) for cache in prompts),
        column=jnp.int32(0),
        waiting=jnp.int32(0),
        row_S=jnp.full((S,), B, jnp.int32),
        key_S=_keys(key, zero_S),
        first_S=zero_S,
        begin_S=zero_S,
        length_S=zero_S,
        last_S=zero_S,
        ended_S=jnp.zeros((S,), bool),
    )


def _widened(s: Slots, width: int) -> Slots:
    """A wider ring for rows of which one has filled it, laid out anew: the oldest column first."""

    def from_oldest(dims, x):
        return jnp.roll(x, -s.column, axis=dims.index("C")) if "C" in dims else x

    full = s.caches[0].width
    caches = tuple(map_arrays(from_oldest, cache).widened(width) for cache in s.caches)
    return s.replace(caches=caches, column=jnp.int32(full), begin_S=full + 1 - s.length_S)


def _refill_of(how: Decoding, params, key, first_row, first_Q, last_QD, prompts: Caches):
    """Returns the step that gives slots without a row to those that wait, in the order of the rows. last_QD: what the
    model says behind each prompt."""
    Q, B = len(first_Q), len(first_Q) * how.num_generations

    def refill(s: Slots) -> Slots:
        free_S = _ended(s, B, how.max_completion_length)
        row_S = jnp.where(free_S, jnp.minimum(s.waiting + jnp.cumsum(free_S) - 1, B), s.row_S)
        new_S, prompt_S = free_S & (row_S < B), jnp.minimum(row_S // how.num_generations, Q - 1)
        key_S = _keys(key, first_row + row_S)
        token_S, logp_S = how.next_token(params, key_S, last_QD[prompt_S], 0)

        def with_prompts(dims, x, of_all):
            return jnp.take(of_all, prompt_S, axis=dims.index("Q")) if "Q" in dims else x

        return s.replace(
            written=_append(_left(s), new_S, row_S, 0, token_S, logp_S),
            caches=tuple(map_arrays(with_prompts, *each) for each in zip(s.caches, prompts, strict=True)),
            waiting=jnp.minimum(s.waiting + jnp.sum(free_S), B),
            row_S=row_S,
            key_S=key_S,
            first_S=first_Q[prompt_S],
            begin_S=jnp.where(new_S, s.column, s.begin_S),
            length_S=jnp.where(free_S, new_S, s.length_S),
            last_S=jnp.where(new_S, token_S, s.last_S),
            ended_S=jnp.where(free_S, new_S & how.is_end(token_S), s.ended_S),
        )

    return refill


def _decode_of(how: Decoding, params, layers, B: int, P: int):
    """Returns the step that feeds the last token of every slot and draws the next."""
    C = how.max_completion_length

    def decode(s: Slots) -> Slots:
        live_S, fed_S = ~_ended(s, B, C), P + s.length_S - 1
        seen_SP = jnp.arange(P) >= s.first_S[:, None]
        width = s.caches[0].width
        seen_SC = (jnp.arange(width) - s.begin_S[:, None]) % width < s.length_S[:, None]
        args = (s.last_S, fed_S - s.first_S, seen_SP, seen_SC, s.caches, s.column, layers)
        out, caches = how.model.apply({"params": params}, *args, method="decode")
        token_S, logp_S = how.next_token(params, s.key_S, out.hidden_BTD[:, 0], s.length_S)
        written, routes_LBTX = s.written, s.written.routes_LBTX
        if routes_LBTX is not None:
            at = (slice(None), jnp.where(live_S, s.row_S, B), fed_S)
            routes_LBTX = routes_LBTX.at[at].set(out.free_routes_LBTX[:, :, 0], mode="drop")
        written = written.replace(step=written.step + 1, routes_LBTX=routes_LBTX)
        return s.replace(
            written=_append(written, live_S, s.row_S, s.length_S, token_S, logp_S),
            caches=caches,
            column=(s.column + 1) % width,
            length_S=s.length_S + live_S,
            last_S=token_S,
            ended_S=s.ended_S | (live_S & how.is_end(token_S)),
        )

    return decode


def _ended(s: Slots, B: int, C: int) -> chex.Array:
    """[S] bool: slots that wait for a row."""
    return s.ended_S | (s.length_S == C) | (s.row_S == B)


def _append(written: DecodeState, kept_S, row_S, place_S, token_S, logp_S) -> DecodeState:
    """One token for the rows of those slots."""
    at = (jnp.where(kept_S, row_S, len(written.lengths_B)), place_S)
    return written.replace(
        tokens_BC=written.tokens_BC.at[at].set(token_S, mode="drop"),
        logp_BC=written.logp_BC.at[at].set(logp_S, mode="drop"),
    )


def _left(s: Slots) -> DecodeState:
    """What is written, with the lengths and ends of the rows that have slots."""
    return s.written.replace(
        lengths_B=s.written.lengths_B.at[s.row_S].set(s.length_S, mode="drop"),
        ended_B=s.written.ended_B.at[s.row_S].set(s.ended_S, mode="drop"),
    )


def _keys(key: chex.PRNGKey, row_S: chex.Array) -> chex.PRNGKey:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, row_S)
