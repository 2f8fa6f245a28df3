"""The check of the old policy; the reference policy; a sampler that lags behind; routing replay."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo import build, rl, steps
from gspo.model.distribution import Sampling
from gspo.run.writers import read_jsonl
from gspo.steps import initial_state
from gspo.types import UserError
from tests.rl.runs import FAST, replace_sampler
from tests.tiny_runs import (
    assert_bit_equal,
    rl_config,
    state_of,
)


def stale(sample, *_):
    """Samples from the parameters of its first call for ever."""
    kept = []

    def sample_from_kept(params, *args):
        kept.append(jax.tree.map(jnp.copy, params))
        return sample(kept[0], *args)

    return sample_from_kept


def warmer(_, model, data, tokenizer, sampling, *rest):
    return MAKE_SAMPLER(model, data, tokenizer, Sampling(1.3 * sampling.temperature), *rest)


def misplaced(sample, *_):
    """Log-probs of each row handed to the next."""

    def sample_misplaced(*args):
        rollout = sample(*args)
        return rollout.replace(logp_BC=jnp.roll(rollout.logp_BC, 1, axis=0))

    return sample_misplaced


MAKE_SAMPLER = steps.sampler_of


MODES = {
    "sampler": {},
    "learner": {"old_logps": "learner"},
    "bfloat16": {"model.dtype": "bfloat16"},
    "bfloat16, learner": {"model.dtype": "bfloat16", "old_logps": "learner"},
}
ALWAYS = {(stale, "learner"), (warmer, "learner"), (misplaced, "sampler")}


@pytest.mark.parametrize(
    ("fault", "stops_at", "changes"),
    [
        pytest.param(
            fault,
            stops_at,
            changes,
            id=f"{fault.__name__}-{mode}",
            marks=() if (fault, mode) in ALWAYS else pytest.mark.slow,
        )
        for fault, stops_at in ((stale, 1), (warmer, 0), (misplaced, 0))
        for mode, changes in MODES.items()
    ],
)
def test_an_old_policy_that_is_not_the_one_that_sampled_stops_the_run(
    folder, tmp_path, monkeypatch, fault, stops_at, changes
):
    # Catches a check that compares the learner with itself, one that runs before the first update only of the whole
    # run, and a bound for bfloat16 that weights one rollout old stay below.
    replace_sampler(monkeypatch, fault)
    with pytest.raises(
        UserError, match=f"rollout {stops_at}: before the first update sampler and learner differ by .*stale"
    ) as error:
        rl.train(build.rl_plan(rl_config(folder, **FAST | changes)), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == stops_at
    assert ("the last good checkpoint is step 1" in str(error.value)) == (stops_at == 1)


@pytest.mark.parametrize("changes", [{}, {"old_logps": "learner"}], ids=["sampler", "learner"])
def test_a_tolerance_of_zero_allows_no_rounding(folder, tmp_path, monkeypatch, changes):
    # Catches 0 taken for "not set".
    def rounded(sample, *_):
        def sample_rounded(*args):
            rollout = sample(*args)
            return rollout.replace(logp_BC=rollout.logp_BC * (1 + 1e-6))

        return sample_rounded

    replace_sampler(monkeypatch, rounded)
    plan = build.rl_plan(rl_config(folder, check_tolerance=0.0, **FAST | changes))
    with pytest.raises(UserError, match=r"rollout 0: .*which is above check_tolerance=0;"):
        rl.train(plan, tmp_path / "run")
    rl.train(dataclasses.replace(plan, check_tolerance=None), tmp_path / "run")


MICRO = {
    "micro_batch_size": 2,
    "logp_chunk": 4,
    "model.remat": True,
    "model.moe_backend": "blocked",
    "model.num_layers": 2,
}
DENSE = {"model.num_experts": 0, "model.d_ff": 16, "temperature": 0.7, "top_k": 4, "top_p": 0.9, "min_p": 0.02}


@pytest.mark.parametrize("changes", [
    pytest.param(DENSE, id="dense model, cut distribution"),
    pytest.param(MICRO, id="MoE, micro-batches, chunks, remat", marks=pytest.mark.slow),
])  # fmt: skip
def test_log_probs_of_sampler_and_learner_agree(folder, tmp_path, changes, updates, monkeypatch):
    # Catches a temperature or a cut on one side only, positions or masks that differ under left padding, and a dense
    # model that breaks on the routes it does not have.
    monkeypatch.setattr(
        rl, "make_evaluator", lambda *_, **__: lambda params: ({}, [])
    )  # another sampler, which is not looked at
    rl.train(
        build.rl_plan(rl_config(folder, **{"old_logps": "learner", "num_rollouts": 2, "eval.every": 0} | changes)),
        tmp_path,
    )
    for done in updates:
        assert all(0 <= float(step["sampler/abs_max"]) < 1e-4 for step in done)
        assert float(done[0]["log_ratio/abs_max"]) < 1e-5
    assert len(updates) == 2


def test_a_kl_term_holds_a_reference_that_starts_equal_and_stays(folder, tmp_path, updates):
    # Catches a reference that shares the policy's buffers or follows it unasked, and a KL that is not 0 against an
    # equal policy.
    config = rl_config(folder, **FAST | {"objective.beta": 0.1})
    rl.train(build.rl_plan(config), tmp_path)
    run = rl.prepare(build.rl_plan(config))
    initial = initial_state(build.rl_plan(config), run.steps.start)
    _, state = state_of(config, tmp_path)
    assert_bit_equal(state.ref_params, initial.params)
    assert abs(float(updates[0][0]["kl"])) < 1e-6 < 1e-4 < float(updates[1][-1]["kl"])
    assert (
        max(
            float(jnp.abs(a - b).max())
            for a, b in zip(*map(jax.tree.leaves, (state.params, initial.params)), strict=True)
        )
        > 0.01
    )


def watch_states(monkeypatch):
    """The states in which the rollouts of a test begin their updates, on the host."""
    seen, update = [], rl.update

    def watched(steps, state, *rest, **more):
        seen.append(jax.tree.map(np.array, state))
        return update(steps, state, *rest, **more)

    monkeypatch.setattr(rl, "update", watched)
    return seen


def test_the_reference_follows_the_policy_at_the_rollouts_that_were_asked_for_and_by_the_share(
    folder, tmp_path, monkeypatch
):
    # Catches a reference that follows at every rollout whatever the period, one rollout early or late, or by 1 - α.
    seen = watch_states(monkeypatch)
    changes = {"num_rollouts": 5, "objective.beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 3}
    rl.train(build.rl_plan(rl_config(folder, ref_model_mixup_alpha=0.25, **FAST | changes)), tmp_path)
    first = seen[0].params
    for state in seen[:3]:
        assert_bit_equal(state.ref_params, first)
    mixed = jax.tree.map(lambda p, r: 0.25 * p + 0.75 * r, seen[3].params, first)
    for state in seen[3:]:
        jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-6), state.ref_params, mixed)
    assert np.abs(seen[3].params["embedding"] - first["embedding"]).max() > 0.01


def test_a_sampler_that_lags_two_rollouts_behind_has_the_parameters_of_two_rollouts_ago(folder, tmp_path, monkeypatch):
    # Catches a shift after the updates instead of before them, and a lag of one or three.
    seen, drawn = watch_states(monkeypatch), []

    def recording(sample, *_):
        def sample_recorded(params, *args):
            drawn.append(np.array(params["embedding"]))
            return sample(params, *args)

        return sample_recorded

    replace_sampler(monkeypatch, recording)
    changes = {"num_rollouts": 5, "old_logps": "learner", "mismatch.stale_rollouts": 2}
    rl.train(build.rl_plan(rl_config(folder, **FAST | changes)), tmp_path)
    policies = [state.params["embedding"] for state in seen]
    assert len({policy.tobytes() for policy in policies}) == 5
    for rollout in range(5):
        np.testing.assert_array_equal(drawn[rollout], policies[max(rollout - 2, 0)])


def shifted_routes(sample, *_):
    """Recorded experts that are not those that ran."""

    def sample_shifted(*args):
        rollout = sample(*args)
        routes = rollout.routes_LBTX
        return rollout.replace(routes_LBTX=jnp.where(routes >= 0, (routes + 1) % 4, routes))

    return sample_shifted


REPLAY = FAST | {"num_rollouts": 1, "updates_per_rollout": 2}


@pytest.mark.parametrize("mode", ["R2", "R3"])
def test_routing_replay_runs_and_its_drift_is_that_of_the_free_choices(folder, tmp_path, mode, updates):
    # Catches replay that breaks the first-minibatch check, and a drift measured on replayed routes (0 by construction).
    rl.train(build.rl_plan(rl_config(folder, **REPLAY | {"router_replay.mode": mode})), tmp_path)
    assert float(updates[0][0]["log_ratio/abs_max"]) < 1e-5
    assert float(updates[0][0]["routing/experts_changed"]) == 0 < float(updates[0][1]["routing/experts_changed"])


def test_R3_runs_the_experts_that_the_sampler_recorded(folder, tmp_path, monkeypatch):
    # Catches a replay mode that is read and then ignored: with other experts the log-probs cannot be the sampler's.
    replace_sampler(monkeypatch, shifted_routes)
    with pytest.raises(UserError, match="sampler and learner differ"):
        rl.train(build.rl_plan(rl_config(folder, **REPLAY | {"router_replay.mode": "R3"})), tmp_path)


@pytest.mark.parametrize(
    "changes", [REPLAY | {"router_replay.mode": "R2"}, {"num_rollouts": 1}], ids=["R2", "free routing"]
)
def test_R2_and_free_routing_do_not_run_what_the_sampler_recorded(folder, tmp_path, monkeypatch, updates, changes):
    # Catches R2 as another name for R3, and free routing that replays; R2 compares with the learner's own routes, free
    # routing with the sampler's.
    replace_sampler(monkeypatch, shifted_routes)
    rl.train(build.rl_plan(rl_config(folder, **changes)), tmp_path)
    assert float(updates[0][0]["log_ratio/abs_max"]) < 1e-5
    changed = float(updates[0][0]["routing/experts_changed"])
    assert changed == 0 if "router_replay.mode" in changes else changed > 0.3
