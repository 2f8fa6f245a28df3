"""scripts/setup_env.sh: which jax it installs. Stubs in place of the machine's programs note how they are called."""

import os
import subprocess

import pytest

from tests.tiny_runs import ROOT

GPU, OLD_GPU = "580.65.06, 9.0", "580.65.06, 7.0"


def set_up(folder, smi: str = "", *, uv: bool = False, own: str = "", **environment: str) -> tuple[str, list[str]]:
    """(what it printed, the installer's command lines) in a copy whose .venv is a stub. smi: what nvidia-smi says.
    uv: the machine has one. own: what the one does that is installed into .venv; "": it cannot be installed."""
    tools, python = folder / "bin", folder / ".venv" / "bin" / "python"
    for path in (folder / "scripts", tools, python.parent):
        path.mkdir(parents=True, exist_ok=True)
    (folder / "scripts" / "setup_env.sh").write_text((ROOT / "scripts" / "setup_env.sh").read_text())
    (folder / "requirements.txt").write_text("jax==1.2.3   # arrays\njaxtyping==9\n")
    (folder / "pyproject.toml").write_text("")
    note = f'#!/bin/bash\necho "$@" >> {folder}/calls\n'
    refuses = "" if own else '[[ "$*" != *uv==* ]]\n'
    answers = {python: note + refuses, tools / "python3": "#!/bin/bash\necho Python 3.99\n"}
    answers[tools / "nvidia-smi"] = f'#!/bin/bash\necho "{smi}"\n' if smi else "#!/bin/bash\nexit 9\n"
    if uv:
        answers[tools / "uv"] = note
    if own:
        answers[python.with_name("uv")] = note.replace('"$@"', '"own uv" "$@"') + own
    for path, text in answers.items():
        path.write_text(text)
        path.chmod(0o755)
    (folder / "calls").write_text("")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}
    done = subprocess.run(["bash", "scripts/setup_env.sh"], cwd=folder, text=True, capture_output=True,
                          env={**kept, "PATH": f"{tools}:/usr/bin:/bin", **environment})  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout, (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize(("smi", "environment", "wanted", "words"), [
    ("", {}, "jax==1.2.3", None),
    ("NVIDIA-SMI has failed", {}, "jax==1.2.3", None),
    (GPU, {}, "jax[cuda13]==1.2.3", "an NVIDIA driver for CUDA 13"),
    (f"{GPU}\n{GPU}", {}, "jax[cuda13]==1.2.3", "an NVIDIA driver for CUDA 13"),
    (OLD_GPU, {}, "jax[cuda12]==1.2.3", "an NVIDIA driver for CUDA 12"),
    ("550.54.15, 9.0", {}, "jax[cuda12]==1.2.3", "an NVIDIA driver for CUDA 12"),
    ("", {"TPU_WORKER_ID": "0"}, "jax[tpu]==1.2.3", "a TPU"),
], ids=["cpu", "broken driver", "gpu", "two gpus", "old gpu", "old driver", "tpu"])  # fmt: skip
@pytest.mark.parametrize("uv", [False, True], ids=["pip", "uv"])
def test_jax_is_installed_for_what_the_machine_has(tmp_path, smi, environment, wanted, words, uv):
    # Catches a GPU that is left idle by the CPU's jax, CUDA 13 under a driver or on a GPU that does not know it,
    # another version than the pinned one, and an installer that is forgotten.
    printed, calls = set_up(tmp_path, smi, uv=uv, **environment)
    assert calls[-2].split()[-3:] == ["-r", "requirements.txt", wanted]
    assert (f"this machine has {words}: installing {wanted}\n" in printed) if words else ("installing" not in printed)


def test_nothing_is_installed_twice_and_a_gpu_that_came_later_is_seen(tmp_path):
    # Catches a stamp that forgets what jax was installed for.
    assert len(set_up(tmp_path)[1]) == 3 and set_up(tmp_path)[1] == []
    assert "jax[cuda13]==1.2.3" in set_up(tmp_path, GPU)[1][1] and set_up(tmp_path, GPU)[1] == []


@pytest.mark.parametrize("fails", [False, True], ids=["works", "fails"])
def test_a_machine_without_uv_gets_one_and_what_it_cannot_do_pip_does(tmp_path, fails):
    # Catches pip's minutes where uv takes seconds, and a machine whose index only pip knows left without packages.
    _, calls = set_up(tmp_path, own="exit 1\n" if fails else "exit 0\n")
    by = [("own uv" if call.startswith("own uv") else "pip") for call in calls]
    assert "uv==" in calls[0]
    assert by == (["pip", "own uv", "pip", "own uv", "pip"] if fails else ["pip", "own uv", "own uv"])
    assert all("jax==1.2.3" in call for call in calls[1 : 3 if fails else 2])
