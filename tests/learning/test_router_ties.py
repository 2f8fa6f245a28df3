"""Experts on the edge of being chosen: what a tie, or rounding next to one, does to the log-probs of two passes.

The choice of experts is a step function of the router's logits. Sampler and learner compute these in another order, so
a token whose last chosen expert and the next one are within rounding of each other may run other experts in the two
passes. Its log-prob then moves by tenths of a nat, not by rounding, whatever else is right. How often: see the second
test. What restores equality: replay of the recorded routes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo.learning.sampler import make_sampler
from gspo.learning.scores import score_completions
from gspo.model.transformer import Transformer
from tests import model_oracle as oracle

MOE, V = oracle.MOE, oracle.MOE.vocab_size
Q, G, P, C = 3, 8, 5, 12


def with_router(change):
    """Parameters of MOE with change(router [L, D, E]) in place of its routers."""
    params = oracle.build(MOE)[1]
    moe = params["blocks"]["moe"]
    return params | {"blocks": params["blocks"] | {"moe": moe | {"router": change(moe["router"])}}}


def rollout_of(params, spec=MOE):
    sample = make_sampler(Transformer(spec), num_generations=G, max_completion_length=C, eos_ids=(), pad_id=0)
    prompts = oracle.left_padded([[4, 9, 2, 0, 7], [3, 3, 8], [5]], P, np.random.default_rng(0), V)[0]
    return jax.tree.map(np.asarray, sample(params, prompts, np.array([5, 3, 1], np.int32), jax.random.key(0)))


@functools.cache
def scorer(spec=MOE):
    return jax.jit(functools.partial(score_completions, Transformer(spec), completion_width=C))


def flipped(old_LBTX, new_LBTX):
    """[B, T] bool: tokens whose set of experts differs in some layer, where the old one was recorded."""
    differ = np.any(np.sort(old_LBTX, axis=-1) != np.sort(new_LBTX, axis=-1), axis=-1)
    return np.any(differ & np.all(old_LBTX >= 0, axis=-1), axis=0)


@pytest.mark.parametrize(
    "backend", ["blocked"] + [pytest.param(name, marks=pytest.mark.slow) for name in ("dense", "ragged")]
)
def test_of_experts_that_tie_exactly_the_lower_runs_in_decoding_and_in_the_whole_frame(backend):
    # Catches a choice that depends on the shape of the pass (one token against a frame) or on the backend. The logits
    # of experts 1 and 3 are 0 for every token: 3 may run beside 1, never in its place.
    spec = dataclasses.replace(MOE, moe_backend=backend)
    params = with_router(lambda router: router.at[:, :, jnp.array([1, 3])].set(0.0))
    rollout = rollout_of(params, spec)
    scores = scorer(spec)(params, rollout.tokens_BT, rollout.prompt_lengths_B)
    fed = np.broadcast_to((rollout.routes_LBTX >= 0).all(axis=-1), scores.free_routes_LBTX.shape[:-1])
    np.testing.assert_array_equal(rollout.routes_LBTX[fed], np.asarray(scores.free_routes_LBTX)[fed])
    one, three = (np.any(rollout.routes_LBTX == expert, axis=-1)[fed] for expert in (1, 3))
    assert (three <= one).all() and (one & ~three).mean() > 0.1
    np.testing.assert_allclose(scores.logp_BC, rollout.logp_BC, atol=1e-5)


def test_a_near_tie_that_flips_moves_log_probs_by_tenths_of_a_nat_and_replay_undoes_it():
    # Catches a bound on the largest difference between sampler and learner that an honest run cannot keep, and replay
    # that does not fix the choice. Experts 1 and 3 have equal routers up to the seventh digit, which has another sign
    # for the learner than for the sampler: where only one of them is chosen, it is another one.
    nearly = lambda sign: with_router(lambda r: r.at[:, :, 3].set(r[:, :, 1] * (1 + sign * 3e-7)))  # noqa: E731
    rollout, learner = rollout_of(nearly(+1)), nearly(-1)
    frame = (learner, rollout.tokens_BT, rollout.prompt_lengths_B)
    free = scorer()(*frame)
    replayed = scorer()(*frame, replayed_routes_LBTX=rollout.routes_LBTX)
    tokens_BC = flipped(rollout.routes_LBTX, free.free_routes_LBTX)[:, P - 1 : -1]  # where a token is predicted
    gap_BC = np.abs(free.logp_BC - rollout.logp_BC)
    assert tokens_BC.mean() > 0.2 and np.median(gap_BC[tokens_BC]) > 0.1
    assert np.abs(replayed.logp_BC - rollout.logp_BC).max() < 1e-5


def test_the_share_of_tokens_that_flip_is_some_ten_times_the_relative_error_of_the_numbers():
    # Catches an estimate of the share by which a check of sampler against learner may be loosened. Random weights,
    # 4,096 tokens, all parameters moved by a relative error: at 1e-4 and at 1e-3 the share of tokens that flip in one
    # of two layers is in proportion to it, so at float32's rounding, 1e-7 to 1e-6, it is 1e-5 at most. Each flip is
    # seen by the later tokens of its row: the share of log-probs that move is larger than that of flips.
    params = oracle.build(MOE)[1]
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(0, V, (64, 64)).astype(np.int32), np.full(64, 64 - C, np.int32)
    base = scorer()(params, tokens, lengths)
    share, moved = {}, {}
    for error in (1e-6, 1e-4, 1e-3):
        flips, gaps = [], []
        for _ in range(5):
            noisy = jax.tree.map(lambda x: x * (1 + error * rng.standard_normal(x.shape)).astype(np.float32), params)  # noqa: B023
            scores = scorer()(noisy, tokens, lengths)
            flips.append(flipped(np.asarray(base.free_routes_LBTX), np.asarray(scores.free_routes_LBTX)))
            gaps.append(np.abs(scores.logp_BC - base.logp_BC))
        share[error], moved[error] = np.mean(flips), np.mean(np.array(gaps) > 0.01)
    assert share[1e-6] < 1e-4
    for error in (1e-4, 1e-3):
        assert 2 * error < share[error] < 50 * error
    assert moved[1e-6] < 1e-3 and moved[1e-4] > share[1e-4]
