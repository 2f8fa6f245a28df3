"""The launch scripts: what they would run, what they refuse, and how launch_local.sh and the SLURM job treat their
processes.

Nothing here reaches a cluster: PATH holds a few named tools, and for gcloud, kubectl and the like a trap that notes
that it was called."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import finished, in_session, started

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
CONFIG = "configs/gspo_running_sum.py"
TOOLS = [
    "bash",
    "cat",
    "dirname",
    "env",
    "git",
    "mv",
    "python3",
    "rm",
    "sed",
    "seq",
    "sleep",
    "sort",
    "stat",
    "tail",
    "touch",
]
TRAPS = ["gcloud", "kubectl", "srun", "scancel", "scontrol", "sbatch", "ssh", "curl", "pgrep", "pkill", "uv"]
BASH = shutil.which("bash")
AWKWARD = """--config.name=it's "$HOME" `x` \\n {a: b} # 100%"""
GKE = {"NAME": "gspo-1", "IMAGE": "us-docker.pkg.dev/p/r/gspo:1", "CONFIG": CONFIG, "WORKDIR": "/mnt/gspo/runs/x",
       "BUCKET": "my-bucket", "TPU_ACCELERATOR": "tpu-v5p-slice", "TPU_TOPOLOGY": "4x4x4", "NUM_HOSTS": "16",
       "CHIPS_PER_HOST": "4"}  # fmt: skip
TPU = ["--name=gspo-1", "--zone=us-east5-a", "--type=v5p-128", f"--config={CONFIG}", "--workdir=/mnt/gspo/runs/x"]

pytestmark = pytest.mark.skipif(BASH is None, reason="needs bash")


def heed_interrupts():
    """As at a terminal: where tests run in the background SIGINT comes ignored, and bash cannot trap a signal that it
    finds ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def tools(tmp_path):
    """Environment of a script: PATH with TOOLS and the traps, which write their arguments, one JSON list a line, to
    `tools.called`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in TOOLS:
        (folder / name).symlink_to(shutil.which(name))
    for name in TRAPS:
        note = f"json.dump(['{name}', *sys.argv[1:]], out); out.write('\\n')"
        program = (
            f"#!{sys.executable}\nimport json, sys\nwith open({str(tmp_path / 'called')!r}, 'a') as out:\n    {note}\n"
        )
        write_program(folder / name, program)

    class Tools(dict):
        def called(self):
            log = tmp_path / "called"
            return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    (tmp_path / "home").mkdir()
    return Tools(PATH=str(folder), HOME=str(tmp_path / "home"), TMPDIR=str(tmp_path / "home"))


@pytest.fixture
def start():
    """subprocess.Popen of which nothing is left after the test, however that ends."""
    with contextlib.ExitStack() as stack:
        yield lambda words, **options: stack.enter_context(started(words, **options))


def execute(words, **options):
    return finished(words, timeout=60, **options)


def run(script, *arguments, env, cwd=None):
    return execute([BASH, SCRIPTS / script, *map(str, arguments)], env=env, cwd=cwd)


def commands(result):
    assert (result.returncode, result.stderr) == (0, ""), result
    return [shlex.split(line) for line in result.stdout.splitlines()]


def wait_for(condition, seconds=15):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def runs(pid):
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


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


# ---------------------------------------------------------------------------- launch_slurm.sbatch


def test_the_slurm_job_starts_one_process_per_node_with_all_its_gpus(tools):
    # Catches: JAX's own default of one GPU per task, an srun that kills the processes before they say why, overrides
    # that split.
    (line,) = commands(run("launch_slurm.sbatch", "--dry-run", CONFIG, "/shared/x", AWKWARD, env=tools))
    assert line == ["env", "JAX_PLATFORMS=cuda,cpu", "JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7", "srun",
                    "--kill-on-bad-exit=0",
                    "--wait=120", "--cpu-bind=none", f"{ROOT}/.venv/bin/python", "experiments/rl.py", "--distributed",
                    f"--config={CONFIG}", "--workdir=/shared/x", AWKWARD]  # fmt: skip
    wanted = {"--ntasks-per-node=1", "--gpus-per-node=8", "--requeue", "--open-mode=append", "--signal=B:USR1@120"}
    text = (SCRIPTS / "launch_slurm.sbatch").read_text()
    assert wanted <= set(re.findall(r"^#SBATCH (\S+)$", text, re.MULTILINE))
    # SLURM reads no directive after the first command.
    assert text.rindex("\n#SBATCH") < text.index("\nset -u")


