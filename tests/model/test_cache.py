"""The cache of decoding, against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo.model.cache import KVCache, StackedCache, attend_cached
from tests import model_oracle as oracle

L, Q, G, P, K, R, H = 2, 2, 3, 4, 2, 2, 6
B, WIDTH = Q * G, 5
KINDS = pytest.mark.parametrize("kind", [KVCache, StackedCache], ids=["one-layer", "stacked"])


def draws(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def filled(kind, columns, seed=0):
    """A cache with so many columns of completions, and the keys and values in it as [L, .., S, K, H]."""
    layers = 1 if kind is KVCache else L
    content = draws(seed, *[(layers, Q, P, K, H)] * 2, *[(layers, B, columns, K, H)] * 2)
    prompts = [jnp.asarray(x[0] if kind is KVCache else x) for x in content[:2]]
    cache = kind.behind(*prompts, G, WIDTH)
    for layer, column in np.ndindex(layers, columns):
        cache = cache.write(layer, jnp.int32(column), *(x[layer, :, column] for x in content[2:]))
    return cache, *content


@KINDS
def test_what_was_written_lies_in_its_layer_row_and_column_and_nothing_elsewhere(kind):
    # Catches keys in the place of values, heads and widths exchanged, a write to another layer or one column off.
    cache, prompt_k, prompt_v, own_k, own_v = filled(kind, 3)
    for layer in range(len(own_k)):
        found = cache.read(jnp.int32(layer))
        np.testing.assert_array_equal(found.prompt_k_QKHP, np.transpose(prompt_k[layer], (0, 2, 3, 1)))
        np.testing.assert_array_equal(found.prompt_v_QKPH, np.transpose(prompt_v[layer], (0, 2, 1, 3)))
        np.testing.assert_array_equal(found.k_BKHC[..., :3], np.transpose(own_k[layer], (0, 2, 3, 1)))
        np.testing.assert_array_equal(found.v_BKCH[:, :, :3], np.transpose(own_v[layer], (0, 2, 1, 3)))
        assert not found.k_BKHC[..., 3:].any() and not found.v_BKCH[:, :, 3:].any()


@KINDS
def test_a_wider_cache_holds_what_the_narrow_one_held(kind):
    # Catches columns that move when room is added.
    cache, *_ = filled(kind, WIDTH)
    assert cache.width == cache.widened(WIDTH).width == WIDTH and cache.widened(9).width == 9
    narrow, wide = cache.read(0), cache.widened(9).read(0)
    np.testing.assert_array_equal(wide.k_BKHC[..., :WIDTH], narrow.k_BKHC)
    np.testing.assert_array_equal(wide.v_BKCH[..., :WIDTH, :], narrow.v_BKCH)
    assert not wide.k_BKHC[..., WIDTH:].any() and not wide.v_BKCH[..., WIDTH:, :].any()


@pytest.mark.parametrize("shared", [True, False], ids=["all-rows-alike", "each-row-its-own"])
def test_a_query_attends_to_its_own_prompt_and_its_own_completion(shared):
    # Catches the prompt of another group, query heads that read the wrong key head, columns not yet written, and two
    # softmaxes, one over the prompt and one over the completion.
    cache, prompt_k, prompt_v, own_k, own_v = filled(KVCache, 4, seed=1)
    (q,) = draws(2, (B, K * R, H))
    seen_QP = np.array([[True] * 4, [False, False, True, True]])
    seen_BC = np.random.default_rng(3).random((1 if shared else B, WIDTH)) < 0.6
    seen_BC[:, 0], seen_BC[:, 4:] = True, False
    out = jax.jit(attend_cached)(q, cache, seen_QP, seen_BC)
    for b, n in np.ndindex(B, K * R):
        group, head = b // G, n // R
        prompt, own = np.flatnonzero(seen_QP[group]), np.flatnonzero(seen_BC[0 if shared else b])
        keys = np.concatenate([prompt_k[0, group, prompt, head], own_k[0, b, own, head]]).astype(np.float64)
        values = np.concatenate([prompt_v[0, group, prompt, head], own_v[0, b, own, head]]).astype(np.float64)
        np.testing.assert_allclose(out[b, n], oracle.softmax(keys @ q[b, n] / np.sqrt(H)) @ values, atol=1e-5)


def test_scores_are_float32_and_the_result_has_the_dtype_of_the_cache():
    # Catches a softmax in bfloat16, whose weights are off by half a percent each.
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), filled(KVCache, 3)[0])
    (q,) = draws(4, (B, K * R, H))
    seen_QP, seen_BC = jnp.ones((Q, P), bool), jnp.arange(WIDTH)[None] < 3
    call = (jnp.asarray(q, jnp.bfloat16), half, seen_QP, seen_BC)
    jaxpr = str(jax.make_jaxpr(attend_cached)(*call))
    assert "bf16" in jaxpr and not any("exp" in line and "bf16" in line for line in jaxpr.splitlines())
    assert attend_cached(*call).dtype == jnp.bfloat16
