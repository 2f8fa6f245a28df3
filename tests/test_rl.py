"""The loop: what a rollout's updates share, what stops a run, and that a killed run ends like one never killed."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo import build, rl, steps
from gspo.masked import Last, Max, Mean, Min, over_updates, values
from gspo.model.distribution import Sampling
from gspo.run.writers import read_jsonl
from gspo.steps import initial_state
from gspo.types import UserError
from tests.tiny_runs import (  # noqa: F401
    ROOT,
    assert_bit_equal,
    contents,
    kept_compiles,
    patch_samplers,
    rl_config,
    state_of,
    stateful_config,
)

RESULTS = ("metrics.jsonl", "samples.jsonl")  # what is a function of the seed


@pytest.fixture(autouse=True, scope="module")
def parts_made_once():
    """Runs of one config share their jitted steps; tracing them anew would be most of the time. They hold no state of a
    run: if they did, the resumed runs below would differ from the unbroken one."""
    made, prepare = {}, rl.prepare

    def prepare_once(plan, *tokenizer):
        key = (
            json.dumps(plan.written, sort_keys=True),
            steps.sampler_of,
            rl.make_steps,
            rl.Collector,
            rl.make_evaluator,
        )  # what the tests replace
        if key not in made:
            made[key] = prepare(plan, *tokenizer)
        return made[key]._replace(notes=list(made[key].notes))

    rl.prepare = prepare_once
    yield
    rl.prepare = prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rl")


@pytest.fixture(scope="module")
def plain(folder):
    """A run of the default kind, for the tests that only look at one: its workdir, and beside it plain.log."""
    with contextlib.redirect_stdout(io.StringIO()) as log:
        rl.train(build.rl_plan(rl_config(folder)), folder / "plain")
    (folder / "plain.log").write_text(log.getvalue())
    return folder / "plain"


@pytest.fixture
def copy(plain, tmp_path):
    """A copy of it that may be changed."""
    return Path(shutil.copytree(plain, tmp_path / "copy"))


@pytest.fixture
def updates(monkeypatch):
    """The metrics of every update of the runs in a test, one list per rollout."""
    seen, reduce = [], rl.update_metrics
    monkeypatch.setattr(
        rl, "update_metrics", lambda steps: (seen.append([values(step) for step in steps]), reduce(steps))[1]
    )
    return seen


def replace_sampler(monkeypatch, wrap):
    """Every sampler of the test is wrap(sampler, model, data plan, tokenizer, sampling, num_generations)."""
    make = steps.sampler_of
    patch_samplers(monkeypatch, lambda *args: wrap(make(*args), *args))


def watch_updates(monkeypatch, before):
    """before(batch, part) is called at every update, with the minibatch and the rollout's whole batch."""
    make = rl.make_steps

    def made(*args):
        steps, whole = make(*args), []

        def minibatches(batch):
            whole[:] = [batch]
            return steps.minibatches(batch)

        def train_step(state, part):
            before(whole[0], part)
            return steps.train_step(state, part)

        return steps._replace(minibatches=minibatches, train_step=train_step)

    monkeypatch.setattr(rl, "make_steps", made)


def completions(workdir):
    """[rollout][row] texts, where the run logged all rows."""
    samples = read_jsonl(workdir / "samples.jsonl")
    return [[s["completion"] for s in samples if s["step"] == step] for step in sorted({s["step"] for s in samples})]


# ---------------------------------------------------------------------------------------------------- randomness


def test_a_seed_repeats_every_byte_and_another_seed_does_not(folder, plain):
    # Catches noise from the clock or from dict order, timings among the metrics, and a seed that nothing reads.
    for seed in (0, 1):
        rl.train(build.rl_plan(rl_config(folder, seed=seed)), folder / f"seed{seed}")
    for name in RESULTS:
        assert (folder / "seed0" / name).read_bytes() == (plain / name).read_bytes()
        assert (folder / "seed1" / name).read_bytes() != (plain / name).read_bytes()
    assert_bit_equal(state_of(rl_config(folder), folder / "seed0")[1], state_of(rl_config(folder), plain)[1])