@pytest.fixture
def slurm_job(tools, tmp_path, start):
    """Starts the script as a job: function(code with which the processes end after SIGTERM) -> Popen, once srun
    runs."""
    project, pid = tmp_path / "project", tmp_path / "srun.pid"
    write_program(project / ".venv" / "bin" / "python", "")
    write_program(project / CONFIG, "")
    write_program(project / "experiments" / "rl.py", "")
    folder = Path(tools["PATH"])
    scancel = (folder / "scancel").read_text()
    (folder / "scancel").write_text(
        f"{scancel}import os, signal\nos.kill(int(open({str(pid)!r}).read()), signal.SIGTERM)\n"
    )

    def submit(code):
        trap = (
            f"sleep 0.3; kill %1; exit {code}"  # time in which the shell's wait is interrupted and the processes save
        )
        write_program(
            folder / "srun",
            f"#!{BASH}\ntrap '{trap}' TERM\nsleep 600 &\necho $$ > {pid}.new\nmv {pid}.new {pid}\nwait\n",
        )
        env = tools | {"SLURM_JOB_ID": "77", "SLURM_SUBMIT_DIR": str(project), "SLURM_GPUS_ON_NODE": "2"}
        words = [BASH, SCRIPTS / "launch_slurm.sbatch", CONFIG, "/shared/x"]
        job = start(words, env=env, cwd=tmp_path, stderr=subprocess.PIPE)
        wait_for(pid.exists)
        return job, int(pid.read_text())

    return submit


@pytest.mark.parametrize(("code", "requeued"), [(143, True), (0, False)])
def test_near_the_time_limit_the_processes_save_and_an_unfinished_job_returns_to_the_queue(
    code, requeued, tools, slurm_job
):
    # Catches: a job that requeues before its processes have saved or after the run has finished, the code of the
    # interrupted wait.
    job, _ = slurm_job(code)
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=15)
    assert job.returncode == code
    assert tools.called() == [["scancel", "--signal=TERM", "77"]] + [["scontrol", "requeue", "77"]] * requeued


def test_a_cancelled_slurm_job_does_not_come_back(tools, slurm_job):
    # Catches: scancel, which sends SIGTERM to the shell as well, taken for the time limit: a job that nobody can end.
    job, srun = slurm_job(143)
    job.send_signal(signal.SIGTERM)
    os.kill(srun, signal.SIGTERM)
    job.communicate(timeout=15)
    assert job.returncode == 143
    assert tools.called() == []


# ---------------------------------------------------------------------------------------------------- launch_tpu_pod.sh


