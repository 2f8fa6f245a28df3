"""Runs of the loop that several tests look at, and what makes them quick."""

import json
import shutil
from pathlib import Path

import pytest

from gspo import rl, steps
from gspo.masked import values
from tests.rl.runs import train_logged
from tests.tiny_runs import kept_compiles, rl_config  # noqa: F401 - a fixture


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
    return train_logged(rl_config(folder), folder / "plain")


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