@pytest.fixture(scope="module")
def frozen(folder):
    """Two rollouts of one prompt that no completion is rewarded for: the policy stays, and all that differs is
    noise."""
    config = rl_config(folder, **{
        "rewards": ("hash_answer",), "num_rollouts": 2, "task.options": {"size": 1}, "log.num_samples": 16,
        "eval.every": 1,
    })  # fmt: skip
    rl.train(build.rl_plan(config), folder / "frozen")
    return config, folder / "frozen"


def test_rollouts_groups_and_rows_have_noise_of_their_own(frozen):
    # Catches a key that never advances, or that is shared by all prompts, or by the rows of a group.
    first, second = completions(frozen[1])
    assert len(first) == len(second) == 16 and first != second
    groups = [rollout[g : g + 4] for rollout in (first, second) for g in range(0, 16, 4)]
    assert len({tuple(group) for group in groups}) == 8
    assert all(len(set(group)) > 1 for group in groups)


def test_without_a_difference_in_reward_nothing_moves_and_evaluations_agree(frozen):
    # Catches 0 / 0 in the advantages of equal rewards, evaluation noise that depends on the step, ratios that differ
    # from 1 by more than rounding, and a clip share reported where there is nothing to clip.
    config, workdir = frozen
    lines = read_jsonl(workdir / "metrics.jsonl")
    assert len(lines) == 3
    evals = [{name: value for name, value in line.items() if name.startswith("eval/")} for line in lines]
    assert evals[0] == evals[1] == evals[2] and len(evals[0]) == 5
    for line in lines[:2]:
        assert line["frac_reward_zero_std"] == 1 and line["advantage/abs_max"] == 0 and line["grad_norm/max"] == 0
        assert (
            line["log_ratio/abs_max"] < 1e-5 and line["clip_ratio/tokens"] == 0 and line["routing/experts_changed"] == 0
        )
    run = rl.prepare(build.rl_plan(config))
    assert_bit_equal(
        state_of(config, workdir)[1].params,
        initial_state(build.rl_plan(config), run.steps.start).params,
    )


# ---------------------------------------------------------------------------- several updates per rollout

FAST = {
    "updates_per_rollout": 4,
    "scale_rewards": "reinforce++",
    "optimizer.learning_rate": 0.05,
    "num_rollouts": 2,
    "eval.every": 0,
}


def test_all_minibatches_of_a_rollout_share_its_old_log_probs_and_move_away_from_them(folder, updates, monkeypatch):
    # Catches a rollout redone for each minibatch, old log-probs recomputed after each update (the ratio is then always
    # 1), rows used twice or left out, a clip that never acts, and rollouts that all take the same prompts.
    draws, cuts = [], []
    watch_updates(monkeypatch, lambda batch, part: cuts.append((batch, part)))
    replace_sampler(monkeypatch, lambda sample, *_: lambda *args: (draws.append(sample(*args)), draws[-1])[1])
    config = rl_config(folder, **FAST)
    rl.train(build.rl_plan(config), folder / "fast")
    drawn = draws[:2]
    assert len(draws) == 3  # the third is the evaluation at the end
    assert (
        len({tuple(row[:4].tolist()) for rollout in drawn for row in rollout.tokens_BT}) == 8
    )  # of the 14 in an epoch
    for rollout in range(2):
        wholes, parts = zip(*cuts[4 * rollout : 4 * rollout + 4], strict=True)
        assert len({id(whole) for whole in wholes}) == 1
        for read in (lambda batch: batch.inputs.old_logp_BC, lambda batch: batch.tokens_BT):
            np.testing.assert_array_equal(np.concatenate([read(part) for part in parts]), read(wholes[0]))
        np.testing.assert_array_equal(wholes[0].inputs.old_logp_BC, drawn[rollout].logp_BC)
        gaps = [float(step["log_ratio/abs_max"]) for step in updates[rollout]]
        assert gaps[0] < 1e-5 and min(gaps[1:]) > 1e-3
        assert updates[rollout][0]["clip_ratio/tokens"] == 0
    lines = read_jsonl(folder / "fast" / "metrics.jsonl")
    assert max(line["clip_ratio/tokens"] for line in lines[:2]) > 0.1
    assert lines[0]["log_ratio/first_abs_max"] < 1e-5 < lines[0]["log_ratio/abs_max"]


