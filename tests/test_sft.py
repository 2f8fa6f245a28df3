"""The cold start: what it learns, what stops it, and that a stopped run ends like one never stopped."""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo import build, sft, steps
from gspo.learning.learner import make_train_step
from gspo.learning.scores import score_completions
from gspo.learning.state import state_on_mesh
from gspo.masked import values
from gspo.objectives import negative_log_likelihood
from gspo.run.checkpoint import Checkpointer, restore_params
from gspo.run.writers import read_jsonl
from gspo.types import TrainState, UserError
from tests import model_oracle
from tests.tiny_runs import assert_bit_equal, contents, kept_compiles, parts_of, patch_samplers, sft_config  # noqa: F401 - a fixture

make_evaluation_loss = sft.make_evaluation_loss  # as it is, where the runs share one
RESULTS = ("metrics.jsonl", "samples.jsonl")


@pytest.fixture(autouse=True, scope="module")
def steps_made_once():
    """The runs below share their jitted functions, as they are of one model: tracing them anew would be most of the
    time."""
    made = {}

    def once(make, model_at):
        def make_once(*args, **options):
            key = (make, args[model_at])
            if key not in made:
                made[key] = make(*args, **options)
            return made[key]

        return make_once

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "make_train_step", once(sft.make_train_step, 0))
        patch.setattr(sft, "make_evaluation_loss", once(sft.make_evaluation_loss, 1))
        patch_samplers(patch, once(steps.sampler_of, 0))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sft")


@pytest.fixture(scope="module")
def plain(folder):
    sft.train(build.sft_plan(sft_config(folder)), folder / "plain")
    return folder / "plain"


def abstract_of(config):
    plan, _, layout, model = parts_of(config)
    return state_on_mesh(layout, model, steps.optimizer_of(plan.optimizer)[0]).abstract


def state_of(config, workdir):
    with Checkpointer(workdir, keep_last=9) as checkpointer:
        step, state, _ = checkpointer.restore(abstract_of(config))
    return step, state


def assert_ends_like(workdir, plain, config):
    for name in RESULTS:
        assert (workdir / name).read_bytes() == (plain / name).read_bytes(), name
    assert_bit_equal(state_of(config, workdir), state_of(config, plain))


def test_the_policy_learns_to_imitate_the_demonstrations(plain):
    # Catches a loss on the wrong columns, a gradient of the wrong sign, an evaluation of the first parameters for ever.
    lines = read_jsonl(plain / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(31))
    assert lines[0]["loss"] > 1.5 and lines[29]["loss"] < 0.4
    assert lines[0]["eval/pass@1"] < 0.2 and lines[30]["eval/pass@1"] > 0.5
    assert lines[15]["learning_rate"] == pytest.approx(0.01, rel=1e-5) and lines[0]["learning_rate"] == pytest.approx(
        0.02
    )


def test_the_first_loss_is_the_mean_negative_log_likelihood_of_the_demonstrations(folder, plain):
    # Catches prompts or padding counted in the loss, an end token that is not learned, a mean of means over rows.
    config = sft_config(folder)
    plan, tokenizer, layout, model = parts_of(config)
    source = sft.demonstration_source(plan.data, tokenizer)
    start = state_on_mesh(layout, model, steps.optimizer_of(plan.optimizer)[0])
    params = steps.initial_state(plan, start).params
    demos = source.batch(0, 8)
    P = config.max_prompt_length

    @jax.jit
    def logits(params, tokens_BT, first_B):
        hidden_BTD = model.apply({"params": params}, tokens_BT, first_B).hidden_BTD
        return model.apply({"params": params}, hidden_BTD, method="logits")

    logits_BTV = np.asarray(logits(params, demos.tokens_BT, P - demos.prompt_lengths_B), np.float64)
    total = count = 0
    for row, length in enumerate(demos.completion_lengths_B):
        assert demos.tokens_BT[row, P + length - 1] == tokenizer.eos_ids[0]
        for t in range(P, P + length):
            logits_V = logits_BTV[row, t - 1]
            total += np.log(np.exp(logits_V).sum()) - logits_V[demos.tokens_BT[row, t]]
            count += 1
        if row == 3:  # eval.num_prompts of 4: the first rows of this batch, as both splits are one file here
            first_four = total / count
    line = read_jsonl(plain / "metrics.jsonl")[0]
    assert line["loss"] == pytest.approx(total / count, rel=1e-5)
    assert line["eval/loss"] == pytest.approx(first_four, rel=1e-5)
    for rows in (2, 3):  # in batches that come out even, and in one that must not count its surplus
        small = dataclasses.replace(plan, batch_size=rows)
        loss, notes = make_evaluation_loss(small, model, tokenizer)
        assert loss(params) == {"eval/loss": pytest.approx(first_four, rel=1e-5)} and not notes