def test_the_tpu_slice_is_requested_set_up_run_and_deleted_by_these_commands(tools):
    # Catches: a command without the zone or the project, a node of another name than ssh uses, --spot that is not
    # passed on.
    flags = [*TPU, "--project=my-project", "--spot", "--bucket=my-bucket", "--dry-run"]
    place = ["--zone=us-east5-a", "--project=my-project"]
    tpus = ["gcloud", "compute", "tpus"]
    lines = commands(run("launch_tpu_pod.sh", "all", *flags, env=tools))
    assert lines[0] == [*tpus, "queued-resources", "create", "gspo-1", "--node-id=gspo-1", *place,
                        "--accelerator-type=v5p-128",
                        "--runtime-version=v2-alpha-tpuv5", "--spot"]  # fmt: skip
    assert lines[1] == [*tpus, "queued-resources", "describe", "gspo-1", *place, "--format=value(state.state)"]
    archive = f"{tools['TMPDIR']}/gspo-gspo-1.tar.gz"
    assert lines[2] == ["git", "archive", "--format=tar.gz", f"--output={archive}", "HEAD"]
    assert lines[3] == [*tpus, "tpu-vm", "scp", archive, "gspo-1:gspo.tar.gz", "--worker=all", *place]
    assert lines[4] == ["rm", "-f", archive]
    for line in lines[5:]:
        assert line[:-1] == [*tpus, "tpu-vm", "ssh", "gspo-1", "--worker=all", *place]
    install, gcsfuse, mount, start = (line[-1] for line in lines[5:])
    pinned = (
        re.search(r"^jax==\S+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
        .group()
        .replace("jax", "jax[tpu]")
    )
    assert "bash scripts/setup_env.sh" in install and install.endswith(f"'{pinned}'")
    assert "gcsfuse" in gcsfuse and mount.endswith("my-bucket /mnt/gspo; }")
    assert f"experiments/rl.py --distributed --config={CONFIG} --workdir=/mnt/gspo/runs/x" in start

    (stop,) = commands(run("launch_tpu_pod.sh", "stop", *flags, env=tools))
    assert "pkill -TERM -f" in stop[-1]
    (delete,) = commands(run("launch_tpu_pod.sh", "delete", *flags, env=tools))
    assert delete == [*tpus, "queued-resources", "delete", "gspo-1", *place, "--force", "--quiet"]


def test_the_subcommands_print_together_what_all_prints(tools):
    # Catches: a step that `all` leaves out or does in another order.
    flags = [*TPU, "--bucket=my-bucket", "--dry-run", "--", AWKWARD]
    parts = [run("launch_tpu_pod.sh", part, *flags, env=tools).stdout for part in ("create", "setup", "run", "all")]
    assert "".join(parts[:3]) == parts[3] != ""


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v6e-32", "v2-alpha-tpuv6e"),
        ("v4-8", "tpu-ubuntu2204-base"),
    ],
)
def test_each_type_of_tpu_has_its_runtime_version_and_a_given_one_counts(kind, version, tools):
    # Catches: a machine image for another generation, with which the chips are not found.
    words = ["create", "--name=a", "--zone=us-east5-a", f"--type={kind}", "--dry-run"]
    assert f"--runtime-version={version}" in commands(run("launch_tpu_pod.sh", *words, env=tools))[0]
    assert "--runtime-version=other" in commands(run("launch_tpu_pod.sh", *words, "--version=other", env=tools))[0]


def test_what_the_hosts_are_told_starts_the_run_with_the_very_arguments_and_hands_its_code_on(tools, tmp_path):
    # Catches: quotes, spaces and dollars that are lost between the shell here and the one there; output of an earlier
    # run shown again; an exit code that is that of tail.
    command = commands(run("launch_tpu_pod.sh", "run", *TPU, "--dry-run", "--", AWKWARD, env=tools))[0][
        -1
    ].removeprefix("--command=")
    folder = tmp_path / "home" / "gspo"
    text = f'#!{BASH}\nexec {sys.executable} "$@"\n'
    write_program(folder / ".venv" / "bin" / "python", text)
    program = "import json, os, sys\nprint(json.dumps([sys.argv, os.environ['JAX_PLATFORMS']]))\nsys.exit(5)\n"
    write_program(folder / "experiments" / "rl.py", program)
    (folder / "rl.log").write_text("of an earlier run\n")
    for name, text in {"pgrep": f"#!{BASH}\nexit 1\n", "nohup": f'#!{BASH}\nexec "$@"\n'}.items():
        write_program(Path(tools["PATH"]) / name, text)
    result = execute([BASH, "-c", command], env=tools, cwd=tmp_path / "home")
    assert (result.returncode, result.stderr) == (5, "")
    arguments = ["experiments/rl.py", "--distributed", f"--config={CONFIG}", "--workdir=/mnt/gspo/runs/x", AWKWARD]
    assert json.loads(result.stdout) == [arguments, "tpu,cpu"]
    assert (folder / "rl.log").read_text() == f"of an earlier run\n{result.stdout}"


