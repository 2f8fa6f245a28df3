"""Scores: equal to the float64 model, whatever the chunks and micro-batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo.learning.scores import router_logp, score_completions
from gspo.model.distribution import Sampling
from tests import model_oracle as oracle
from tests.few_rows import DENSE, LENGTHS, MOE, PROMPT_LENGTHS, WARM, B, C, P, T, frame, rows_of, scorer_of


@pytest.mark.parametrize(
    ("spec", "sampling", "chunk"),
    [(DENSE, Sampling(0.7, 6, 0.9, 0.02), 4), (MOE, WARM, 128)]
    + [
        pytest.param(spec, sampling, chunk, marks=pytest.mark.slow)
        for spec in (DENSE, MOE)
        for sampling in (Sampling(), Sampling(0.7, 6, 0.9, 0.02))
        for chunk in (1, 2, 6)
    ],
)
def test_scores_equal_the_float64_model_in_any_chunks(spec, sampling, chunk):
    # Catches log-probs shifted by one column, a last chunk that is cut off (4 does not divide 6), a score or
    # an entropy that the cuts of the sampler change.
    model, params = oracle.build(spec)
    score = jax.jit(functools.partial(score_completions, model, completion_width=C, sampling=sampling, chunk=chunk))
    scores = score(params, frame(rows_of()), PROMPT_LENGTHS.astype(np.int32))
    exact = oracle.float64(params)
    for b, row in enumerate(rows_of()):
        logp, entropy = oracle.score(exact, spec, *row, temperature=sampling.temperature)  # never the cuts
        np.testing.assert_allclose(scores.logp_BC[b, : LENGTHS[b]], logp, rtol=1e-5, atol=2e-5)
        np.testing.assert_allclose(scores.entropy_BC[b, : LENGTHS[b]], entropy, rtol=1e-5, atol=2e-5)
    assert scores.logp_BC.shape == (B, C) and scores.logp_BC.dtype == jnp.float32


@pytest.mark.parametrize("micro_batch_size", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_scorer_in_micro_batches_returns_the_rows_in_their_order(micro_batch_size):
    # Catches rows, or routes, that come back in the order in which they were split; router log-probs of other columns
    # than those that predict a token, of free choices instead of the given experts, or renormalised over these.
    params = oracle.build(MOE)[1]
    routes = np.random.default_rng(9).integers(0, 5, (2, B, T, 2)).astype(np.int8)
    rows = frame(rows_of()), PROMPT_LENGTHS.astype(np.int32)
    whole, parts = (scorer_of(size)(params, *rows) for size in (0, micro_batch_size))
    assert parts.router_kl_LBT is None and whole.margin_LBT.shape == (2, B, T)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6), parts, whole)
    assert parts.free_routes_LBTX.shape == (2, B, T, 2) and parts.router_logp_LBCX.shape == (2, B, C, 2)
    given_LBCX = router_logp(whole.router_logits_LBTE, routes, C)
    own_LBCX = router_logp(whole.router_logits_LBTE, whole.free_routes_LBTX, C)
    np.testing.assert_allclose(whole.router_logp_LBCX, own_LBCX, rtol=1e-6)
    exact = oracle.float64(params)
    for b, (prompt, completion) in enumerate(rows_of()):
        _, free_LTX, router_LTE = oracle.decoder(exact, MOE, [*prompt, *completion])
        np.testing.assert_array_equal(whole.free_routes_LBTX[:, b, P - len(prompt) : P + len(completion)], free_LTX)
        for l, t, x in np.ndindex(2, len(completion), 2):
            prob_E = oracle.softmax(router_LTE[l, len(prompt) + t - 1])
            expected = np.log(prob_E[routes[l, b, P + t - 1, x]])
            assert given_LBCX[l, b, t, x] == pytest.approx(expected, rel=1e-4, abs=1e-5)