def test_the_evaluation_loss_is_that_of_the_parameters_at_hand(plain):
    # Catches one that is taken once, or of the rows that are trained on.
    losses = [line["eval/loss"] for line in read_jsonl(plain / "metrics.jsonl") if "eval/loss" in line]
    assert len(losses) == 7 and losses[0] > 1.5 and losses[-1] < 0.4


def test_an_evaluation_split_without_demonstrations_is_named_and_has_no_loss(folder, tmp_path):
    # Catches a run that cannot start because of what it would only have watched, and one that is silent about it.
    (tmp_path / "test.jsonl").write_text('{"prompt": "0=", "answer": "0"}\n')
    config = sft_config(folder, **{"task.name": f"jsonl:{tmp_path}/{{split}}.jsonl", "task.eval_split": "test"})
    plan, tokenizer, _, model = parts_of(config)
    loss, (note,) = make_evaluation_loss(plan, model, tokenizer)
    assert loss(None) == {} and note.startswith("no eval/loss: ") and "no demonstrations" in note
    lines = [json.dumps({"prompt": prompt, "answer": "0", "demonstration": "0"}) for prompt in ("0=", "00000=")]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    _, (note,) = make_evaluation_loss(plan, model, tokenizer)
    assert note == "eval/loss leaves out 1 examples longer than the frame"


def test_a_run_ends_at_its_target_and_ends_there_again(folder, plain, tmp_path, capsys):
    # Catches a target that is passed, one that ends a run without a checkpoint to start from, and a resume that trains
    # on.
    before = read_jsonl(plain / "metrics.jsonl")
    at = next(line["step"] for line in before if line.get("eval/pass@1", 0) >= 0.5)
    assert 0 < at < 30
    config = sft_config(folder, target_pass_at_1=0.5)
    line = sft.train(build.sft_plan(config), tmp_path / "run")
    assert f"at update {at}: the target is reached" in capsys.readouterr().out
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert lines[:at] == before[:at] and len(lines) == at + 1 and lines[at] == line | {"step": at}
    assert line["eval/pass@1"] == before[at]["eval/pass@1"] and state_of(config, tmp_path / "run")[0] == at
    kept = contents(tmp_path / "run")
    sft.train(build.sft_plan(config), tmp_path / "run")
    assert contents(tmp_path / "run") == kept
    at_once = sft_config(folder, target_pass_at_1=0.5, init_from=str(plain))
    sft.train(build.sft_plan(at_once), tmp_path / "at_once")
    assert state_of(at_once, tmp_path / "at_once")[0] == 0


def test_every_example_comes_once_in_an_epoch(folder, tmp_path, monkeypatch):
    # Catches one batch used for ever, and batches that overlap.
    seen, make = [], sft.make_batch
    monkeypatch.setattr(
        sft, "make_batch", lambda *args: (seen.extend((batch := make(*args)).tokens_BT.tolist()), batch)[1]
    )
    sft.train(build.sft_plan(sft_config(folder, num_updates=7, **{"eval.every": 0})), tmp_path)
    epochs = [sorted(map(tuple, seen[start : start + 14])) for start in range(0, 56, 14)]
    assert len(set(epochs[0])) == 14 and all(epoch == epochs[0] for epoch in epochs)
    assert seen[:14] != seen[14:28]


