"""The lab: its numbers against loops, its gradients against those of the run, what it measures and compiles but once,
and what it refuses in one line."""

import csv
import json
import math
import shutil

import jax
import numpy as np
import pytest

from gspo import build, rl
from gspo.report import gradients, lab, recorded
from gspo.run import tokens
from gspo.run.writers import read_jsonl
from gspo.types import LossInputs
from tests.loss_arrays import arrays, jit, loss_and_gradient, metrics_of, objective_of
from tests.tiny_runs import command, kept_compiles, rl_config  # noqa: F401 - fixtures
from tests.token_records import about, columns_of_rows

RUN = {
    "updates_per_rollout": 4, "optimizer.learning_rate": 0.01, "scale_rewards": "reinforce++", "eval.every": 0,
    "log.tokens_every": 2, "checkpoint.keep_last": 9, "objective.epsilon": 0.01, "objective.epsilon_high": 0.02,
}  # fmt: skip
ASKED = lab.Asked(("grpo", "gspo"), {}, ())


# ---------------------------------------------------------------------------- numbers


def test_the_variance_of_log_w_splits_as_its_sums_say():
    # Catches a mean over the group in place of the whole, shares that do not add up, n - 1, ties that count whole.
    rng = np.random.default_rng(0)
    x, changes = rng.normal(size=50) + 0.3, rng.integers(0, 4, 50)
    changed = changes > 0
    x[changed] *= 3
    mean = sum(x) / 50
    whole = sum((v - mean) ** 2 for v in x)
    between, within = 0.0, {}
    for flag in (True, False):
        own = [v for v, c in zip(x, changed, strict=True) if c == flag]
        middle = sum(own) / len(own)
        between += len(own) * (middle - mean) ** 2
        within[flag] = sum((v - middle) ** 2 for v in own)
    top, room = 0.0, 12.5
    for number in (3, 2, 1, 0):
        own = [(v - mean) ** 2 for v, c in zip(x, changes, strict=True) if c == number]
        top, room = top + min(room / len(own), 1) * sum(own), max(room - len(own), 0)
    found = lab.split_variance(x, changes)
    want = {
        "token_var": whole / 50,
        "mean_changes": sum(changes) / 50,
        "changed_tokens": sum(changed) / 50,
        "changed_share": sum((v - mean) ** 2 for v, c in zip(x, changed, strict=True) if c) / whole,
        "top_share": top / whole,
        "between_share": between / whole,
        "within_changed": within[True] / whole,
        "within_same": within[False] / whole,
    }
    assert found == pytest.approx(want, rel=1e-12)
    assert found["between_share"] + found["within_changed"] + found["within_same"] == pytest.approx(1)


def test_nothing_that_varies_has_no_shares():
    found = lab.split_variance(np.zeros(3), np.array([1, 0, 0]))
    assert found["token_var"] == 0 and math.isnan(found["changed_share"]) and math.isnan(found["top_share"])
    found = lab.split_variance(np.array([1.0, 2.0]), np.array([3, 3]))
    assert found["changed_share"] == 1 and found["top_share"] == 0.25  # all tie


def test_effective_sample_size_and_cosine_are_their_sums():
    # Catches squares in the wrong place, and weights that overflow.
    log_w = np.random.default_rng(1).normal(size=20)
    w = [math.exp(v) for v in log_w]
    assert lab.ess(log_w) == pytest.approx(sum(w) ** 2 / (20 * sum(v * v for v in w)))
    assert lab.ess(log_w + 2000) == pytest.approx(lab.ess(log_w))
    a, b, none = [1.0, 2.0, -3.0], [0.5, -1.0, 4.0], [0.0, 0.0, 0.0]
    want = sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(14 * 17.25)
    found = gradients.cosines(np.array([a, b, none]))
    np.testing.assert_allclose(found, [[1, want, np.nan], [want, 1, np.nan], [np.nan] * 3], rtol=1e-12)


