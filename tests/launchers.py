"""How tests run the launch scripts, and what they start."""

import shlex
import shutil
import signal
import time
from pathlib import Path

from tests.processes import finished

ROOT = Path(__file__).parents[1]
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


def heed_interrupts():
    """As at a terminal: where tests run in the background SIGINT comes ignored, and bash cannot trap a signal that it
    finds ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


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