def test_packed_demonstrations_see_themselves_alone(folder):
    # Catches a demonstration that sees its neighbour or counts positions from it, a mask that is a column off, and one
    # that is left out, cut, or comes twice between two batches: each against the float64 model of that demonstration.
    plan, tokenizer, layout, model = parts_of(sft_config(folder))
    source = sft.demonstration_source(plan.data, tokenizer)
    params, cursor, held = model_oracle.build(model.spec)[1], 0, []

    @jax.jit
    def score(batch):
        width = batch.inputs.mask_BC.shape[1]
        frames = (batch.tokens_BT, batch.prompt_lengths_B, width)
        return score_completions(model, params, *frames, segments_BT=batch.segments_BT).logp_BC

    for _ in range(2):
        packed, after = sft.make_packed_batch(layout, source, cursor, 3)
        found = sorted(np.asarray(score(packed))[packed.inputs.mask_BC].tolist())
        demos, expected = source.batch(cursor, after - cursor), []
        P = source.prompt_width
        for tokens_T, p, c in zip(demos.tokens_BT, demos.prompt_lengths_B, demos.completion_lengths_B, strict=True):
            ids = (tokens_T[P - p : P], tokens_T[P : P + c])
            expected += model_oracle.score(model_oracle.float64(params), model.spec, *ids)[0].tolist()
        np.testing.assert_allclose(found, sorted(expected), rtol=1e-4)
        held.append(after - cursor)
        cursor = after
    assert held == [4, 5]  # in 3 rows


@pytest.mark.slow
def test_packed_rows_give_the_loss_and_the_gradient_of_the_same_demonstrations_in_rows_of_their_own(folder):
    # Catches gradients through padding or a neighbour, and a load of experts that counts padding.
    plan, tokenizer, layout, model = parts_of(sft_config(folder))
    source = sft.demonstration_source(plan.data, tokenizer)
    params = model_oracle.build(model.spec)[1]
    step = make_train_step(model, model_oracle.record_gradients(), negative_log_likelihood)

    def gradient(batch):
        own = jax.tree.map(jnp.copy, params)
        state, metrics = step(TrainState(jnp.int32(0), own, jax.tree.map(jnp.zeros_like, own)), batch)
        return state.opt_state, values(jax.device_get(metrics))

    cursor, held = 0, []
    for _ in range(2):
        packed, after = sft.make_packed_batch(layout, source, cursor, 3)
        grads, metrics = gradient(packed)
        expected, other = gradient(sft._rows(layout, source, cursor, 5, counted=after - cursor))
        assert metrics["loss"] == pytest.approx(other["loss"], rel=1e-6)
        if after - cursor == 5:  # the load is that of all tokens in the frame
            assert metrics["routing/load_cv"] == pytest.approx(other["routing/load_cv"], rel=1e-6)
        jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-6), grads, expected)
        held.append(after - cursor)
        cursor = after
    assert held == [4, 5]


