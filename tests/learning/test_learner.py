"""Scores and updates: equal to the float64 model and loss, whatever the chunks, micro-batches, padding or order of
rows."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gspo.learning.learner import UpdatePlan, make_ref_sync, make_train_step
from gspo.learning.sampler import make_sampler
from gspo.learning.scores import Scores, make_scorer, router_logp, score_completions
from gspo.masked import values
from gspo.model.distribution import Sampling
from gspo.model.transformer import Transformer
from gspo.objectives import negative_log_likelihood, preset
from gspo.types import Batch, LossInputs, TrainState
from tests import model_oracle as oracle
from tests import oracles
from tests.model_oracle import quick_compiles  # noqa: F401 - a fixture

DENSE, MOE = oracle.DENSE, oracle.MOE
B, P, C, V = 4, 4, 6, 11
T = P + C
PROMPT_LENGTHS, LENGTHS = np.array([4, 2, 3, 1]), np.array([6, 1, 3, 4])
ADVANTAGES = np.array([1.0, -0.7, -1.3, 0.4], np.float32)
WARM = Sampling(temperature=0.8)
EPSILON, EPSILON_HIGH = 0.01, 0.015


# ---------------------------------------------------------------- batches and steps


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


# ---------------------------------------------------------------- scores


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


# ---------------------------------------------------------------- the gradient


@pytest.mark.parametrize("case", [GSPO_MOE, SFT_DENSE], ids=["gspo-moe", "sft-dense"])
def test_loss_and_gradient_of_a_step_equal_the_float64_loss_of_the_float64_model(case):
    # Catches whatever stands between the two: chunks, micro-batches (a mean of means: rows have 6, 1, 3 and 4 tokens),
    # temperature, masks, replay, and NaN under the padding.
    spec = case[0]
    exact, (old_logps, routes, _) = oracle.float64(oracle.build(spec)[1]), old_policy()

    def exact_loss(params):
        given = routes if spec.num_experts else [None] * B
        logps = [oracle.score(params, spec, *row, given[b], temperature=0.8)[0] for b, row in enumerate(rows_of())]
        if case == SFT_DENSE:
            return -np.mean(np.concatenate(logps))
        return oracle.gspo_loss(logps, old_logps, ADVANTAGES, EPSILON, EPSILON_HIGH)

    grads, metrics = gradients(*case, make_batch())
    assert metrics["loss"] == pytest.approx(exact_loss(exact), rel=1e-5)
    checks = oracle.directional_derivatives(exact_loss, exact, np.random.default_rng(3))
    leaves = jax.tree.leaves(grads)
    for (name, direction, expected), grad in zip(checks, leaves, strict=True):
        assert np.sum(grad.astype(np.float64) * direction) == pytest.approx(expected, rel=1e-3, abs=2e-6), name
    assert metrics["grad_norm"] == pytest.approx(
        np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in leaves)), rel=1e-5
    )
    if case == GSPO_MOE:
        assert (
            metrics["clip_ratio/sequences_low"] == metrics["clip_ratio/sequences_high"] == 0.25
        )  # and two rows are not clipped
        assert np.abs(grads["blocks"]["moe"]["router"]).max() > 1e-4  # the router learns under replay


@pytest.mark.parametrize(
    ("spec", "objective", "keywords"),
    [
        pytest.param(*case, keywords, marks=pytest.mark.slow)
        for case in (GSPO_MOE, SFT_DENSE)
        for keywords in (
            {"micro_batch_size": 0},
            {"micro_batch_size": 1},
            {"micro_batch_size": 4},
            {"chunk": 1},
            {"chunk": 6},
        )
    ]
    + [
        pytest.param(dataclasses.replace(MOE, moe_backend=backend, remat=True), gspo, {}, marks=pytest.mark.slow)
        for backend in ("dense", "blocked", "ragged")
    ],
    ids=lambda x: ",".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else None,
)  # fmt: skip
def test_micro_batches_and_chunks_do_not_change_gradient_and_metrics(spec, objective, keywords):
    # Catches a mean of means (rows have 6, 1, 3 and 4 tokens), metrics of the last part only, routes split differently
    # from tokens.
    batch = make_batch()
    base = dataclasses.replace(spec, moe_backend="blocked", remat=False)
    expected, metrics = gradients(base, objective, batch)
    found, other = (
        gradients(spec, objective, batch, **keywords) if spec == base else replayed(spec, objective, batch, keywords)
    )
    assert_same_gradients(found, expected)
    assert_same_metrics(other, metrics)


def test_router_losses_add_the_same_gradient_in_any_micro_batches():
    # Catches a balance loss over the micro-batch, and one that an aggregation over tokens weighs by the tokens of a
    # part.
    objective = preset("grpo", loss_agg_mode="token-mean")
    plan = UpdatePlan(router_aux_loss_coef=0.5, router_z_loss_coef=0.1)
    batch, found = make_batch(), {}
    for size in (0, 1):
        step = make_train_step(
            Transformer(MOE), OPTIMIZER, objective, dataclasses.replace(plan, micro_batch_size=size), sampling=WARM
        )
        found[size] = step(fresh_state(MOE), batch)[0].opt_state[0]
    plain = make_train_step(Transformer(MOE), OPTIMIZER, objective, sampling=WARM)(fresh_state(MOE), batch)[
        0
    ].opt_state[0]
    assert_same_gradients(found[1], found[0])
    added = np.asarray(found[0]["blocks"]["moe"]["router"] - plain["blocks"]["moe"]["router"])
    assert np.abs(added).max() > 1e-2


def replayed(spec, objective, batch, keywords):
    state = fresh_state(dataclasses.replace(spec, moe_backend="blocked", remat=False))
    state, metrics = step_of(spec, objective, **keywords)(state, batch)
    return state.opt_state[0], values(jax.device_get(metrics))


@pytest.mark.parametrize(
    "case", [SFT_DENSE, pytest.param(GSPO_MOE, marks=pytest.mark.slow)], ids=["sft-dense", "gspo-moe"]
)
def test_more_padding_changes_nothing(case):
    # Catches a loss divided by the frame's width, padding that counts as tokens, positions or routes tied to the
    # frame's left edge.
    expected, metrics = gradients(*case, make_batch())
    found, other = gradients(*case, make_batch(prompt_width=P + 2, width=C + 3))
    assert_same_gradients(found, expected)
    assert_same_metrics(other, metrics)


@pytest.mark.parametrize("recorded", [True, False], ids=["replay", "free"])
def test_the_order_of_rows_changes_nothing(recorded):
    # Catches advantages, masks or routes paired with another row's tokens.
    expected, metrics = gradients(*GSPO_MOE, make_batch(recorded=recorded))
    found, other = gradients(*GSPO_MOE, make_batch(order=[2, 0, 3, 1], recorded=recorded))
    assert_same_gradients(found, expected)
    assert other["loss"] == pytest.approx(metrics["loss"], rel=1e-5)


def test_replaying_the_routes_of_the_same_weights_changes_no_bit():
    # Catches replay misaligned by left padding, by the completion's padding or by the micro-batches of the update.
    free, metrics = gradients(*GSPO_MOE, make_batch(recorded=False))
    replay, other = gradients(*GSPO_MOE, make_batch())
    jax.tree.map(np.testing.assert_array_equal, replay, free)
    assert other["loss"] == metrics["loss"] and other["routing/experts_changed"] == 0


def test_other_routes_give_another_loss_and_are_not_what_drift_is_measured_on():
    # Catches an update that ignores the replay, and the drift metric computed on replayed routes, where it is 0 by
    # construction.
    batch = make_batch()
    routes = np.where(batch.old_routes_LBTX >= 0, (batch.old_routes_LBTX + 1) % 5, -1).astype(np.int8)
    _, metrics = gradients(*GSPO_MOE, batch)
    _, other = gradients(*GSPO_MOE, batch.replace(old_routes_LBTX=routes, replayed_routes_LBTX=routes))
    assert abs(other["loss"] - metrics["loss"]) > 1e-3
    exact = oracle.float64(oracle.build(MOE)[1])
    free = np.zeros_like(routes)
    real_BT = np.zeros((B, T), bool)
    kl, margin = [], []  # [2] for each real token
    for b, (prompt, completion) in enumerate(rows_of()):
        columns = slice(P - len(prompt), P + len(completion))
        _, free[:, b, columns], z = oracle.decoder(exact, MOE, [*prompt, *completion], routes[:, b, columns])
        real_BT[b, columns] = True
        for t in range(z.shape[1]):
            old_z = old_policy()[2][b][:, t]
            p, q = [oracle.softmax(old) for old in old_z], [oracle.softmax(new) for new in z[:, t]]
            kl.append([sum(p[l][e] * np.log(p[l][e] / q[l][e]) for e in range(5)) for l in range(2)])
            margin.append([np.sort(z[l, t])[-2] - np.sort(z[l, t])[-3] for l in range(2)])
    for name, expected in (("kl", kl), ("margin", margin)):
        np.testing.assert_allclose(other[f"routing/{name}_by_layer"], np.mean(expected, axis=0), rtol=1e-4)
        assert other[f"routing/{name}"] == pytest.approx(np.mean(expected), rel=1e-4)
    share, tokens = oracle.count_changes(routes, free, real_BT)
    assert share > 0.3
    assert other["routing/experts_changed"] == pytest.approx(share, rel=1e-5)
    assert other["routing/tokens_changed"] == pytest.approx(tokens, rel=1e-5)
    variation, peak = oracle.count_load(free, real_BT, 5)
    assert other["routing/load_cv"] == pytest.approx(variation, rel=1e-5)
    assert other["routing/load_max_over_mean"] == pytest.approx(peak, rel=1e-5)


def test_entropy_is_averaged_over_completion_tokens():
    # Catches the entropy of padding, which is high and would hide a collapse.
    exact = oracle.float64(oracle.build(MOE)[1])
    _, metrics = gradients(*GSPO_MOE, make_batch())
    entropies = np.concatenate([oracle.score(exact, MOE, *row, temperature=0.8)[1] for row in rows_of()])
    assert metrics["entropy"] == pytest.approx(entropies.mean(), rel=1e-5)


def test_rspo_through_a_step_sees_how_far_the_routers_moved_from_those_that_sampled():
    # Catches a router shift that is dropped on its way to the loss, or taken over the policy's own choices in place of
    # the old routers' (they differ here), at other columns than those that predict, or with a gradient.
    logps, _, router_logits = old_policy()
    exact, rows, batch = oracle.float64(oracle.build(MOE)[1]), rows_of(), make_batch()
    real = np.asarray(batch.inputs.mask_BC)
    routes, old_router = np.full_like(batch.old_routes_LBTX, -1), np.full((2, B, C, 2), np.nan, np.float32)
    router = np.zeros((2, B, C, 2))
    for b, (prompt, completion) in enumerate(rows):
        new_LTE = oracle.decoder(exact, MOE, [*prompt, *completion])[2]
        for l, t in np.ndindex(new_LTE.shape[:2]):
            chosen, c = oracle.top_k(router_logits[b][l, t], 2), t - len(prompt) + 1
            routes[l, b, P - len(prompt) + t] = chosen
            if 0 <= c < len(completion):
                old_router[l, b, c] = np.log(oracle.softmax(router_logits[b][l, t]))[chosen]
                router[l, b, c] = np.log(oracle.softmax(new_LTE[l, t]))[chosen]
    assert (routes[routes >= 0] != batch.old_routes_LBTX[routes >= 0]).any()
    gamma = oracles.router_gamma(router, old_router, real)[real]
    assert gamma.min() == 0.8 < np.median(gamma) < 0.95  # some at the floor, some above it

    def framed(rows):
        frame_BC = np.zeros((B, C))
        frame_BC[real] = np.concatenate(rows)
        return frame_BC

    def exact_loss(params):
        new_BC = framed([oracle.score(params, MOE, *row, temperature=0.8)[0] for row in rows])
        return oracles.rspo(new_BC, new_BC, framed(logps), batch.inputs.advantages_BC, real, router, old_router)

    inputs = batch.inputs.replace(old_router_logp_LBCX=old_router)
    batch = batch.replace(old_routes_LBTX=routes, replayed_routes_LBTX=None, inputs=inputs)
    grads, metrics = gradients(MOE, preset("rspo"), batch)
    assert metrics["loss"] == pytest.approx(exact_loss(exact), rel=1e-5)
    # One direction through all parameters at once: that of a single leaf has tests above.
    rng, eps = np.random.default_rng(3), 1e-5
    direction = jax.tree.map(lambda x: rng.standard_normal(x.shape), exact)

    def along(step):
        return exact_loss(jax.tree.map(lambda x, d: x + step * d, exact, direction))

    slope = sum(
        np.sum(g.astype(np.float64) * d) for g, d in zip(*map(jax.tree.leaves, (grads, direction)), strict=True)
    )
    assert slope == pytest.approx((along(eps) - along(-eps)) / (2 * eps), rel=1e-3) and abs(slope) > 1e-2


# ---------------------------------------------------------------- several updates per rollout


def test_the_ratio_is_one_before_the_first_update_and_moves_after_it():
    # Catches stale or missing old log-probs: a ratio that is off at once, or one that is 1 for ever and clips nothing.
    batch, state = make_batch(), fresh_state(MOE)
    scores = scorer_of(0)(state.params, batch.tokens_BT, batch.prompt_lengths_B)
    batch = batch.replace(inputs=batch.inputs.replace(old_logp_BC=scores.logp_BC))
    step = step_of(*GSPO_MOE)
    gaps, clipped = [], []
    for _ in range(3):
        state, metrics = step(state, batch)
        gaps.append(float(metrics["log_ratio/abs_max"].value))
        clipped.append(float(metrics["clip_ratio/sequences"].value))
    assert gaps[0] < 2e-5 and clipped[0] == 0
    assert min(gaps[1:]) > 1e-2 and max(clipped[1:]) > 0
    assert int(state.step) == 3


def test_the_given_state_is_donated_and_later_calls_do_not_trace_again():
    # Catches two copies of parameters and optimizer in memory, and a compilation for every update.
    state, step = fresh_state(MOE), step_of(*GSPO_MOE)
    new_state, _ = step(state, make_batch())
    before = TRACES["gspo"]
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    for order in ([1, 0, 2, 3], [3, 2, 1, 0]):
        new_state, _ = step(new_state, make_batch(order=order))
    assert TRACES["gspo"] == before > 0


def test_supervised_updates_raise_the_likelihood_of_the_demonstrations():
    # Catches the wrong sign, and a loss over the prompt or the padding, which these few rows would not improve so far.
    step, batch, state = step_of(*SFT_DENSE), make_batch(), fresh_state(DENSE)
    losses = []
    for _ in range(40):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"].value))
    exact = oracle.float64(oracle.build(DENSE)[1])
    logps = np.concatenate([oracle.score(exact, DENSE, *row, temperature=0.8)[0] for row in rows_of()])
    assert losses[0] == pytest.approx(-logps.mean(), rel=1e-5)
    assert losses[-1] < 0.3 * losses[0]


def test_the_entropy_bonus_adapts_to_its_target_and_pulls_with_its_coefficient():
    # Catches a coefficient that moves the wrong way or below 0, a penalty for a bonus, and one that is weighed by other
    # means than the loss. The coefficient is data: one compiled step serves all of its values.
    model, params = oracle.build(DENSE)
    exact, rows = oracle.float64(params), rows_of()
    target = np.concatenate([oracle.score(exact, DENSE, *row)[1] for row in rows]).mean()
    plan = UpdatePlan(chunk=4, entropy_target=target - 0.05, entropy_step=0.25)
    step = make_train_step(model, OPTIMIZER, preset("grpo"), plan)
    sharp = params | {"embedding": 3 * params["embedding"]}  # the head is tied to it: less entropy than the target
    found = {}
    for start, coef, expected in ((params, 0.0, 0.0), (params, 0.1, 0.0), (params, 0.5, 0.25), (sharp, 0.5, 0.75)):
        state = fresh_state(DENSE).replace(params=jax.tree.map(jnp.copy, start), entropy_coef=jnp.float32(coef))
        state, metrics = step(state, make_batch().replace(old_routes_LBTX=None, replayed_routes_LBTX=None))
        assert metrics["entropy_coef"].value == state.entropy_coef == expected
        found.setdefault(coef, state.opt_state[0])

    def mean_entropy(params):
        return np.mean([oracle.score(params, DENSE, *row)[1].mean() for row in rows])

    checks = oracle.directional_derivatives(mean_entropy, exact, np.random.default_rng(10))
    for (name, direction, expected), with_bonus, without in zip(
        checks, jax.tree.leaves(found[0.5]), jax.tree.leaves(found[0.0]), strict=True
    ):
        pull = np.sum(np.asarray(with_bonus - without, np.float64) * direction) / -0.5
        assert pull == pytest.approx(expected, rel=1e-3, abs=1e-5), name


def test_the_reference_follows_the_policy_by_the_mixup_share():
    # Catches shares that are swapped: a reference that jumps to the policy takes the KL term away.
    mixed = make_ref_sync(0.6)({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([11.0, -8.0])})
    np.testing.assert_allclose(mixed["w"], [5.0, -2.0], rtol=1e-6)


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


# ---------------------------------------------------------------- memory


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
