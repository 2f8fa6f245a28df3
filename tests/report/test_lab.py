"""The lab: its numbers against loops, its gradients against those of the run, and what it refuses in one line."""

import csv
import json
import math
import shutil

import numpy as np
import pytest

from gspo import build, rl
from gspo.report import lab
from gspo.run import tokens
from gspo.run.writers import read_jsonl
from tests.tiny_runs import command, kept_compiles, rl_config  # noqa: F401 - fixtures
from tests.token_records import about, columns_of_rows

RUN = {
    "updates_per_rollout": 4, "optimizer.learning_rate": 0.01, "scale_rewards": "reinforce++", "eval.every": 0,
    "log.tokens_every": 2, "checkpoint.keep_last": 9, "objective.epsilon": 0.01, "objective.epsilon_high": 0.02,
}  # fmt: skip


# ---------------------------------------------------------------------------- numbers


def test_the_variance_of_log_w_splits_as_its_sums_say():
    # Catches a mean over the group in place of the whole, shares that do not add up, n - 1.
    rng = np.random.default_rng(0)
    x, changed = rng.normal(size=50) + 0.3, rng.random(50) < 0.3
    x[changed] *= 3
    mean = sum(x) / 50
    whole = sum((v - mean) ** 2 for v in x)
    between, within = 0.0, {}
    for flag in (True, False):
        own = [v for v, c in zip(x, changed, strict=True) if c == flag]
        middle = sum(own) / len(own)
        between += len(own) * (middle - mean) ** 2
        within[flag] = sum((v - middle) ** 2 for v in own)
    found = lab.split_variance(x, changed)
    want = {
        "token_var": whole / 50,
        "changed_tokens": sum(changed) / 50,
        "changed_share": sum((v - mean) ** 2 for v, c in zip(x, changed, strict=True) if c) / whole,
        "between_share": between / whole,
        "within_changed": within[True] / whole,
        "within_same": within[False] / whole,
    }
    assert found == pytest.approx(want, rel=1e-12)
    assert found["between_share"] + found["within_changed"] + found["within_same"] == pytest.approx(1)


def test_nothing_that_varies_has_no_shares():
    found = lab.split_variance(np.zeros(3), np.array([True, False, False]))
    assert found["token_var"] == 0 and math.isnan(found["changed_share"])
    assert lab.split_variance(np.array([1.0, 2.0]), np.array([True, True]))["changed_share"] == 1


def test_effective_sample_size_and_cosine_are_their_sums():
    # Catches squares in the wrong place, and weights that overflow.
    log_w = np.random.default_rng(1).normal(size=20)
    w = [math.exp(v) for v in log_w]
    assert lab.ess(log_w) == pytest.approx(sum(w) ** 2 / (20 * sum(v * v for v in w)))
    assert lab.ess(log_w + 2000) == pytest.approx(lab.ess(log_w))
    a, b = [1.0, 2.0, -3.0], [0.5, -1.0, 4.0]
    want = sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(14 * 17.25)
    assert lab.cosine(np.array(a), np.array(b)) == pytest.approx(want)
    assert math.isnan(lab.cosine(np.zeros(3), np.array(a)))


def test_experts_are_compared_as_sets_where_a_token_is_predicted():
    # Catches a change of order counted as one of choice, and columns that are one off.
    old = np.zeros((1, 1, 5, 2), np.int8)
    old[..., 1] = 1
    new = old[..., ::-1].copy()
    new[0, 0, 2, 0] = 3  # P = 3: column 2 predicts the first of C = 2
    assert lab.routes_changed(old, new, 2).tolist() == [[True, False]]


# ---------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    rl.train(build.rl_plan(rl_config(folder, **RUN)), folder / "run")
    return folder / "run"


def arguments(run, out, **fields):
    fields = {"rollouts": run, "objectives": "('grpo','gspo')", "updates": "(0,1,2,3)"} | fields
    return ["--config=configs/lab.py", f"--workdir={out}", *(f"--config.{k}={v}" for k, v in fields.items())]


