"""The cache of decoding, against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo.model.cache import KVCache, attend_cached
from tests import model_oracle as oracle
from tests.model_oracle import quick_compiles  # noqa: F401 - a fixture

L, Q, G, P, K, R, H = 2, 2, 3, 4, 2, 2, 6
B, WIDTH = Q * G, 5


def draws(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def filled(columns, seed=0):
    """A cache with so many columns of completions, and the keys and values in it as [.., S, K, H]."""
    prompt_k, prompt_v, own_k, own_v = draws(seed, *[(L, Q, P, K, H)] * 2, *[(L, B, columns, K, H)] * 2)
    cache = KVCache.behind(jnp.asarray(prompt_k), jnp.asarray(prompt_v), G, WIDTH)
    for layer, column in np.ndindex(L, columns):
        cache = cache.write(layer, jnp.int32(column), own_k[layer, :, column], own_v[layer, :, column])
    return cache, prompt_k, prompt_v, own_k, own_v


def test_what_was_written_lies_in_its_layer_row_and_column_and_nothing_elsewhere():
    # Catches keys in the place of values, heads and widths exchanged, a write to another layer or one column off.
    cache, prompt_k, prompt_v, own_k, own_v = filled(3)
    for layer in range(L):
        kp_QKHP, vp_QKPH, k_BKHC, v_BKCH = cache.read(jnp.int32(layer))
        np.testing.assert_array_equal(kp_QKHP, np.transpose(prompt_k[layer], (0, 2, 3, 1)))
        np.testing.assert_array_equal(vp_QKPH, np.transpose(prompt_v[layer], (0, 2, 1, 3)))
        np.testing.assert_array_equal(k_BKHC[..., :3], np.transpose(own_k[layer], (0, 2, 3, 1)))
        np.testing.assert_array_equal(v_BKCH[:, :, :3], np.transpose(own_v[layer], (0, 2, 1, 3)))
        assert not k_BKHC[..., 3:].any() and not v_BKCH[:, :, 3:].any()


def test_a_wider_cache_holds_what_the_narrow_one_held():
    # Catches columns that move when room is added.
    cache, *_ = filled(WIDTH)
    wide = cache.widened(9)
    assert wide.width == 9 and cache.widened(WIDTH).width == WIDTH
    np.testing.assert_array_equal(wide.k_LBKHC[..., :WIDTH], cache.k_LBKHC)
    np.testing.assert_array_equal(wide.v_LBKCH[..., :WIDTH, :], cache.v_LBKCH)
    assert not wide.k_LBKHC[..., WIDTH:].any() and not wide.v_LBKCH[..., WIDTH:, :].any()


@pytest.mark.parametrize("shared", [True, False], ids=["all-rows-alike", "each-row-its-own"])
def test_a_query_attends_to_its_own_prompt_and_its_own_completion(shared):
    # Catches the prompt of another group, query heads that read the wrong key head, columns not yet written, and two
    # softmaxes, one over the prompt and one over the completion.
    cache, prompt_k, prompt_v, own_k, own_v = filled(4, seed=1)
    (q,) = draws(2, (B, K * R, H))
    seen_QP = np.array([[True] * 4, [False, False, True, True]])
    seen_BC = np.random.default_rng(3).random((1 if shared else B, WIDTH)) < 0.6
    seen_BC[:, 0], seen_BC[:, 4:] = True, False
    out = jax.jit(attend_cached)(q, cache, 1, seen_QP, seen_BC)
    for b, n in np.ndindex(B, K * R):
        group, head = b // G, n // R
        prompt, own = np.flatnonzero(seen_QP[group]), np.flatnonzero(seen_BC[0 if shared else b])
        keys = np.concatenate([prompt_k[1, group, prompt, head], own_k[1, b, own, head]]).astype(np.float64)
        values = np.concatenate([prompt_v[1, group, prompt, head], own_v[1, b, own, head]]).astype(np.float64)
        np.testing.assert_allclose(out[b, n], oracle.softmax(keys @ q[b, n] / np.sqrt(H)) @ values, atol=1e-5)


def test_scores_are_float32_and_the_result_has_the_dtype_of_the_cache():
    # Catches a softmax in bfloat16, whose weights are off by half a percent each.
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), filled(3)[0])
    (q,) = draws(4, (B, K * R, H))
    seen_QP, seen_BC = jnp.ones((Q, P), bool), jnp.arange(WIDTH)[None] < 3
    call = (jnp.asarray(q, jnp.bfloat16), half, 0, seen_QP, seen_BC)
    jaxpr = str(jax.make_jaxpr(attend_cached, static_argnums=2)(*call))
    assert "bf16" in jaxpr and not any("exp" in line and "bf16" in line for line in jaxpr.splitlines())
    assert attend_cached(*call).dtype == jnp.bfloat16