def test_stop_finds_the_run_and_not_the_shell_that_looks_for_it(tools):
    # Catches: pkill -f that ends its own shell, whose command line holds the name of the script too.
    command = commands(run("launch_tpu_pod.sh", "stop", *TPU, "--dry-run", env=tools))[0][-1].removeprefix("--command=")
    (pattern,) = set(re.findall(r"-f '([^']*)'", command))
    assert re.search(pattern, f".venv/bin/python experiments/rl.py --distributed --config={CONFIG}")
    assert re.search(pattern, "/home/me/gspo/.venv/bin/python3.12 experiments/rl.py --workdir=x")
    for other in (
        f"bash -c {command}",
        f"pkill -TERM -f {pattern}",
        "vim experiments/rl.py ",
        "python experiments/sft.py --x",
    ):
        assert not re.search(pattern, other)


def test_setup_waits_for_the_machines_and_gives_up_when_the_request_failed(tools):
    # Catches: waiting for ever on a request that Google has refused.
    write_program(Path(tools["PATH"]) / "gcloud", f"#!{BASH}\necho FAILED\n")
    result = run("launch_tpu_pod.sh", "setup", *TPU, env=tools)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: --name=gspo-1: the request is FAILED; delete it and create it again\n"


# ---------------------------------------------------------------------------------------------------- launch_gke.sh


def rendered(result):
    assert (result.returncode, result.stderr) == (0, ""), result
    first, *lines, last = result.stdout.splitlines()
    assert (first, last) == ("kubectl apply -f - <<'EOF'", "EOF")
    return "\n".join(lines) + "\n"


def test_the_filled_in_yaml_is_a_jobset_of_one_process_per_tpu_host(tools):
    # Catches: a value in the wrong field, numbers that YAML reads as strings, a restart of one pod alone, too short a
    # time to save.
    yaml = pytest.importorskip("yaml")
    jobset = yaml.safe_load(
        rendered(run("launch_gke.sh", "--dry-run", "--", AWKWARD, "--config.b=$(PROCESS_ID)", env=tools | GKE))
    )
    assert (jobset["apiVersion"], jobset["kind"], jobset["metadata"]["name"]) == (
        "jobset.x-k8s.io/v1alpha2",
        "JobSet",
        "gspo-1",
    )
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert jobset["spec"]["failurePolicy"]["rules"][0]["action"] == "FailJobSet"
    (group,) = jobset["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    assert (group["name"], group["replicas"]) == ("slice", 1)
    assert (job["parallelism"], job["completions"], job["backoffLimit"], job["completionMode"]) == (
        16,
        16,
        0,
        "Indexed",
    )
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"] == {
        "containerName": "rl",
        "operator": "In",
        "values": [2],
    }
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    pod = job["template"]["spec"]
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"], pod["serviceAccountName"]) == (
        "Never",
        300,
        "default",
    )
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
    }
    (container,) = pod["containers"]
    assert (container["name"], container["image"]) == ("rl", GKE["IMAGE"])
    assert container["resources"] == {"requests": {"google.com/tpu": 4}, "limits": {"google.com/tpu": 4}}
    assert container["command"] + container["args"] == [
        "python", "experiments/rl.py", "--coordinator=gspo-1-slice-0-0.gspo-1:8482", "--num_processes=16",
        "--process_id=$(PROCESS_ID)",
        f"--config={CONFIG}", "--workdir=/mnt/gspo/runs/x", AWKWARD, "--config.b=$$(PROCESS_ID)"]  # fmt: skip
    assert container["env"][0]["name"] == "PROCESS_ID" and "job-completion-index" in str(
        container["env"][0]["valueFrom"]
    )
    (volume,) = pod["volumes"]
    assert volume["csi"]["volumeAttributes"]["bucketName"] == "my-bucket"
    assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/mnt/gspo"}]


