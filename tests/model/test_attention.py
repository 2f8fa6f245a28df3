"""RMSNorm, grouped-query attention and visibility, each against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo.model.attention import RMSNorm, attend, visible
from tests import model_oracle as oracle

attend = jax.jit(attend)


def draws(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def test_rms_norm_divides_by_the_root_mean_square_and_multiplies_by_its_scale():
    # Catches a LayerNorm, eps outside of the root, a sum for a mean, a scale that is 1 + w.
    x, scale = draws(0, (3, 8), (8,))
    x[1] *= 1e-3  # here eps = 1e-3 decides
    y = RMSNorm(1e-3).apply({"params": {"scale": scale}}, x)
    expected = [oracle.rms_norm(row.astype(np.float64), scale, 1e-3) for row in x]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_of_bfloat16_is_computed_in_float32():
    # Catches squares and means in bf16: a mean over 512 entries loses its last bits, and the result is off by more.
    x = jnp.asarray(draws(1, (4, 512))[0], jnp.bfloat16)
    scale = np.ones(512, np.float32)
    y = RMSNorm(1e-6).apply({"params": {"scale": scale}}, x)
    expected = np.stack([oracle.rms_norm(row, scale, 1e-6) for row in np.asarray(x, np.float64)])
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        np.asarray(y, np.float32), np.asarray(jnp.asarray(expected, jnp.bfloat16), np.float32)
    )


def test_visible_shows_the_past_from_the_first_real_column_and_nothing_else():
    # Catches a window that starts one column off, one that looks ahead, and padding rows with nothing to look at (NaN).
    first, start, queries, keys = np.array([0, 3, 9]), 2, 4, 8
    seen = np.asarray(jax.jit(visible, static_argnums=(2, 3))(first, start, queries, keys))
    for b, t, s in np.ndindex(3, queries, keys):
        column = start + t
        assert seen[b, t, s] == ((first[b] <= s <= column) or s == column), (b, t, s)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_query_attention_equals_the_loop(kv_heads):
    # Catches query heads that read the wrong key head (n mod K in place of n // (N/K)), a missing 1/√H, a softmax over
    # queries.
    B, T, S, N, H = 2, 3, 5, 4, 6
    q, k, v = draws(4, (B, T, N, H), (B, S, kv_heads, H), (B, S, kv_heads, H))
    seen = np.random.default_rng(5).random((B, T, S)) < 0.6
    seen[..., 0] = True
    out = attend(q, k, v, jnp.asarray(seen))
    for b, t, n in np.ndindex(B, T, N):
        kv, columns = n // (N // kv_heads), np.flatnonzero(seen[b, t])
        weight = oracle.softmax(np.array([q[b, t, n].astype(np.float64) @ k[b, s, kv] / np.sqrt(H) for s in columns]))
        np.testing.assert_allclose(
            out[b, t, n], sum(w * v[b, s, kv] for w, s in zip(weight, columns, strict=True)), atol=1e-5
        )


def test_columns_that_are_not_visible_have_no_influence():
    # Catches a mask of -10 or so, which large junk scores overcome, and junk values that leak through 0 weights.
    q, k, v = draws(6, (1, 2, 2, 4), (1, 4, 1, 4), (1, 4, 1, 4))
    seen = np.array([[[True, True, False, False], [True, False, True, False]]])
    hidden = np.ones((1, 4, 1, 4), np.float32)
    hidden[:, :3] = 0
    plain = attend(q, k, v, jnp.asarray(seen))
    np.testing.assert_array_equal(plain, attend(q, k + 1e6 * hidden, v + 1e6 * hidden, jnp.asarray(seen)))


def test_a_row_that_sees_nothing_gives_finite_values_and_gradients():
    # Catches a mask of -inf: the softmax of a row that is masked throughout is NaN, and NaN in one row's gradient is
    # NaN in all.
    q, k, v = draws(7, (2, 1, 2, 4), (2, 3, 1, 4), (2, 3, 1, 4))
    seen = jnp.array([[[False, False, False]], [[True, True, False]]])
    value, grads = jax.jit(jax.value_and_grad(lambda *qkv: jnp.sum(attend(*qkv, seen) ** 2), argnums=(0, 1, 2)))(
        q, k, v
    )
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)


def test_scores_and_softmax_are_float32_when_keys_are_bfloat16():
    # Catches a softmax in bf16, whose weights are off by half a percent each.
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in draws(8, (1, 2, 2, 4), (1, 3, 1, 4), (1, 3, 1, 4)))
    closed = jax.make_jaxpr(attend)(q, k, v, jnp.ones((1, 2, 3), bool))
    softmax = ("exp", "reduce_sum", "reduce_max")
    found = [eqn.outvars[0].aval.dtype for eqn in equations(closed.jaxpr) if eqn.primitive.name in softmax]
    assert len(found) >= 3 and all(dtype == jnp.float32 for dtype in found)
    assert attend(q, k, v, jnp.ones((1, 2, 3), bool)).dtype == jnp.bfloat16


def equations(jaxpr):
    """All equations, those of inner jaxprs too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)
