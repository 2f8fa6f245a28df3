"""A run on random ids: prompts and lengths are what they are said to be, and a step is the program's own."""

import numpy as np
import pytest

from configs import benchmark
from gspo import build, rl
from gspo.report.workload import Ids, Work
from tests.tiny_runs import assert_bit_equal, kept_compiles  # noqa: F401 - the latter takes effect by its name


def tiny(**changes):
    config = benchmark.get_config("tiny")
    config.mesh.data = 1
    config.update_from_flattened_dict(changes)
    return Work(build.rl_plan(config))


def test_ids_are_their_numbers():
    # Catches a prompt of another length in tokens than in numbers, an end id among the plain ones.
    ids = Ids(514, 8)
    assert ids.encode(ids.decode([17, 4, 511])) == ids.prompt_ids("17 4 511") == [17, 4, 511]
    assert ids.pad_id == 513 and ids.eos_ids == tuple(range(505, 513))
    assert Ids(514, 0).eos_ids == ()


def test_prompts_fill_their_frame_and_hold_plain_ids():
    # Catches padding that is measured as work, and prompts that are all the same.
    work = tiny()
    prompts = work.source.batch(0, 2)
    assert prompts.lengths_Q.tolist() == [4, 4] and prompts.tokens_QP.max() < work.tokenizer.pad_id
    assert not np.array_equal(*prompts.tokens_QP)


@pytest.mark.slow
def test_a_step_is_that_of_the_loop():
    # Catches a benchmark's own copy of the step: the same key, prompts and state give what the loop's parts give.
    ours, theirs = tiny(), tiny()
    ours.step()
    batch = theirs.collect()
    state, done = rl.update(theirs.steps, theirs.state, batch)
    assert len(done) == 2 and int(ours.state.step) == int(state.step) == 2
    assert_bit_equal(ours.state.params, state.params)
    assert set(ours.timer.take()) == {"rollout", "reward", "old_logps", "update"}
    assert np.asarray(ours.lengths_B).tolist() == [6] * 8
    advantages_BC = np.asarray(batch.inputs.advantages_BC)
    assert np.ptp(advantages_BC) > 0, "rewards that are all the same make a gradient of 0"


def test_end_ids_make_lengths_about_geometric():
    # Catches end ids that never come, or a mean that is not vocab_size / num_end_ids.
    work = tiny(
        **{"task.options.num_end_ids": 8, "max_completion_length": 24, "num_prompts": 16, "num_generations": 16}
    )
    lengths_B = np.asarray(work.rollout().completion_lengths_B)
    assert 0.6 * 34 / 8 < lengths_B.mean() < 1.6 * 34 / 8 and lengths_B.max() > 2 * lengths_B.mean()
    assert work.sizes().completion == pytest.approx(lengths_B.mean())


def test_a_written_batch_has_the_shape_of_a_collected_one():
    # Catches updates that are measured on other rows than those of a step.
    work = tiny()
    written, collected = work.batch(), work.collect()
    assert written.tokens_BT.shape == collected.tokens_BT.shape
    assert bool(written.inputs.mask_BC.all()) and np.ptp(np.asarray(written.inputs.advantages_BC)) > 0
    prompts_QGP = np.asarray(written.tokens_BT)[:, :4].reshape(2, 4, 4)
    assert (prompts_QGP == prompts_QGP[:, :1]).all(), "rows of a group share their prompt"
