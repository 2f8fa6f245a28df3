"""Masked sums and means, kept as (sum, count) until the very end.

A mean of means is wrong as soon as parts differ in size: micro-batches with different lengths, devices with different
rows, minibatches of a rollout. So nothing here divides; `Mean.value` does, once, after the parts were added. Metrics
are kept likewise: each says how it adds up.
"""

import functools
import operator
from collections.abc import Sequence

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class Mean:
    """A mean in the making: scalars `total` and `count`, float32 or wider. `a + b` merges two parts exactly."""

    total: chex.Array
    count: chex.Array

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> chex.Array:
        """total / count, and 0 where nothing was counted."""
        return self.total / (self.count + (self.count == 0))


@flax.struct.dataclass
class Max:
    """A maximum in the making: -inf where nothing was seen, which `value` gives as 0."""

    largest: chex.Array

    def __add__(self, other: "Max") -> "Max":
        return Max(jnp.maximum(self.largest, other.largest))

    @property
    def value(self) -> chex.Array:
        return jnp.where(self.largest == -jnp.inf, 0, self.largest)


@flax.struct.dataclass
class Min:
    """A minimum in the making: inf where nothing was seen, which `value` gives as 0."""

    smallest: chex.Array

    def __add__(self, other: "Min") -> "Min":
        return Min(jnp.minimum(self.smallest, other.smallest))

    @property
    def value(self) -> chex.Array:
        return jnp.where(self.smallest == jnp.inf, 0, self.smallest)


@flax.struct.dataclass
class Last:
    """The last of several values, scalars or arrays: for what the parts before it say nothing of."""

    value: chex.Array

    def __add__(self, other: "Last") -> "Last":
        return other


Metric = Mean | Max | Min | Last
Metrics = dict[str, Metric]  # how a metric adds up over the updates of a rollout is part of it, not of its name


def over_updates(value: chex.Array, counted: chex.Array | bool = True) -> Mean:
    """A value that does not add up (a quantile, a variance, a norm) as a mean over updates; `counted` says whether this
    one has it at all."""
    counted = at_least_float32(counted)
    return Mean(jnp.where(counted, value, 0), counted)


def added(parts: Sequence[Metrics]) -> Metrics:
    """The metrics of several updates as those of all. On the host, in float64: nothing is lost by the order."""
    parts = [jax.tree.map(lambda x: np.asarray(x, np.float64), part) for part in parts]
    return {name: functools.reduce(operator.add, (part[name] for part in parts)) for name in parts[0]}


def values(metrics: Metrics) -> dict[str, float | list[float]]:
    """Metrics as numbers; arrays, one value per layer say, as lists."""
    return {name: np.asarray(metric.value, np.float64).tolist() for name, metric in metrics.items()}


def at_least_float32(x: chex.Array) -> chex.Array:
    """x as float32; float64 stays. A bf16 sum over thousands of tokens would be noise."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def masked_sum(x: chex.Array, mask: chex.Array, axis: int | tuple[int, ...] | None = None) -> chex.Array:
    """Sum of x where mask holds. x may hold inf or NaN elsewhere: it is replaced, not multiplied by 0."""
    return jnp.sum(jnp.where(mask, x, 0), axis=axis)


def masked_mean(x: chex.Array, mask: chex.Array) -> Mean:
    """Mean of x over the True elements of mask (broadcast to x), as a `Mean`."""
    x = at_least_float32(x)
    return Mean(masked_sum(x, mask), jnp.sum(jnp.broadcast_to(mask, x.shape), dtype=x.dtype))


def row_means(x_BC: chex.Array, mask_BC: chex.Array) -> chex.Array:
    """[B, C] -> [B] mean of each row over its mask; 0 for a row without a True element."""
    chex.assert_equal_shape([x_BC, mask_BC])
    return masked_sum(at_least_float32(x_BC), mask_BC, axis=1) / jnp.maximum(jnp.sum(mask_BC, axis=1), 1)
