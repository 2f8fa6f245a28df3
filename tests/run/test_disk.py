"""A full disk: one line, whole files, and a run that goes on when there is room."""

import errno
import os
import subprocess
import time
import types
from pathlib import Path

import jax
import pytest
from orbax.checkpoint._src.checkpointers import async_checkpointer

from gspo import build, rl
from gspo.data.scoring import Scorer
from gspo.run import disk
from gspo.run.checkpoint import Checkpointer
from gspo.run.writers import MetricsWriter, read_jsonl
from gspo.types import UserError
from tests.run.test_cli import config, refused  # noqa: F401 - a fixture
from tests.tiny_runs import assert_bit_equal, command, kept_compiles, rl_config, state_of  # noqa: F401 - fixtures


def state(size, seed=0):
    return {"params": {"w": jax.random.normal(jax.random.key(seed), (size,))}}


def abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder], capture_output=True).returncode:
        pytest.skip("file systems can be mounted by root only")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path, leave: int = 0) -> Path:
    """Takes all room but `leave` bytes; returns the file to delete."""
    with open(folder / "ballast", "ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
        file.truncate(max(file.tell() - leave, 0))
    return folder / "ballast"


def test_a_full_disk_is_known_by_number_by_words_and_through_other_errors():
    # Catches: the error of TensorStore, which has no number, or of a thread, which is wrapped; any other error of the
    # file system, or memory that has run out, taken for a full disk.
    words = ValueError("RESOURCE_EXHAUSTED: Failed to write 9 bytes: No space left on device [os_error_code='28']")
    wrapped = RuntimeError("in a thread")
    wrapped.__cause__ = words
    assert all(map(disk.is_full, (OSError(errno.ENOSPC, "x"), OSError(errno.EDQUOT, "x"), words, wrapped)))
    others = (OSError(errno.EIO, "x"), PermissionError(13, "x"), ValueError("RESOURCE_EXHAUSTED: out of memory"))
    assert not any(map(disk.is_full, others))
    assert [disk.readable(n) for n in (0, 999, 1234, 5e6, 2e12)] == [
        "0 bytes",
        "999 bytes",
        "1.2 kB",
        "5.0 MB",
        "2.0 TB",
    ]


def test_a_line_that_does_not_fit_leaves_the_file_as_it_was_and_says_what_is_missing(tmp_path):
    # Catches: half a line before the next one, a line that comes out of a buffer when the file is closed, and a
    # traceback without a word of the cause.
    class Full:  # takes five bytes and then no more
        def __init__(self, file):
            self.file, self.calls = file, 0

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            self.calls += 1
            if self.calls > 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data[:5])

    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"a": 1})
        plain, writer._files["metrics.jsonl"] = writer._files["metrics.jsonl"], Full(writer._files["metrics.jsonl"])
        with pytest.raises(
            UserError, match=rf"the disk is full: a line of metrics.jsonl .* to {tmp_path}: .* missing"
        ) as error:
            writer.write(1, {"a": 2})
        assert "\n" not in str(error.value)
        assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 0, "a": 1}]
        writer._files["metrics.jsonl"] = plain
        assert writer.offset()["metrics.jsonl"] == os.path.getsize(tmp_path / "metrics.jsonl") == 20
        writer.write(1, {"a": 3})
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 0, "a": 1}, {"step": 1, "a": 3}]