def test_the_metrics_of_a_rollout_sum_up_its_updates(updates):
    # Catches a mean of means (the updates hold 1, 2 and 5 rows), a mean of maxima, a minimum that is averaged, drift
    # per update taken from the first minibatch (always 0).
    def step(rows, loss, norm, largest, smallest, gap, changed):
        return {
            "loss": Mean(np.float32(rows * loss), np.float32(rows)), "grad_norm": over_updates(norm),
            "ratio/max": Max(largest), "ratio/min": Min(smallest), "log_ratio/abs_max": Max(gap),
            "routing/experts_changed": Last(changed),
            "routing/experts_changed_by_layer": Last(np.array([changed, 0.0])),
        }  # fmt: skip

    steps = [step(1, 1.0, 2.0, 1.1, 0.9, 0.0, 0.0), step(2, 2.0, 5.0, 1.4, 0.8, 0.3, 0.2)]
    steps.append(step(5, 6.0, 2.0, 1.2, 0.7, 0.1, 0.5))
    line = rl.update_metrics(jax.device_get(steps))
    assert line.pop("routing/experts_changed_by_layer") == [0.5, 0.0]
    assert line == pytest.approx({
        "loss": 35 / 8, "grad_norm": 3.0, "grad_norm/max": 5.0, "ratio/max": 1.4, "ratio/min": 0.7,
        "log_ratio/abs_max": 0.3, "log_ratio/first_abs_max": 0.0, "routing/experts_changed": 0.5,
        "routing/experts_changed_per_update": 0.2,
    }, rel=1e-6)  # fmt: skip


# ---------------------------------------------------------------------------- the check of the old policy


def stale(sample, *_):
    """Samples from the parameters of its first call for ever."""
    kept = []

    def sample_from_kept(params, *args):
        kept.append(jax.tree.map(jnp.copy, params))
        return sample(kept[0], *args)

    return sample_from_kept


def warmer(_, model, data, tokenizer, sampling, num_generations):
    return MAKE_SAMPLER(model, data, tokenizer, Sampling(1.3 * sampling.temperature), num_generations)


def misplaced(sample, *_):
    """Log-probs of each row handed to the next."""

    def sample_misplaced(*args):
        rollout = sample(*args)
        return rollout.replace(logp_BC=jnp.roll(rollout.logp_BC, 1, axis=0))

    return sample_misplaced


MAKE_SAMPLER = steps.sampler_of


@pytest.mark.parametrize("changes", [
    {}, {"old_logps": "learner"}, {"model.dtype": "bfloat16"}, {"model.dtype": "bfloat16", "old_logps": "learner"},
], ids=["sampler", "learner", "bfloat16", "bfloat16, learner"])  # fmt: skip
@pytest.mark.parametrize(("fault", "stops_at"), [(stale, 1), (warmer, 0), (misplaced, 0)])
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


# ---------------------------------------------------------------------------------------------------- reference policy


def test_a_kl_term_holds_a_reference_that_starts_equal_and_stays(folder, tmp_path, updates):
    # Catches a reference that shares the policy's buffers or follows it unasked, and a KL that is not 0 against an
    # equal policy.
    config = stateful_config(folder, sync_ref_model=False)
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

    def watched(steps, state, batch):
        seen.append(jax.tree.map(np.array, state))
        return update(steps, state, batch)

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


def test_tokens_per_second_are_what_was_generated_over_the_time_that_it_took(plain):
    # Catches a rate that leaves out a phase, or counts the padding.
    lines, timings = (read_jsonl(plain / name) for name in ("metrics.jsonl", "timings.jsonl"))
    assert len(timings) == 3
    for line, times in zip(lines, timings, strict=False):
        seconds = times["rollout"] + times["reward"] + times["old_logps"] + times["update"]
        assert times["tokens_per_second"] == pytest.approx(line["num_tokens"] / seconds)


