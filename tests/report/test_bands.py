"""Figures over many seeds: what is drawn, from which numbers, and that no figure fails on what is not there."""

import csv
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from configs import base, paper_cpu
from experiments.paper_claims import CLAIMS
from experiments.paper_figures import draw_all, end_of, gains, labels_of, swept
from gspo.report import bands
from gspo.report.evidence import smoothed
from gspo.report.ledger import Ledger
from tests.report.test_evidence import curve

RESULTS = Path(__file__).parent.parent.parent / "experiments" / "results" / "paper_cpu"


def seeds_of(*levels, length=8, **columns):
    """seed -> a run whose reward is `level` all along."""
    return {10 + i: curve([level] * length, **columns) for i, level in enumerate(levels)}


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_that_diverged_counts_with_a_reward_of_nothing(tmp_path):
    # Catches a mean over the survivors, which makes the worst method the best.
    curves = seeds_of(0.5, 0.5) | {12: curve([0.5] * 3, entropy=0.3)}
    np.testing.assert_array_equal(bands.matrix(curves, "reward")[2], [0.5] * 3 + [0] * 5)
    curves = {10: curve([0.5] * 5, entropy=0.2), 11: curve([0.5] * 3, entropy=0.3)}
    np.testing.assert_array_equal(bands.matrix(curves, "entropy")[1], [0.3] * 5)


def test_a_band_is_the_middle_of_the_seeds_with_its_interval(tmp_path):
    # Catches a mean that one seed decides, and a CSV that is not what is drawn.
    figure, (axes,) = bands.new_figure(1, 1)
    rows = bands.curve_panel(axes, {"GRPO": seeds_of(0.1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 1.0)}, "reward", "Reward")
    assert len(axes.lines) == 8 + 1 and axes.get_legend_handles_labels()[1] == ["GRPO (n = 8)"]
    bands.save(figure, [axes], rows, tmp_path / "figure")
    last = rows_of(tmp_path / "figure.csv")[-1]
    assert (last["arm"], last["rollout"], last["iqm"]) == ("GRPO", "8", "0.5")
    assert float(last["low"]) < 0.5 < float(last["high"])
    assert (tmp_path / "figure.png").stat().st_size > 5000 and (tmp_path / "figure.pdf").exists()


def test_a_share_that_is_nothing_everywhere_is_drawn_on_a_plain_axis(tmp_path):
    # Catches a run that ends in its figure because no token was clipped.
    figure, (axes,) = bands.new_figure(1, 1)
    bands.curve_panel(axes, {"GRPO": seeds_of(0.5, clipped=0.0)}, "clipped", "Clipped", log=True)
    bands.save(figure, [axes], [], tmp_path / "figure")
    assert axes.get_yscale() == "linear" and not (tmp_path / "figure.csv").exists()


def test_a_method_has_its_colour_in_every_figure_and_nothing_on_a_log_axis_is_a_gap(tmp_path):
    # Catches GRPO in blue beside a figure where it is orange, two arms of one colour, and a cliff down to the axis.
    names = ["B MoE GSPO", "GRPO", "rspo", "GRPO+R2", "GSPO", "dapo"]
    found = bands.colors_of(names)
    assert len(set(found.values())) == 6
    assert (found["GRPO"], found["B MoE GSPO"]) == (bands.SHADES["GRPO"][0], bands.SHADES["GSPO"][0])
    figure, (axes,) = bands.new_figure(1, 1)
    own = seeds_of(0.5, 0.5, clipped=np.array([0.1] * 4 + [0.0] * 4))
    bands.curve_panel(axes, {"GRPO": own}, "clipped", "Clipped", log=True, window=1)
    assert all(np.isnan(line.get_ydata()).tolist() == [False] * 4 + [True] * 4 for line in axes.lines)
    plt.close(figure)


def test_own_curves_lie_over_the_range_of_those_before(tmp_path):
    # Catches a band of other rollouts than the curve's, and one of nothing where nothing was run before.
    figure, (axes, other) = bands.new_figure(1, 2)
    own = {0: curve(np.linspace(0, 0.7, 8))}
    bands.ordinary_panel(axes, own, seeds_of(0.2, 0.4, 0.9, length=20), "reward", "GRPO", color="red")
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    assert corners[:, 0].max() == 8 and set(np.round(corners[:, 1], 6)) == {0.2, 0.9}
    np.testing.assert_allclose(axes.lines[1].get_ydata(), smoothed(np.linspace(0, 0.7, 8)))
    bands.ordinary_panel(other, own, {}, "reward", "GRPO", color="red")
    assert not other.collections
    plt.close(figure)


