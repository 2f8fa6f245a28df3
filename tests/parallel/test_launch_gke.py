"""The YAML of a GKE JobSet, and what is refused before it is written.

Nothing here reaches a cluster: PATH holds a few named tools, and for gcloud, kubectl and the like a trap that notes
that it was called."""

import re
from pathlib import Path

import pytest

from tests.launchers import AWKWARD, BASH, CONFIG, GKE, TPU, run, write_program

pytestmark = pytest.mark.skipif(BASH is None, reason="needs bash")


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
