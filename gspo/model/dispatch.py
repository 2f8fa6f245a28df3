"""Expert parallelism: tokens to the devices that hold their experts, and back. Dropless, under `jax.shard_map`.

Rows are cut along all axes but `tensor`, experts along those that the rules give them. The devices that hold the
experts of one another's tokens form a group of n. On each, with M tokens of its own:

    all_gather   every device of the group sees all n M tokens, runs its own experts on those that chose them, and the
                 partial sums are added up and scattered back. Moves n M rows each way, whatever was chosen: right for n
                 up to about X
    all_to_all   each (token, choice) pair travels to the one device that holds its expert, and its result back. Moves M
                 X rows each way: right for larger groups

Both need room for the worst case, all tokens of a group choosing the experts of one device: n M min(X, E/n) rows.
Routing decides how many of them are filled, and the grouped matmuls of the `ragged` backend visit only those.
"""

from collections.abc import Callable
from functools import partial

import chex
import jax
import jax.numpy as jnp

from gspo.model.experts import from_slots, make_slots, most_pairs, to_slots
from gspo.parallel.sharding import Layout, gather_axes

Backend = Callable[
    ..., chex.Array
]  # (h_MD, gates_MX, experts_MX, w_gate, w_up, w_down) -> [M, D]; see gspo.model.experts


def dispatch(
    layout: Layout,
    backend: Backend,
    h_BTD: chex.Array,
    gates_BTX: chex.Array,
    experts_BTX: chex.Array,
    w_gate_EDF: chex.Array,
    w_up_EDF: chex.Array,
    w_down_EFD: chex.Array,
    *,
    dtype: jnp.dtype,
) -> chex.Array:
    """Σ_x gate_x · E_{expert_x}(h) for every token, [B, T, D]; weights are cast to dtype."""
    chex.assert_equal_shape([gates_BTX, experts_BTX])
    chex.assert_equal_shape_prefix([h_BTD, gates_BTX], 2)
    if not layout.several:
        return _on_tokens(
            backend, h_BTD, gates_BTX, experts_BTX, *(w.astype(dtype) for w in (w_gate_EDF, w_up_EDF, w_down_EFD))
        )

    group, tensor, embed = layout.axes("expert"), layout.axes("mlp"), layout.axes("expert_embed")
    ragged = layout.mesh.devices.flat[0].platform != "cpu"
    exchange = {"all_gather": _by_all_gather, "all_to_all": partial(_by_all_to_all, ragged=ragged)}[layout.dispatch]

    def one_device(h_BTD, gates_BTX, experts_BTX, *weights):
        # Weights that are cut along an axis of rows are gathered, in the dtype that they are used in; the transpose of
        # that scatters their gradients back.
        w_gate_EDF, w_up_EDF, w_down_EFD = (w.astype(dtype) for w in weights)
        w_gate_EDF, w_up_EDF = (gather_axes(w, embed, 1) for w in (w_gate_EDF, w_up_EDF))
        w_down_EFD = gather_axes(w_down_EFD, embed, 2)

        def run(h_MD, gates_MX, experts_MX):
            return backend(h_MD, gates_MX, experts_MX, w_gate_EDF, w_up_EDF, w_down_EFD)

        def exchanged(h_MD, gates_MX, experts_MX):
            if not group:
                return run(h_MD, gates_MX, experts_MX)
            return exchange(run, w_gate_EDF.shape[0], group, h_MD, gates_MX, experts_MX)

        y_BTD = _on_tokens(exchanged, h_BTD, gates_BTX, experts_BTX)
        return (
            jax.lax.psum(y_BTD, tensor) if tensor else y_BTD
        )  # each device of `tensor` has a part of the experts' width

    rows, up, down = (
        layout.spec("rows"),
        layout.spec("expert", "expert_embed", "mlp"),
        layout.spec("expert", "mlp", "expert_embed"),
    )
    mapped = jax.shard_map(
        one_device, mesh=layout.mesh, in_specs=(rows, rows, rows, up, up, down), out_specs=rows, check_vma=False
    )  # fmt: skip
    return mapped(h_BTD, gates_BTX, experts_BTX, w_gate_EDF, w_up_EDF, w_down_EFD)


