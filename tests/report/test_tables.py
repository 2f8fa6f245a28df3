"""Tables of runs: which lines a number comes from, and what stands where there is none."""

import json

import pytest

from gspo.report import tables
from gspo.types import UserError
from scripts import expert_load


@pytest.mark.parametrize(
    ("over_seeds", "want"),
    [
        ([], "-"),
        ([None], "-"),
        ([None, None], "-"),
        ([0.25], "0.25"),
        ([0.25, 0.75], "0.50 [0.25, 0.75]"),
        ([0.75, None, 0.25], "0.50 [0.25, 0.75] (2 of 3 seeds)"),
        ([None, 0.5], "0.50 (1 of 2 seeds)"),
    ],
)
def test_a_cell_is_the_mean_over_seeds_with_their_range_and_says_how_many_there_are(over_seeds, want):
    # Catches statistics of nothing, a seed without the metric counted as zero, and one that is dropped without a word.
    assert tables.cell(over_seeds, "{:.2f}") == want


def test_before_is_before_the_first_update_and_after_is_after_the_last():
    # Catches the only evaluation of a run, which comes last, shown as the one before training.
    lines = [{"step": 0, "loss": 1.0}, {"step": 1, "x": 0.4}, {"step": 2, "x": 0.6}]
    assert tables.before_and_after(lines, "x") == (None, 0.6)
    assert tables.before_and_after([{"step": 0, "x": 0.1}, *lines[1:]], "x") == (0.1, 0.6)
    assert tables.before_and_after(lines[2:], "x") == (None, 0.6)  # one line, and training had begun before it
    assert tables.before_and_after([{"step": 0, "x": 0.1}, {"step": 1, "loss": 1.0}], "x") == (0.1, None)
    assert tables.before_and_after([], "x") == (None, None)


def test_what_is_absent_or_null_is_left_out_of_a_mean():
    # Catches NaN, which the file holds as null, taken for a number.
    lines = [{"x": 1}, {"x": None}, {"y": 9.0}, {"x": 2.0}]
    assert tables.mean(lines, "x") == 1.5 and tables.mean(lines, "z") is None


def test_a_file_that_a_run_has_not_written_has_no_lines(tmp_path):
    # Catches a table that fails for want of timings.
    assert tables.lines_of(tmp_path, "timings.jsonl") == []


def test_a_bar_in_a_cell_does_not_end_it():
    # Catches a heading such as max |x| that gives the table two columns more.
    assert tables.markdown([["1", "2"]], ["a", "max |x|"]) == "| a | max \\|x\\| |\n| --- | --- |\n| 1 | 2 |\n"


def test_the_load_of_experts_is_shown_by_layer_for_the_first_and_the_last_update(tmp_path, capsys):
    # Catches max/mean - 1 shown as max/mean, the last evaluation (which has no load) taken for the last update, and a
    # traceback for a dense run.
    peak, variation = "routing/load_max_over_mean_by_layer", "routing/load_cv_by_layer"
    lines = [{peak: [0.5, 3.0], variation: [0.25, 1.0]}, {peak: [0.0, 1.0], variation: [0.0, 0.5]}, {"eval/loss": 1}]
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert expert_load.main([str(tmp_path / "moe")]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| 1 | 1.50 (0.25) | 1.00 (0.00) |",
        "| 2 | 4.00 (1.00) | 2.00 (0.50) |",
        "| mean | 2.75 (0.62) | 1.50 (0.25) |",
    ]
    with pytest.raises(UserError, match=r"^dense: its metrics tell no load of experts"):
        tables.load_by_layer({"dense": lines[2:]})
