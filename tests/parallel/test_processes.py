"""Several processes on one machine: the same run as one process, the work of the host divided, and what happens when
one is lost."""

import json
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from gspo.parallel import distributed
from gspo.run.checkpoint import Checkpointer, restore_params
from gspo.run.writers import read_jsonl
from tests.parallel.runs import CONFIG, DIVIDED, RESULTS, assert_same_metrics, launch
from tests.tiny_runs import ROOT, assert_bit_equal, kept_compiles, rl_config, state_of  # noqa: F401 - a fixture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("distributed")
    (path / "config.py").write_text(CONFIG.format(folder=str(path), divided=DIVIDED))
    return path


@pytest.fixture(scope="module")
def two(folder):
    """The run in two processes of two devices each."""
    code, stdout, stderr = launch(folder, "two", processes=2, devices=2)
    assert code == 0, stderr
    assert "4 devices in 2 process(es), mesh data=2 x expert=2" in stdout
    return folder / "two"


def test_two_processes_run_what_one_process_runs_and_share_the_work_of_the_host(folder, two):
    # Catches rows of one process that are dropped or trained on twice, another order of prompts, noise that depends on
    # the process, groups that the processes select differently, and completions that every host scores.
    code, _, stderr = launch(folder, "one", processes=1, devices=4)
    assert code == 0, stderr
    lines, expected = (read_jsonl(path / "metrics.jsonl") for path in (two, folder / "one"))
    assert len(lines) == len(expected) == 5 and max(line["clip_ratio/tokens"] for line in lines[:4]) > 0
    assert_same_metrics(lines, expected, atol=2e-5)
    assert len(read_jsonl(two / "samples.jsonl")) == len(read_jsonl(folder / "one" / "samples.jsonl")) == 16
    scored = {name: list(map(int, (folder / f"scored-{name}").read_text().split())) for name in ("1-0", "2-0", "2-1")}
    assert scored["2-0"] == scored["2-1"] == [n // 2 for n in scored["1-0"]]


def test_a_checkpoint_of_several_processes_is_whole_for_one_with_any_number_of_devices(folder, two):
    # Catches files of which each process wrote its own, and shardings that a checkpoint can only be read back into.
    found = []
    for sizes in (
        {"mesh.data": 1},
        {"mesh.data": 2},
        {"mesh.data": 1, "mesh.fsdp": 2, "mesh.expert": 2},
        {"mesh.data": 8},
    ):
        changes = DIVIDED | {"mesh.expert": 1, "num_prompts": 8} | sizes
        step, state = state_of(rl_config(folder, **changes), two)
        assert step == 4
        found.append(jax.device_get(state))
    for state in found[1:]:
        assert_bit_equal(state, found[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), found[0].params)
    assert_bit_equal(restore_params(two, abstract)[1], found[0].params)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])  # 0 is where they meet
def test_a_signal_to_one_process_and_the_loss_of_another_leave_a_run_that_resumes_bit_equal(folder, two, victim):
    # Catches a process that waits for ever for one that is gone, processes that save different steps, a second process
    # that does not hear of the signal, half a checkpoint taken for a whole one, and a resumed run that goes another
    # way.
    broken = f"broken-{victim}"
    code, _, stderr = launch(folder, broken, processes=2, devices=2, die=f"1 4 {int(signal.SIGTERM)}")
    assert code == 143 and stderr.count("stopped by SIGTERM: saved rollout") == 2, stderr
    saved = {line.rpartition("saved rollout ")[2].split()[0] for line in stderr.splitlines() if "saved rollout" in line}
    (step,) = saved
    assert all((folder / broken / "checkpoints" / step / f"SEAL.{process}").exists() for process in (0, 1))

    code, _, stderr = launch(folder, broken, processes=2, devices=2, die=f"{victim} 2 {int(signal.SIGKILL)}")
    assert code == 137 and f"process {victim} was ended by SIGKILL" in stderr, stderr
    assert "another process of this run is gone" in stderr and "Traceback" not in stderr, stderr
    assert "had not stopped and are killed" not in stderr, stderr

    code, stdout, stderr = launch(folder, broken, processes=2, devices=2)
    assert code == 0 and "resumed at rollout" in stdout, stderr
    for name in RESULTS:
        assert (folder / broken / name).read_bytes() == (two / name).read_bytes(), name
    states = [state_of(rl_config(folder, **DIVIDED), path)[1] for path in (folder / broken, two)]
    assert_bit_equal(*states)