@pytest.mark.parametrize("all_of_them", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_figure_of_the_paper_is_drawn_from_what_there_is(tmp_path, all_of_them):
    # Catches a night that ends in a figure of arms that have not run, and an arm's name that a figure has wrong.
    config = paper_cpu.get_config()
    columns = dict(
        clipped=0.1, experts_changed=0.1, experts_changed_per_update=0.01, tokens=1e6, sequence_variance=1e-4
    )
    known = seeds_of(0.5, 0.6, 0.4, length=3, **columns)
    asked = []

    def curves(arm):
        asked.append(arm)
        return known if all_of_them or arm == "B MoE GRPO" else {}

    drawn = draw_all(curves, config, tmp_path)
    names = {path.name for path in drawn}
    assert names == (
        {"fig1_a", "fig1_b", "fig1_best", "fig2", "fig3", "sweep", "gains", "dose", "staleness", "length", "depth"}
        | {"clips", "objectives", "old_logps", "again"}
        if all_of_them
        else {"fig1_b", "fig2", "fig3"}
    )
    assert all(path.with_suffix(".png").exists() and path.with_suffix(".csv").exists() for path in drawn)
    known = {*config.arms, *config.same}
    assert set(asked) <= known, set(asked) - known


def test_the_interaction_is_the_gain_on_the_moe_less_that_on_its_twin(tmp_path):
    # Catches a gain of other seeds than those that both methods have, and one with its sign turned.
    level = {"B MoE GRPO": 0.5, "B MoE GSPO": 0.8, "dense GRPO": 0.7, "dense GSPO": 0.6}

    def curves(arm):
        model, rate, power = arm.replace(" lr ", "|").replace(" clip 2^", "|").split("|")
        more = 0.0 if rate == "1e-4" else 0.1 * (model == "B MoE GSPO")
        found = seeds_of(level[model] + more, level[model] + more)
        if rate == "2e-4":  # of as many gains, but of other seeds or ranges
            seed = 10 if "MoE" in model else 11
            return {seed: found[seed]} if power == "0" else {}
        if rate == "3e-4" and "MoE" in model:
            return {}
        return found if power == "0" else {10: found[10]}

    gains(curves, ("1e-4", "2e-4", "3e-4"), (0, 1), tmp_path / "gains")
    told = {(row["arm"], row["Learning rate"]): float(row["iqm"]) for row in rows_of(tmp_path / "gains.csv")}
    assert told == {
        ("MoE", "0.0001"): 0.3, ("MoE", "0.0002"): 0.4, ("dense twin", "0.0001"): -0.1, ("dense twin", "0.0002"): -0.1,
        ("dense twin", "0.0003"): -0.1, ("MoE - dense twin", "0.0001"): 0.4,
    }  # fmt: skip


def test_each_method_is_at_its_own_best_of_the_sweep():
    # Catches a tuned arm that the committed sweep does not choose, or chooses by a seed that is reported elsewhere.
    config, ledger = paper_cpu.get_config(), Ledger(RESULTS, base.rl(), "")
    for arm, best in paper_cpu.BEST.items():
        cells = {(rate, power): ledger.curves(swept(*arm.rsplit(" ", 1), rate, power))
                 for rate in paper_cpu.SWEEP_RATES for power in paper_cpu.SWEEP_CLIPS}  # fmt: skip
        assert all(set(own) == set(paper_cpu.SWEPT) for own in cells.values())
        assert max(cells, key=lambda cell: end_of(cells[cell])) == best, arm
        changes = config.arms[f"best {arm.removeprefix('B ')}"].changes
        at = config.arms[swept(*arm.rsplit(" ", 1), *best)].changes
        assert changes.to_dict() == at.to_dict(), arm


def test_every_claim_is_about_arms_of_one_figure_that_runs_them():
    # Catches a claim that nothing will ever judge.
    config = paper_cpu.get_config()
    for claim in CLAIMS:
        arms = {config.same.get(arm, arm) for arm in claim.weights}
        assert arms <= set(config.arms), f"{claim.number}: {arms - set(config.arms)}"
        seeds = [
            {seed for name in config.figures if arm in config.figures[name].arms for seed in config.figures[name].seeds}
            for arm in arms
        ]
        assert len(set.intersection(*seeds)) >= 3, claim.number
        assert claim.figure in config.figures, claim.number


def test_an_arm_is_called_as_its_figure_means_it():
    # Catches "16 updates mismatch GRPO" in a figure that asks whose log-probs are the old ones, and two arms under one
    # label.
    config = paper_cpu.get_config()
    called = labels_of(config, "old_logps")
    assert set(called) == {f"{whose} {method}" for whose in ("sampler", "learner") for method in ("GRPO", "GSPO")}
    assert called["learner GRPO"] == "16 updates mismatch GRPO"
    assert labels_of(config, "objectives")["rspo"] == "router x20 RSPO"
    for name in ("clips", "objectives", "old_logps", "again"):
        assert set(labels_of(config, name).values()) >= set(config.figures[name].arms)
