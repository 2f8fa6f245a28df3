"""The folder of a run: its config, and the lock that keeps a second run out of it."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gspo.run import disk
from gspo.run.workdir import hold_workdir, keep_config
from gspo.types import UserError

CONFIG = {"objective": {"epsilon": 0.2, "level": "token"}, "seed": 0, "lengths": (8, 16), "none": None}


def start(workdir, config, **options):
    """What a run does with its folder before the first rollout."""
    with hold_workdir(workdir, config, **options) as folder:
        keep_config(workdir, config)
    return folder


def test_a_workdir_keeps_its_config_and_takes_the_same_one_again(tmp_path):
    # Catches: tuples, which JSON turns into lists, reported as a difference.
    workdir = start(tmp_path / "runs" / "a", CONFIG)
    assert json.loads((workdir / "config.json").read_text())["objective"] == {"epsilon": 0.2, "level": "token"}
    start(workdir, CONFIG)
    assert sorted(os.listdir(workdir)) == ["LOCK", "config.json"]


def test_a_changed_config_stops_and_lists_the_fields_that_differ(tmp_path):
    # Catches: a run resumed under other settings; a message that does not say which, or what to do.
    start(tmp_path, CONFIG)
    changed = {"objective": {"epsilon": 0.0003, "level": "token"}, "seed": True, "lengths": [8, 16], "new": 1}
    with pytest.raises(UserError) as error:
        start(tmp_path, changed)
    message = str(error.value)
    assert "objective.epsilon: saved 0.2, now 0.0003" in message and "seed: saved 0, now true" in message
    assert "new: saved nothing, now 1" in message and "none: saved null, now absent" in message
    assert "lengths" not in message and "level" not in message and "\n" not in message
    assert "--workdir" in message and "--allow_changed_config" in message
    assert json.loads((tmp_path / "config.json").read_text())["objective"]["epsilon"] == 0.2


def test_an_allowed_change_keeps_the_earlier_configs(tmp_path):
    # Catches: the history of a run's settings lost.
    for epsilon in (0.1, 0.2, 0.3):
        start(tmp_path, {"epsilon": epsilon}, allow_changed_config=True)
    values = {path.name: json.loads(path.read_text())["epsilon"] for path in tmp_path.glob("*.json")}
    assert values == {"config.1.json": 0.1, "config.2.json": 0.2, "config.json": 0.3}


def test_a_workdir_that_cannot_be_used_is_a_one_line_error(tmp_path):
    # Catches: a traceback, or a run that fails at its first checkpoint an hour later.
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        with pytest.raises(UserError, match="--workdir=") as error:
            start(path, CONFIG)
        assert "\n" not in str(error.value)
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "config.json").write_text("{half")
    with pytest.raises(UserError, match="not JSON"):
        start(tmp_path, CONFIG, allow_changed_config=True)


def test_a_config_is_kept_whole_or_not_at_all(tmp_path, monkeypatch):
    # Catches: the only copy of a run's config renamed away before the new one is written, by which any config is taken
    # afterwards; half a file, which no later start can read.
    start(tmp_path, CONFIG)
    before = (tmp_path / "config.json").read_bytes()

    def full(path, text):
        path.with_name(f"{path.name}.tmp").write_text(text[:9])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(disk, "write_whole", full)
        with pytest.raises(UserError, match=r"--workdir=.* cannot be used: No space left on device"):
            start(tmp_path, CONFIG | {"seed": 1}, allow_changed_config=True)
    assert (tmp_path / "config.json").read_bytes() == before
    start(tmp_path, CONFIG | {"seed": 1}, allow_changed_config=True)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1
    assert (tmp_path / "config.1.json").read_bytes() == before


# ---------------------------------------------------------------------------- two runs

HOLDER = """
import sys, time
from gspo.run.workdir import hold_workdir
with hold_workdir(sys.argv[1], {}):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_refused_with_a_line_that_names_the_first_until_that_is_killed(tmp_path):
    # Catches: two runs that interleave their metrics and remove each other's checkpoints; a lock that outlives a
    # killed run, so that nobody can resume it; one that does not say whom to stop.
    root = Path(__file__).parents[2]
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        cwd=root,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)},
    )
    try:
        assert holder.stdout.readline() == "held\n"
        who = f"is in use: process {holder.pid} on {socket.gethostname()}, since 20[0-9-]+ [0-9:]+ .*, is running in it"
        for _ in range(2):
            with pytest.raises(UserError, match=who) as error:
                start(tmp_path, {})
            assert "\n" not in str(error.value) and "--workdir" in str(error.value)
        assert os.listdir(tmp_path) == ["LOCK"]
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
        start(tmp_path, {})
    finally:
        holder.kill()
        holder.communicate()
    assert (tmp_path / "LOCK").read_text() == ""  # it names nobody who has left in the usual way


def test_a_run_that_fails_leaves_its_folder_free(tmp_path):
    # Catches: a sweep in one process that locks itself out after the first arm.
    for _ in range(2):
        with pytest.raises(KeyError), hold_workdir(tmp_path, {}):
            raise KeyError
    with hold_workdir(tmp_path, {}), pytest.raises(UserError, match=f"process {os.getpid()} on"):
        start(tmp_path, {})
