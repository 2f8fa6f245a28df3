"""A run by scripts/launch_local.sh, in one process or several, that counts the work of each and may lose one."""

import os
import sys

import numpy as np

from tests.processes import finished
from tests.tiny_runs import ROOT

RESULTS = ("metrics.jsonl", "samples.jsonl")
DIVIDED = {
    "mesh.data": 2, "mesh.expert": 2, "num_rollouts": 4, "eval.num_prompts": 8, "filter_groups.enable": True,
    "filter_groups.max_num_gen_batches": 2, "optimizer.learning_rate": 0.01, "log.num_samples": 4,
    "model.moe_backend": "blocked",
    "router_replay.mode": "R2", "checkpoint.every": 2,
}  # fmt: skip

# The config of the runs below. It is read in every process, where it also notes how many completions the process
# scores, and, at the call that DIE names, ends it.
CONFIG = """
import os, signal
from pathlib import Path

import jax

from gspo.data.scoring import Scorer
from tests.tiny_runs import rl_config

FOLDER = Path({folder!r})
score = Scorer.__call__
process, at, number = (int(word) for word in os.environ.get("DIE", "-1 0 0").split())
calls = []


def watched(scorer, texts, *rest):
    calls.append(len(texts))
    with open(FOLDER / f"scored-{{jax.process_count()}}-{{jax.process_index()}}", "a") as file:
        print(len(texts), file=file)
    if (jax.process_index(), len(calls)) == (process, at):
        os.kill(os.getpid(), number)
    return score(scorer, texts, *rest)


if score.__name__ != "watched":
    Scorer.__call__ = watched


def get_config():
    return rl_config(FOLDER, **{divided!r})
"""


def launch(folder, name, *, processes, devices, die="", script="experiments/rl.py", **more):
    """Runs the script with the config by scripts/launch_local.sh in folder/name; returns (exit code, stdout,
    stderr)."""
    command = ["bash", "scripts/launch_local.sh", "-n", str(processes), "--devices-per-process", str(devices), "--"]
    command += [sys.executable, script, f"--config={folder / 'config.py'}", f"--workdir={folder / name}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GRACE": "60"} | ({"DIE": die} if die else {}) | more
    done = finished(command, timeout=300, cwd=ROOT, env=environment)
    return done.returncode, done.stdout, done.stderr


def assert_same_metrics(lines, expected, *, atol):
    """Of one process and several: the same lines and names, numbers up to the order in which they are added up."""
    assert len(lines) == len(expected)
    for line, want in zip(lines, expected, strict=True):
        assert line.keys() == want.keys()
        for name in want:
            found, value = (np.asarray(each[name], float) for each in (line, want))  # None, of an empty bin: NaN
            np.testing.assert_allclose(found, value, rtol=1e-3, atol=atol, err_msg=f"{line['step']} {name}")
