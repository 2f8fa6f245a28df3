"""A run that records its tokens: the same run, and columns that say what its own metrics say."""

import shutil

import jax
import numpy as np
import pytest

from gspo import build, rl
from gspo.objectives import make_objective
from gspo.report.workload import Work
from gspo.run import tokens
from gspo.run.writers import read_jsonl
from gspo.types import LossInputs, UserError
from tests.rl.runs import FAST, RESULTS
from tests.tiny_runs import assert_bit_equal, rl_config, state_of

MOVING = FAST | {"num_rollouts": 3}  # updates that are large enough to clip and to move routers
RECORDED = MOVING | {"log.tokens_every": 2}


@pytest.fixture(scope="module")
def recorded(folder):
    rl.train(build.rl_plan(rl_config(folder, **RECORDED)), folder / "recorded")
    return folder / "recorded"


@pytest.fixture(scope="module")
def records(recorded):
    return {rollout: tokens.read(paths) for rollout, paths in tokens.files(recorded).items()}


def test_a_run_that_records_ends_like_one_that_does_not(folder, recorded):
    # Catches a pass for the record that changes what is trained: a key that is used, a donated state, another program.
    rl.train(build.rl_plan(rl_config(folder, **MOVING)), folder / "unrecorded")
    for name in RESULTS:
        assert (recorded / name).read_bytes() == (folder / "unrecorded" / name).read_bytes(), name
    states = [state_of(rl_config(folder, **MOVING), path)[1] for path in (recorded, folder / "unrecorded")]
    assert_bit_equal(*states)
    assert not (folder / "unrecorded" / "tokens").exists()
    assert list(tokens.files(recorded)) == [0, 2]


@pytest.mark.slow
def test_the_update_of_a_run_that_records_is_the_same_program(folder):
    # Catches outputs for the record in the update that all runs make.
    programs = []
    for changes in (MOVING, RECORDED):
        work = Work(build.rl_plan(rl_config(folder, **changes)))
        part = work.steps.minibatches(work.batch())[0]
        programs.append(work.steps.train_step.lower(work.state, part).as_text())
    assert programs[0] == programs[1]


def per_update(record):
    """[N] the update that trained on each token, and the columns of each update as rows and tokens."""
    return np.repeat(record.columns["update"], record.columns["length"])


def test_the_columns_give_the_metrics_of_the_run(recorded, records):
    # Catches log-probs of another minibatch or another moment, routes one token off, rewards of other rows.
    lines = read_jsonl(recorded / "metrics.jsonl")
    for rollout, record in records.items():
        c, line, of = record.columns, lines[rollout], per_update(record)
        assert len(c["token"]) == line["num_tokens"] and len(c["row"]) == 16
        np.testing.assert_allclose(c["reward"].mean(), line["reward/mean"], rtol=1e-6)
        np.testing.assert_allclose(c["truncated"].mean(), line["completions/clipped_ratio"], rtol=1e-6)
        log_w, mask = (c["logp"] - c["old_logp"]).astype(np.float64), c["mask"]
        np.testing.assert_allclose(np.abs(log_w[mask]).max(), line["log_ratio/abs_max"], rtol=1e-4)
        np.testing.assert_allclose(-log_w[mask].mean(), line["approx_kl/k1"], rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(c["entropy"][mask].mean(dtype=np.float64), line["entropy"], rtol=2e-3)
        moved = (np.sort(c["old_routes"], -1) != np.sort(c["routes"], -1)).any((1, 2))
        shares, ratios = [], []
        for update in range(4):
            here = (of == update) & mask
            squared = (log_w - log_w[here].mean()) ** 2
            shares.append(squared[here & moved].sum() / max(squared[here].sum(), 1e-30))
            ratios.append(log_w[here].var())
        np.testing.assert_allclose(np.mean(ratios), line["log_ratio/token_var"], rtol=1e-3)
        # Of the first update all log-ratios are rounding, and so is its share.
        np.testing.assert_allclose(np.mean(shares[1:]) * 3 / 4, line["routing/variance_share"], atol=0.26)
        assert moved.any() and np.abs(log_w).max() > 0.05


def test_the_objective_on_the_columns_clips_what_the_run_has_clipped(recorded, records):
    # Catches advantages of other rows, a mask that counts pads, tokens in another order.
    lines = read_jsonl(recorded / "metrics.jsonl")
    for rollout, record in records.items():
        objective, c, starts, counted = make_objective(**record.about["objective"]), record.columns, record.starts, []
        clipped = jax.jit(lambda inputs, objective=objective: objective(inputs)[1]["clip_ratio/tokens"])
        for update in range(4):
            rows = np.flatnonzero(c["update"] == update)
            frames = {
                name: np.zeros((len(rows), 6), c[name].dtype) for name in ("logp", "old_logp", "advantage", "mask")
            }
            for name, frame in frames.items():
                for i, row in enumerate(rows):
                    frame[i, : c["length"][row]] = c[name][starts[row] : starts[row + 1]]
            counted.append(clipped(LossInputs(*frames.values())))
        total, count = (sum(float(getattr(share, name)) for share in counted) for name in ("total", "count"))
        assert total / count == pytest.approx(lines[rollout]["clip_ratio/tokens"], abs=1e-6) and total > 0


def test_after_the_updates_the_tokens_are_scored_by_the_policy_that_they_left(recorded, records, folder):
    # Catches a last pass with the parameters of before, and one over other rows. The run ends with rollout 2.
    config, record = rl_config(folder, **RECORDED), records[2]
    _, state = state_of(config, recorded)
    steps = rl.prepare(build.rl_plan(config)).steps
    c, starts = record.columns, record.starts
    pad, P, C = 3, 4, 6
    tokens_BT = np.full((16, P + C), pad, np.int32)
    prompt_starts = np.concatenate([[0], np.cumsum(c["prompt_length"])])
    for i in range(16):
        q = c["group"][i]
        prompt = c["prompt_token"][prompt_starts[q] : prompt_starts[q + 1]]
        tokens_BT[i, P - len(prompt) : P] = prompt
        tokens_BT[i, P : P + c["length"][i]] = c["token"][starts[i] : starts[i + 1]]
    scores = steps.scorer(state.params, tokens_BT, c["prompt_length"][c["group"]])
    want = np.concatenate([np.asarray(scores.logp_BC)[i, : c["length"][i]] for i in range(16)])
    np.testing.assert_allclose(c["after_logp"], want, rtol=1e-4, atol=1e-5)
    assert np.abs(c["after_logp"] - c["old_logp"]).max() > 0.05


def test_a_run_that_goes_on_writes_the_records_that_one_never_stopped_has(folder, recorded, tmp_path):
    # Catches records of rollouts that were thrown away at a resume, and some that are missing after it.
    copy = shutil.copytree(recorded, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints" / "3")
    whole = {path.name: path.read_bytes() for path in sorted((copy / "tokens").iterdir())}
    (copy / "tokens" / "000002.0.npz").write_bytes(b"half")
    (copy / "tokens" / "000008.0.npz").write_bytes(b"of another life")
    rl.train(build.rl_plan(rl_config(folder, **RECORDED)), copy)
    assert {path.name: path.read_bytes() for path in sorted((copy / "tokens").iterdir())} == whole


def test_a_negative_number_is_refused(folder):
    with pytest.raises(UserError, match=r"log\.tokens_every=-1"):
        build.rl_plan(rl_config(folder, **{"log.tokens_every": -1}))
