"""The launch scripts: what they would run, what they refuse, and how launch_local.sh treats its processes.

Nothing here reaches a cluster: PATH holds a few named tools, and for gcloud, kubectl and the like a trap that notes
that it was called."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.launchers import (
    AWKWARD,
    BASH,
    CONFIG,
    GKE,
    ROOT,
    SCRIPTS,
    TPU,
    commands,
    execute,
    heed_interrupts,
    run,
    runs,
    wait_for,
    write_program,
)
from tests.processes import finished, in_session, started

pytestmark = pytest.mark.skipif(BASH is None, reason="needs bash")


# ---------------------------------------------------------------------------------------------------- all scripts


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_finds_nothing():
    # Catches: words that split, variables that are never set, a cd that may fail. The exceptions are those of a file
    # that is sourced.
    files = sorted([*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("*.sbatch")])
    result = execute(["shellcheck", "--shell=bash", "--exclude=SC1091", *files])
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", ["launch_local.sh", "launch_slurm.sbatch", "launch_tpu_pod.sh", "launch_gke.sh"])
def test_help_prints_the_comment_at_the_top_and_nothing_of_the_code(script, tools):
    # Catches: help that runs into the code or stops before the flags, and help that needs the flags it explains.
    result = run(script, "--help", env=tools)
    assert (result.returncode, result.stderr) == (0, "")
    assert "--dry-run" in result.stdout and script in result.stdout
    assert not re.search(r"^(#|set -|fail\()", result.stdout, re.MULTILINE)


@pytest.mark.parametrize(("command", "words"), [
    ("launch_local.sh", "-n is missing; pass"),
    ("launch_local.sh -n", "-n has no value"),
    ("launch_local.sh -n two -- true", "-n two: not a number"),
    ("launch_local.sh -n 0 -- true", "-n 0: not a number"),
    ("launch_local.sh -n 2", "COMMAND is missing; pass it after --"),
    ("launch_local.sh -n 2 true", "unexpected argument true; the command comes after --"),
    ("launch_local.sh -n 2 --config=x -- true", "--config is no flag of this script"),
    ("launch_local.sh -n 2 --devices-per-process=-1 -- true", "--devices-per-process -1: not a number"),
    ("launch_local.sh -n 2 --port 70000 -- true", "--port 70000: not a port"),
    ("launch_local.sh -n 2 -- true --process_id=1", "--process_id is set by this script; leave it out"),
    ("launch_slurm.sbatch --dry-run", "CONFIG is missing; usage: sbatch"),
    (f"launch_slurm.sbatch --dry-run {CONFIG}", "WORKDIR is missing; usage: sbatch"),
    ("launch_slurm.sbatch --dry-run --config=x y", "--config=x stands where CONFIG belongs"),
    ("launch_slurm.sbatch --dry-run configs/absent.py runs/x", "CONFIG=configs/absent.py: there is no such file"),
    (f"launch_slurm.sbatch --dry-run {CONFIG} runs/x "
     "seed=1", "unexpected argument seed=1; fields are set as --config.a.b=value"),
    (f"launch_slurm.sbatch {CONFIG} runs/x", "not a SLURM job; submit it"),
    (f"launch_slurm.sbatch {CONFIG} runs/x --dry-run", "--dry-run comes first"),
    ("launch_tpu_pod.sh", "the subcommand is missing; pass one of create, setup"),
    ("launch_tpu_pod.sh destroy --name=a", "destroy is no subcommand; pass one of create, setup"),
    ("launch_tpu_pod.sh stop --zone=us-east5-a", "--name is missing, which stop needs; pass one like --name=gspo-1"),
    ("launch_tpu_pod.sh stop --name=gspo-1", "--zone is missing"),
    ("launch_tpu_pod.sh stop --name=Gspo_1 --zone=us-east5-a", "--name=Gspo_1: cannot be right"),
    ("launch_tpu_pod.sh create --name=gspo-1 --zone=us-east5-a", "--type is missing"),
    ("launch_tpu_pod.sh create --name=gspo-1 --zone=us-east5-a --type=v99-8", "--version is missing"),
    ("launch_tpu_pod.sh run --name=gspo-1 --zone=us-east5-a --config=c.py", "--workdir is missing"),
    ("launch_tpu_pod.sh run --name=gspo-1 --zone=us-east5-a --config=c.py "
     "--workdir=runs/x", "--workdir=runs/x: not a full path"),
    ("launch_tpu_pod.sh run --name=gspo-1 --zone=us-east5-a "
     "--config.seed=1", "--config.seed is a field of the config; pass it after"),
    ("launch_tpu_pod.sh stop --name", "--name has no value"),
    ("launch_gke.sh --dryrun", "--dryrun is no flag of this script"),
    ("launch_gke.sh --dry-run", "NAME is not set; set it like NAME="),
], ids=lambda value: value if value.startswith("launch") else "")  # fmt: skip
def test_bad_usage_is_one_line_that_names_the_flag_and_the_remedy(command, words, tools):
    # Catches: a mistake that is ignored, passed on to the cloud, or answered by the shell's own message.
    result = run(*command.split(), env=tools)
    assert (result.returncode, result.stdout) == (2, ""), result
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert words in result.stderr
    assert tools.called() == []


@pytest.mark.parametrize("script", [
    ["launch_local.sh", "-n", "2", "--dry-run", "--", "touch", "touched"],
    ["launch_slurm.sbatch", "--dry-run", CONFIG, "runs/dry"],
    ["launch_tpu_pod.sh", "all", "--dry-run", "--bucket=my-bucket", *TPU],
    ["launch_tpu_pod.sh", "stop", "--dry-run", *TPU],
    ["launch_tpu_pod.sh", "delete", "--dry-run", *TPU],
    ["launch_gke.sh", "--dry-run"],
], ids=lambda words: " ".join(words[:2]))  # fmt: skip
def test_a_dry_run_calls_nothing_and_writes_nothing(script, tools, tmp_path):
    # Catches: an archive that is made, a cluster that is asked, a command that is executed although only the print was
    # wanted.
    before = sorted(tmp_path.rglob("*")), sorted(os.listdir(ROOT))
    result = run(*script, env=tools | GKE, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "") and result.stdout
    assert (sorted(tmp_path.rglob("*")), sorted(os.listdir(ROOT))) == before


# ---------------------------------------------------------------------------------------------------- launch_local.sh


SHOW = (
    "import os, sys, json; "
    "print(json.dumps([sys.argv[1:], {k: v for k, v in os.environ.items() if k.startswith(('JAX', 'XLA'))}]))"
)


def local(tools, *words, grace=60, **env):
    return run("launch_local.sh", *words, env=tools | {"GRACE": str(grace)} | env)


def test_each_process_gets_its_flags_and_the_environment_and_all_but_the_first_a_prefix(tools):
    # Catches: the same process_id twice, a port per process, flags before the command's own, output that cannot be told
    # apart.
    result = local(tools, "-n", 2, "--devices-per-process=3", "--", sys.executable, "-c", SHOW, "--config.a=x  y")
    assert result.returncode == 0
    (first,), (second,) = result.stdout.splitlines(), result.stderr.splitlines()
    assert second.startswith("[1] ")
    seen = [json.loads(first), json.loads(second.removeprefix("[1] "))]
    assert seen[0][1] == seen[1][1] == {"JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
                                        "XLA_FLAGS": "--xla_force_host_platform_device_count=3"}  # fmt: skip
    port = seen[0][0][1].rpartition(":")[2]
    assert 1024 <= int(port) <= 65535
    for i, (arguments, _) in enumerate(seen):
        assert arguments == [
            "--config.a=x  y",
            f"--coordinator=127.0.0.1:{port}",
            "--num_processes=2",
            f"--process_id={i}",
        ]


@pytest.mark.parametrize(("given", "flags", "wanted"), [
    ("", [], "--xla_force_host_platform_device_count=4"),
    ("--xla_a=1", [], "--xla_a=1 --xla_force_host_platform_device_count=4"),
    ("--xla_force_host_platform_device_count=8 --xla_a=1", [], "--xla_a=1 --xla_force_host_platform_device_count=8"),
    ("--xla_force_host_platform_device_count=8 --xla_a=1", ["--devices-per-process", "2"],
     "--xla_a=1 --xla_force_host_platform_device_count=2"),
])  # fmt: skip
def test_the_number_of_devices_stands_once_in_the_users_xla_flags(given, flags, wanted, tools):
    # Catches: the user's other flags dropped, two counts of which the last wins, a given --devices-per-process that is
    # ignored.
    result = local(tools, "-n", 1, *flags, "--port=1234", "--dry-run", "--", "program", XLA_FLAGS=given)
    assert commands(result)[0][2] == f"XLA_FLAGS={wanted}"


def test_the_printed_command_is_the_one_that_is_run(tools):
    # Catches: a dry run whose quoting differs from what the processes get.
    words = ["-n", 2, "--port", 23456, "--", sys.executable, "-c", SHOW, AWKWARD]
    lines = local(tools, words[0], words[1], "--dry-run", *words[2:]).stdout.splitlines()
    typed = [execute([BASH, "-c", line], env=tools, cwd=ROOT).stdout for line in lines]
    result = local(tools, *words)
    assert [result.stdout, result.stderr.removeprefix("[1] ")] == typed
    assert json.loads(typed[1])[0] == [AWKWARD, "--coordinator=127.0.0.1:23456", "--num_processes=2", "--process_id=1"]


@pytest.mark.parametrize("there", [True, False])
def test_python_is_that_of_the_projects_environment_where_there_is_one(there, tools, tmp_path):
    # Catches: the system's python without the requirements; a replaced `python` that is an argument and not the
    # program.
    shutil.copytree(SCRIPTS, tmp_path / "project" / "scripts")
    python = tmp_path / "project" / ".venv" / "bin" / "python"
    if there:
        write_program(python, f'#!{BASH}\nexec {sys.executable} "$@"\n')
    words = ["-n", "1", "--port=1234", "--dry-run", "--", "python", "python"]
    result = execute([BASH, tmp_path / "project" / "scripts" / "launch_local.sh", *words], env=tools)
    assert commands(result)[0][4:6] == [str(python) if there else "python", "python"]


def test_the_code_of_the_process_that_failed_first_is_passed_on_and_the_process_named(tools):
    # Catches: the code of the last process instead, success although one failed, a launcher that kills those that end
    # by themselves.
    program = (
        "case $* in *id=1*) exit 7 ;; *id=2*) sleep 0.5; echo left by itself; exit 1 ;; *) sleep 0.5; exit 0 ;; esac"
    )
    result = local(tools, "-n", 3, "--", "bash", "-c", program, "x")
    assert result.returncode == 7
    assert result.stderr.splitlines() == [
        "error: process 1 ended with exit code 7; the others have 60 s to stop by "
        "themselves", "[2] left by itself"]  # fmt: skip


def test_a_killed_process_is_named_with_its_signal_and_the_others_are_killed_after_grace(tools, tmp_path):
    # Catches: waiting for ever on processes that hang in a collective; grandchildren that survive; a message by the
    # shell itself.
    pids = tmp_path / "pids"
    program = (
        f'echo $$ >> {pids}; [[ $* != *id=0* ]] || kill -KILL $$; trap "" TERM; sleep 600 & echo $! >> {pids}; wait'
    )
    start = time.monotonic()
    result = local(tools, "-n", 3, "--", "bash", "-c", program, "x", grace=1)
    assert result.returncode == 128 + signal.SIGKILL
    assert 1 <= time.monotonic() - start < 15
    assert result.stderr.splitlines() == [
        "error: process 0 was ended by SIGKILL (exit code 137); the others have 1 s to stop by themselves",
        "error: after 1 s, these processes had not stopped and are killed: 1 2"]  # fmt: skip
    assert len(pids.read_text().split()) == 5
    wait_for(lambda: not any(map(runs, pids.read_text().split())))


def test_nothing_that_a_test_has_started_outlives_its_time(tools, tmp_path):
    # Catches: processes of a launcher, each in a group of its own, that run on for minutes after a test has given up.
    pids = tmp_path / "pids"
    program = f'echo $$ >> {pids}; trap "" TERM INT; sleep 600 & echo $! >> {pids}; wait'
    words = [BASH, SCRIPTS / "launch_local.sh", "-n", "2", "--", "bash", "-c", program]
    with started(words, env=tools, stderr=subprocess.DEVNULL) as launcher:
        wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 4)
        assert set(map(int, pids.read_text().split())) < set(in_session(launcher.pid))
        with pytest.raises(subprocess.TimeoutExpired):
            finished([BASH, "-c", f"sleep 600 & echo $! >> {pids}; wait"], timeout=0.5, env=tools)
    wait_for(lambda: not any(map(runs, [launcher.pid, *pids.read_text().split()])))
    assert len(pids.read_text().split()) == 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_reaches_all_processes_as_sigterm_and_it_waits_for_them(
    number, tools, tmp_path, start
):
    # Catches: processes left behind, a launcher that ends before they have saved, SIGINT that is ignored in the
    # background.
    program = f"""
