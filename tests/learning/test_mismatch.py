"""Samplers that differ from the learner on purpose, and what replaying their routes mends."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo.learning.mismatch import make_rounding
from gspo.learning.sampler import make_sampler
from gspo.learning.scores import make_scorer
from gspo.model.distribution import Sampling
from gspo.model.routing import changed, swap_experts
from gspo.model.spec import ModelSpec
from gspo.model.transformer import Transformer
from gspo.types import completion_mask

SPEC = ModelSpec(
    vocab_size=12,
    num_layers=2,
    d_model=16,
    num_heads=2,
    num_kv_heads=1,
    head_width=8,
    num_experts=6,
    experts_per_token=2,
    d_expert=16,
)
C = 8


@pytest.fixture(scope="module")
def params():
    return nn.unbox(Transformer(SPEC).init_params(jax.random.key(0)))


def rollout_of(model, params, key=1):
    sampler = make_sampler(model, num_generations=8, max_completion_length=C, eos_ids=(11,), pad_id=10)
    prompt_QP = jax.random.randint(jax.random.key(7), (16, 5), 0, 10)
    return sampler(params, prompt_QP, jnp.full((16,), 5), jax.random.key(key))


def gap(rollout, scores):
    """Mean square of sampler minus learner log-prob."""
    mask_BC = completion_mask(rollout.completion_lengths_B, C)
    return float(jnp.sum(jnp.where(mask_BC, (rollout.logp_BC - scores.logp_BC) ** 2, 0)) / mask_BC.sum())


def test_int8_rounding_keeps_255_levels_per_column_and_half_a_step(params):
    # Catches a scale per tensor (one large column would flatten the others), a clipped maximum, and vectors that are
    # rounded too.
    rounded = make_rounding("int8")(params)
    x, y = (np.asarray(tree["blocks"]["moe"]["gate"], np.float64) for tree in (params, rounded))
    step = np.abs(x).max(axis=-2, keepdims=True) / 127
    assert np.all(np.abs(x - y) <= step / 2 * 1.001)
    assert np.abs(x - y).max() > 0
    np.testing.assert_allclose(np.round(y / step), y / step, atol=1e-3)
    np.testing.assert_array_equal(params["final_norm"]["scale"], rounded["final_norm"]["scale"])
    # Catches norms of all layers, [L, D], rounded by the largest of them.
    uneven = jax.tree.map(lambda x: x, params)
    scales = uneven["blocks"]["mlp_norm"]["scale"] = 1 + 0.1 * jax.random.normal(jax.random.key(2), (2, 16))
    np.testing.assert_array_equal(make_rounding("int8")(uneven)["blocks"]["mlp_norm"]["scale"], scales)


def test_bfloat16_rounding_changes_values_and_not_dtypes(params):
    # Catches a cast that the sampler's own float32 cast undoes, so that nothing differs.
    rounded = make_rounding("bfloat16")(params)
    assert jax.tree.map(lambda x: x.dtype, rounded) == jax.tree.map(lambda x: x.dtype, params)
    assert float(jnp.abs(rounded["head"] - params["head"]).max()) > 0
    np.testing.assert_array_equal(rounded["head"], params["head"].astype(jnp.bfloat16).astype(jnp.float32))


def test_swapped_experts_are_new_ones_at_the_asked_rate():
    # Catches a swap for an expert that already runs (the token would use it twice), and a rate counted per expert.
    experts = np.stack([np.random.default_rng(m).permutation(6)[:2] for m in range(4000)]).astype(np.int32)
    swapped = np.asarray(swap_experts(jax.random.key(0), jnp.asarray(experts), 6, 0.3))
    assert all(len(set(row)) == 2 for row in swapped)
    np.testing.assert_array_equal(swapped[:, 0], experts[:, 0])
    assert (swapped != experts).any(axis=1).mean() == pytest.approx(0.3, abs=0.03)
    assert len(set(swapped[:, 1])) == 6


@pytest.mark.parametrize(
    "injected", [{"router_noise": 0.5}, pytest.param({"router_swap": 0.3}, marks=pytest.mark.slow)]
)
def test_replaying_the_samplers_routes_brings_the_learner_closer_to_it(params, injected):
    # Catches noise that never reaches the routes, routes recorded before the injection, and a replay that ignores what
    # it is given.
    learner = Transformer(SPEC)
    rollout = rollout_of(learner.clone(**injected), params)
    scorer = make_scorer(learner, completion_width=C, sampling=Sampling(), chunk=C)
    free = scorer(params, rollout.tokens_BT, rollout.prompt_lengths_B)
    replayed = scorer(params, rollout.tokens_BT, rollout.prompt_lengths_B, rollout.routes_LBTX)
    recorded_BT = np.asarray((rollout.routes_LBTX >= 0).all(axis=(0, 3)))
    first_layer = np.asarray(changed(rollout.routes_LBTX, free.free_routes_LBTX))[0][recorded_BT].mean()
    assert first_layer > 0.05
    if "router_swap" in injected:
        assert first_layer == pytest.approx(
            0.3 / 2, abs=0.04
        )  # one of two experts, at the rate; later layers see other inputs
        assert gap(rollout, replayed) < 1e-8  # the swap is all there is: with the same experts the two agree
    assert gap(rollout, free) > 1e-5
    assert gap(rollout, replayed) < 0.7 * gap(rollout, free)


def test_without_injection_the_sampler_draws_no_router_noise(params):
    # Catches a noise of scale 0 that still costs a random stream, and a sampler changed for everybody.
    plain = rollout_of(Transformer(SPEC), params)
    same = rollout_of(Transformer(dataclasses.replace(SPEC), router_noise=0.0, router_swap=0.0), params)
    np.testing.assert_array_equal(plain.tokens_BT, same.tokens_BT)
    scorer = make_scorer(Transformer(SPEC), completion_width=C, sampling=Sampling(), chunk=C)
    assert gap(plain, scorer(params, plain.tokens_BT, plain.prompt_lengths_B)) < 1e-9
