"""One of two processes is killed at ten random moments, saves included; started again each time, the run ends
bit-equal."""

import numpy as np
import pytest

from gspo.run.writers import read_jsonl
from tests.parallel.runs import DIVIDED, RESULTS, launch
from tests.tiny_runs import assert_bit_equal, kept_compiles, rl_config, state_of  # noqa: F401 - a fixture

CHANGES = DIVIDED | {"num_rollouts": 14, "checkpoint.every": 1, "eval.every": 5}
# What a run does again and again. A moment is a random time after one of them has begun for the n-th time.
EVENTS = {"rollout": 0.5, "write": 0.05, "finalize": 0.05, "seal": 0.05, "line": 0.3, "restore": 0.5}

# The config. Read in the process that MOMENT names, it has it killed there.
CONFIG = """
import os, signal, threading, time

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint._src.checkpointers import async_checkpointer

from gspo.data.scoring import Scorer
from gspo.run import checkpoint, stored, writers
from tests.tiny_runs import rl_config

PLACES = {{
    "rollout": (Scorer, "__call__"),
    "write": (async_checkpointer, "_background_wait_for_commit_futures"),
    "finalize": (ocp.PyTreeCheckpointHandler, "finalize"),
    "seal": (checkpoint, "write_seal"),
    "line": (writers.MetricsWriter, "write"),
    "restore": (stored, "read_arrays"),
}}
victim, event, number, delay = os.environ.get("MOMENT", "-1 none 0 0").split()
count = []


def killing(function):
    def wrapped(*args, **options):
        count.append(event)
        if (str(jax.process_index()), str(len(count))) == (victim, number):
            threading.Thread(target=kill, daemon=True).start()
        return function(*args, **options)

    return wrapped


def kill():
    time.sleep(float(delay))
    print("killed at", event, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


if event != "none" and not count:
    count.append("hooked")
    owner, name = PLACES[event]
    setattr(owner, name, killing(getattr(owner, name)))


def get_config():
    return rl_config({folder!r}, **{changes!r})
"""


def moments(seed: int, count: int) -> list[tuple[int, str, int, float]]:
    """(victim, event, which of its occurrences, seconds after it): each event at least once, in a random order."""
    rng = np.random.default_rng(seed)
    events = [*EVENTS, *rng.choice(list(EVENTS), count - len(EVENTS))]
    found = []
    for event in rng.permutation(events):
        number = 1 if event == "restore" else int(rng.integers(1, 3))
        # Only the first process writes lines and finalizes what the others have written.
        victim = 0 if event in ("line", "finalize") else int(rng.integers(2))
        found.append((victim, str(event), number, float(rng.uniform(0, EVENTS[event]))))
    if found[0][1] == "restore":  # there is nothing to restore yet
        found.append(found.pop(0))
    return found


@pytest.mark.slow
def test_a_run_of_two_processes_killed_at_ten_random_moments_ends_bit_equal_to_an_unbroken_one(tmp_path):
    # Catches: a moment at which a kill leaves something that the next start takes for whole (arrays, seals, lines of
    # metrics), or that it cannot start from; processes that resume at different steps; one that outlives another.
    (tmp_path / "config.py").write_text(CONFIG.format(folder=str(tmp_path), changes=CHANGES))
    code, _, stderr = launch(tmp_path, "unbroken", processes=2, devices=2)
    assert code == 0, stderr
    for victim, event, number, delay in moments(seed=0, count=10):
        moment = f"{victim} {event} {number + 1} {delay:.3f}"  # + 1: hooking counts as the first
        code, stdout, stderr = launch(tmp_path, "killed", processes=2, devices=2, MOMENT=moment)
        assert code == 137 and f"process {victim} was ended by SIGKILL" in stderr, (moment, stdout, stderr)
        assert f"killed at {event}" in stdout + stderr, (moment, stdout, stderr)
        assert "another process of this run is gone" in stderr and "had not stopped" not in stderr, (moment, stderr)
    code, stdout, stderr = launch(tmp_path, "killed", processes=2, devices=2)
    assert code == 0 and "resumed at rollout" in stdout, stderr
    assert [line["step"] for line in read_jsonl(tmp_path / "killed" / "metrics.jsonl")] == list(range(15))
    for name in RESULTS:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes(), name
    states = [state_of(rl_config(tmp_path, **CHANGES), tmp_path / name)[1] for name in ("killed", "unbroken")]
    assert_bit_equal(*states)
