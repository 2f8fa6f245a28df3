"""Temperature, top-k, top-p, min-p: what is drawn and what is scored, against sorted loops in float64."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo.model.distribution import Sampling, draw, drawn_logits, entropy, log_prob, scored_logits
from gspo.model.head import token_scores
from gspo.types import UserError
from tests import model_oracle as oracle

draw, drawn_logits, scored_logits = (
    jax.jit(f, static_argnames="sampling") for f in (draw, drawn_logits, scored_logits)
)
log_prob, entropy = jax.jit(log_prob), jax.jit(entropy)
V, ROWS = 11, 40
CASES = [
    {},
    {"temperature": 0.7},
    {"top_k": 3},
    {"top_k": 1},
    {"top_p": 0.6},
    {"top_p": 0.01},
    {"min_p": 0.2},
    {"temperature": 0.5, "top_k": 5, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 1.8, "top_k": 6, "top_p": 0.9, "min_p": 0.3},
]
OPTIONS = {"temperature": 1.6, "top_k": 7, "top_p": 0.8, "min_p": 0.08}
COMBINATIONS = [dict(some) for n in range(5) for some in itertools.combinations(OPTIONS.items(), n)]


def logits_of(seed=0, vocab=V):
    return (1.5 * np.random.default_rng(seed).standard_normal((ROWS, vocab))).astype(np.float32)


def exact(row, case):
    case = dict(case)
    return oracle.distribution(row, top_k_=case.pop("top_k", 0), **case)


def name(case):
    return ",".join(f"{k}={v}" for k, v in case.items()) or "plain"


# ---------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_drawn_distribution_equals_the_sorted_loop(case):
    # Catches cuts before the temperature, top-p that drops the token which crosses it, min-p against 1 and not the
    # largest probability.
    z = logits_of()
    found = np.asarray(jax.nn.softmax(drawn_logits(z, Sampling(**case))))
    expected = np.stack([exact(row, case) for row in z])
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-7)
    np.testing.assert_array_equal(found == 0, expected == 0)


@pytest.mark.parametrize("case", COMBINATIONS, ids=name)
def test_tokens_are_drawn_as_often_as_their_log_probs_say(case):
    # Catches, for every option and combination: a temperature that shapes the draw and not the log-prob or the reverse,
    # a cut that leaks into the log-prob, a cut that is not applied, log-probs of another token. 20,000 draws from one
    # distribution: a token of the kept set comes up with frequency exp(log-prob) / mass of the set, another never.
    draws, vocab = 20_000, 13
    z = logits_of(8, vocab)[0]
    tokens, logps = map(np.asarray, draw(jax.random.key(0), np.tile(z, (draws, 1)), Sampling(**case)))
    scored = exact(z, {"temperature": case.get("temperature", 1.0)})
    kept = exact(z, case) > 0
    np.testing.assert_allclose(logps, np.log(scored)[tokens], rtol=1e-5, atol=1e-6)
    counts = np.bincount(tokens, minlength=vocab)
    assert (counts[~kept] == 0).all(), "a token outside of the kept set was drawn"
    assert kept.sum() > 2 and (kept.all() or bool(case.keys() - {"temperature"}))
    reported = {int(token): np.exp(logp) for token, logp in zip(tokens, logps, strict=True)}
    expected = np.array([reported.get(v, 0) for v in np.flatnonzero(kept)]) / scored[kept].sum() * draws
    statistic = np.sum((counts[kept] - expected) ** 2 / expected)
    degrees = kept.sum() - 1
    assert statistic < degrees + 4 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("case", [{"top_k": V}, {"top_k": 50}, {"top_p": 1.0}, {"min_p": 0.0}], ids=name)
def test_a_cut_that_keeps_everything_is_no_cut(case):
    # Catches top_k larger than the vocabulary, and a top_p of 1 that loses the least likely token to rounding.
    z = logits_of(4)
    np.testing.assert_array_equal(drawn_logits(z, Sampling(**case)), z)


def test_the_likeliest_token_survives_every_cut():
    # Catches an empty kept set, from which a sampler draws uniformly.
    z = logits_of(5)
    for case in ({"top_p": 1e-6}, {"min_p": 0.999}, {"top_k": 1}, {"top_k": 1, "top_p": 1e-6, "min_p": 0.999}):
        left = jax.nn.softmax(drawn_logits(z, Sampling(**case)))
        np.testing.assert_allclose(np.asarray(left)[np.arange(ROWS), np.argmax(z, axis=1)], 1, atol=1e-6)


def test_tokens_that_tie_at_the_edge_of_a_cut_are_all_kept():
    # Catches a kept set that depends on how a sort breaks ties: one of two equal tokens would never be drawn.
    z = np.array([[2.0, 1.0, 1.0, 1.0, -3.0]], np.float32)
    for case in ({"top_k": 2}, {"top_p": 0.5}):
        kept = np.asarray(drawn_logits(z, Sampling(**case))) > -1e29
        np.testing.assert_array_equal(kept, [[True, True, True, True, False]])


def test_temperature_zero_draws_the_argmax_and_scores_it_at_temperature_one():
    # Catches a division by 0, greedy decoding that breaks ties at random, and log-probs that are 0 whatever the model
    # thinks of the token.
    z = logits_of(6)
    z[0] = 0.0
    best = np.argmax(z, axis=1)
    tokens, logps = draw(jax.random.key(0), z, Sampling(temperature=0))
    np.testing.assert_array_equal(tokens, best)
    expected = [np.log(exact(row, {})[t]) for row, t in zip(z, best, strict=True)]
    np.testing.assert_allclose(logps, expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- what is scored


def on_the_edge(names, vocab):
    """(logits, Sampling) with these options, so that in every row the eighth token sits exactly on the edge of each
    cut: it ties with the seventh, those before it reach top_p, and it has min_p of the likeliest one's probability."""
    rng, temperature = np.random.default_rng(9), 1.6 if "temperature" in names else 1.0
    z = np.sort(1.5 * rng.standard_normal(vocab))[::-1]
    z[7] = z[6]
    p = oracle.softmax(z / temperature)
    left = p[:8].sum() if "top_k" in names else 1.0  # of which top-p takes its share
    cuts = {"temperature": temperature, "top_k": 7, "top_p": p[:7].sum() / left, "min_p": p[7] / p[0]}
    rows = np.stack([z[rng.permutation(vocab)] for _ in range(ROWS)]).astype(np.float32)
    return rows, Sampling(**{option: cuts[option] for option in names})