@pytest.mark.parametrize("async_save", [True, False])
def test_a_checkpoint_that_does_not_fit_is_one_line_and_the_one_before_stays(
    tmp_path, monkeypatch, capfd, caplog, async_save
):
    # Catches: a traceback of every thread of a save, no word of how much is missing, an error that is raised again when
    # the writer is closed, and a partial folder that keeps the room it has taken.
    def full(_, writes=(), *_args, **_options):
        for write in writes if async_save else ():
            write.result()
        raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device [os_error_code='28']")

    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    with Checkpointer(tmp_path, async_save=async_save) as checkpointer:
        checkpointer.save(1, state(1000), {})
        checkpointer.wait()
        with monkeypatch.context() as patch, pytest.raises(UserError) as error:
            patch.setattr(async_checkpointer, "_background_wait_for_commit_futures", full)
            patch.setattr("orbax.checkpoint._src.checkpointers.checkpointer.Checkpointer.save", full)
            checkpointer.save(2, state(1 << 20), {})
            checkpointer.wait()
    told = str(error.value)
    assert f"the disk is full: checkpoint 2 could not be written to {tmp_path / 'checkpoints'}" in told
    assert "it takes 4.2 MB, " in told and " are missing" in told and "\n" not in told
    assert (
        async_save or "1.0 kB are free, 4.2 MB are missing" in told
    )  # in the other case what was written counts as room
    assert "the last good checkpoint is step 1" in told
    assert "Traceback" not in "".join([*capfd.readouterr(), caplog.text])
    assert os.listdir(tmp_path / "checkpoints") == ["1"]
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore(abstract(state(1000)))[0] == 1


def test_a_real_disk_that_is_full_during_a_save_takes_it_when_there_is_room(small_disk, capfd, caplog):
    # Catches: what only the real writers do: errors of TensorStore's own, files that are left half written.
    with Checkpointer(small_disk) as checkpointer:
        checkpointer.save(1, state(1 << 18), {})
        checkpointer.wait()
        ballast = fill(small_disk, leave=1 << 20)
        with pytest.raises(
            UserError, match=r"checkpoint 2 .* it takes 4\.2 MB, .* are missing; .* good checkpoint is step 1"
        ) as error:
            checkpointer.save(2, state(1 << 20), {})
            checkpointer.wait()
    assert "\n" not in str(error.value) and "Traceback" not in "".join([*capfd.readouterr(), caplog.text])
    assert os.listdir(small_disk / "checkpoints") == ["1"]
    ballast.unlink()
    with Checkpointer(small_disk) as checkpointer:
        checkpointer.save(2, state(1 << 20, seed=2), {})
        step, restored, _ = checkpointer.restore(abstract(state(1 << 20)))
    assert step == 2
    assert_bit_equal(restored, state(1 << 20, seed=2))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["a line of metrics.jsonl", "checkpoint 2"])
def test_a_run_on_a_disk_that_fills_up_stops_with_one_line_and_goes_on_bit_equal(
    command, config, small_disk, tmp_path, monkeypatch, where  # noqa: F811
):  # fmt: skip
    # Catches: a traceback, a half line or a broken checkpoint that the resumed run keeps, an exit code of success.
    folder, workdir = Path(config.removeprefix("--config=")).parent, small_disk / "run"
    reduce, score, calls = rl.update_metrics, Scorer.__call__, []
    monkeypatch.setattr(rl, "update_metrics", lambda steps: reduce(steps) | {"long": [0.5] * 3000})
    rl.train(build.rl_plan(rl_config(folder)), tmp_path / "unbroken")

    def filling(*args):
        calls.append(args)
        if len(calls) == 3:  # in the second rollout, after an evaluation and the first one
            while not (workdir / "checkpoints" / "1" / "SEAL.0").exists():
                time.sleep(0.01)
            fill(small_disk, leave=60_000 if "checkpoint" in where else 0)
        return score(*args)

    monkeypatch.setattr(Scorer, "__call__", filling)
    refused(
        command("rl", config, f"--workdir={workdir}"),
        f"the disk is full: {where} could not be written",
        "missing; make room",
    )
    (line,) = read_jsonl(workdir / "metrics.jsonl")[: -1 if "checkpoint" in where else None]
    assert line["step"] == 0
    assert all((workdir / name).read_bytes()[-1:] in (b"\n", b"") for name in ("metrics.jsonl", "samples.jsonl"))
    (small_disk / "ballast").unlink()
    code, stdout, stderr = command("rl", config, f"--workdir={workdir}")
    assert (code, stderr) == (0, "") and "resumed at rollout 1" in stdout
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (workdir / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes(), name
    assert_bit_equal(*(state_of(rl_config(folder), path)[1] for path in (workdir, tmp_path / "unbroken")))
