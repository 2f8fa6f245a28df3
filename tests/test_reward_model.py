"""Training on preferences, a reward model and DPO: what is learned, what a stopped run leaves; and a reward model as a
reward of reinforcement learning."""

import jax
import numpy as np
import pytest

from gspo import build, dpo, reward_model, rl, supervised
from gspo.generate import Judged
from gspo.learning.critic import Critic
from gspo.learning.rewards import STATISTICS, CompletionRows, make_reward_fn
from gspo.learning.state import reward_model_start, state_on_mesh
from gspo.model.transformer import abstract_params
from gspo.pairs import agreement, pair_source, wilson
from gspo.reward_source import with_models
from gspo.run.checkpoint import Checkpointer, restore_base, restore_params
from gspo.run.progress import Timer
from gspo.run.stored import read_content, steps_at
from gspo.run.writers import read_jsonl
from gspo.steps import initial_state, optimizer_of
from gspo.types import UserError
from tests.tiny_runs import (  # noqa: F401 - fixtures
    assert_bit_equal,
    command,
    contents,
    dpo_config,
    kept_compiles,
    parts_of,
    reward_model_config,
    rl_config,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pairs")


@pytest.fixture(scope="module")
def trained(folder):
    reward_model.train(build.reward_model_plan(reward_model_config(folder)), folder / "rm")
    return folder / "rm"


def abstract_of(config):
    """(layout, model, state as ShapeDtypeStructs) of a reward model."""
    plan, _, layout, policy = parts_of(config)
    model = Critic(policy.spec, layout)
    return layout, model, reward_model_start(layout, model, optimizer_of(plan.optimizer)[0]).abstract


def assert_ends_like(workdir, other, abstract):
    assert (workdir / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    states = []
    for place in (workdir, other):
        with Checkpointer(place, keep_last=9) as checkpointer:
            states.append(checkpointer.restore(abstract))
    assert_bit_equal(states[0][:2], states[1][:2])
    metas = [{name: value for name, value in meta.items() if name != "offsets"} for _, _, meta in states]
    assert metas[0] == metas[1]


class Death(BaseException):
    pass


def dying(function, call):
    """The function, which raises Death when it has been called so often."""
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(0)
        if len(calls) == call:
            raise Death
        return function(*args, **kwargs)

    return wrapped


# ---------------------------------------------------------------------------- training


def test_a_reward_model_learns_the_preference_and_says_how_sure_that_is(trained):
    # Catches a loss of the wrong sign, an evaluation of the first parameters for ever, or of the training pairs.
    lines = read_jsonl(trained / "metrics.jsonl")
    first, last = lines[0], lines[-1]
    assert [line["step"] for line in lines] == list(range(41))
    assert first["eval/accuracy"] == 0.5 and first["eval/loss"] == pytest.approx(np.log(2))
    assert first["loss"] == pytest.approx(np.log(2)) and first["accuracy"] == 0.5
    assert last["eval/accuracy"] > 0.95 and last["eval/loss"] < 0.2
    assert last["eval/accuracy_low"] < last["eval/accuracy"] <= last["eval/accuracy_high"] <= 1
    assert sum(last["eval/calibration_count"]) == 20


def test_the_log_names_what_was_left_out(folder, trained, capsys):
    # Catches a pair that vanishes without a word.
    reward_model.train(build.reward_model_plan(reward_model_config(folder)), trained)  # which has ended
    assert "reward model: 1 of 57 pairs left out: 1 (pair 56) with equal texts" in capsys.readouterr().out


def test_the_statistics_beside_the_weights_are_those_of_the_training_pairs(folder, trained):
    # Catches statistics of the first parameters, of held-out pairs or of differences.
    config = reward_model_config(folder)
    plan, tokenizer, _, _ = parts_of(config)
    _, model, abstract = abstract_of(config)
    _, params = restore_params(trained, abstract.params)
    source = pair_source(plan.data, "train", tokenizer)
    assert len(source) == 56
    rows = source.batch(0, 56).rows
    frames = CompletionRows(rows.tokens_BT, rows.prompt_lengths_B, rows.completion_lengths_B)
    scores = np.asarray(make_reward_fn(model, completion_width=6)(params, frames))
    found = read_content(trained)["meta"][STATISTICS]
    assert found == {"mean": pytest.approx(scores.mean(), abs=1e-5), "std": pytest.approx(scores.std(), rel=1e-5)}


@pytest.mark.slow
def test_a_killed_training_of_a_reward_model_ends_bit_equal_when_it_is_started_again(
    folder, trained, tmp_path, monkeypatch
):
    # Catches a data position or an optimizer that starts anew, and lines that stand twice.
    plan = build.reward_model_plan(reward_model_config(folder))
    with monkeypatch.context() as patch:
        patch.setattr(reward_model, "make_pairs", dying(reward_model.make_pairs, 33))
        with pytest.raises(Death):
            reward_model.train(plan, tmp_path)
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 32
    reward_model.train(plan, tmp_path)
    assert_ends_like(tmp_path, trained, abstract_of(reward_model_config(folder))[2])


@pytest.mark.slow
def test_a_run_begins_with_the_body_of_a_policy_or_with_a_reward_model(folder, trained, tmp_path):
    # Catches a second stage that starts from random parameters, and a policy's head taken for a score.
    config = dpo_config(folder, num_updates=1)
    dpo.train(build.dpo_plan(config), tmp_path / "policy")
    policy = restore_params(tmp_path / "policy", abstract_params(parts_of(config)[3]))[1]
    held = {}

    def begun(init_from):
        plan = build.reward_model_plan(reward_model_config(folder, num_updates=1, init_from=str(init_from)))
        with pytest.MonkeyPatch.context() as patch:
            real = supervised.open_run

            def watched(*args, **kwargs):
                opened = real(*args, **kwargs)
                held["params"] = jax.device_get(opened.state.params)
                return opened

            patch.setattr(supervised, "open_run", watched)
            reward_model.train(plan, tmp_path / f"from_{init_from.name}")
        return held["params"]

    params = begun(tmp_path / "policy")
    assert_bit_equal(params["body"], {name: jax.device_get(policy[name]) for name in params["body"]})
    assert "head" in policy and "head" not in params["body"] and not params["value"].any()
    assert_bit_equal(begun(trained), jax.device_get(restore_params(trained, abstract_of(config)[2].params)[1]))


def test_a_reward_model_is_not_taken_for_a_policy(folder, trained, tmp_path):
    # Catches weights of which the shapes may fit and the meaning does not.
    dense = {"model.num_experts": 0, "model.d_ff": 16, "init_from": str(trained)}
    with pytest.raises(UserError, match="the weights are those of a reward model, where a policy is wanted"):
        rl.train(build.rl_plan(rl_config(folder, **dense)), tmp_path)


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (build.reward_model_plan, {"micro_batch_size": 3}, "micro_batch_size=3: the two rows of a pair stay together"),
        (build.reward_model_plan, {"micro_batch_size": 6}, "micro_batch_size=6: must divide the 16 rows of a batch"),
        (
            build.reward_model_plan,
            {"center_rewards_coefficient": -1.0},
            "center_rewards_coefficient=-1.0: must be >= 0",
        ),
        (build.reward_model_plan, {"lora.rank": 2}, "lora.rank=2: all weights of a reward model are trained"),
        (
            build.reward_model_plan,
            {"model.num_experts": 4, "router_aux_loss_coef": 0.1},
            "router_aux_loss_coef, router_z_loss_coef: a reward model has no such loss",
        ),
        (build.dpo_plan, {"router_z_loss_coef": 0.1}, "router_aux_loss_coef, router_z_loss_coef: a dense model has no"),
        (build.dpo_plan, {"beta": 0.0}, "beta=0.0: must be positive"),
        (build.dpo_plan, {"label_smoothing": 0.5}, r"label_smoothing=0.5: must be in \[0, 0.5\)"),
    ],
)
def test_numbers_that_cannot_be_are_refused(folder, make, changes, message):
    # Catches a pair cut in two, and settings under which nothing can be learned.
    config_of = reward_model_config if make is build.reward_model_plan else dpo_config
    with pytest.raises(UserError, match=f"^{message}"):
        make(config_of(folder, **changes))


