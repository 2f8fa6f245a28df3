"""A batch of four rows of unlike lengths, with junk under its padding, and the steps and scorers to run it through.

What they compile is kept for all tests of a process.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gspo.learning.learner import UpdatePlan, make_train_step
from gspo.learning.scores import Scores, make_scorer
from gspo.masked import values
from gspo.model.distribution import Sampling
from gspo.model.transformer import Transformer
from gspo.objectives import negative_log_likelihood, preset
from gspo.types import Batch, LossInputs, TrainState
from tests import model_oracle as oracle

DENSE, MOE = oracle.DENSE, oracle.MOE
B, P, C, V = 4, 4, 6, 11
T = P + C
PROMPT_LENGTHS, LENGTHS = np.array([4, 2, 3, 1]), np.array([6, 1, 3, 4])
ADVANTAGES = np.array([1.0, -0.7, -1.3, 0.4], np.float32)
WARM = Sampling(temperature=0.8)
EPSILON, EPSILON_HIGH = 0.01, 0.015


def rows_of(seed=0):
    """[(prompt, completion)] of the lengths above."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, V, p), rng.integers(0, V, c)) for p, c in zip(PROMPT_LENGTHS, LENGTHS, strict=True)]


def frame(rows, prompt_width=P, width=C, seed=1):
    """Rows -> tokens_BT, with junk tokens under all padding."""
    tokens = np.random.default_rng(seed).integers(0, V, (len(rows), prompt_width + width)).astype(np.int32)
    for b, (prompt, completion) in enumerate(rows):
        tokens[b, prompt_width - len(prompt) : prompt_width] = prompt
        tokens[b, prompt_width : prompt_width + len(completion)] = completion
    return tokens


@functools.cache
def old_policy():
    """Of each row: old log-probs, those of MOE and a drift of some percent per token; routes; router logits, drifted
    too."""
    exact, rng = oracle.float64(oracle.build(MOE)[1]), np.random.default_rng(8)
    logps = [
        oracle.score(exact, MOE, *row, temperature=0.8)[0] + 0.05 * rng.standard_normal(len(row[1]))
        for row in rows_of()
    ]
    routed = [oracle.decoder(exact, MOE, [*prompt, *completion])[1:] for prompt, completion in rows_of()]
    return logps, [routes for routes, _ in routed], [z + 0.3 * rng.standard_normal(z.shape) for _, z in routed]


def make_batch(prompt_width=P, width=C, order=range(B), recorded=True):
    """The rows above in a frame of any width; junk, NaN included, wherever no real token stands. recorded: routes, else
    -1."""
    rows, (old_logps, row_routes, router_logits) = rows_of(), old_policy()
    order = list(order)
    old_BC = np.full((B, width), np.nan, np.float32)
    routes = np.full((2, B, prompt_width + width, 2), -1, np.int8)
    old_router = np.full((2, B, prompt_width + width, 5), np.nan, np.float32)
    for b, i in enumerate(order):
        old_BC[b, : LENGTHS[i]] = old_logps[i]
        columns = slice(prompt_width - PROMPT_LENGTHS[i], prompt_width + LENGTHS[i])
        old_router[:, b, columns] = router_logits[i]
        if recorded:
            routes[:, b, columns] = row_routes[i]
    mask_BC = np.arange(width) < LENGTHS[order][:, None]
    return Batch(
        tokens_BT=frame([rows[i] for i in order], prompt_width, width, seed=prompt_width + order[0]),
        prompt_lengths_B=PROMPT_LENGTHS[order].astype(np.int32),
        completion_lengths_B=LENGTHS[order].astype(np.int32),
        inputs=LossInputs(
            logp_BC=None,
            old_logp_BC=old_BC,
            advantages_BC=np.where(mask_BC, ADVANTAGES[order][:, None], 0),
            mask_BC=mask_BC,
        ),
        old_routes_LBTX=routes,
        replayed_routes_LBTX=routes,
        old_router_logits_LBTE=old_router,
    )


OPTIMIZER = optax.chain(oracle.record_gradients(), optax.sgd(0.3))
TRACES = {"gspo": 0}


class CountedGspo:
    """GSPO, and how often it was traced."""

    objective = preset("gspo", epsilon=EPSILON, epsilon_high=EPSILON_HIGH)
    needs, aggregate = objective.needs, staticmethod(objective.aggregate)

    def __call__(self, inputs):
        TRACES["gspo"] += 1
        return self.objective(inputs)


gspo = CountedGspo()


@functools.cache
def step_of(spec, objective, micro_batch_size=2, chunk=4):
    return make_train_step(
        Transformer(spec),
        OPTIMIZER,
        objective,
        UpdatePlan(micro_batch_size=micro_batch_size, chunk=chunk),
        sampling=WARM,
    )


@functools.cache
def scorer_of(micro_batch_size):
    return make_scorer(
        Transformer(MOE),
        completion_width=C,
        sampling=WARM,
        chunk=128,
        micro_batch_size=micro_batch_size,
        keep=tuple(Scores.__dataclass_fields__),
    )


def fresh_state(spec):
    params = jax.tree.map(jnp.copy, oracle.build(spec)[1])  # a step donates what it is given
    return TrainState(jnp.int32(0), params, OPTIMIZER.init(params))


def gradients(spec, objective, batch, **keywords):
    """(gradient tree, metrics) of one step."""
    state, metrics = step_of(spec, objective, **keywords)(fresh_state(spec), batch)
    return jax.tree.map(np.asarray, state.opt_state[0]), values(jax.device_get(metrics))


def assert_same_gradients(one, other, rtol=1e-4, atol=1e-6):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), one, other)


def assert_same_metrics(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-6, err_msg=name)


GSPO_MOE = (MOE, gspo)
SFT_DENSE = (DENSE, negative_log_likelihood)
