"""One update: loss and gradient equal to the float64 loss of the float64 model, whatever the chunks, micro-batches,
padding or order of rows."""

import dataclasses

import jax
import numpy as np
import pytest

from gspo.learning.learner import UpdatePlan, make_train_step
from gspo.masked import values
from gspo.model.transformer import Transformer
from gspo.objectives import negative_log_likelihood, preset
from tests import model_oracle as oracle
from tests import oracles
from tests.few_rows import (
    ADVANTAGES,
    EPSILON,
    EPSILON_HIGH,
    GSPO_MOE,
    MOE,
    OPTIMIZER,
    SFT_DENSE,
    WARM,
    B,
    C,
    P,
    T,
    assert_same_gradients,
    assert_same_metrics,
    fresh_state,
    gradients,
    gspo,
    make_batch,
    old_policy,
    rows_of,
    step_of,
)


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
)
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


@pytest.mark.slow
def test_router_losses_of_fine_tuning_equal_those_of_the_float64_model_in_value_and_gradient():
    # Catches losses over prompts or padding, a mean over tokens where one over rows is meant, a weight that the token
    # count of the likelihood scales, a gradient through the shares f, and one that stops before the router.
    exact, balance, z = oracle.float64(oracle.build(MOE)[1]), 0.5, 0.1
    batch = make_batch().replace(old_routes_LBTX=None, replayed_routes_LBTX=None, old_router_logits_LBTE=None)
    plan = UpdatePlan(2, 4, router_aux_loss_coef=balance, router_z_loss_coef=z)
    step = make_train_step(Transformer(MOE), OPTIMIZER, negative_log_likelihood, plan, sampling=WARM)
    state, metrics = step(fresh_state(MOE), batch)
    metrics = values(jax.device_get(metrics))
    chosen = [oracle.decoder(exact, MOE, [*prompt, *completion])[1] for prompt, completion in rows_of()]

    def parts(params):
        """(negative log-likelihood, balance loss, z-loss); the shares of the experts stay those of `exact`."""
        logps, losses = [], []
        for routes, (prompt, completion) in zip(chosen, rows_of(), strict=True):
            logits, _, router = oracle.decoder(params, MOE, [*prompt, *completion])
            rows = [oracle.distribution(row, 0.8) for row in logits[len(prompt) - 1 : -1]]
            logps += [np.log(row[token]) for row, token in zip(rows, completion, strict=True)]
            losses.append(oracle.router_losses(router[:, len(prompt) :], routes[:, len(prompt) :]))
        return -np.mean(logps), *np.mean(losses, axis=0)

    names = ("loss", "routing/balance_loss", "routing/z_loss")
    np.testing.assert_allclose([metrics[name] for name in names], parts(exact), rtol=1e-5)
    checks = oracle.directional_derivatives(
        lambda params: np.dot((1, balance, z), parts(params)), exact, np.random.default_rng(3)
    )
    for (name, direction, expected), grad in zip(checks, jax.tree.leaves(state.opt_state[0]), strict=True):
        found = np.sum(np.asarray(grad, np.float64) * direction)
        assert found == pytest.approx(expected, rel=1e-3, abs=2e-6), name


@pytest.mark.slow
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