def test_the_critic_has_the_optimizer_of_the_run_with_a_learning_rate_of_its_own(folder, tmp_path):
    # Catches a critic without the warm-up of the run: Adam's first step is its learning rate, here a quarter of 0.1.
    changes = {"critic.enable": True, "critic.learning_rate": 0.1, "optimizer.warmup_steps": 4, "optimizer.eps": 1e-30}
    config = rl_config(folder, **FAST | changes | {"num_rollouts": 1, "updates_per_rollout": 1})
    rl.train(build.rl_plan(config), tmp_path)
    critic = state_of(config, tmp_path)[1].critic
    np.testing.assert_allclose(np.abs(critic.params["value"]), 0.025, rtol=1e-4)


def test_without_a_kl_term_no_reference_is_held(folder, plain):
    # Catches a third tree of parameters that nothing reads.
    _, state = state_of(rl_config(folder), plain)
    assert state.ref_params is None and "kl" not in read_jsonl(plain / "metrics.jsonl")[0]


# ---------------------------------------------------------------------------------------------------- routing replay


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


# ---------------------------------------------------------------------------------------------------- what the log says


def test_the_first_lines_of_the_log_say_what_runs(plain):
    # Catches a clip range or a number of updates that one finds out about after the run.
    lines = plain.with_name("plain.log").read_text().splitlines()
    assert re.fullmatch(
        r"RL: MoE model, 1 layers, 4 experts of which 2 run, [\d,]+ parameters, [\d,]+ active", lines[0]
    )
    assert "2 updates per rollout of 4 x 4 completions" in lines[1] and "ratio of the sequence" in lines[1]
    assert "[1 - 0.0003, 1 + 0.0004]" in lines[1]
    assert lines[2].startswith("RL: evaluation reads training examples: task.eval_split='train'")
    assert lines[3].startswith("RL 1/3") and not any("warning" in line for line in lines)


@pytest.mark.parametrize(("changes", "words"), [
    ({"objective.epsilon": 0.2, "objective.epsilon_high": 0.27}, "objective.epsilon is 0.2/0.27, a value for token "
                                                                 "ratios"),
    ({"updates_per_rollout": 1}, "GRPO and GSPO are the same algorithm"),
    ({"objective.preset": "grpo", "objective.epsilon": 3e-4}, "nearly everything will be clipped"),
    ({"model.dtype": "bfloat16"}, "by more than the clip range 0.0003/0.0004 of a sequence; set old_logps='learner'"),
])  # fmt: skip
def test_settings_that_are_probably_not_meant_are_warned_about(folder, changes, words):
    # Catches ε left at 0.2 for GSPO, one update per rollout, and GSPO's ε on token ratios, all unnoticed.
    (warning,) = [
        note for note in rl.prepare(build.rl_plan(rl_config(folder, **changes))).notes if note.startswith("warning")
    ]
    assert words in warning


@pytest.mark.parametrize("changes", [
    {"old_logps": "learner"}, {"objective.preset": "grpo"}, {"objective.epsilon": 0.02, "objective.epsilon_high": 0.03},
])  # fmt: skip
def test_bfloat16_is_warned_about_only_where_rounding_meets_a_narrow_range(folder, changes):
    # Catches a warning that is always there, which nobody reads.
    notes = rl.prepare(build.rl_plan(rl_config(folder, **{"model.dtype": "bfloat16"} | changes))).notes
    assert not [note for note in notes if "round differently" in note]


def test_dropped_prompts_are_counted_in_the_log(folder):
    # Catches prompts that vanish without a word.
    config = rl_config(folder, max_prompt_length=3, overlong_prompts="drop")
    assert "8 prompts longer than max_prompt_length=3 tokens were dropped" in rl.prepare(build.rl_plan(config)).notes


# ---------------------------------------------------------------------------------------------------- start and stop


def test_init_from_starts_from_the_parameters_of_another_run(folder, plain, tmp_path):
    # Catches an init_from that is read too late, or that takes the optimizer and the step along.
    config = rl_config(folder, init_from=str(plain), num_rollouts=1, rewards=("hash_answer",))
    rl.train(build.rl_plan(config), tmp_path)
    step, state = state_of(config, tmp_path)
    assert_bit_equal(state.params, state_of(rl_config(folder), plain)[1].params)
    assert step == 1 and int(state.step) == 2