def test_experts_are_compared_as_sets_where_a_token_is_predicted():
    # Catches a change of order counted as one of choice, columns that are one off, and a sum that wraps at 256.
    old = np.zeros((300, 1, 5, 2), np.int8)
    old[..., 1] = 1
    new = old[..., ::-1].copy()
    new[:, 0, 2, 0] = 3  # P = 3: column 2 predicts the first of C = 2
    assert lab.changes(old, new, 2).tolist() == [[300, 0]]


def test_one_of_several_objectives_is_that_objective():
    # Catches the neighbour's loss, a count of another aggregation, metrics that were mixed.
    names = ("grpo", "dapo")
    given = arrays(rows=5, spread=0.5)

    @jit
    def one_of_them(which, logp, *others):
        one = gradients.OneOf(tuple(objective_of(name) for name in names), which)

        def loss(logp):
            value, metrics = one(LossInputs(logp, *others))
            return value.value, {name: metric.value for name, metric in metrics.items()}

        return jax.value_and_grad(loss, has_aux=True)(logp), one.aggregate(logp, others[-1])

    for which, name in enumerate(names):
        ((loss, metrics), gradient), mean = one_of_them(which, *given)
        want, want_gradient = loss_and_gradient(objective_of(name), *given, {})
        known = metrics_of(objective_of(name), *given)
        np.testing.assert_allclose(loss, want, rtol=1e-5)
        np.testing.assert_allclose(gradient, want_gradient, rtol=1e-5)
        assert metrics == {name: pytest.approx(float(known[name])) for name in gradients.KEPT}
        assert (
            mean.count == objective_of(name).aggregate(given[0], given[-1]).count and metrics["clip_ratio/tokens"] > 0
        )


# ---------------------------------------------------------------------------- once


WRITTEN = RUN | {"max_prompt_length": 12, "max_completion_length": 12}  # what made-up records fit into


@pytest.fixture
def written(tmp_path):
    """A folder that looks like that of a run, up to what is in its checkpoints."""
    plan = build.rl_plan(rl_config(tmp_path, **WRITTEN))
    folder = tmp_path / "written"
    (folder / "checkpoints" / "2").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(plan.written))
    for rollout in (0, 2):
        tokens.write(folder, 0, about(rollout) | {"objective": dict(plan.objective)}, columns_of_rows(rollout))
    return folder


def plan_of(folder, **changes):
    """That of the run, changed."""
    return build.rl_plan(rl_config(folder.parent, **WRITTEN | changes))


# ---------------------------------------------------------------------------- once


def test_what_was_measured_is_measured_again_only_where_something_else_is_asked(tmp_path):
    # Catches work that is done twice, and rows that answer another question.
    calls, path = [], tmp_path / "measured" / "a.0.2.json"

    def measure():
        calls.append(1)
        return [{"ess": len(calls), "changed_share": float("nan")}]

    first = lab.measured_once(path, "this", measure)
    again = lab.measured_once(path, "this", measure)
    assert len(calls) == 1 and again[0]["ess"] == 1 and math.isnan(again[0]["changed_share"]) and len(first) == 1
    assert lab.measured_once(path, "that", measure)[0]["ess"] == 2 and lab.measured_once(path, "this", measure)


def test_a_digest_is_of_what_is_asked_the_config_and_the_record(written):
    # Catches rows that outlive what they were made of.
    run = recorded.opened("a", written, plan_of(written))
    known = ASKED.digest(run, 2)
    assert known == ASKED.digest(recorded.opened("a", written, plan_of(written)), 2)
    others = [
        ASKED._replace(updates=(1,)),
        ASKED._replace(objectives=("grpo",)),
        lab.Asked(("grpo", "gspo"), {"grpo": (0.1, 0.1)}, ()),
    ]
    found = {known, ASKED.digest(run, 0), *(asked.digest(run, 2) for asked in others)}
    found.add(ASKED.digest(run._replace(plan=plan_of(written, seed=5)), 2))
    tokens.write(written, 0, about(2) | {"objective": dict(run.plan.objective)}, columns_of_rows(7))
    assert len(found | {ASKED.digest(run, 2)}) == 7


