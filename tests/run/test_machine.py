"""Compiled programs kept on disk, and cores of a CPU as devices. What is settled once per process is looked at from
processes of their own."""

import os
import subprocess
import sys
import time
import zlib

import pytest

from gspo.run import machine
from tests.tiny_runs import ROOT

PROGRAM = """
from gspo.run import machine
machine.share_cores({rows})
note = machine.keep_programs()
import jax
found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event.rpartition("/")[2]))
value = jax.jit(lambda x: x * 3 + 1)(2.0)
print(float(value), found.count("cache_hits"), found.count("cache_misses"), jax.device_count(), repr(note))
"""
CHOICES = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")


def run(cache, rows=(), **chosen: str) -> list[str]:
    """value, hits, misses, devices, note of a process whose caches lie in `cache`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    environment = {**kept, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cache), **chosen}
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(rows=rows)], cwd=ROOT, env=environment, text=True,
                          capture_output=True)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.strip().split(" ", 4)


def entries(folder):
    return sorted(folder.rglob("*-cache"))


# ---------------------------------------------------------------------------- compiled programs


def test_what_one_process_has_compiled_the_next_one_reads(tmp_path):
    # Catches a cache that is never switched on, one that holds only programs that took a second, and an entry that a
    # killed process left half written and that is then compiled again for ever.
    assert run(tmp_path) == ["7.0", "0", "1", "1", "''"]
    assert run(tmp_path) == ["7.0", "1", "0", "1", "''"]
    (entry,) = entries(tmp_path)
    assert entry.parent == tmp_path / "gspo" / "xla" / machine.cpu_digest()
    assert entry.parent.stat().st_mode & 0o777 == 0o700
    entry.write_bytes(entry.read_bytes()[:100])
    assert run(tmp_path) == ["7.0", "0", "1", "1", "''"]
    assert run(tmp_path) == ["7.0", "1", "0", "1", "''"]


def test_the_users_own_folder_is_taken_and_the_users_no_is_heard(tmp_path):
    # Catches a default that wins over the environment.
    assert run(tmp_path / "home", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))[1:3] == ["0", "1"]
    assert len(entries(tmp_path / "own")) == 1
    run(tmp_path / "home", JAX_ENABLE_COMPILATION_CACHE="false")
    assert not (tmp_path / "home").exists()


def test_a_cache_that_cannot_be_written_is_one_note_and_the_run_goes_on(tmp_path):
    # Catches a traceback, or a warning for each program, where the home folder is read-only.
    (tmp_path / "file").write_text("in the way")
    value, hits, _, _, note = run(tmp_path / "file")
    assert (value, hits) == ("7.0", "0") and "compiled programs are not kept" in note and str(tmp_path) in note


def test_unfinished_entries_go_and_so_do_the_oldest_of_too_many(tmp_path):
    # Catches the newest removed for the oldest, whole entries taken for torn ones, and an entry that is empty kept.
    whole = zlib.compress(os.urandom(1000))
    written = {
        "a-cache": whole,
        "b-cache": whole,
        "torn-cache": whole[:500],
        "empty-cache": b"",
        "other-cache": b"\x28x",
    }
    for name, data in written.items():
        (tmp_path / name).write_bytes(data)
    machine.tidy(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a-cache", "b-cache", "other-cache", ".checked"}
    for age, name in enumerate(("a-cache", "b-cache", "other-cache")):
        os.utime(tmp_path / name, (time.time() - 100 + age,) * 2)
    machine.tidy(tmp_path, limit=len(whole) + 2)
    assert {path.name for path in tmp_path.iterdir()} == {"b-cache", "other-cache", ".checked"}


def test_each_kind_of_cpu_has_a_folder_of_its_own(tmp_path):
    # Catches machine code of a newer CPU run by an older one that shares the home folder, and a new folder whenever the
    # clock of the CPU is read.
    core = "processor\t: 0\nmodel name\t: EPYC\ncpu MHz\t\t: {mhz}\nflags\t\t: sse2 {flag}\n"
    digests = []
    for mhz, flag, cores in ((1000, "avx2", 2), (2000, "avx2", 4), (1000, "avx512f", 2)):
        (tmp_path / "cpuinfo").write_text("\n".join([core.format(mhz=mhz, flag=flag)] * cores))
        digests.append(machine.cpu_digest(tmp_path / "cpuinfo"))
    assert digests[0] == digests[1] != digests[2]
    assert machine.cpu_digest(tmp_path / "nowhere")


# ---------------------------------------------------------------------------- memory

FAULTS = """
import resource
import numpy as np
from gspo.run import machine
machine.keep_heap()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        np.ones(2**23)  # 64 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_memory_that_is_given_back_is_not_mapped_anew(tmp_path):
    # Catches settings that glibc ignores, and those that win over the user's.
    def faults(**chosen: str) -> int:
        kept = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
        command = [sys.executable, "-c", FAULTS]
        return int(subprocess.check_output(command, cwd=ROOT, env={**kept, "JAX_PLATFORMS": "cpu", **chosen}))

    own = faults(GLIBC_TUNABLES="")
    if own < 1000:
        pytest.skip("the C library of this machine keeps memory by itself")
    assert faults() < own / 10


# ---------------------------------------------------------------------------- cores


@pytest.mark.parametrize(("rows", "chosen", "devices"), [
    ((64, 128), {}, min(machine.cores(), 2)),
    ((64, 3), {}, 1),
    ((), {}, 1),
    ((64,), {"JAX_NUM_CPU_DEVICES": "1"}, 1),
    ((64,), {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, 4),
], ids=["even", "odd", "none", "one by the environment", "four by XLA_FLAGS"])  # fmt: skip
def test_a_cpu_is_two_devices_where_rows_divide_and_the_user_has_not_chosen(tmp_path, rows, chosen, devices):
    # Catches a run that fails by rows that two devices cannot share, and a number of devices that wins over the user's.
    assert run(tmp_path, rows, **chosen)[3] == str(devices)


def test_a_machine_of_one_core_stays_one_device(monkeypatch):
    # Catches two devices that take turns on one core.
    updated = []
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(machine, "cores", lambda: 1)
    monkeypatch.setattr(machine.jax.config, "update", lambda *change: updated.append(change))
    machine.share_cores((64,))
    assert updated == []
    monkeypatch.setattr(machine, "cores", lambda: 96)
    machine.share_cores((64,))
    assert updated == [("jax_num_cpu_devices", 2)]
