"""The loop: what a rollout's updates share, where its noise comes from, what the log says, on what devices it runs."""

import re

import jax
import numpy as np
import pytest

from gspo import build, rl
from gspo.masked import Last, Max, Mean, Min, over_updates
from gspo.run.writers import read_jsonl
from gspo.steps import initial_state
from tests.rl.runs import FAST, RESULTS, completions, replace_sampler, watch_updates
from tests.tiny_runs import (
    assert_bit_equal,
    rl_config,
    state_of,
)


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
    assert evals[0] == evals[1] == evals[2] and len(evals[0]) == 8
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


@pytest.mark.slow
def test_rows_decoded_some_at_a_time_train_the_same_policy(folder, tmp_path, monkeypatch):
    # Catches a field that ends in the plan, and rows, old log-probs, routes or ends that are others than those of all
    # rows at once.
    changes = FAST | {"num_rollouts": 1, "eval.every": 1, "router_replay.mode": "R3"}
    draws = []
    replace_sampler(monkeypatch, lambda sample, *_: lambda *args: (draws.append(sample(*args)), draws[-1])[1])
    for name, slots in (("all", 0), ("some", 3)):
        rl.train(build.rl_plan(rl_config(folder, max_num_seqs=slots, **changes)), tmp_path / name)
    passes = [int(rollout.decode_steps) for rollout in draws]  # of a rollout between two evaluations, twice
    assert (
        len(passes) == 6 and max(passes[:3]) <= 6 and all(x >= 2 * y for x, y in zip(passes[3:], passes, strict=False))
    )
    whole, some = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("all", "some"))
    for expected, line in zip(whole, some, strict=True):
        assert line.keys() == expected.keys()
        for field, value in expected.items():
            np.testing.assert_allclose(line[field], value, rtol=1e-3, atol=1e-5, err_msg=field)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["R2", "R3"])
def test_replay_and_router_metrics_hold_for_sigmoid_routers_shared_experts_and_dense_layers(folder, tmp_path, mode):
    # Catches routes that are counted over all layers where only some have a router, a drift that is not measured on
    # free choices, a bias that an update moves.
    changes = FAST | {
        "model.num_layers": 3, "model.dense_layers": (1,), "model.d_ff": 8, "model.router": "sigmoid",
        "model.routed_scale": 2.5, "model.d_shared": 8, "model.shared_gate": True, "model.qkv_bias": True,
        "router_replay.mode": mode, "router_aux_loss_coef": 0.01, "log.router_kl": True, "checkpoint.every": 2,
        "optimizer.weight_decay": 0.1,
    }  # fmt: skip
    config = rl_config(folder, **changes)
    rl.train(build.rl_plan(config), tmp_path / mode)
    lines = read_jsonl(tmp_path / mode / "metrics.jsonl")[:2]
    for line in lines:
        assert line["log_ratio/first_abs_max"] < 1e-5 < line["log_ratio/abs_max"]
        assert line["routing/experts_changed"] > 0 and line["routing/kl"] > 0 and line["routing/margin"] > 0
        assert len(line["routing/load_cv_by_layer"]) == len(line["routing/kl_by_layer"]) == 2
    trained, before = (
        state_of(config, tmp_path / mode)[1].params,
        initial_state(build.rl_plan(config), rl.prepare(build.rl_plan(config)).steps.start).params,
    )
    moved = jax.tree.map(lambda x, y: bool((np.asarray(x) != np.asarray(y)).any()), trained, before)
    assert not moved["blocks"]["moe"]["selection"]["bias"]
    assert moved["blocks"]["moe"]["router"] and moved["blocks"]["shared"]["up"] and moved["dense_blocks"]["mlp"]["up"]
    assert moved["blocks"]["attention"]["query_bias"]["bias"] and moved["blocks"]["shared_gate"]


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
    changes |= {"num_rollouts": 1, "updates_per_rollout": 1, "scale_rewards": "group"}
    config = rl_config(folder, **FAST | changes)
    rl.train(build.rl_plan(config), tmp_path)
    critic = state_of(config, tmp_path)[1].critic
    np.testing.assert_allclose(np.abs(critic.params["value"]), 0.025, rtol=1e-4)


def test_without_a_kl_term_no_reference_is_held(folder, plain):
    # Catches a third tree of parameters that nothing reads.
    _, state = state_of(rl_config(folder), plain)
    assert state.ref_params is None and "kl" not in read_jsonl(plain / "metrics.jsonl")[0]