def test_seeds_share_all_programs_and_arms_of_one_model_share_the_measure(written, monkeypatch):
    # Catches a compilation for each run; and one program for two models, for other objectives or clip ranges.
    made = {"make_steps": 0, "make_measure": 0}

    def counted(name, function):
        def call(*arguments):
            made[name] += 1
            return function(*arguments)

        monkeypatch.setattr(lab, name, call)

    counted("make_steps", lab.make_steps)
    counted("make_measure", lab.make_measure)
    programs = lab.Programs()

    def of(**changes):
        run = recorded.opened("a", written, plan_of(written))._replace(plan=plan_of(written, **changes))
        programs.measure(run, ASKED.settings(run.plan))
        return tuple(made.values())

    ranges = {"objective.epsilon": None, "objective.epsilon_high": None}
    assert of(**ranges) == (1, 1)
    assert of(seed=3, **ranges) == (1, 1)
    assert of(**ranges, **{"router_replay.mode": "R2"}) == (2, 1)
    assert of(**ranges, **{"objective.preset": "grpo"}) == (3, 1)
    assert of() == (4, 2)
    assert of(**ranges, **{"model.d_expert": 16}) == (5, 3)


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
def test_the_lab_meets_the_policies_of_training_and_the_gradients_of_the_learner(run, tmp_path, command, monkeypatch):  # noqa: F811
    # Catches parameters of another moment, rows of another order, an objective of other settings, an optimizer that
    # begins anew; log w that is not 0 where both policies are the same; a program for each objective or rollout, and
    # what is measured a second time.
    traced, gradient_of = [], gradients.gradient_of
    monkeypatch.setattr(gradients, "gradient_of", lambda *given: traced.append(1) or gradient_of(*given))
    code, stdout, stderr = command("lab", *arguments(run, tmp_path))
    assert code == 0, stderr
    assert len(traced) == 2  # with replay and without
    assert "2/2  run, seed 0, rollout 2: " in stdout
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
            shares = [float(row[f"share/{kind}"]) for kind in gradients.KINDS]
            assert math.isnan(shares[0]) or sum(shares) == pytest.approx(1)
            if row["update"] == "0":
                assert float(row["token_var"]) < 1e-9 and float(row["clipped_tokens"]) == 0
                assert float(row["cosine/grpo"]) == pytest.approx(1, abs=1e-5)
                assert float(row["ess"]) == pytest.approx(1)
    assert max(float(row["token_var"]) for row in rows) > 1e-6
    for name in ("cosine", "kinds", "variance"):
        assert {".png", ".pdf"} <= {path.suffix for path in tmp_path.glob(f"{name}.*")}
    assert "gspo" in (tmp_path / "table.md").read_text() and "lab.csv" in stdout
    before = (tmp_path / "lab.csv").read_bytes()
    monkeypatch.setattr(lab, "rows_of_rollout", lambda *_: pytest.fail("measured again"))
    code, _, stderr = command("lab", *arguments(run, tmp_path))
    assert code == 0 and (tmp_path / "lab.csv").read_bytes() == before, stderr


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
    elif what == "long":
        columns = columns_of_rows(2, prompts=["a prompt that is longer than twelve tokens"] * 3)
        tokens.write(run, 0, tokens.read([last]).about, columns)
    elif what == "reference":
        return run, {"objectives": "('grpo','rspo')"}
    elif what == "updates":
        return run, {"updates": "(0,4)"}
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
        ("long", "does not fit the frames"),
        ("objective", "did you mean 'grpo'"),
        ("reference", "'rspo' needs router_logp_LBCX"),
        ("updates", "4 updates per rollout"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_field(written, tmp_path, command, what, says):  # noqa: F811
    # Catches a traceback, and hours of work before the mistake is seen.
    rollouts, fields = damaged(written, tmp_path, what)
    code, _, stderr = command("lab", *arguments(rollouts, tmp_path / "out", **fields))
    assert code == 2 and says in stderr and stderr.count("\n") == 1, stderr
    field = {"objective": "objectives", "reference": "objectives", "updates": "updates"}.get(what, "rollouts")
    assert f"config.{field}" in stderr
    assert not (tmp_path / "out").exists()
