"""The experiments from end to end, each as small as it can be: what they leave, and that no arm stops them."""

import json
import re

import matplotlib.pyplot as plt
import pytest

from gspo import evaluate
from gspo.parallel import distributed
from gspo.report import aot, arms, campaign, tables
from tests.tiny_runs import command, contents, kept_compiles  # noqa: F401 - fixtures

CONFIG_FILE = """
from ml_collections import ConfigDict

from tests.tiny_runs import rl_config, sft_config

SMALL = {{"num_rollouts": 2, "num_prompts": 2, "num_generations": 2, "checkpoint.every": 0}}
SMALL |= {{"eval.num_prompts": 2, "eval.num_generations_eval": 2}}  # the rollouts' own: one sampler for both


def get_config(changes=""):
    config = ConfigDict()
    config.cold_start = sft_config({folder!r}, num_updates=1, **{{"eval.every": 0, "eval.num_prompts": 2}})
    config.base = rl_config({folder!r}, **SMALL)
    config.seeds = (0,)
{more}
    return config
"""
DENSE_ONCE = """
    from configs.paper import Paper

    paper = Paper(config.cold_start, config.base)
    paper.config.base.update(updates_per_rollout=1)
    paper.config.base.eval.every = 0
    dense = {"num_experts": 0, "d_ff": 16}
    cold = paper.cold("dense", model=dense)
    paper.figure("one", (0,), [paper.arm("Dense", cold, {"objective": {"preset": "gspo"}, "model": dense})])
    config = paper.config
    config.reference = "nowhere"
"""
TWO_BY_TWO = """
    config.seeds = (0, 1)
    config.arms = ConfigDict({"GRPO": {"objective": {"preset": "grpo"}}, "GSPO": {"objective": {"preset": "gspo"}}})
"""
DRIFT = """
    config.base.update(old_logps="learner")
    config.mismatch_rollouts = 1
    config.modes = ("R3",)
    config.injections = ConfigDict({"router noise 0.3": {"router_noise": 0.3}}, allow_dotted_keys=True)
"""


class InThisProcess:
    """In place of the processes of a campaign."""

    def __init__(self, waiting, workers, ended, options):
        self.waiting, self.options = waiting, options

    def work(self):
        for run in self.waiting:
            campaign.train_one(run, **self.options)


@pytest.fixture
def experiment(tmp_path, command):  # noqa: F811
    """experiment(script, lines of its config) -> (workdir, stdout); it has to end well."""

    def run(script, more, *arguments):
        path = tmp_path / "config.py"
        path.write_text(CONFIG_FILE.format(folder=str(tmp_path), more=more))
        code, stdout, stderr = command(script, f"--config={path}", f"--workdir={tmp_path / 'run'}", *arguments)
        assert code == 0, stderr
        return tmp_path / "run", stdout

    return run


def cells(path):
    """The table in a Markdown file, as {first cell: {column: cell}}."""
    lines = (re.split(r"(?<!\\)\|", line)[1:-1] for line in path.read_text().splitlines())
    header, _, *rows = ([cell.strip() for cell in line] for line in lines)
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_compare_ends_in_its_table_for_a_dense_arm_with_one_update_and_no_evaluation(experiment, monkeypatch):
    # Catches hours of training that end in a KeyError for a metric that this arm never had, and an evaluation after
    # training shown as one before it.
    monkeypatch.setattr(campaign, "_Crew", InThisProcess)
    workdir, stdout = experiment("compare", DENSE_ONCE)
    row = cells(workdir / "table.md")["Dense"]
    absent = {"pass@1 before", "experts changed per update", "experts changed per rollout"}
    assert {column for column, cell in row.items() if cell == "-"} == absent
    (last,) = tables.lines_of(workdir / "dense" / "0", "metrics.jsonl")[-1:]
    assert row["pass@1 after"] == f"{last['eval/pass@1']:.3f}"
    assert (workdir / "curves.png").exists() and "Dense" in stdout
    assert "One seed shows what can happen, not how often" in stdout and "of 0 seeds" in stdout


