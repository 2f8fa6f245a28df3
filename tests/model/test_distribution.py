"""Temperature, top-k, top-p, min-p: what is sampled and what is scored, against sorted loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo.model.distribution import Sampling, entropy, log_prob, shape_logits
from gspo.types import UserError
from tests import model_oracle as oracle
from tests.model_oracle import quick_compiles  # noqa: F401 - a fixture

shape_logits = jax.jit(shape_logits, static_argnums=1)
log_prob, entropy, categorical = jax.jit(log_prob), jax.jit(entropy), jax.jit(jax.random.categorical)
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


def logits_of(seed=0):
    return (1.5 * np.random.default_rng(seed).standard_normal((ROWS, V))).astype(np.float32)


def exact(row, case, keep=None):
    case = dict(case)
    return oracle.distribution(row, top_k_=case.pop("top_k", 0), keep=keep, **case)


def name(case):
    return ",".join(f"{k}={v}" for k, v in case.items()) or "plain"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_sampled_distribution_equals_the_sorted_loop(case):
    # Catches cuts before the temperature, top-p that drops the token which crosses it, min-p against 1 and not the
    # largest probability.
    z = logits_of()
    shaped = shape_logits(z, Sampling(**case))
    found = np.exp(np.stack([log_prob(shaped, np.full(ROWS, v)) for v in range(V)], axis=1))
    expected = np.stack([exact(row, case) for row in z])
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-7)
    np.testing.assert_array_equal(found == 0, expected == 0)
    nats = [-sum(p * np.log(p) for p in row if p > 0) for row in expected]
    np.testing.assert_allclose(entropy(shaped), nats, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [{}, {"temperature": 0.7, "top_k": 4, "top_p": 0.9, "min_p": 0.05}], ids=name)
def test_gradients_of_log_prob_and_entropy_equal_finite_differences_on_the_kept_set(case):
    # Catches NaN from cut tokens (0 · inf), a gradient that reaches them, and one that leaks through the threshold of a
    # cut.
    z = logits_of(1)[:4]
    token = np.array([np.argmax(row) for row in z])

    def loss(z):
        shaped = shape_logits(z, Sampling(**case), keep=token)
        return jnp.sum(log_prob(shaped, token) + 0.3 * entropy(shaped))

    def exact_loss(z):
        p = [exact(row, case, keep=t) for row, t in zip(z, token, strict=True)]
        return sum(np.log(q[t]) - 0.3 * sum(x * np.log(x) for x in q if x > 0) for q, t in zip(p, token, strict=True))

    grad = np.asarray(jax.jit(jax.grad(loss))(z))
    for r, v in np.ndindex(z.shape):
        step = np.zeros(z.shape)
        step[r, v] = 1e-6
        expected = (exact_loss(z + step) - exact_loss(z - step)) / 2e-6
        assert grad[r, v] == pytest.approx(expected, abs=2e-5)
        if exact(z[r], case, keep=token[r])[v] == 0:
            assert grad[r, v] == 0


@pytest.mark.parametrize("case", [{"top_k": 2}, {"top_p": 0.3}, {"min_p": 0.5}], ids=name)
def test_the_sampled_token_is_scored_and_learns_even_if_it_has_left_the_kept_set(case):
    # Catches a ratio of 0 (log-prob -1e30) for a token that drifted out of the top-k: the loss would be lost or
    # infinite.
    z = logits_of(2)
    token = np.argmin(z, axis=1)
    shaped = shape_logits(z, Sampling(**case), keep=token)
    expected = [np.log(exact(row, case, keep=t)[t]) for row, t in zip(z, token, strict=True)]
    np.testing.assert_allclose(log_prob(shaped, token), expected, rtol=1e-5)
    grad = jax.jit(jax.grad(lambda z: jnp.sum(log_prob(shape_logits(z, Sampling(**case), keep=token), token))))(z)
    assert (np.abs(np.asarray(grad)[np.arange(ROWS), token]) > 1e-3).all()


def test_keeping_a_token_inside_the_kept_set_changes_nothing():
    # Catches a learner whose log-probs differ from the sampler's although the weights are the same.
    z = logits_of(3)
    sampling = Sampling(temperature=0.8, top_k=5, top_p=0.9, min_p=0.02)
    np.testing.assert_array_equal(shape_logits(z, sampling, keep=np.argmax(z, axis=1)), shape_logits(z, sampling))


@pytest.mark.parametrize("case", [{"top_k": V}, {"top_k": 50}, {"top_p": 1.0}, {"min_p": 0.0}], ids=name)
def test_a_cut_that_keeps_everything_is_no_cut(case):
    # Catches top_k larger than the vocabulary, and a top_p of 1 that loses the least likely token to rounding.
    z = logits_of(4)
    np.testing.assert_array_equal(shape_logits(z, Sampling(**case)), z)


def test_the_likeliest_token_survives_every_cut():
    # Catches an empty kept set, from which a sampler draws uniformly.
    z = logits_of(5)
    for case in ({"top_p": 1e-6}, {"min_p": 0.999}, {"top_k": 1}, {"top_k": 1, "top_p": 1e-6, "min_p": 0.999}):
        shaped = np.asarray(shape_logits(z, Sampling(**case)))
        np.testing.assert_array_equal(np.argmax(shaped, axis=1), np.argmax(z, axis=1))
        np.testing.assert_allclose(log_prob(shaped, np.argmax(z, axis=1)), 0, atol=1e-6)


def test_tokens_that_tie_at_the_edge_of_a_cut_are_all_kept():
    # Catches a kept set that depends on how a sort breaks ties: sampler and learner could then keep different tokens.
    z = np.array([[2.0, 1.0, 1.0, 1.0, -3.0]], np.float32)
    for case in ({"top_k": 2}, {"top_p": 0.5}):
        kept = np.asarray(shape_logits(z, Sampling(**case))) > -1e29
        np.testing.assert_array_equal(kept, [[True, True, True, True, False]])


def test_temperature_zero_puts_everything_on_the_argmax():
    # Catches a division by 0, and greedy decoding that breaks ties at random.
    z = logits_of(6)
    z[0] = 0.0
    shaped = shape_logits(z, Sampling(temperature=0))
    best = np.argmax(z, axis=1)
    np.testing.assert_array_equal(log_prob(shaped, best), np.zeros(ROWS))
    np.testing.assert_array_equal(categorical(jax.random.key(0), shaped), best)
    np.testing.assert_array_equal(entropy(shaped), np.zeros(ROWS))


def test_removed_tokens_are_never_drawn():
    # Catches a penalty in place of a removal.
    z = np.tile(logits_of(7)[0], (4000, 1))
    shaped = shape_logits(z, Sampling(top_k=4))
    drawn = np.asarray(categorical(jax.random.key(1), shaped))
    assert set(drawn) == set(oracle.top_k(z[0], 4))


def test_logits_that_are_not_float32_are_refused():
    # Catches bf16 logits, whose log-probs are off by a percent: past every clip range of GSPO.
    with pytest.raises(AssertionError):
        shape_logits(jnp.zeros((2, V), jnp.bfloat16), Sampling())


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", -0.1), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("min_p", 1.0)]
)
def test_a_cut_out_of_its_range_is_a_one_line_error_that_names_the_field(field, value):
    # Catches top_p = 0, which would keep nothing, and a negative top_k that means "all" in one library and "none" in
    # another.
    with pytest.raises(UserError, match=field) as error:
        Sampling(**{field: value})
    assert "\n" not in str(error.value)
