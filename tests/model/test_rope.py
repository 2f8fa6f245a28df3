"""Rotary positions against loops over single pairs, and the rules that slow their waves down."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo.model.rope import Llama3, Yarn, apply_rope, rope_tables, rule_of
from tests import model_oracle as oracle

apply_rope, rope_tables = jax.jit(apply_rope), jax.jit(rope_tables, static_argnums=(1, 2, 3))


def draws(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def test_rope_turns_the_pairs_half_a_head_apart():
    # Catches the interleaved layout (pairs 2i, 2i + 1), a turn in the other sense, and frequencies over H/2 instead of
    # H.
    (x_BTNH,) = draws(2, (2, 3, 2, 6))
    positions = np.array([[0, 1, 7], [0, 0, 30]])
    turned = apply_rope(x_BTNH, *rope_tables(jnp.asarray(positions), 6, 100.0))
    for b, t, n in np.ndindex(2, 3, 2):
        expected = oracle.rope(x_BTNH[b, t, n].astype(np.float64), positions[b, t], 100.0)
        np.testing.assert_allclose(turned[b, t, n], expected, atol=1e-5)


def test_a_part_of_a_head_is_turned_and_the_rest_stays():
    # Catches the last numbers turned instead of the first, frequencies of the whole head, a rest that is stretched.
    (x_BTNH,) = draws(4, (1, 2, 2, 12))
    scaling = ("yarn", 4.0, 256.0)
    turned = apply_rope(x_BTNH, *rope_tables(np.array([[3, 9]]), 8, 100.0, scaling))
    for t, n in np.ndindex(2, 2):
        expected = oracle.rope(x_BTNH[0, t, n].astype(np.float64), (3, 9)[t], 100.0, scaling, width=8)
        np.testing.assert_allclose(turned[0, t, n], expected, atol=1e-5)
    np.testing.assert_array_equal(turned[..., 8:], x_BTNH[..., 8:])


def regimes(scaling):
    """How much of each of 8 waves is left: 1 kept, 1/factor slowed down."""
    frequency = 100.0 ** (-np.arange(8) / 8)
    return np.array([oracle.slowed(f, i, 8, 100.0, scaling) / f for i, f in enumerate(frequency)])


@pytest.mark.parametrize("scaling", [
    (8.0, 1.0, 4.0, 64.0), ("linear", 4.0), ("yarn", 4.0, 256.0), ("yarn", 4.0, 256.0, 16.0, 2.0, 1.7),
    ("yarn", 4.0, 256.0, 16.0, 2.0, None, False),
])  # fmt: skip
def test_scaled_rope_slows_down_long_waves_and_leaves_short_ones(scaling):
    # Catches low and high swapped, a jump where waves are interpolated, wave lengths without their 2π, places counted
    # in a whole head instead of half of one, a stretch of cos without sin.
    left = regimes(scaling)
    if scaling[0] != "linear":
        assert left[0] == 1 and left[-1] == 1 / scaling[0 if len(scaling) == 4 else 1]
        assert ((left > left[-1]) & (left < 1)).any(), "no wave is interpolated: the comparison says little"
    (x,) = draws(11, (1, 1, 1, 16))
    turned = apply_rope(x, *rope_tables(np.array([[23]]), 16, 100.0, scaling))
    expected = oracle.rope(x[0, 0, 0].astype(np.float64), 23, 100.0, scaling)
    np.testing.assert_allclose(turned[0, 0, 0], expected, atol=1e-5)


def test_yarn_stretches_by_the_logarithm_of_its_factor_unless_told_otherwise():
    # Catches the factor of the paper (on scores) taken for that on queries and on keys, which is its root.
    assert Yarn(4.0, 64.0).amplitude() == pytest.approx(0.1 * np.log(4) + 1)
    assert Yarn(0.5, 64.0).amplitude() == 1 and Yarn(4.0, 64.0, attention=1.0).amplitude() == 1
    assert rule_of(("yarn", 4.0, 64.0)) == Yarn(4.0, 64.0) and rule_of(()) is None
    assert rule_of((8.0, 1.0, 4.0, 64.0)) == Llama3(8.0, 1.0, 4.0, 64.0)


@pytest.mark.parametrize("scaling", [
    ("ntk", 2.0), ("linear",), ("linear", 0.0), ("yarn", 4.0), ("yarn", 4.0, 64.0, 1.0, 32.0), (8.0, 4.0, 1.0, 64.0),
    ("yarn", 4.0, "64"), (8.0, 1.0, 4.0), ("yarn", 4.0, 64.0, 32.0, 1.0, -1.0), ("yarn", 4.0, 64.0, 32.0, 1.0, 1.0, 0),
])  # fmt: skip
def test_a_tuple_that_is_no_rule_is_refused(scaling):
    # Catches a rule that is taken for another one, or whose numbers stand in another order.
    with pytest.raises(ValueError, match="yarn"):
        rule_of(scaling)


def test_rope_makes_scores_depend_on_the_distance_alone():
    # Catches queries and keys that are turned by different angles at the same position.
    q, k = draws(3, (1, 1, 1, 8), (1, 1, 1, 8))

    def score(q_at, k_at):
        def turned(x, p):
            return apply_rope(x, *rope_tables(jnp.array([[p]]), 8, 100.0))

        return float(jnp.sum(turned(q, q_at) * turned(k, k_at)))

    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-5)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3