@pytest.mark.slow
def test_objectives_trains_tabulates_and_draws_every_seed_of_every_preset(experiment, monkeypatch):
    # Catches the first seed shown for all of them, in the table or in the figure.
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    workdir, stdout = experiment("objectives", TWO_BY_TWO)
    table = cells(workdir / "table.md")
    assert list(table) == ["GRPO", "GSPO"] and all(arm in stdout for arm in table)
    for arm in table:
        entropies = []
        for seed in (0, 1):
            lines = tables.lines_of(workdir / f"{arm.lower()}-{seed}", "metrics.jsonl")
            entropies.append(sum(line["entropy"] for line in lines[:2]) / 2)
        mean, low, high = (f"{x:.3f}" for x in (sum(entropies) / 2, min(entropies), max(entropies)))
        assert table[arm]["entropy, last 5"] == f"{mean} [{low}, {high}]" and low != high
    assert (workdir / "objectives.png").exists()
    lines = figures[0].axes[0].lines
    widths = [line.get_linewidth() for line in lines if line.get_color() == "#0072B2"]
    assert len(widths) == 3 and widths[0] == widths[1] < widths[2]  # thin for each seed, thick for their mean
    assert len([line for line in lines if line.get_color() == "#D55E00"]) == 2  # dots: pass@1 of each seed


@pytest.mark.parametrize("seeds", ["(1, 1)", "()"])
def test_seeds_that_are_none_or_not_different_are_refused(tmp_path, command, seeds):  # noqa: F811
    # Catches one run that is counted as two, and a table of nothing.
    (tmp_path / "config.py").write_text(CONFIG_FILE.format(folder=str(tmp_path), more=TWO_BY_TWO))
    code, _, stderr = command(
        "objectives", f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/run", f"--config.seeds={seeds}"
    )
    assert code == 2 and re.fullmatch(r"error: seeds=\(.*\): give one number or more, each once\n", stderr), stderr


@pytest.mark.slow
def test_routing_drift_leaves_its_figure_and_its_table(experiment):
    # Catches an experiment of eight minutes that fails at its end.
    workdir, stdout = experiment("routing_drift", DRIFT)
    row = cells(workdir / "replay.md")["router noise 0.3"]
    assert row["replay"] == "R3" and row["experts replayed otherwise"] == "0%"
    assert "-" not in row.values() and "router noise 0.3" in stdout
    assert {"drift.png", "by_length.json", "drift", "router_noise_0.3_R3"} <= {path.name for path in workdir.iterdir()}
    assert cells(workdir / "load.md").keys() == {"1", "mean"}


# ---------------------------------------------------------------------------- many processes


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Experiments find their runs done: one arm, one seed, two rollouts."""
    folder = tmp_path / "run" / "a"
    folder.mkdir(parents=True)
    lines = [{"step": step, "reward/mean": 0.5, "loss": 0.1, "eval/pass@1": 0.25} for step in range(2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(arms, "train_arms", lambda *_, **__: {"A": [folder]})
    monkeypatch.setattr(arms, "trained", lambda *_, **__: {"A": [folder]})
    monkeypatch.setattr(evaluate, "evaluate_workdir", lambda *_, **__: (2, {"eval/pass@1": 0.25}, [{"prompt": "0="}]))
    monkeypatch.setattr(aot, "devices_of", lambda _: pytest.fail("compiled on a process that shows nothing"))
    return tmp_path / "run"


@pytest.mark.parametrize("script", ["compare", "objectives", "evaluate"])
def test_only_the_first_of_many_processes_prints_and_writes(tmp_path, trained, command, monkeypatch, script):  # noqa: F811
    # Catches sixteen hosts that print sixteen tables, and write one file all at once.
    more = DENSE_ONCE if script == "compare" else TWO_BY_TWO
    (tmp_path / "config.py").write_text(CONFIG_FILE.format(folder=str(tmp_path), more=more))
    config = f"--config={tmp_path}/config.py" if script != "evaluate" else "--config=configs/gspo_running_sum.py"
    before = contents(trained)
    for primary in (False, True):
        monkeypatch.setattr(distributed, "is_primary", lambda primary=primary: primary)
        code, stdout, stderr = command(script, config, f"--workdir={trained}")
        assert code == 0, stderr
        assert bool(stdout) == primary
        assert (contents(trained) != before) == (primary and script != "evaluate")


def test_only_the_first_of_many_processes_compiles_ahead_of_time(trained, command, monkeypatch):  # noqa: F811
    # Catches each host compiling every slice, and all of them writing the same report.
    monkeypatch.setattr(distributed, "is_primary", lambda: False)
    before = contents(trained)
    assert command("aot", "--config=configs/aot.py", f"--workdir={trained}") == (0, "", "")
    assert contents(trained) == before