import pathlib, signal, sys, time
me = sys.argv[-1][-1]
def save(number, frame):
    time.sleep(0.5)
    pathlib.Path("{tmp_path}", "saved" + me).write_text(str(number))
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
pathlib.Path("{tmp_path}", "ready" + me).touch()
while True:
    time.sleep(0.05)
"""
    words = [BASH, SCRIPTS / "launch_local.sh", "-n", "2", "--", sys.executable, "-c", program]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    launcher = start(words, env=tools, preexec_fn=heed_interrupts, **pipes)
    wait_for(lambda: len(list(tmp_path.glob("ready*"))) == 2)
    launcher.send_signal(number)
    stdout, stderr = launcher.communicate(timeout=15)
    assert launcher.returncode == 143
    assert [(tmp_path / f"saved{i}").read_text() for i in range(2)] == [str(int(signal.SIGTERM))] * 2
    assert (stdout, stderr) == ("saved\n", "[1] saved\n")


def test_a_second_ctrl_c_kills_processes_that_do_not_end(tools, tmp_path, start):
    # Catches: a run that cannot be ended from the terminal.
    pids = tmp_path / "pids"
    program = f'trap "" TERM; echo $$ >> {pids}; while :; do sleep 0.1; done'
    words = [BASH, SCRIPTS / "launch_local.sh", "-n", "2", "--", "bash", "-c", program]
    launcher = start(words, env=tools, stderr=subprocess.DEVNULL, preexec_fn=heed_interrupts)
    wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    launcher.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert launcher.poll() is None and all(map(runs, pids.read_text().split()))
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=15) == 128 + signal.SIGKILL
    assert not any(map(runs, pids.read_text().split()))
