"""What tests of the loop watch and replace in a run."""

import contextlib
import io

from gspo import build, rl, steps
from gspo.run.writers import read_jsonl
from tests.tiny_runs import (
    patch_samplers,
)

RESULTS = ("metrics.jsonl", "samples.jsonl")  # what is a function of the seed


FAST = {
    "updates_per_rollout": 4,
    "scale_rewards": "reinforce++",
    "optimizer.learning_rate": 0.05,
    "num_rollouts": 2,
    "eval.every": 0,
}


def train_logged(config, workdir):
    """Runs the config in the workdir, and returns it; beside it lies its log, <workdir>.log."""
    with contextlib.redirect_stdout(io.StringIO()) as log:
        rl.train(build.rl_plan(config), workdir)
    workdir.with_suffix(".log").write_text(log.getvalue())
    return workdir


def replace_sampler(monkeypatch, wrap):
    """Every sampler of the test is wrap(sampler, *arguments of `steps.sampler_of`)."""
    make = steps.sampler_of
    patch_samplers(monkeypatch, lambda *args: wrap(make(*args), *args))


def watch_updates(monkeypatch, before):
    """before(batch, part) is called at every update, with the minibatch and the rollout's whole batch."""
    make = rl.make_steps

    def made(*args):
        steps, whole = make(*args), []

        def minibatches(batch):  # once for each pass over a rollout
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