def rounded_otherwise(z, seed):
    """The same logits, as another order of summation might give them: noise in the seventh digit."""
    return (z * (1 + 1e-6 * np.random.default_rng(seed).standard_normal(z.shape))).astype(np.float32)


@pytest.mark.parametrize("vocab", [13, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("names", COMBINATIONS, ids=lambda names: "+".join(names) or "plain")
def test_rounding_moves_no_log_prob_between_sampler_and_learner_by_more_than_rounding(names, vocab):
    # Catches ratios that are taken under the cut distribution: with a token on the edge of a cut, noise in the seventh
    # digit removes it on one side only, and the log-probs of its row part by the log of its mass. Catches a temperature
    # that one side forgets, too.
    z, sampling = on_the_edge(names, vocab)
    for seed in range(5):
        tokens, logps = draw(jax.random.key(seed), z, sampling)
        moved = rounded_otherwise(z, seed)[None]  # hidden states under an identity head are the learner's logits
        scores, _ = token_scores(moved, tokens[None], np.eye(vocab, dtype=np.float32), sampling=sampling, chunk=ROWS)
        np.testing.assert_allclose(scores[0], logps, atol=1e-4, rtol=0)


@pytest.mark.parametrize("vocab", [13, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_edges_of_the_test_above_flip(vocab):
    # Catches a construction that puts no token on the edge: the test above could then not fail. Under the same noise
    # each combination of cuts keeps another set in some row, and a log-prob under that set moves 50 times further than
    # the test allows.
    for names in COMBINATIONS:
        z, sampling = on_the_edge(names, vocab)
        kept = [np.asarray(drawn_logits(x, sampling)) > -1e29 for x in (z, rounded_otherwise(z, 0))]
        p = np.asarray(jax.nn.softmax(scored_logits(z, sampling)))
        log_mass = [np.log(np.sum(p * k, axis=1)) for k in kept]
        moved = np.abs(log_mass[0] - log_mass[1]).max()
        assert moved > 5e-3 if names.keys() - {"temperature"} else moved < 1e-6, (names, moved)


@pytest.mark.parametrize("case", [{}, {"temperature": 0.7, "top_k": 4, "top_p": 0.9, "min_p": 0.05}], ids=name)
def test_gradients_of_scores_equal_finite_differences_of_the_uncut_softmax(case):
    # Catches a gradient that stops at the edge of a cut, a temperature left out of it, NaN or a ratio of 0 for a token
    # that is outside of the kept set now (here the least likely one): it would carry no gradient.
    z, sampling = logits_of(1)[:4], Sampling(**case)
    tokens = np.argmin(z, axis=1)
    temperature = case.get("temperature", 1.0)

    def loss(z):
        logp, nats = token_scores(z[None], tokens[None], jnp.eye(V), sampling=sampling, chunk=2)
        return jnp.sum(logp + 0.3 * nats)

    def exact_loss(z):
        p = [exact(row, {"temperature": temperature}) for row in z]
        return sum(np.log(q[t]) - 0.3 * np.sum(q * np.log(q)) for q, t in zip(p, tokens, strict=True))

    assert float(loss(z)) == pytest.approx(exact_loss(z), rel=1e-5)
    grad = np.asarray(jax.jit(jax.grad(loss))(z))
    for r, v in np.ndindex(z.shape):
        step = np.zeros(z.shape)
        step[r, v] = 1e-6
        expected = (exact_loss(z + step) - exact_loss(z - step)) / 2e-6
        assert grad[r, v] == pytest.approx(expected, abs=2e-5)


def test_scoring_does_not_sort_the_vocabulary():
    # Catches cuts that creep back into the learner: a sort of [rows, V] for each chunk, forward and backward.
    def scores(z):
        return token_scores(z, np.zeros((1, ROWS), np.int32), jnp.eye(V), sampling=Sampling(1.0, 3, 0.9, 0.1), chunk=8)

    text = str(jax.make_jaxpr(scores)(logits_of()[None]))
    assert not re.search(r"\b(sort|top_k|approx_top_k|cumsum)\[", text)


def test_logits_that_are_not_float32_are_refused():
    # Catches bf16 logits, whose log-probs are off by a percent: past every clip range of GSPO.
    for shaped in (scored_logits, drawn_logits):
        with pytest.raises(AssertionError):
            shaped(jnp.zeros((2, V), jnp.bfloat16), Sampling())


# ---------------------------------------------------------------- mistakes of the user's


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", -0.1), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("min_p", 1.0)]
)
def test_a_cut_out_of_its_range_is_a_one_line_error_that_starts_with_the_field(field, value):
    # Catches top_p = 0, which would keep nothing, a negative top_k that means "all" in one library and "none" in
    # another, and a name that no config has (rollout.top_p): only what follows the field's own name may differ.
    with pytest.raises(UserError) as error:
        Sampling(**{field: value})
    assert str(error.value).startswith(f"{field}={value}: ") and "\n" not in str(error.value)


def test_a_number_of_nothing_does_not_draw_what_is_all_but_impossible(monkeypatch):
    # Catches the first token of the vocabulary at log-prob -60, once in 8 million draws.
    logits = jnp.array([-60.0, -2.0, 0.0, -1.0])
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.zeros(shape))
    tokens, logps = draw.__wrapped__(jax.random.key(0), logits, Sampling())
    assert tokens == 1 and logps == log_prob(logits, tokens)
