"""The value model and its update, against the float64 decoder and the sums of PPO's value loss."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo.learning.critic import Critic, completion_values, make_critic_step, make_value_fn
from gspo.types import Batch, LossInputs, TrainState
from tests import model_oracle as oracle

SPEC, V = oracle.DENSE, oracle.DENSE.vocab_size
B, P, C = 4, 4, 6
PROMPT_LENGTHS, LENGTHS = np.array([4, 2, 3, 1], np.int32), np.array([6, 1, 3, 4], np.int32)
RANGE = 0.2  # cliprange_value


@functools.cache
def rows_of():
    rng = np.random.default_rng(0)
    return [(rng.integers(0, V, p), rng.integers(0, V, c)) for p, c in zip(PROMPT_LENGTHS, LENGTHS, strict=True)]


def exact_values(params):
    """Of each row: the value before each of its completion tokens, of the float64 decoder. params: a float64 tree."""
    body = params["body"] | {"head": np.eye(SPEC.d_model)}  # the hidden states themselves
    spec = dataclasses.replace(SPEC, tie_embeddings=False)
    hidden = [oracle.decoder(body, spec, [*prompt, *completion])[0] for prompt, completion in rows_of()]
    return [h[n - 1 : -1] @ params["value"] for h, n in zip(hidden, PROMPT_LENGTHS, strict=True)]


@functools.cache
def targets():
    """Of each row: (old values, returns, mask), float64. Old values lie so that some tokens are past the range on
    either side and others inside; some tokens of the completion do not count."""
    rng, found = np.random.default_rng(2), []
    for values in exact_values(oracle.float64(oracle.build_critic(SPEC)[1])):
        old = values + rng.choice([-3, -0.5, 0.5, 3], len(values)) * RANGE
        mask = rng.random(len(values)) < 0.8
        mask[0] = True
        found.append((old, values + rng.standard_normal(len(values)), mask))
    return found


def batch_of(rows=None):
    """The rows above in one frame; junk wherever no completion token stands. rows: other (old values,
    returns, mask) than those of `targets`."""
    tokens = np.random.default_rng(3).integers(0, V, (B, P + C)).astype(np.int32)
    old_BC, returns_BC = np.float32(1e3) * np.random.default_rng(5).standard_normal((2, B, C), np.float32)
    mask_BC = np.zeros((B, C), bool)
    for b, ((prompt, completion), (old, returns, mask)) in enumerate(zip(rows_of(), rows or targets(), strict=True)):
        n = len(completion)
        tokens[b, P - len(prompt) : P], tokens[b, P : P + n] = prompt, completion
        old_BC[b, :n], returns_BC[b, :n], mask_BC[b, :n] = old, returns, mask
    zeros_BC = np.zeros((B, C), np.float32)
    inputs = LossInputs(logp_BC=None, old_logp_BC=zeros_BC, advantages_BC=zeros_BC, mask_BC=mask_BC)
    return Batch(tokens, PROMPT_LENGTHS, LENGTHS, inputs, old_values_BC=old_BC, returns_BC=returns_BC)


@functools.cache
def step_of(micro_batch_size=0):
    return make_critic_step(
        oracle.build_critic(SPEC)[0],
        oracle.record_gradients(),
        cliprange_value=RANGE,
        micro_batch_size=micro_batch_size,
    )


def stepped(batch, micro_batch_size=0):
    """(gradients, metrics as numbers) of one step."""
    params = jax.tree.map(jnp.copy, oracle.build_critic(SPEC)[1])  # the step donates its state
    state, metrics = step_of(micro_batch_size)(
        TrainState(jnp.int32(0), params, oracle.record_gradients().init(params)), batch
    )
    assert state.step == 1
    return state.opt_state, {name: float(getattr(x, "value", x)) for name, x in metrics.items()}


def exact_loss(params):
    """Mean over the tokens that count of ½ max((V - R)², (clip(V, V_old - ε, V_old + ε) - R)²)."""
    terms = []
    for values, (old, returns, mask) in zip(exact_values(params), targets(), strict=True):
        for v, o, r in zip(values[mask], old[mask], returns[mask], strict=True):
            held = min(max(v, o - RANGE), o + RANGE)
            terms.append(0.5 * max((v - r) ** 2, (held - r) ** 2))
    return np.mean(terms)


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("micro_batch_size", [0, 2, 1])
def test_the_value_of_a_token_is_read_at_the_column_that_predicts_it(micro_batch_size):
    # Catches values shifted by one (a value that has seen its token), padding that is seen, rows that come back in the
    # order in which they were dealt.
    critic, params = oracle.build_critic(SPEC)
    values = make_value_fn(critic, completion_width=C, micro_batch_size=micro_batch_size)
    found = values(params, batch_of().tokens_BT, PROMPT_LENGTHS)
    assert found.shape == (B, C) and found.dtype == jnp.float32
    for b, expected in enumerate(exact_values(oracle.float64(params))):
        np.testing.assert_allclose(found[b, : LENGTHS[b]], expected, rtol=1e-5, atol=1e-5)


def test_no_value_depends_on_the_token_before_which_it_stands():
    # Catches the same shift without an oracle: the critic would judge a choice that it should have predicted from.
    critic, params = oracle.build_critic(SPEC)
    tokens = batch_of().tokens_BT
    values = jax.jit(lambda tokens: completion_values(critic, params, tokens, PROMPT_LENGTHS, C).values_BC)
    for column in range(C):
        other = tokens.copy()
        other[:, P + column] = (other[:, P + column] + 1) % V
        changed = np.abs(values(tokens) - values(other)).max(axis=0) > 1e-6
        np.testing.assert_array_equal(changed, np.arange(C) > column)


def test_an_untrained_critic_expects_nothing():
    # Catches a last layer that starts at random: the first advantages of PPO would be noise.
    critic = Critic(SPEC)
    params = nn.unbox(jax.jit(critic.init_params)(jax.random.key(0)))
    np.testing.assert_array_equal(
        completion_values(critic, params, batch_of().tokens_BT, PROMPT_LENGTHS, C).values_BC, np.zeros((B, C))
    )


# ---------------------------------------------------------------- the update


def test_the_gradient_of_a_step_is_that_of_the_clipped_value_loss_of_the_float64_model():
    # Catches a loss that is not clipped, or clipped around the returns, min in place of max, a mean over rows or over
    # masked tokens, a factor of 2, values of another column, a gradient that does not reach the body.
    params = oracle.float64(oracle.build_critic(SPEC)[1])
    grads, metrics = stepped(batch_of())
    found = {jax.tree_util.keystr(path): np.asarray(g) for path, g in jax.tree_util.tree_leaves_with_path(grads)}
    total = 0.0
    for path, direction, slope in oracle.directional_derivatives(exact_loss, params, np.random.default_rng(4)):
        assert np.sum(found[path] * direction) == pytest.approx(slope, rel=2e-3, abs=2e-5), path
        total += np.sum(np.square(found[path], dtype=np.float64))
    assert metrics["critic/grad_norm"] == pytest.approx(np.sqrt(total), rel=1e-5) and total > 1e-2
    # The case is met: tokens on both sides of the range, where the clipped term is the larger, and inside.
    kinds = set()
    for values, (old, returns, mask) in zip(exact_values(params), targets(), strict=True):
        held = np.clip(values, old - RANGE, old + RANGE)
        rules = np.abs(held - returns) > np.abs(values - returns)
        kinds |= set(np.where(held == values, 0, np.where(rules, np.sign(held - values), 9))[mask])
    assert kinds == {-1, 0, 1, 9}


def test_metrics_equal_those_of_the_tokens_that_count():
    # Catches an explained variance of another mean, with the sum of squares for the variance, or over junk; a loss
    # without its half.
    values = exact_values(oracle.float64(oracle.build_critic(SPEC)[1]))
    _, metrics = stepped(batch_of())
    v = np.concatenate([x[mask] for x, (_, _, mask) in zip(values, targets(), strict=True)])
    r = np.concatenate([returns[mask] for _, returns, mask in targets()])
    assert metrics["critic/value_mean"] == pytest.approx(v.mean(), rel=1e-4)
    assert metrics["critic/loss"] == pytest.approx(np.mean((v - r) ** 2) / 2, rel=1e-4)
    assert metrics["critic/explained_variance"] == pytest.approx(
        1 - np.mean((v - r) ** 2) / r.var(), rel=1e-3, abs=1e-4
    )


def test_explained_variance_is_1_for_a_critic_that_is_right_and_below_0_for_one_worse_than_the_mean():
    # Catches 1 - ratio taken the other way round, or of standard deviations.
    values = exact_values(oracle.float64(oracle.build_critic(SPEC)[1]))
    right = [(v, v, mask) for v, (_, _, mask) in zip(values, targets(), strict=True)]
    opposite = [(v, -v, mask) for v, (_, _, mask) in zip(values, targets(), strict=True)]
    assert stepped(batch_of(right))[1]["critic/explained_variance"] == pytest.approx(1, abs=1e-5)
    assert stepped(batch_of(opposite))[1]["critic/explained_variance"] < 0


@pytest.mark.parametrize("micro_batch_size", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_the_step_does_not_depend_on_micro_batches(micro_batch_size):
    # Catches a mean of means: rows have from 1 to 6 tokens, so that the parts count differently.
    grads, metrics = stepped(batch_of())
    others, more = stepped(batch_of(), micro_batch_size)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), grads, others)
    assert more == pytest.approx(metrics, rel=1e-5)