def test_without_overrides_the_yaml_has_no_empty_argument(tools):
    # Catches: "- " left over where EXTRA_ARGS stood, which hands the program an argument that it refuses.
    text = rendered(run("launch_gke.sh", "--dry-run", env=tools | GKE))
    assert "${" not in text and "EXTRA_ARGS" not in text
    assert not re.search(r'^\s*-\s*(""|)$', text, re.MULTILINE)


@pytest.mark.parametrize("name", GKE)
def test_an_unset_variable_of_the_yaml_is_named(name, tools):
    # Catches: an empty field that Kubernetes would refuse, or, worse, accept.
    result = run("launch_gke.sh", "--dry-run", env=tools | {k: v for k, v in GKE.items() if k != name})
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(rf"error: {name} is not set; set it like {name}=\S+\n", result.stderr)


@pytest.mark.parametrize(("name", "value"), [
    ("NAME", "Gspo"), ("NAME", "a" * 41), ("IMAGE", 'x"\n  evil: "y'), ("IMAGE", "a b"), ("CONFIG", "configs/x"),
    ("CONFIG", "a.py: b"),
    ("WORKDIR", "runs/x"), ("WORKDIR", '/mnt/gspo/"'), ("BUCKET", "gs://b"), ("TPU_ACCELERATOR", "v5p"),
    ("TPU_TOPOLOGY", "64"),
    ("TPU_TOPOLOGY", "4x4x4\n"), ("NUM_HOSTS", "0"), ("NUM_HOSTS", "16 # x"), ("NUM_HOSTS", "8"),
    ("CHIPS_PER_HOST", "four"),
    ("SERVICE_ACCOUNT", "me: you"),
])  # fmt: skip
def test_a_value_that_would_break_the_yaml_or_the_slice_is_refused(name, value, tools):
    # Catches: fields that are smuggled in by a quote or a line end, a workdir outside the bucket, hosts that do not
    # fill the topology.
    result = run("launch_gke.sh", "--dry-run", env=tools | GKE | {name: value})
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {name}=") and result.stderr.count("\n") == 1


def test_an_override_with_a_line_end_is_refused(tools):
    # Catches: a second YAML line out of one argument.
    result = run("launch_gke.sh", "--dry-run", "--", "--config.name=a\nb", env=tools | GKE)
    assert (result.returncode, result.stdout) == (2, "")
    assert (
        result.stderr
        == "error: --config.name after --: its value has a line end or another control character; leave it out\n"
    )


def test_the_yaml_that_a_dry_run_prints_is_what_kubectl_gets(tools, tmp_path):
    # Catches: a dry run that shows another file than the one that is applied.
    write_program(
        Path(tools["PATH"]) / "kubectl", f'#!{BASH}\necho "$@" > {tmp_path}/arguments\ncat > {tmp_path}/stdin\n'
    )
    wanted = rendered(run("launch_gke.sh", "--dry-run", "--", AWKWARD, env=tools | GKE))
    assert run("launch_gke.sh", "--", AWKWARD, env=tools | GKE).returncode == 0
    assert (tmp_path / "arguments").read_text() == "apply -f -\n"
    assert (tmp_path / "stdin").read_text() == wanted


@pytest.mark.parametrize(
    ("tool", "words"), [("gcloud", ["launch_tpu_pod.sh", "create", *TPU]), ("kubectl", ["launch_gke.sh"])]
)
def test_a_missing_tool_is_named_with_the_way_to_get_it(tool, words, tools):
    # Catches: "command not found" halfway through.
    (Path(tools["PATH"]) / tool).unlink()
    result = run(*words, env=tools | GKE)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {tool} is missing; install it") and result.stderr.count("\n") == 1
