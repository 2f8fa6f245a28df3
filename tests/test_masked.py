"""Masked sums and means: what is counted, in which precision, and that parts add up."""

import jax
import jax.numpy as jnp
import numpy as np

from gspo import masked

X = np.array([[1.0, 2.0, np.nan], [4.0, np.inf, -np.inf], [np.nan] * 3])
MASK = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]], bool)


# Catches NaN · 0, and rows without an element counted as zeros.
def test_what_lies_under_the_mask_does_not_matter():
    assert masked.masked_sum(X, MASK) == 7
    np.testing.assert_array_equal(masked.masked_sum(X, MASK, axis=1), [3, 4, 0])
    mean = masked.masked_mean(X, MASK)
    assert (mean.total, mean.count) == (7, 3)
    np.testing.assert_array_equal(masked.row_means(X, MASK), [1.5, 4, 0])


# Catches a gradient of NaN through the unselected branch of a where.
def test_gradients_at_masked_positions_are_zero():
    gradient = jax.grad(lambda x: masked.masked_mean(x, MASK).value + masked.row_means(x, MASK).sum())(jnp.asarray(X))
    np.testing.assert_allclose(gradient, MASK / 3 + MASK / np.array([[2], [1], [1]]), rtol=1e-6)


# Catches a mean of means.
def test_means_of_parts_add_up_to_the_mean_of_the_whole():
    parts = masked.masked_mean(X[:1], MASK[:1]) + masked.masked_mean(X[1:], MASK[1:])
    np.testing.assert_allclose(parts.value, 7 / 3, rtol=1e-6)


# Catches an extreme that takes the 0 of an empty part, a part that is added twice, and a value without a token counted
# in a mean over updates.
def test_metrics_add_up_as_they_declare():
    def update(x, seen, rows):
        x = jnp.asarray(x, jnp.float32)
        return {
            "max": masked.Max(jnp.max(x, initial=-jnp.inf, where=seen)),
            "min": masked.Min(jnp.min(x, initial=jnp.inf, where=seen)),
            "mean": masked.masked_mean(x, jnp.full(x.shape, seen)),
            "norm": masked.over_updates(jnp.nan if not seen else x.sum(), jnp.asarray(seen)),
            "last": masked.Last(jnp.asarray(rows)),
        }

    parts = [
        update([-3.0, -1.0, -2.0], True, [1.0, 2.0]),
        update([5.0], False, [3.0, 4.0]),
        update([-8.0], True, [5.0, 6.0]),
    ]
    line = masked.values(masked.added(jax.device_get(parts)))
    assert line == {"max": -1, "min": -8, "mean": -14 / 4, "norm": -7, "last": [5, 6]}
    empty = masked.values(parts[1])
    assert [empty[name] for name in ("max", "min", "mean", "norm")] == [0] * 4


# Catches sums of float32 in an order that shows: 1 is lost beside 2^24.
def test_updates_are_added_in_float64():
    parts = [{"x": masked.Mean(np.float32(total), np.float32(1))} for total in (2**24, 1, 1)]
    assert masked.values(masked.added(parts)) == {"x": (2**24 + 2) / 3}


def test_a_mean_of_nothing_is_zero():  # catches 0/0
    assert masked.masked_mean(X, np.zeros_like(MASK)).value == 0


# Catches a mask that counts its own shape instead of the shape it is broadcast to.
def test_a_mask_of_rows_counts_every_element_of_the_row():
    mean = masked.masked_mean(np.ones((2, 3)), np.array([[True], [False]]))
    assert (mean.total, mean.count) == (3, 3)


# Catches a sum in bf16, which stops growing at 256.
def test_bfloat16_is_summed_in_float32():
    ones = jnp.ones((1, 3000), jnp.bfloat16)
    mask = jnp.ones_like(ones, dtype=bool)
    mean = masked.masked_mean(ones, mask)
    assert mean.total == 3000 and mean.total.dtype == mean.count.dtype == jnp.float32
    halves = masked.row_means(ones.at[:, ::2].set(0), mask)
    assert halves[0] == 0.5 and halves.dtype == jnp.float32


def test_float64_stays_float64():  # catches oracles that agree only because both sides were rounded
    with jax.enable_x64(True):
        mean = masked.masked_mean(np.float64(X), MASK)
        assert mean.total.dtype == mean.count.dtype == masked.row_means(X, MASK).dtype == jnp.float64