@pytest.mark.slow
def test_the_lab_meets_the_policies_of_training_and_the_gradients_of_the_learner(run, tmp_path, command):  # noqa: F811
    # Catches parameters of another moment, rows of another order, an objective of other settings, an optimizer that
    # begins anew; log w that is not 0 where both policies are the same.
    code, stdout, stderr = command("lab", *arguments(run, tmp_path))
    assert code == 0, stderr
    with open(tmp_path / "lab.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4 * 2 * 2  # rollouts, updates, replay, objectives
    lines = read_jsonl(run / "metrics.jsonl")
    for rollout in (0, 2):
        own = [row for row in rows if int(row["rollout"]) == rollout]
        assert all(float(row["replay_error"]) < 1e-6 for row in own)
        norms = [float(r["grad_norm"]) for r in own if (r["objective"], r["replay"]) == ("gspo", "off")]
        np.testing.assert_allclose(np.mean(norms), lines[rollout]["grad_norm"], rtol=1e-5)
        np.testing.assert_allclose(max(norms), lines[rollout]["grad_norm/max"], rtol=1e-5)
        assert min(norms[1:]) >= 0 and len(set(norms)) > 2
        for row in own:
            shares = [float(row[f"share/{kind}"]) for kind in lab.KINDS]
            assert math.isnan(shares[0]) or sum(shares) == pytest.approx(1)
            if row["update"] == "0":
                assert float(row["token_var"]) < 1e-9 and float(row["clipped_tokens"]) == 0
                assert float(row["cosine/grpo"]) == pytest.approx(1, abs=1e-5)
                assert float(row["ess"]) == pytest.approx(1)
    assert max(float(row["token_var"]) for row in rows) > 1e-6
    for name in ("cosine", "kinds", "variance"):
        assert {".png", ".pdf"} <= {path.suffix for path in tmp_path.glob(f"{name}.*")}
    assert "gspo" in (tmp_path / "table.md").read_text() and "lab.csv" in stdout


@pytest.fixture
def written(tmp_path):
    """A folder that looks like that of a run, up to what is in its checkpoints."""
    plan = build.rl_plan(rl_config(tmp_path, **RUN))
    folder = tmp_path / "written"
    (folder / "checkpoints" / "2").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(plan.written))
    for rollout in (0, 2):
        tokens.write(folder, 0, about(rollout) | {"objective": dict(plan.objective)}, columns_of_rows(rollout))
    return folder


def damaged(run, tmp_path, what):
    """The folder with one thing wrong, and the fields that go with it."""
    if what == "objective":
        return run, {"objectives": "('gspo','grppo')"}
    if what == "folder":
        return tmp_path / "nowhere", {}
    if what == "none":
        return "", {}
    last = run / "tokens" / "000002.0.npz"
    if what == "records":
        shutil.rmtree(run / "tokens")
    elif what == "truncated":
        last.write_bytes(last.read_bytes()[:500])
    elif what == "foreign":
        shutil.copy(run / "tokens" / "000000.0.npz", last)
    elif what == "checkpoint":
        shutil.rmtree(run / "checkpoints" / "2")
    return run, {}


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("none", "config.rollouts: name the workdir"),
        ("folder", "it holds no config.json"),
        ("records", "log.tokens_every"),
        ("truncated", "not a whole record of tokens"),
        ("foreign", "is of another run; remove it"),
        ("checkpoint", "checkpoint.keep_last"),
        ("objective", "did you mean 'grpo'"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_field(written, tmp_path, command, what, says):  # noqa: F811
    # Catches a traceback, and hours of work before the mistake is seen.
    rollouts, fields = damaged(written, tmp_path, what)
    code, _, stderr = command("lab", *arguments(rollouts, tmp_path / "out", **fields))
    assert code == 2 and says in stderr and stderr.count("\n") == 1, stderr
    assert ("config.objectives" if what == "objective" else "config.rollouts") in stderr
    assert not (tmp_path / "out").exists()