def test_the_first_lines_of_the_log_say_what_runs(plain):
    # Catches a clip range or a number of updates that one finds out about after the run.
    lines = plain.with_name("plain.log").read_text().splitlines()
    # In float32 Adam's two moments are twice the size of the policy; its two counts are of 4 bytes.
    policy, optimizer, together = (float(re.split(r"  +", line)[-1].split()[0]) for line in lines[2:5])
    assert lines[1] == "RL: held on each device:" and [line.split()[1] for line in lines[2:5]] == [
        "policy", "optimizer", "together",
    ]  # fmt: skip
    assert optimizer == pytest.approx(2 * policy, abs=0.2) and together == pytest.approx(3 * policy, abs=0.3)
    del lines[1:5]
    assert re.fullmatch(
        r"RL: MoE model, 1 layers, 4 experts of which 2 run, [\d,]+ parameters, [\d,]+ active", lines[0]
    )
    assert "2 updates per rollout of 4 x 4 completions" in lines[1] and "ratio of the sequence" in lines[1]
    assert "[1 - 0.0003, 1 + 0.0004]" in lines[1]
    assert lines[2].startswith("RL: evaluation reads training examples: task.eval_split='train'")
    assert lines[3] == "RL: evaluation counts what exact_match gives 1 as solved"
    assert lines[4].startswith("RL 1/3") and not any("warning" in line for line in lines)


@pytest.mark.parametrize(("preset", "words"), [
    ("gspo", "surrogate clip, clip range [1 - 0.0003, 1 + 0.0004], seq-mean-token-mean"),
    ("cispo", "surrogate cispo, clip range [1 - 1, 1 + 4], token-mean"),
    ("gmpo", "surrogate gmpo, clip range [-0.4, 0.4] of the log-ratio, seq-mean-token-mean"),
    ("rspo", "surrogate gmpo, clip range [-0.4, 0.4] of the log-ratio, seq-mean-token-mean"),
    ("sapo", "surrogate sapo, seq-mean-token-mean"), ("reinforce", "surrogate reinforce, seq-mean-token-sum"),
])  # fmt: skip
def test_the_log_tells_the_clip_range_that_the_surrogate_has(folder, preset, words):
    # Catches a range told of an objective that clips nothing, and one of log-ratios told as one of ratios.
    told = rl._describe_updates(build.rl_plan(rl_config(folder, **{"objective.preset": preset})))
    assert told.endswith(f", {words}")


@pytest.mark.parametrize(("changes", "words"), [
    ({"objective.epsilon": 0.2, "objective.epsilon_high": 0.27}, "objective.epsilon is 0.2/0.27, a value for token "
                                                                 "ratios"),
    ({"updates_per_rollout": 1}, "GRPO and GSPO are the same algorithm"),
    ({"objective.preset": "grpo", "objective.epsilon": 3e-4}, "nearly everything will be clipped"),
    ({"model.dtype": "bfloat16"}, "by more than the clip range [1 - 0.0003, 1 + 0.0004] of a sequence; set "
                                  "old_logps='learner'"),
])  # fmt: skip
def test_settings_that_are_probably_not_meant_are_warned_about(folder, changes, words):
    # Catches ε left at 0.2 for GSPO, one update per rollout, and GSPO's ε on token ratios, all unnoticed.
    (warning,) = [
        note for note in rl.prepare(build.rl_plan(rl_config(folder, **changes))).notes if note.startswith("warning")
    ]
    assert words in warning


@pytest.mark.parametrize("changes", [
    {"old_logps": "learner"}, {"objective.preset": "grpo"}, {"objective.surrogate": "sapo"},
    {"objective.epsilon": 0.02, "objective.epsilon_high": 0.03},
])  # fmt: skip
def test_bfloat16_is_warned_about_only_where_rounding_meets_a_narrow_range(folder, changes):
    # Catches a warning that is always there, which nobody reads.
    notes = rl.prepare(build.rl_plan(rl_config(folder, **{"model.dtype": "bfloat16"} | changes))).notes
    assert not [note for note in notes if "round differently" in note]


def test_dropped_prompts_are_counted_in_the_log(folder):
    # Catches prompts that vanish without a word.
    config = rl_config(folder, max_prompt_length=3, overlong_prompts="drop")
    assert "8 prompts longer than max_prompt_length=3 tokens were dropped" in rl.prepare(build.rl_plan(config)).notes


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