def _on_tokens(run: Callable, h_BTD, gates_BTX, experts_BTX, *weights):
    """run on [M, ...], M = B · T."""
    y_MD = run(*(x.reshape(-1, x.shape[-1]) for x in (h_BTD, gates_BTX, experts_BTX)), *weights)
    return y_MD.reshape(h_BTD.shape)


def _by_all_gather(run, num_local: int, group, h_MD, gates_MX, experts_MX):
    """All tokens of the group to every device; each adds what its experts have to say."""
    h_AD, gates_AX, experts_AX = (
        jax.lax.all_gather(x, group, axis=0, tiled=True) for x in (h_MD, gates_MX, experts_MX)
    )
    own_AX = experts_AX - jax.lax.axis_index(group) * num_local  # outside of 0 .. num_local - 1: another device's
    return jax.lax.psum_scatter(run(h_AD, gates_AX, own_AX), group, scatter_dimension=0, tiled=True)


def _by_all_to_all(run, num_local: int, group, h_MD, gates_MX, experts_MX, *, ragged: bool):
    """Each pair to the device of its expert, sorted by device, and its result back to where it came from."""
    n, me = jax.lax.psum(1, group), jax.lax.axis_index(group)
    M, X = experts_MX.shape
    slots = make_slots(experts_MX // num_local, n, 1, M * X)  # one stretch per device
    sizes_nn = jax.lax.all_gather(slots.size_E, group)  # [from, to]
    before_nn = jnp.cumsum(sizes_nn, axis=0) - sizes_nn  # pairs for `to` that come from devices before `from`
    start_nn = jnp.cumsum(sizes_nn, axis=1) - sizes_nn  # where the stretch for `to` starts on `from`
    out = (start_nn[me], sizes_nn[me], before_nn[me], sizes_nn[:, me])
    back = (before_nn[:, me], sizes_nn[:, me], start_nn[:, me], sizes_nn[me])

    num_received = n * most_pairs(experts_MX, num_local)
    own_S1 = (experts_MX % num_local).reshape(-1, 1)[slots.token_S * X + slots.choice_S]
    own_R1 = _exchange(own_S1, num_received, out, group, ragged)
    filled_R1 = (jnp.arange(num_received) < jnp.sum(sizes_nn[:, me]))[:, None]
    h_RD = _exchange(to_slots(h_MD, slots.slot_MX, slots.token_S), num_received, out, group, ragged)
    y_RD = run(h_RD, filled_R1.astype(gates_MX.dtype), jnp.where(filled_R1, own_R1, -1))
    y_SD = _exchange(y_RD, M * X, back, group, ragged)
    return from_slots(y_SD, gates_MX.astype(y_SD.dtype), *slots[:3])


def _exchange(x_SA, num_rows: int, plan, group, ragged: bool):
    """Stretches of rows to their devices -> [num_rows, A], 0 where nothing arrived.

    plan: where each stretch starts here, its size, where it starts there, and what size arrives from each device; [n]
    int32 each. Where the backend has no ragged_all_to_all (the CPU), everything is gathered and the same rows are
    picked by the same plan."""
    if ragged:
        return jax.lax.ragged_all_to_all(x_SA, jnp.zeros((num_rows, x_SA.shape[1]), x_SA.dtype), *plan, axis_name=group)
    me = jax.lax.axis_index(group)
    x_nSA, here_nn, size_nn, there_nn = (jax.lax.all_gather(x, group) for x in (x_SA, *plan[:3]))
    begin_n, size_n = there_nn[:, me], size_nn[:, me]
    row_R = jnp.arange(num_rows)
    inside_Rn = (row_R[:, None] >= begin_n) & (row_R[:, None] < begin_n + size_n)
    from_R = jnp.argmax(inside_Rn, axis=1)
    source_R = here_nn[from_R, me] + row_R - begin_n[from_R]
    picked_RA = x_nSA[from_R, jnp.clip(source_R, 0, x_SA.shape[0] - 1)]
    return jnp.where(jnp.any(inside_Rn, axis=1)[:, None], picked_RA, 0)