@pytest.mark.slow
def test_a_packed_run_that_dies_and_is_resumed_ends_bit_equal_to_one_that_did_not(folder, tmp_path, monkeypatch):
    # Catches a data position that is counted in rows, where rows hold as many demonstrations as they can.
    config = sft_config(folder, packing=True, num_updates=6, **{"eval.every": 0, "checkpoint.every": 2})
    sft.train(build.sft_plan(config), tmp_path / "whole")
    make, calls = sft.make_packed_batch, []

    def dies(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return make(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sft, "make_packed_batch", dies)
        with pytest.raises(KeyboardInterrupt):
            sft.train(build.sft_plan(config), tmp_path / "run")
    sft.train(build.sft_plan(config), tmp_path / "run")
    assert_ends_like(tmp_path / "run", tmp_path / "whole", config)


def test_samples_are_those_of_the_evaluations_once_each(plain):
    # Catches samples that are written again by a resume, or never.
    assert [s["step"] for s in read_jsonl(plain / "samples.jsonl")] == [
        step for step in range(0, 31, 5) for _ in range(3)
    ]


@pytest.mark.parametrize(
    "place",
    ["in an update", *(pytest.param(place, marks=pytest.mark.slow) for place in ("in an evaluation", "after a save"))],
)
def test_a_run_that_dies_and_is_resumed_ends_bit_equal_to_one_that_did_not(folder, plain, tmp_path, monkeypatch, place):
    # Catches samples or lines twice, a data position or an optimizer that starts anew.
    class Death(BaseException):
        pass

    def dies(function, call):
        calls = []

        def wrapped(*args, **kwargs):
            result = function(*args, **kwargs)
            calls.append(0)
            if len(calls) == call:
                raise Death
            return result

        return wrapped

    with monkeypatch.context() as patch:
        if place == "in an update":
            patch.setattr(sft, "make_batch", dies(sft.make_batch, 13))
        elif place == "in an evaluation":
            make = sft.make_evaluator
            patch.setattr(sft, "make_evaluator", lambda *args: dies(make(*args), 4))
        else:
            patch.setattr(Checkpointer, "save", dies(Checkpointer.save, 2))
        with pytest.raises(Death):
            sft.train(build.sft_plan(sft_config(folder)), tmp_path)
    step, _ = state_of(sft_config(folder), tmp_path)
    assert step == {"in an update": 10, "in an evaluation": 10, "after a save": 20}[place]
    sft.train(build.sft_plan(sft_config(folder)), tmp_path)
    assert_ends_like(tmp_path, plain, sft_config(folder))


def test_SIGTERM_saves_says_so_and_leaves_and_the_resumed_run_ends_the_same(
    folder, plain, tmp_path, monkeypatch, capsys
):
    # Catches updates lost since the last checkpoint, and samples of an evaluation that the stop cut in two.
    make, batches = sft.make_batch, []

    def make_batch(*args):
        batches.append(0)
        if len(batches) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return make(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sft, "make_batch", make_batch)
        with pytest.raises(SystemExit) as stopped:
            sft.train(build.sft_plan(sft_config(folder)), tmp_path)
    assert stopped.value.code == 143 and "stopped by SIGTERM: saved update 7 in" in capsys.readouterr().err
    assert state_of(sft_config(folder), tmp_path)[0] == 7
    sft.train(build.sft_plan(sft_config(folder)), tmp_path)
    assert_ends_like(tmp_path, plain, sft_config(folder))


def test_a_finished_run_started_again_changes_nothing(folder, plain):
    # Catches a last line, samples or a checkpoint written twice.
    before = contents(plain)
    line = sft.train(build.sft_plan(sft_config(folder)), plain)
    assert contents(plain) == before and line["eval/pass@1"] == read_jsonl(plain / "metrics.jsonl")[-1]["eval/pass@1"]


def test_a_loss_that_is_not_finite_stops_the_run_and_the_last_good_checkpoint_is_kept(folder, tmp_path, monkeypatch):
    # Catches NaN saved over good parameters, and a message that does not say where to go on from.
    make, batches = sft.make_batch, []

    def poisoned(*args):
        batches.append(0)
        batch = make(*args)
        return batch.replace(
            tokens_BT=batch.tokens_BT + 99 * (len(batches) > 12)
        )  # outside of the vocabulary: NaN embeddings

    monkeypatch.setattr(sft, "make_batch", poisoned)
    with pytest.raises(
        UserError, match="update 12: loss or gradient is not finite; the last good checkpoint is step 10; lower"
    ):
        sft.train(build.sft_plan(sft_config(folder)), tmp_path)
    step, params = restore_params(tmp_path, abstract_of(sft_config(folder)).params)
    assert step == 10 and all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))


def test_init_from_starts_from_the_parameters_of_another_run(folder, plain, tmp_path):
    # Catches a second stage that starts from random parameters.
    sft.train(build.sft_plan(sft_config(folder, init_from=str(plain))), tmp_path)
    assert read_jsonl(tmp_path / "metrics.jsonl")[0]["loss"] < 0.4


def test_examples_that_were_dropped_are_counted_in_the_log(folder, tmp_path, capsys):
    # Catches training on half of the data without a word.
    data = (folder / "digits.jsonl").read_text() + 3 * '{"prompt": "00000=", "answer": "0", "demonstration": "0"}\n'
    (tmp_path / "longer.jsonl").write_text(data)
    config = sft_config(folder, overlong_prompts="drop", **{"task.name": f"jsonl:{tmp_path}/longer.jsonl"})
    sft.train(build.sft_plan(config), tmp_path / "run")
    assert "SFT: 3 examples longer than the frame were dropped" in capsys.readouterr().out