def test_a_finished_run_started_again_changes_nothing(folder, plain):
    # Catches lines written twice, a checkpoint saved anew, one more rollout.
    before = contents(plain)
    line = rl.train(build.rl_plan(rl_config(folder)), plain)
    assert contents(plain) == before
    assert line == {name: value for name, value in read_jsonl(plain / "metrics.jsonl")[-1].items() if name != "step"}


def test_a_failed_start_does_not_claim_the_workdir_for_its_config(folder, tmp_path):
    # Catches a mistyped init_from after which the corrected command is refused, because the config differs from the
    # mistaken one.
    with pytest.raises(UserError, match="no such folder"):
        rl.train(build.rl_plan(rl_config(folder, init_from=str(tmp_path / "nowhere"))), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists() and not any(contents(tmp_path / "run").values())


def test_a_changed_config_is_refused_by_name_and_taken_when_allowed(folder, plain, copy):
    # Catches a run that goes on under other settings without a word, and a flag that does nothing.
    longer = rl_config(folder, num_rollouts=4)
    with pytest.raises(UserError, match="num_rollouts: saved 3, now 4"):
        rl.train(build.rl_plan(longer), copy)
    assert contents(copy) == contents(plain)
    rl.train(build.rl_plan(longer), copy, allow_changed_config=True)
    lines = read_jsonl(copy / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[:3] == read_jsonl(plain / "metrics.jsonl")[:3]


def test_a_checkpoint_of_another_model_stops_the_run_and_nothing_is_touched(folder, plain):
    # Catches a config.json replaced, or metrics cut, by a run that then cannot start.
    before = contents(plain)
    with pytest.raises(UserError, match=r"^model\.d_model=32: the weights in .* were trained with 16"):
        rl.train(build.rl_plan(rl_config(folder, **{"model.d_model": 32})), plain, allow_changed_config=True)
    assert contents(plain) == before


def test_a_truncated_checkpoint_falls_back_to_the_one_before_and_the_run_ends_the_same(folder, plain, copy, caplog):
    # Catches a run that starts from scratch over a damaged checkpoint, or that goes on with damaged arrays.
    largest = max(
        (path for path in (copy / "checkpoints" / "3").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    largest.write_bytes(largest.read_bytes()[:-10])
    rl.train(build.rl_plan(rl_config(folder)), copy)
    assert any("falling back to step 2" in record.getMessage() for record in caplog.records)
    assert (copy / "metrics.jsonl").read_bytes() == (plain / "metrics.jsonl").read_bytes()
    assert_bit_equal(state_of(rl_config(folder), copy)[1], state_of(rl_config(folder), plain)[1])


@pytest.mark.parametrize(("seen", "message"), [
    (True, "rollout 1, update 0: loss or gradient is not finite; the last good checkpoint is step 1; lower "
           "optimizer.learning_rate"),
    (False, "step 2: params/[a-z/]+ is not finite; nothing was saved; the last good checkpoint is step 1"),
], ids=["in the loss", "in the parameters alone"])  # fmt: skip
def test_NaN_stops_the_run_and_the_last_good_checkpoint_is_kept(folder, tmp_path, monkeypatch, seen, message):
    # Catches NaN parameters saved over good ones, also where the last update of a rollout made them and no loss has
    # shown it yet.
    class Poisoned(rl.Collector):
        def __call__(self, state, cursor, *args):
            experience = super().__call__(state, cursor, *args)
            batch = experience.batch
            advantages_BC = batch.inputs.advantages_BC * (jnp.nan if cursor else 1.0)
            return experience._replace(batch=batch.replace(inputs=batch.inputs.replace(advantages_BC=advantages_BC)))

    monkeypatch.setattr(rl, "Collector", Poisoned)
    if not seen:
        monkeypatch.setattr(rl, "guard", lambda *_: None)
    with pytest.raises(UserError, match=message):
        rl.train(build.rl_plan(rl_config(folder)), tmp_path)
    step, state = state_of(rl_config(folder), tmp_path)
    assert step == 1 and all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state))
    assert os.listdir(tmp_path / "checkpoints") == ["1"]


# ---------------------------------------------------------------------------- killed and resumed


@pytest.fixture(scope="module")
def unbroken(folder):
    """The run that the killed ones are compared with; on the way, its compilations are kept for them."""
    rl.train(build.rl_plan(stateful_config(folder)), folder / "unbroken")
    return folder / "unbroken"


def assert_ends_like(folder, workdir, unbroken):
    for name in RESULTS:
        assert (workdir / name).read_bytes() == (unbroken / name).read_bytes(), name
    (step, state), (want_step, want) = (state_of(stateful_config(folder), path) for path in (workdir, unbroken))
    assert step == want_step == 4
    assert_bit_equal(state, want)


def test_the_unbroken_run_moves_all_that_it_carries(folder, unbroken):
    # Catches a comparison of runs that would agree because nothing in them ever changes.
    run = rl.prepare(build.rl_plan(stateful_config(folder)))
    _, state = state_of(stateful_config(folder), unbroken)
    fresh = initial_state(build.rl_plan(stateful_config(folder)), run.steps.start)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), state, fresh)))
    assert state.ref_params is not None and state.entropy_coef is not None
    lines = read_jsonl(unbroken / "metrics.jsonl")
    assert (
        len({line["filter_groups/draws"] for line in lines[:4]}) > 1
    )  # so that the data position is no function of the step


