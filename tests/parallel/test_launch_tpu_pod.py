"""The commands for a slice of TPUs: requested, set up, run, stopped, deleted.

Nothing here reaches a cluster: PATH holds a few named tools, and for gcloud, kubectl and the like a trap that notes
that it was called."""

import json
import re
import sys
from pathlib import Path

import pytest

from tests.launchers import AWKWARD, BASH, CONFIG, ROOT, TPU, commands, execute, run, write_program

pytestmark = pytest.mark.skipif(BASH is None, reason="needs bash")


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
