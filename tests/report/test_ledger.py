"""The ledger: which runs it knows, and curves that come back as they were written."""

import json

import numpy as np
import pytest

from configs import base, paper_cpu, paper_gpu, paper_pod
from gspo import build
from gspo.report.arms import laid_over, runs_of, seeds_of_arms, slug
from gspo.report.campaign import DIVERGED, Run
from gspo.report.ledger import Ledger, figures_table
from gspo.types import UserError


def paper(**figures):
    from configs.paper import Paper

    made = Paper(base.sft(), base.rl())
    cold = made.cold("small", model={"num_experts": 4})
    for arm, beta in (("first", 0.0), ("second", 0.1)):
        made.arm(arm, cold, {"objective": {"beta": beta}})
    for name, (arms, seeds) in figures.items():
        made.figure(name, seeds, arms)
    return made.config


def run_with(folder, seed=10, arm="B MoE GRPO", rewards=(0.25, 0.5), **changes):
    """A run that has ended, of two rollouts by default."""
    config = laid_over(base.rl(), changes, seed=seed, init_from=f"/somewhere/{seed}", num_rollouts=len(rewards))
    run = Run(arm, seed, folder / slug(arm) / str(seed), config, folder / "cold")
    run.folder.mkdir(parents=True)
    lines = [{"step": i, "reward/mean": r, "num_tokens": 100, "entropy": 1 / 3} for i, r in enumerate(rewards)]
    lines.append({"step": len(rewards), "eval/pass@1": 0.75})
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run.folder / "timings.jsonl").write_text('{"step": 0, "rollout": 1.5, "update": 2.0, "tokens_per_second": 9.0}\n')
    return run


def test_curves_come_back_with_tokens_added_up_and_gaps_as_nan(tmp_path):
    # Catches an evaluation that is taken for a rollout without reward, and seeds that overwrite one another.
    ledger = Ledger(tmp_path / "results", base.rl(), "abc")
    for seed in (11, 10):
        ledger.add(run_with(tmp_path, seed, rewards=(0.25, seed / 100)))
    curves = Ledger(tmp_path / "results", base.rl()).curves("B MoE GRPO")
    assert list(curves) == [10, 11]
    np.testing.assert_array_equal(curves[11]["reward"], [0.25, 0.11, np.nan])
    np.testing.assert_array_equal(curves[10]["tokens"], [100, 200, 200])
    np.testing.assert_array_equal(curves[10]["pass@1"], [np.nan, np.nan, 0.75])
    assert ledger.curves("never run") == {}


def test_a_finished_run_is_known_and_one_of_another_config_is_an_error(tmp_path):
    # Catches arms that are made again every time, and a figure that mixes two settings under one name.
    run = run_with(tmp_path)
    ledger = Ledger(tmp_path / "results", base.rl(), "abc")
    assert not ledger.has(run)
    ledger.add(run)
    again = Ledger(tmp_path / "results", base.rl())
    assert again.has(run)
    assert again.has(run._replace(config=laid_over(run.config, {}, init_from="/elsewhere")))
    assert not again.has(run._replace(seed=11))
    other = run._replace(config=laid_over(run.config, {"optimizer": {"learning_rate": 0.5}}))
    with pytest.raises(UserError, match="B MoE GRPO, seed 10, made with another config"):
        again.has(other)
    later = base.rl()
    later.a_field_of_later = 1
    assert Ledger(tmp_path / "results", later).has(run._replace(config=laid_over(run.config, {"a_field_of_later": 1})))


def test_a_run_that_diverged_is_in_the_list_as_such(tmp_path):
    # Catches a diverged run that is trained again and again, or shown as finished.
    run = run_with(tmp_path)
    (run.folder / DIVERGED).write_text("loss is not finite\n")
    ledger = Ledger(tmp_path / "results", base.rl(), "abc")
    ledger.add(run)
    (row,) = ledger.runs.values()
    assert (row["ended"], row["seconds"], row["commit"]) == ("diverged", "4", "abc")