WRITING = """
import os, signal, time

import jax
from orbax.checkpoint._src.checkpointers import async_checkpointer

from gspo.run import cli
from gspo.run.checkpoint import Checkpointer

write, writes = async_checkpointer._background_wait_for_commit_futures, []


def dying(*args, **options):
    writes.append(args)
    if (jax.process_index(), len(writes)) == (int(os.environ["VICTIM"]), 2):
        time.sleep(2)  # until all wait for the writers
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*args, **options)


def main():
    async_checkpointer._background_wait_for_commit_futures = dying
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    make = jax.jit(lambda seed: {"params": jax.random.normal(jax.random.key(seed), (4, 1000))}, out_shardings=split)
    with Checkpointer(cli.FLAGS.workdir) as checkpointer:
        checkpointer.save(1, make(1), {})
        checkpointer.save(2, make(2), {})
        checkpointer.wait()


cli.define_flags()
cli.run(main, needs="num_rollouts")
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_lost_while_a_checkpoint_is_written_ends_the_others_with_a_line(folder, victim):
    # Catches a process that waits at a barrier of the checkpoint until jax aborts it, with a stack trace and no word
    # of what to do, and half a checkpoint taken for a whole one.
    name = f"writing-{victim}"
    (folder / "writing.py").write_text(WRITING)
    start = time.monotonic()
    code, _, stderr = launch(folder, name, processes=2, devices=2, script=folder / "writing.py", VICTIM=str(victim))
    assert code == 137 and f"process {victim} was ended by SIGKILL" in stderr, stderr
    lines = [line.removeprefix("[1] ") for line in stderr.splitlines() if "another process" in line]
    assert lines == [f"error: {distributed.LOST}"] and "Traceback" not in stderr, stderr
    assert "had not stopped" not in stderr and (victim == 0 or "Check failure" not in stderr), stderr
    assert time.monotonic() - start < 60
    with Checkpointer(folder / name) as checkpointer:
        step, _, _ = checkpointer.restore({"params": jax.ShapeDtypeStruct((4, 1000), np.float32)})
    assert step == 1


def test_an_error_in_one_process_alone_ends_all_of_them(folder, two):
    # Catches a process that waits at the way out for those that wait for it in a collective, and a lost one told as a
    # traceback.
    (folder / "alone.py").write_text(
        "import jax, sys\nfrom gspo.parallel import distributed\n"
        "from gspo.run import cli\nfrom gspo.types import UserError\n\n\ndef main():\n"
        "    if jax.process_index() == 1:\n        raise UserError('a file is missing here')\n"
        "    distributed.any_process(False)\n\n\ncli.define_flags()\ncli.run(main, needs='num_rollouts')\n"
    )
    code, _, stderr = launch(folder, "alone", processes=2, devices=1, script=folder / "alone.py")
    assert code == 2 and "[1] error: a file is missing here" in stderr, stderr
    assert "another process of this run is gone" in stderr and "Traceback" not in stderr, stderr
    assert "had not stopped and are killed" not in stderr, stderr


def test_a_checkpoint_that_one_process_cannot_read_is_passed_over_by_all(folder, two):
    # Catches processes that go on from different steps, and good checkpoints that are judged by what went wrong with
    # another.
    shutil.copytree(two, folder / "unread")
    (folder / "unread.py").write_text(
        "import jax\nfrom gspo import build, rl\nfrom gspo.run import checkpoint, cli, stored\n\n\ndef main():\n"
        "    read, calls = stored.read_arrays, []\n\n"
        "    def failing(*args):\n        calls.append(args)\n"
        "        if len(calls) == 1 and jax.process_index() == 1:\n            raise ValueError('unreadable here')\n"
        "        return read(*args)\n\n"
        "    stored.read_arrays = failing\n"
        "    with checkpoint.Checkpointer(cli.FLAGS.workdir) as checkpointer:\n"
        "        abstract = rl.prepare(build.rl_plan(cli.FLAGS.config)).steps.abstract\n"
        "        print('restored', checkpointer.restore(abstract)[0])\n\n\n"
        "cli.define_flags()\ncli.run(main, needs='num_rollouts')\n"
    )
    code, stdout, stderr = launch(folder, "unread", processes=2, devices=2, script=folder / "unread.py")
    assert code == 0 and "restored 2" in stdout and "[1] restored 2" in stderr, stdout + stderr
    assert {path.name for path in (folder / "unread" / "checkpoints").iterdir()} == {"2", "4.broken"}


COUNTED = """
import builtins
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from gspo.parallel import distributed
from gspo.run import cli
from gspo.run.checkpoint import Checkpointer