@pytest.mark.parametrize("mesh", [{"mesh.data": 2, "mesh.fsdp": 2}, {"mesh.tensor": 2, "mesh.expert": 2}])
@pytest.mark.slow
def test_a_mesh_trains_the_same_reward_model(folder, trained, tmp_path, mesh):
    # Catches pairs that are cut by the devices, gradients that are not summed, a last layer that is not gathered.
    changes = mesh | {
        "num_updates": 6,
        "micro_batch_size": 8,
        "model.num_kv_heads": 2,
        "optimizer.schedule": "constant",
    }
    lines = []
    for name, sizes in (("one", {}), ("several", mesh)):
        config = reward_model_config(folder, **changes | {"mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": 1} | sizes)
        reward_model.train(build.reward_model_plan(config), tmp_path / name)
        lines.append(read_jsonl(tmp_path / name / "metrics.jsonl"))
    for one, several in zip(*lines, strict=True):
        for name in ("loss", "grad_norm", "eval/accuracy", "eval/loss"):
            if name in one:
                assert several[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


@pytest.mark.slow
def test_the_experiment_leaves_a_table_and_a_figure_of_its_calibration(folder, trained, tmp_path, command):  # noqa: F811
    # Catches a script that dies in its last line.
    path = tmp_path / "config.py"
    path.write_text(
        "from tests.tiny_runs import reward_model_config\n\n\ndef get_config():\n"
        f"    return reward_model_config({str(folder)!r})\n"
    )
    before = contents(trained)
    code, _, stderr = command("reward_model", f"--config={path}", f"--workdir={trained}")  # which has ended
    assert code == 0, stderr
    after = contents(trained)
    assert after.keys() - before.keys() == {"calibration.md", "calibration.png"}
    assert before.items() <= after.items()
    text = after["calibration.md"].decode()
    assert text.startswith("Held-out pair accuracy 1.000, 95% interval [0.839, 1.000], 20 pairs") or "interval" in text
    rows = [line.split(" | ") for line in text.splitlines()[4:]]
    assert sum(int(row[1]) for row in rows) == 20


# ---------------------------------------------------------------------------- what is measured


def test_agreement_is_counted_by_confidence():
    # Catches bins of the difference, a confidence in the chosen text in place of the model's own preference, ties.
    logit = lambda p: np.log(p / (1 - p))  # noqa: E731
    found = agreement(np.array([logit(0.52), -logit(0.54), logit(0.97), logit(0.99), 0.0]))
    assert found["eval/accuracy"] == pytest.approx(3.5 / 5)
    assert found["eval/calibration_count"] == [3, *[0] * 8, 2]
    assert found["eval/calibration_accuracy"] == [pytest.approx(0.5), *[None] * 8, 1.0]
    assert found["eval/calibration_confidence"] == [
        pytest.approx((0.52 + 0.54 + 0.5) / 3),
        *[None] * 8,
        pytest.approx(0.98),
    ]
    assert found["eval/ece"] == pytest.approx((3 * 0.02 + 2 * 0.02) / 5)
    assert found["eval/loss"] == pytest.approx(-np.mean(np.log([0.52, 0.46, 0.97, 0.99, 0.5])))


def test_the_interval_is_wilsons():
    # Catches a normal interval, which is empty at 0 and 1. Values: Wilson's formula, 95%.
    assert wilson(20, 20) == (pytest.approx(0.8389, abs=1e-4), 1.0)
    assert wilson(5, 10) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert wilson(0, 10)[0] == 0.0


# ---------------------------------------------------------------------------- DPO


@pytest.fixture(scope="module")
def preferred(folder):
    dpo.train(build.dpo_plan(dpo_config(folder)), folder / "dpo")
    return folder / "dpo"


def state_of_dpo(config):
    plan, _, layout, model = parts_of(config)
    return state_on_mesh(layout, model, optimizer_of(plan.optimizer)[0], lora=plan.lora, with_ref=True)


@pytest.mark.slow
def test_dpo_moves_the_policy_to_what_was_preferred_and_leaves_the_reference(folder, preferred):
    # Catches a reference that follows, a loss of the wrong sign, a reward that is not measured from the reference.
    lines = read_jsonl(preferred / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(np.log(2), rel=1e-5) and lines[0]["rewards/margins"] == 0
    assert lines[0]["eval/accuracy"] == 0.5 and lines[-1]["eval/accuracy"] > 0.95
    config = dpo_config(folder)
    start = state_of_dpo(config)
    with Checkpointer(preferred, keep_last=9) as checkpointer:
        _, state, _ = checkpointer.restore(start.abstract)
    fresh = initial_state(build.dpo_plan(config), start)
    assert_bit_equal(state.ref_params, fresh.params)


@pytest.mark.slow
def test_a_killed_dpo_ends_bit_equal_when_it_is_started_again(folder, preferred, tmp_path, monkeypatch):
    # Catches a reference that is taken anew from the policy of the checkpoint.
    plan = build.dpo_plan(dpo_config(folder))
    with monkeypatch.context() as patch:
        patch.setattr(dpo, "make_pairs", dying(dpo.make_pairs, 30))
        with pytest.raises(Death):
            dpo.train(plan, tmp_path)
    dpo.train(plan, tmp_path)
    assert_ends_like(tmp_path, preferred, state_of_dpo(dpo_config(folder)).abstract)


@pytest.mark.slow
def test_dpo_trains_adapters_and_its_reference_is_the_base(folder, tmp_path):
    # Catches weights that move, a reference that is not what the run began with, a resume without the base.
    config = dpo_config(folder, **{"lora.rank": 2, "num_updates": 20, "checkpoint.every": 10})
    dpo.train(build.dpo_plan(config), tmp_path)
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert lines[0]["rewards/margins"] == 0 and lines[0]["eval/accuracy"] == 0.5
    assert lines[-1]["eval/accuracy"] > 0.9
    start = state_of_dpo(config)
    with Checkpointer(tmp_path, keep_last=9) as checkpointer:
        _, state, _ = checkpointer.restore(start.abstract.saved)
    fresh = initial_state(build.dpo_plan(config), start)
    assert_bit_equal(state.ref_params, fresh.params)
    assert_bit_equal(restore_base(tmp_path, start.abstract.frozen), fresh.frozen)
    assert dpo.train(build.dpo_plan(config), tmp_path)["eval/loss"] == lines[-1]["eval/loss"]


def test_the_best_checkpoint_of_a_run_on_preferences_is_that_of_the_best_accuracy(trained):
    # Catches a choice by pass@1, which such a run does not measure.
    accuracies = {line["step"]: line.get("eval/accuracy") for line in read_jsonl(trained / "metrics.jsonl")}
    kept = {int(path.name): accuracies[int(path.name)] for path in (trained / "checkpoints").iterdir()}
    (best,) = steps_at(trained.with_name(f"{trained.name}@best"))
    assert len(kept) > 1 and int(best.name) == max(kept, key=lambda step: (kept[step], step))


# ---------------------------------------------------------------------------- in reinforcement learning


def drawn(config):
    """(run, the first draw of its collector)."""
    run = rl.prepare(build.rl_plan(config))
    params = initial_state(build.rl_plan(config), run.steps.start).params
    return run, run.collector.draw(params, 0, jax.random.key(3), Timer())


@pytest.mark.parametrize(
    ("normalize", "clip", "mesh"),
    [
        (True, 0.5, {}),
        (False, 0.0, {}),
        pytest.param(True, 0.0, {"mesh.data": 2, "mesh.fsdp": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_reward_model_is_one_of_the_rewards_of_rl(folder, trained, normalize, clip, mesh):
    # Catches scores of other rows, columns in another order than the names, weights of the neighbour, normalisation by
    # the batch, a clip before it.
    name = f"reward_model:{trained}"
    config = rl_config(folder, **mesh | {
        "rewards": ("numeric_answer", name), "reward_weights": (0.25, 2.0), "micro_batch_size": 4,
        "reward_model.normalize": normalize, "reward_model.clip": clip,
    })  # fmt: skip
    run, judged = drawn(config)
    _, model, abstract = abstract_of(reward_model_config(folder))
    _, params = restore_params(trained, abstract.params)
    rollout = jax.device_get(judged.rollout)
    rows = CompletionRows(rollout.tokens_BT, rollout.prompt_lengths_B, rollout.completion_lengths_B)
    scores = np.asarray(make_reward_fn(model, completion_width=6)(params, rows), np.float64)
    if normalize:
        statistics = read_content(trained)["meta"][STATISTICS]
        scores = (scores - statistics["mean"]) / statistics["std"]
    expected = np.clip(scores, -clip, clip) if clip else scores
    assert np.std(expected) > 0.1 and (not clip or np.any(expected != scores))
    np.testing.assert_allclose(judged.parts_BR[:, 1], expected, rtol=1e-4, atol=1e-5)
    right = [text.strip() == example.answer for text, example in zip(judged.texts, judged.examples, strict=True)]
    assert np.all(judged.parts_BR[right, 0] == 1)
    np.testing.assert_allclose(judged.rewards_B, judged.parts_BR @ [0.25, 2.0], rtol=1e-6)
    assert run.collector.metrics([judged])[f"rewards/{name}"] == pytest.approx(expected.mean(), abs=1e-5)


def test_the_weights_of_rewards_of_both_kinds_are_one_where_none_is_given(folder, trained):
    # Catches a weight that goes to the neighbour once the models are taken out, and a model that counts as a failure.
    name = f"reward_model:{trained}"
    plan = build.rl_plan(rl_config(folder, rewards=(name, "numeric_answer"), reward_weights=())).experience
    assert plan.weights == (1.0, 1.0) and plan.reward_functions == {"numeric_answer": 1.0}
    judged = Judged(*[None] * 4, np.zeros(2), np.ones((2, 1), np.float32), np.array([[False], [True]]), None, None)
    judged = with_models(judged, plan, {name: lambda rollout: np.array([5.0, 7.0], np.float32)})
    assert judged.parts_BR.tolist() == [[5, 1], [7, 1]] and judged.rewards_B.tolist() == [6, 8]
    assert judged.failed_BR.tolist() == [[False, False], [False, True]]


def test_a_reward_model_cannot_judge_in_evaluation(folder):
    # Catches a name that is looked up as a module of the user's.
    with pytest.raises(UserError, match=r"^eval\.reward='reward_model:runs/rm': its scores have no 1"):
        build.rl_plan(rl_config(folder, **{"eval.reward": "reward_model:runs/rm"}))


@pytest.mark.slow
def test_a_policy_is_trained_by_a_reward_model_alone(folder, trained, tmp_path):
    # Catches a run that needs a function among its rewards.
    config = rl_config(folder, rewards=(f"reward_model:{trained}",), num_rollouts=1)
    rl.train(build.rl_plan(config), tmp_path)
    line = read_jsonl(tmp_path / "metrics.jsonl")[0]
    assert line["reward/mean"] == pytest.approx(line[f"rewards/reward_model:{trained}"]) and line["reward/std"] > 0


def test_a_reward_model_that_cannot_be_one_of_this_run_is_refused_in_one_line(folder, trained, tmp_path):
    # Catches ids of one alphabet read by another, a policy taken for a judge, a folder that is not there.
    def refusal(source, **changes):
        config = rl_config(folder, rewards=(f"reward_model:{source}",), **changes)
        with pytest.raises(UserError) as told:
            rl.prepare(build.rl_plan(config))
        assert "\n" not in str(told.value) and str(told.value).startswith(f"rewards: 'reward_model:{source}': ")
        return str(told.value)

    assert "were trained with another one; its alphabet is '10 =', not '01 ='" in refusal(
        trained, tokenizer="chars:10 ="
    )
    known = read_content(trained)["identity"]
    with Checkpointer(tmp_path / "policy", identity={k: v for k, v in known.items() if k != "kind"}) as checkpointer:
        checkpointer.save(0, {"params": {"embedding": np.zeros(1)}}, {})
    assert "those of a policy, where a reward model is wanted" in refusal(tmp_path / "policy")
    assert "there is no checkpoint" in refusal(tmp_path / "nowhere")
    abstract = abstract_of(reward_model_config(folder))[2]
    with Checkpointer(tmp_path / "bare", identity=known) as checkpointer:
        checkpointer.save(0, {"params": restore_params(trained, abstract.params)[1]}, {})
    assert "set reward_model.normalize=False" in refusal(tmp_path / "bare")
