"""The compiled phases: the names of their parts, and how large their arrays are."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gspo.learning.learner import UpdatePlan, make_train_step
from gspo.learning.sampler import make_sampler
from gspo.model.transformer import Transformer
from gspo.objectives import negative_log_likelihood
from gspo.types import Batch, LossInputs, TrainState
from tests import model_oracle as oracle
from tests.few_rows import DENSE, MOE, B, C, P, fresh_state, gspo, make_batch, scorer_of, step_of


@functools.cache
def names_in(phase):
    """Words of the names under which the operations of a phase were traced. The bodies of its loops have names of their
    own, which XLA joins to that of the phase."""
    state, batch = fresh_state(MOE), make_batch()
    if phase == "update":
        program = step_of(MOE, gspo).lower(state, batch)
    elif phase == "logprob":
        program = scorer_of(2).lower(state.params, batch.tokens_BT, batch.prompt_lengths_B)
    else:
        sample = make_sampler(Transformer(MOE), num_generations=2, max_completion_length=C, eos_ids=(1,), pad_id=0)
        program = sample.lower(state.params, batch.tokens_BT[:2, :P], batch.prompt_lengths_B[:2], jax.random.key(0))
    names = re.findall(r'loc\("([^"]*)"', program.as_text(debug_info=True))
    return {word for name in names for word in re.split(r"[/()]+", name) if not name.startswith("/")}


@pytest.mark.parametrize(
    ("phase", "parts"),
    [
        ("update", ("attention", "moe", "head", "loss", "optimizer")),
        ("logprob", ("attention", "moe", "head")),
        ("rollout", ("attention", "moe", "head")),
    ],
)
def test_each_phase_and_its_parts_carry_their_names_into_a_profile(phase, parts):
    # Catches a trace in which time cannot be told apart: one jitted function, a thousand unnamed operations.
    assert {phase, *parts} <= names_in(phase)


def wide_case(vocab, width, chunk):
    """A step over a large vocabulary and long completions, lowered for abstract arguments."""
    spec = dataclasses.replace(DENSE, vocab_size=vocab, d_model=8, num_layers=1, d_ff=8)
    model = Transformer(spec)
    step = make_train_step(model, optax.adam(1e-3), negative_log_likelihood, UpdatePlan(chunk=chunk))
    params = oracle.build(spec)[1]
    state = TrainState(jnp.int32(0), params, optax.adam(1e-3).init(params))
    arrays = jnp.zeros((B, width))
    batch = Batch(
        jnp.zeros((B, P + width), jnp.int32),
        jnp.full(B, P),
        jnp.full(B, width),
        LossInputs(logp_BC=None, old_logp_BC=arrays, advantages_BC=arrays, mask_BC=arrays == 0),
    )
    return step.lower(state, batch)


def largest_with(vocab, text):
    """Entries, besides the vocabulary axis, of the largest float32 array in HLO or StableHLO text that has such an
    axis."""
    shapes = [s.split(",") for s in re.findall(r"f32\[([\d,]+)\]", text)]
    shapes += [s.split("x") for s in re.findall(r"tensor<([\dx]+)xf32>", text)]
    sizes = [[int(n) for n in shape] for shape in shapes]
    return max(int(np.prod(shape)) // vocab for shape in sizes if vocab in shape)


def test_the_step_holds_logits_of_one_chunk_of_columns_only():
    # Catches a [B, C, V] float32 array, forward or as a stacked residual of the scan: 40 GB at 64 x 1000 x 151936.
    vocab, width, chunk = 97, 32, 3
    limit = max(B * chunk, 8)  # the head is [8, V]
    assert largest_with(vocab, wide_case(vocab, width, chunk).compile().as_text()) == limit < B * width
    assert (
        largest_with(vocab, wide_case(vocab, width, width).as_text()) == B * width
    )  # what this test looks for can be seen


@pytest.mark.slow
def test_the_memory_of_a_step_follows_the_chunk():
    # Catches residuals kept for the backward pass under another shape, which a search for [B, C, V] would miss.
    whole, chunked = (wide_case(4096, 64, chunk).compile().memory_analysis().temp_size_in_bytes for chunk in (64, 4))
    assert whole > 2 * B * 64 * 4096 * 4
    assert chunked < 0.3 * whole