count, plain_open = [0], builtins.open


class Counted:  # what Python reads of a checkpoint; TensorStore, which reads the arrays, does not come here
    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def read(self, *size):
        data = self.file.read(*size)
        count[0] += len(data)
        return data

    def readinto(self, buffer):
        n = self.file.readinto(buffer)
        count[0] += n
        return n


def counting_open(file, mode="r", *rest, **more):
    opened = plain_open(file, mode, *rest, **more)
    return Counted(opened) if mode == "rb" and "checkpoints" in str(file) else opened


def damage(step_dir):
    file = max((step_dir / "state" / "ocdbt.process_1").rglob("*"), key=lambda path: path.stat().st_size)
    data = file.read_bytes()
    file.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])


def main():
    builtins.open = counting_open
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    split = NamedSharding(mesh, PartitionSpec("data"))
    make = jax.jit(lambda seed: {"params": jax.random.normal(jax.random.key(seed), (4, 1 << 20))}, out_shardings=split)
    wanted = {"params": jax.ShapeDtypeStruct((4, 1 << 20), jnp.float32, sharding=split)}
    with Checkpointer(cli.FLAGS.workdir) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, make(step), {})
        checkpointer.wait()
        saving, count[0] = count[0], 0
        distributed.barrier("all have sealed")
        for _ in range(2):
            step, state, _ = checkpointer.restore(wanted)
            print("restored", step, bool((state["params"] == make(step)["params"]).all()), "hashed", saving, count[0])
            if step == 2:
                distributed.on_primary(lambda: damage(Path(cli.FLAGS.workdir) / "checkpoints" / "2"), "damage")


cli.define_flags()
cli.run(main, needs="num_rollouts")
"""


def test_no_process_reads_the_whole_checkpoint_to_seal_or_to_check_it(folder):
    # Catches a host that hashes what all hosts have written (terabytes, in a real run), a share that nobody reads, and
    # damage to what one process wrote that another, or nobody, would have to find.
    (folder / "counted.py").write_text(COUNTED)
    code, stdout, stderr = launch(folder, "counted", processes=2, devices=2, script=folder / "counted.py")
    assert code == 0, stderr
    lines = [line for line in (stdout + stderr).splitlines() if "restored" in line]
    reads = [list(map(int, line.split()[-2:])) for line in lines if "restored 2 True" in line]
    saving, restoring = np.array(reads).T
    root = folder / "counted" / "checkpoints"
    size = sum(path.stat().st_size for path in (root / "1").rglob("*") if path.is_file() and "SEAL" not in path.name)
    assert len(reads) == 2 and size > 8e6
    for read, whole in ((saving, 2 * size), (restoring, size)):
        assert abs(read.sum() / whole - 1) < 0.01, (read, whole)
        assert (0.3 * whole < read).all() and (read < 0.7 * whole).all(), (read, whole)
    assert len(lines) == 4 and sum("restored 1 True" in line for line in lines) == 2, stderr
    assert "state/ocdbt.process_1/" in stderr and "falling back to step 1" in stderr and "Traceback" not in stderr, (
        stderr
    )
    assert (root / "2.broken").exists()


def test_a_mistake_is_told_by_every_process_and_none_of_them_waits(folder, two):
    # Catches processes that wait at a barrier for one that has left with an error only it has seen.
    config = json.loads((two / "config.json").read_text())
    (two / "config.json").write_text(json.dumps(config | {"seed": 7}))
    try:
        code, _, stderr = launch(folder, "two", processes=2, devices=2)
    finally:
        (two / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    assert (
        code == 2
        and stderr.count("differs from this run's config: seed: saved 7, now 0") == 2
        and "Traceback" not in stderr
    )
