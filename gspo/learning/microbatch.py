"""Rows in parts, and columns: minibatches of a rollout, micro-batches of an update, and gradients that do not depend on
the split.

A loss is a sum and a count. The gradient of the sum is accumulated over micro-batches, and divided by the summed count
once."""

import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from gspo.types import Batch, Params, map_arrays, row_axis


def num_parts(rows: int, micro_batch_size: int) -> int:
    """Number of equal micro-batches; 0 stands for one of all rows. Fails rather than take more rows at a time than was
    asked for."""
    chex.assert_is_divisible(rows, micro_batch_size or rows)
    return rows // (micro_batch_size or rows)


def split_rows(x: chex.Array, parts: int, axis: int = 0, unit: int = 1) -> chex.Array:
    """Rows -> [parts, rows / parts, ...]. Part i holds units i, i + parts, ... so that a sharded row axis stays put;
    a unit is so many neighbours that stay together."""
    shape = x.shape[:axis] + (x.shape[axis] // parts // unit, parts, unit) + x.shape[axis + 1 :]
    return jnp.moveaxis(x.reshape(shape), axis + 1, 0).reshape(parts, *x.shape[:axis], -1, *x.shape[axis + 1 :])


def merge_rows(x: chex.Array, axis: int = 0, unit: int = 1) -> chex.Array:
    """Inverse of `split_rows`."""
    parts, *shape = x.shape
    x = x.reshape(parts, *shape[:axis], shape[axis] // unit, unit, *shape[axis + 1 :])
    return jnp.moveaxis(x, 0, axis + 1).reshape(*shape[:axis], parts * shape[axis], *shape[axis + 1 :])


def split_record(record: Any, parts: int, unit: int = 1) -> Any:
    """`split_rows` on every array of a record."""
    return map_arrays(lambda dims, x: split_rows(x, parts, row_axis(dims), unit), record)


def merge_record(record: Any, unit: int = 1) -> Any:
    """Inverse of `split_record`."""
    return map_arrays(lambda dims, x: merge_rows(x, row_axis(dims), unit), record)


def shared_rows(rows_at_a_time: int, devices: int, num_generations: int) -> int:
    """Neighbouring rows that have their prompt in common, wherever rows are cut: into micro-batches of so many rows,
    and these over the devices."""
    return math.gcd(rows_at_a_time // devices, num_generations)


def shuffled_units(batch: Batch, key: chex.PRNGKey, unit: int) -> Batch:
    """The rows of a rollout batch in an order that the key draws. Units of so many neighbours stay whole, and in the
    places of units: rows that have their prompt in common go on having it, wherever rows are cut."""
    rows = batch.tokens_BT.shape[0]
    order = jax.random.permutation(key, rows // unit)
    order_B = (order[:, None] * unit + jnp.arange(unit)).reshape(-1)
    return map_arrays(lambda dims, x: jnp.take(x, order_B, row_axis(dims)), batch)


def minibatch(batch: Batch, index: int, count: int) -> Batch:
    """The index-th of `count` equal, contiguous parts of a rollout batch."""
    return map_arrays(lambda dims, x: jnp.split(x, count, row_axis(dims))[index], batch)


def accumulated_gradient(
    loss_fn: Callable[[Params, Batch], tuple[chex.Array, tuple[chex.Array, Any]]],
    params: Params,
    batch: Batch,
    micro_batch_size: int,
    shardings: Params | None = None,
    unit: int = 1,
) -> tuple[Params, Any]:
    """Gradient of Σ total / Σ count over the micro-batches, and the auxiliary named tuple of all rows.

    loss_fn: (params, rows) -> (total, (count, named tuple of arrays with a row axis)); the count must not depend on
    params. shardings: where the parameters lie, and so their gradients: left to itself, the partitioner may carry the
    sum whole. unit: neighbouring rows that stay in one micro-batch."""
    parts = num_parts(batch.tokens_BT.shape[0], micro_batch_size)

    def placed(grads: Params) -> Params:
        return grads if shardings is None else jax.lax.with_sharding_constraint(grads, shardings)

    def grad_fn(params, part):
        grads, aux = jax.grad(loss_fn, has_aux=True)(params, part)
        return placed(grads), aux

    if parts == 1:
        grads, (count, aux) = grad_fn(params, batch)
    else:

        def body(carry, part):
            grads, count = carry
            more, (n, aux) = grad_fn(params, part)
            return (placed(jax.tree.map(jnp.add, grads, more)), count + n), aux

        zeros = (placed(jax.tree.map(jnp.zeros_like, params)), jnp.float32(0))
        # Two parts without a loop: XLA holds the sum that a loop carries twice, 0.9 GiB of 16 for a 30B model on 64
        # chips.
        (grads, count), aux = jax.lax.scan(body, zeros, split_record(batch, parts, unit), unroll=parts <= 2)
        aux = merge_record(aux, unit)
    return jax.tree.map(lambda g: g / jnp.maximum(count, 1), grads), aux
