"""The reward model and its update, against the float64 decoder."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo.learning.critic import Critic
from gspo.learning.rewards import CompletionRows, make_reward_fn, make_reward_step
from gspo.objectives import bradley_terry
from gspo.types import TrainState
from tests import model_oracle as oracle

SPEC, V = oracle.DENSE, oracle.DENSE.vocab_size
Q, P, C = 4, 4, 6
PROMPT_LENGTHS, LENGTHS = np.array([4, 2, 3, 1]), np.array([6, 1, 3, 4, 2, 6, 5, 3])
LOSS = partial(bradley_terry, center_rewards_coefficient=0.1)


@functools.cache
def texts():
    """(prompt, completion) of each row: pairs have their prompt in common."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, V, n) for n in PROMPT_LENGTHS]
    return [(prompts[b // 2], rng.integers(0, V, n)) for b, n in enumerate(LENGTHS)]


@functools.cache
def rows_of():
    """Junk behind every completion; pads before a prompt are the same for both rows of a pair."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, V, (2 * Q, P + C)).astype(np.int32)
    tokens[1::2, :P] = tokens[0::2, :P]
    for b, (prompt, completion) in enumerate(texts()):
        tokens[b, P - len(prompt) : P], tokens[b, P : P + len(completion)] = prompt, completion
    margins = np.repeat(np.float32([0.0, 1.0, 0.3, 0.0]), 2)
    return CompletionRows(tokens, np.repeat(PROMPT_LENGTHS, 2).astype(np.int32), LENGTHS.astype(np.int32), margins)


def exact_scores(params):
    """Of each row: the value at its last token, of the float64 decoder. params: a float64 tree."""
    body = params["body"] | {"head": np.eye(SPEC.d_model)}  # the hidden states themselves
    spec = dataclasses.replace(SPEC, tie_embeddings=False)
    hidden = [oracle.decoder(body, spec, [*prompt, *completion])[0][-1] for prompt, completion in texts()]
    return [h @ params["value"] for h in hidden]


@functools.cache
def scores(rows_per_prompt, micro_batch_size=0):
    model, params = oracle.build_critic(SPEC)
    fn = make_reward_fn(model, completion_width=C, micro_batch_size=micro_batch_size, rows_per_prompt=rows_per_prompt)
    return np.asarray(fn(params, rows_of()))


@pytest.mark.parametrize(
    ("rows_per_prompt", "micro_batch_size"), [(1, 0), (2, 4), pytest.param(2, 0, marks=pytest.mark.slow)]
)
def test_a_score_is_read_at_the_last_token_of_the_completion(rows_per_prompt, micro_batch_size):
    # Catches the end of the frame, the token before the last, a shared prompt that is seen by the wrong pair, rows that
    # come back in the order in which they were dealt.
    found = scores(rows_per_prompt, micro_batch_size)
    assert found.shape == (2 * Q,) and found.dtype == np.float32
    expected = exact_scores(oracle.float64(oracle.build_critic(SPEC)[1]))
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@functools.cache
def step_of(micro_batch_size=0):
    return make_reward_step(
        Critic(SPEC), oracle.record_gradients(), LOSS, completion_width=C, micro_batch_size=micro_batch_size
    )


def stepped(micro_batch_size=0):
    """(gradients, metrics as numbers) of one step."""
    params = jax.tree.map(jnp.copy, oracle.build_critic(SPEC)[1])  # the step donates its state
    start = TrainState(jnp.int32(0), params, oracle.record_gradients().init(params))
    state, metrics = step_of(micro_batch_size)(start, rows_of())
    assert state.step == 1
    return state.opt_state, {name: float(metric.value) for name, metric in metrics.items()}


def exact_loss(params):
    """Mean over pairs of −log σ(r_c − r_r − m) + 0.1 (r_c + r_r)²."""
    r, total = exact_scores(params), 0.0
    for q in range(Q):
        z = r[2 * q] - r[2 * q + 1] - float(rows_of().margins_B[2 * q])
        total += np.log1p(np.exp(-z)) + 0.1 * (r[2 * q] + r[2 * q + 1]) ** 2
    return total / Q


def test_the_gradient_of_a_step_is_that_of_the_loss_of_the_float64_model():
    # Catches scores of another column in training than in use, a gradient that does not reach the body or the prompt,
    # margins of another pair.
    params = oracle.float64(oracle.build_critic(SPEC)[1])
    grads, metrics = stepped()
    assert metrics["loss"] == pytest.approx(exact_loss(params), rel=1e-5)
    found = {jax.tree_util.keystr(path): np.asarray(g) for path, g in jax.tree_util.tree_leaves_with_path(grads)}
    for path, direction, slope in oracle.directional_derivatives(exact_loss, params, np.random.default_rng(4)):
        assert np.sum(found[path] * direction) == pytest.approx(slope, rel=2e-3, abs=2e-5), path
    total = sum(np.sum(np.square(g, dtype=np.float64)) for g in found.values())
    assert metrics["grad_norm"] == pytest.approx(np.sqrt(total), rel=1e-5) and total > 1e-2


@pytest.mark.slow
def test_the_step_does_not_depend_on_micro_batches():
    # Catches a pair that is cut in two, and a mean of means.
    grads, metrics = stepped()
    others, more = stepped(micro_batch_size=4)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), grads, others)
    assert more == pytest.approx(metrics, rel=1e-5)