VICTIM = '''
"""Runs `stateful_config` and dies at a place: python victim.py PLACE FOLDER WORKDIR"""
import os, signal, sys, time
from pathlib import Path

import orbax.checkpoint as ocp

from gspo import build, evaluate, rl, steps
from gspo.run import checkpoint
from tests.tiny_runs import stateful_config

place, folder, workdir = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
count = {}


def die_at(call, name):
    count[name] = count.get(name, 0) + 1
    if place == name and count[name] == call:
        while place == "minibatch" and not (workdir / "checkpoints" / "2" / "SEAL.0").exists():
            time.sleep(0.01)  # so that one of the victims leaves a checkpoint to go on from
        os.kill(os.getpid(), signal.SIGKILL)


def hook(owner, attribute, call, name):
    function = getattr(owner, attribute)

    def hooked(*args, **kwargs):
        die_at(call, name)
        return function(*args, **kwargs)

    setattr(owner, attribute, hooked)


def sampler_that_dies(make):
    def make_hooked(*args):
        sample = make(*args)

        def hooked(*args):
            result = sample(*args)  # the device works on: jax returns before it has finished
            if count.get("collect") == 2:
                die_at(1, "rollout")
            return result

        return hooked

    return make_hooked


hook(rl.Collector, "__call__", 0, "collect")
steps.sampler_of = evaluate.sampler_of = sampler_that_dies(steps.sampler_of)  # in the second rollout
make_steps = rl.make_steps


def steps_that_die(*args):
    steps = make_steps(*args)

    def train_step(state, part):
        die_at(8, "minibatch")  # before the second update of the fourth rollout
        return steps.train_step(state, part)

    return steps._replace(train_step=train_step)


rl.make_steps = steps_that_die
# "save": the arrays of the second checkpoint are written, nothing is in place.
hook(ocp.PyTreeCheckpointHandler, "finalize", 2, "save")
hook(checkpoint, "write_seal", 1, "seal")  # the first checkpoint is complete, its seal is not written
rl.train(build.rl_plan(stateful_config(folder)), workdir)
'''


LEFT = {"rollout": set(), "minibatch": {"2"}, "save": {"2"}, "seal": {"2"}}  # complete checkpoints


