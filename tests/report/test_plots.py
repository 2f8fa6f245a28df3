"""The figure: what is drawn where, from which numbers; and the mistakes that it names."""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from gspo.report import plots
from gspo.types import UserError
from scripts import plot_curves as script


def write_run(folder, n=12, shift=0.0, **changes):
    """A metrics.jsonl with every metric of the figure; `changes`: metric (with _ for /) -> function of the step, or
    None."""
    folder.mkdir(parents=True)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(n):
            line = {"step": step, "reward/mean": 0.3 + 0.05 * step + shift, "clip_ratio/tokens": 0.15, "entropy": 1.0,
                    "routing/experts_changed": 0.04, "completions/mean_length": 12.0}  # fmt: skip
            if step % 5 == 0:
                line["eval/pass@1"] = 0.4 + shift
            line |= {name: change(step) for name, change in changes.items()}
            file.write(json.dumps({name: value for name, value in line.items() if value != "absent"}) + "\n")
    return folder


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, kept open."""
    kept = []
    monkeypatch.setattr(plots.plt, "close", kept.append)
    return kept


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def test_two_runs_give_four_lettered_panels_and_one_legend(tmp_path, figures):
    # Catches: a panel or a run that is left out, a legend per panel, axes without labels.
    workdirs = [write_run(tmp_path / "gspo"), write_run(tmp_path / "grpo", shift=-0.1)]
    out = plots.plot_curves(workdirs, ["GSPO", "GRPO"], tmp_path / "curves.png", title="toy")
    (figure,) = figures
    assert titles(figure) == ["Reward", "Clipped tokens", "Experts changed per rollout", "Entropy of the policy"]
    assert [axes.texts[-1].get_text() for axes in figure.axes] == list("abcd")
    assert all(
        axes.get_xlabel() == "Rollout" and axes.get_ylabel() and axes.get_legend() is None for axes in figure.axes
    )
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["GSPO", "GRPO", "unsmoothed", "held-out pass@1"]
    assert figure.axes[1].get_yscale() == "log"
    pixels = matplotlib.image.imread(out)
    assert pixels.shape[1] >= 1500 and pixels[..., :3].std() > 0.05


def test_the_lines_carry_the_numbers_of_the_file_in_the_units_of_the_axis(tmp_path, figures):
    # Catches: fractions under a percent sign, smoothing applied to the raw line, the wrong metric in a panel.
    plots.plot_curves([write_run(tmp_path / "a")], None, tmp_path / "out.png", smooth=0.5)
    reward, clipped, experts, _ = figures[0].axes
    raw, bold = reward.lines[:2]
    want = 0.3 + 0.05 * np.arange(12)
    np.testing.assert_allclose(raw.get_ydata(), want)
    np.testing.assert_allclose(bold.get_ydata()[:2], [want[0], (0.25 * want[0] + 0.5 * want[1]) / 0.75])
    np.testing.assert_allclose(clipped.lines[0].get_ydata(), 15.0)
    np.testing.assert_allclose(experts.lines[0].get_ydata(), 4.0)
    np.testing.assert_allclose(reward.containers[0].lines[0].get_xydata(), [[0, 0.4], [5, 0.4], [10, 0.4]])


def test_workdirs_under_one_label_become_a_mean_with_a_band_over_their_common_rollouts(tmp_path, figures):
    # Catches: seeds drawn as separate runs; a mean that jumps where the shorter seed ends; a band that is not the
    # range.
    dirs = [write_run(tmp_path / "s0", n=12), write_run(tmp_path / "s1", n=9, shift=0.2)]
    plots.plot_curves(dirs, ["GSPO", "GSPO"], tmp_path / "out.png", smooth=0)
    reward = figures[0].axes[0]
    np.testing.assert_allclose(reward.lines[0].get_ydata(), 0.4 + 0.05 * np.arange(9))
    corners = reward.collections[0].get_paths()[0].vertices
    np.testing.assert_allclose([corners[:, 1].min(), corners[:, 1].max()], [0.3, 0.3 + 0.05 * 8 + 0.2])
    words = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert words == ["GSPO (2 seeds)", "range over seeds", "held-out pass@1"]


def test_a_run_keeps_its_colour_and_a_run_that_never_clips_is_named_on_the_log_panel(tmp_path, figures):
    # Catches: colours by order of drawing within a panel; a line that vanishes without a word because log(0) cannot be
    # shown.
    dirs = [write_run(tmp_path / "grpo", **{"clip_ratio/tokens": lambda step: 0.0}), write_run(tmp_path / "gspo")]
    plots.plot_curves(dirs, None, tmp_path / "out.png")
    _, clipped, experts, _ = figures[0].axes
    colors = [line.get_color() for line in experts.lines]
    assert colors == [plots.COLORS[0]] * 2 + [plots.COLORS[1]] * 2
    assert {line.get_color() for line in clipped.lines} == {plots.COLORS[1]}
    (note,) = [text for text in clipped.texts if text.get_text() == "grpo: none"]
    assert note.get_color() == plots.COLORS[0]


def test_panels_without_data_are_dropped_and_length_stands_in_for_entropy(tmp_path, figures):
    # Catches: empty axes for a dense model; null and absent values drawn as zero.
    gone = dict.fromkeys(["routing/experts_changed", "eval/pass@1"], lambda step: "absent")
    run = write_run(tmp_path / "dense", **gone, entropy=lambda step: None)
    plots.plot_curves([run], None, tmp_path / "out.png")
    assert titles(figures[0]) == ["Reward", "Clipped tokens", "Length of completions"]


@pytest.mark.parametrize("n", [1, 2])
def test_a_run_that_has_just_begun_can_be_plotted(tmp_path, figures, n):
    # Catches: a log axis or a limit that fails on one point; a single value drawn as an invisible line.
    plots.plot_curves([write_run(tmp_path / "young", n=n)], None, tmp_path / "out.png")
    assert (figures[0].axes[3].lines[-1].get_marker() == ".") == (n == 1)


def test_runs_are_given_as_folders_or_as_label_equals_folders(tmp_path):
    # Catches: a folder with "=" or "," in its name cut in pieces.
    (tmp_path / "lr=1,b=2").mkdir()
    assert script.parse_run("runs/a") == (None, ["runs/a"])
    assert script.parse_run("GSPO=runs/a,runs/b") == ("GSPO", ["runs/a", "runs/b"])
    assert script.parse_run(str(tmp_path / "lr=1,b=2")) == (None, [str(tmp_path / "lr=1,b=2")])
    assert plots.short_names(["x/gspo", "x/grpo"]) == ["gspo", "grpo"]
    assert plots.short_names(["x/gspo", "y/gspo"]) == ["x/gspo", "y/gspo"]
    with pytest.raises(UserError, match="label=workdir"):
        script.parse_run("GSPO=")


def test_mistakes_are_one_line_with_exit_code_2(tmp_path, capsys):
    # Catches: a traceback; an empty figure.
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "metrics.jsonl").write_text('{"step": 0')
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.jsonl").write_text('{"step": 0, "loss": 1}\n')
    good = str(write_run(tmp_path / "good"))
    out = f"--out={tmp_path / 'out.png'}"
    for arguments, words in (
        ([str(tmp_path / "nowhere"), out], "no such workdir"),
        ([str(tmp_path / "empty"), out], "no metrics.jsonl"),
        ([good, str(tmp_path / "half"), out], "no complete line"),
        ([str(tmp_path / "other"), out], "no metric to plot"),
        ([good, out, "--smooth=1"], "smooth=1"),
        ([good, f"--out={tmp_path}/no/where.png"], "cannot be written"),
    ):
        assert script.main(arguments) == 2
        captured = capsys.readouterr()
        assert words in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert not (tmp_path / "out.png").exists()


def test_the_command_writes_the_figure(tmp_path):
    # Catches: a script that only works from inside the tests (imports, backend).
    write_run(tmp_path / "gspo")
    path = Path(script.__file__)
    command = [sys.executable, str(path), "gspo", "GRPO=gspo", "--out=c.svg"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, "c.svg"), result.stderr
    assert "GRPO" in (tmp_path / "c.svg").read_text()
