"""The cold start: what it learns, what stops it, and that a stopped run ends like one never stopped."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo import build, sft, steps
from gspo.learning.state import state_on_mesh
from gspo.run.checkpoint import Checkpointer, restore_params
from gspo.run.writers import read_jsonl
from gspo.types import UserError
from tests.tiny_runs import assert_bit_equal, contents, kept_compiles, parts_of, patch_samplers, sft_config  # noqa: F401 - a fixture

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
    assert read_jsonl(plain / "metrics.jsonl")[0]["loss"] == pytest.approx(total / count, rel=1e-5)


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


def test_samples_are_those_of_the_evaluations_once_each(plain):
    # Catches samples that are written again by a resume, or never.
    assert [s["step"] for s in read_jsonl(plain / "samples.jsonl")] == [
        step for step in range(0, 31, 5) for _ in range(3)
    ]


@pytest.mark.parametrize(
    "place", ["in an update", "in an evaluation", pytest.param("after a save", marks=pytest.mark.slow)]
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
