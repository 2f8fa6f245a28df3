"""The SLURM job: what it would start, and how it treats its processes near its time limit."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.launchers import AWKWARD, BASH, CONFIG, ROOT, SCRIPTS, commands, run, wait_for, write_program

pytestmark = pytest.mark.skipif(BASH is None, reason="needs bash")


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