@pytest.mark.parametrize("places", [
    ("rollout", "minibatch", "save"), pytest.param(("seal",), marks=pytest.mark.slow),
], ids=str)  # fmt: skip
def test_a_run_killed_anywhere_and_resumed_ends_bit_equal_to_one_never_killed(folder, unbroken, tmp_path, places):
    # Catches a lost optimizer, reference, bonus, key or data position; lines of metrics or samples twice or never; half
    # a checkpoint taken for a whole one.
    (tmp_path / "victim.py").write_text(VICTIM)
    victims = [
        subprocess.Popen(
            [sys.executable, tmp_path / "victim.py", place, folder, tmp_path / place], cwd=ROOT, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for place in places
    ]  # fmt: skip
    for place, victim in zip(places, victims, strict=True):
        _, stderr = victim.communicate()
        assert victim.returncode == -signal.SIGKILL, (place, stderr)
    for place in places:
        assert {name for name in os.listdir(tmp_path / place / "checkpoints") if name.isdecimal()} == LEFT[place]
        assert (tmp_path / place / "checkpoints" / "2" / "SEAL.0").exists() == (place in ("minibatch", "save"))
        rl.train(build.rl_plan(stateful_config(folder)), tmp_path / place)
        assert_ends_like(folder, tmp_path / place, unbroken)


def test_SIGTERM_saves_says_so_and_leaves_and_the_resumed_run_ends_the_same(
    folder, unbroken, tmp_path, monkeypatch, capsys
):
    # Catches a preempted job that loses its work since the last checkpoint, that leaves between two updates of a
    # rollout, or that a scheduler takes for a success.
    cuts = []

    def terminated_at_the_fifth(_, part):
        cuts.append(part)
        if len(cuts) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    watch_updates(monkeypatch, terminated_at_the_fifth)
    with pytest.raises(SystemExit) as stopped:
        rl.train(build.rl_plan(stateful_config(folder)), tmp_path)
    assert stopped.value.code == 143 and len(cuts) == 6
    assert f"stopped by SIGTERM: saved rollout 3 in {tmp_path}" in capsys.readouterr().err
    assert state_of(stateful_config(folder), tmp_path)[0] == 3
    rl.train(build.rl_plan(stateful_config(folder)), tmp_path)
    assert_ends_like(folder, tmp_path, unbroken)


def test_a_signal_before_the_first_rollout_leaves_what_its_message_says(
    folder, unbroken, tmp_path, monkeypatch, capsys
):
    # Catches "saved rollout 0" where nothing was saved, and Ctrl-C that loses what SIGTERM keeps.
    make = rl.make_evaluator

    def make_interrupted(*args, **kwargs):
        evaluate = make(*args, **kwargs)
        return lambda params: (os.kill(os.getpid(), signal.SIGINT), evaluate(params))[1]

    with monkeypatch.context() as patch:
        patch.setattr(rl, "make_evaluator", make_interrupted)
        with pytest.raises(SystemExit) as stopped:
            rl.train(build.rl_plan(stateful_config(folder)), tmp_path)
    assert stopped.value.code == 130 and "stopped by SIGINT: saved rollout 0" in capsys.readouterr().err
    assert state_of(stateful_config(folder), tmp_path)[0] == 0
    rl.train(build.rl_plan(stateful_config(folder)), tmp_path)
    assert_ends_like(folder, tmp_path, unbroken)


# ---------------------------------------------------------------------------------------------------- several devices


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [{"mesh.data": 2, "mesh.fsdp": 2}, {"mesh.data": 2, "mesh.expert": 2}, {"mesh.tensor": 2}], ids=str
)
def test_a_run_on_several_devices_is_the_run_on_one(folder, plain, tmp_path, mesh):
    # Catches rows lost or doubled by the sharding, sums taken per device, noise that depends on the mesh.
    changes = {"mesh.tensor": 1} | mesh | ({"model.num_kv_heads": 2} if "mesh.tensor" in mesh else {})
    rl.train(build.rl_plan(rl_config(folder, **changes)), tmp_path / "many")
    rl.train(
        build.rl_plan(rl_config(folder, **{"model.num_kv_heads": changes.get("model.num_kv_heads", 1)})),
        tmp_path / "one",
    )
    many, one = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("many", "one"))
    for got, want in zip(many, one, strict=True):
        assert got.keys() == want.keys()
        for name in want:
            assert got[name] == pytest.approx(want[name], rel=1e-3, abs=1e-4), (want["step"], name)