def test_a_table_says_how_much_of_each_figure_has_run(tmp_path):
    # Catches a run of two figures counted twice, and seeds that only some arms have.
    config = paper(one=(["first", "second"], (10, 11, 12, 14)), two=(["first"], (10, 11, 12)))
    ledger = Ledger(tmp_path / "results", base.rl(), "abc")
    for arm, seeds in (("first", (10, 11, 12)), ("second", (10, 11, 14))):
        for seed in seeds:
            ledger.add(run_with(tmp_path, seed, arm))
            ledger.runs[arm, seed] |= {"seconds": "1800", "date": f"2026-11-{seed}"}
    rows, columns = figures_table(config, ledger)
    assert rows == [
        ["one", "10 to 11", "6", "8", "3.0", "abc", "2026-11-10 to 2026-11-14"],
        ["two", "10 to 12", "3", "3", "1.5", "abc", "2026-11-10 to 2026-11-12"],
        ["all", "-", "6", "8", "3.0", "abc", "2026-11-10 to 2026-11-14"],
    ]
    assert len(columns) == len(rows[0])
    assert figures_table(config, Ledger(tmp_path / "none", base.rl()))[0][0] == ["one", "-", "0", "8", "0.0", "", ""]


def test_runs_go_seed_by_seed_with_cold_starts_before_what_begins_with_them(tmp_path):
    # Catches all seeds of one arm before the first of the next, and an arm that two figures share run twice.
    config = paper(one=(["first", "second"], (10, 11)), two=(["first"], (11, 12)))
    names = [run.name for run in runs_of(config, tmp_path)]
    assert names == [
        "cold start small, seed 10", "first, seed 10", "second, seed 10",
        "cold start small, seed 11", "first, seed 11", "second, seed 11",
        "cold start small, seed 12", "first, seed 12",
    ]  # fmt: skip
    assert [run.name for run in runs_of(config, tmp_path, figures=["two"], seeds=[12])] == names[-2:]
    first, second = (run for run in runs_of(config, tmp_path) if run.seed == 10 and run.cold)
    assert (first.config.objective.beta, second.config.objective.beta) == (0.0, 0.1)
    assert first.config.init_from == second.config.init_from == str(tmp_path / "cold/small/10")


@pytest.mark.parametrize("of", [paper_cpu, paper_gpu, paper_pod])
def test_every_run_of_the_papers_configs_has_a_plan(of, tmp_path):
    # Catches a cold start whose batch does not come out even, which a night on a pod would begin with.
    config = of.get_config()
    runs = [run for seed in (10, 100) for run in runs_of(config, tmp_path, seeds=[seed])] if of is paper_cpu else (
        runs_of(config, tmp_path))  # fmt: skip
    assert {run.arm for run in runs} >= set(config.arms) and len(runs) >= len(config.arms) + len(config.colds)
    for run in runs:
        build.run_plan(run.config)


def test_an_arm_may_begin_with_a_checkpoint_of_another_one(tmp_path):
    # Catches a restart that begins with the cold start, or before the run whose checkpoint it needs.
    config = paper(one=(["third"], (10,)))
    config.arms.third = {"cold": "first@20", "changes": {"objective": {"beta": 0.2}}}
    cold, first, third = runs_of(config, tmp_path)
    assert (cold.cold, first.cold, third.cold) == (None, cold.folder, first.folder)
    assert third.config.init_from == str(tmp_path / "first/10/checkpoints/20")


def test_names_that_the_config_does_not_have_are_one_line_errors(tmp_path):
    # Catches an empty night of work for a misspelt figure.
    config = paper(one=(["first"], (10,)))
    for mistake, message in (
        ({"figures": ["won"]}, "--figures: there is no 'won'; choose from one"),
        ({"arms": ["third"]}, "--arms=third: in the name of no arm"),
        ({"seeds": [99]}, "--seeds=99: no arm that was asked for has one of them"),
    ):
        with pytest.raises(UserError, match=message):
            runs_of(config, tmp_path, **mistake)
    assert seeds_of_arms(config) == {"first": [10]}
