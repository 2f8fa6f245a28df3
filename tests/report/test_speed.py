"""Tables of measurements: every number comes from the record, and a README is filled in its places only."""

import json

import pytest

from gspo.report import speed


def spread(median, repeats=3):
    return {"median": median, "min": median / 2, "max": median * 2, "repeats": repeats}


PRODUCT = {"flops_needed": 6e9, "flops_per_s": 3e9, "share_of_matmul": 0.25, "share_of_matmul_frames": 0.5}
WHERE = {
    "date": "2030-01-02T03:04:05+00:00", "commit": "abc+", "python": "3.99", "versions": {"jax": "9.9"},
    "platform": "cpu", "device": "cpu", "devices": 2, "cpu": "Z80", "cores": 7, "variables": {"XLA_FLAGS": "--fast"},
}  # fmt: skip


def rollout(name, seconds, passes):
    return PRODUCT | {
        "name": name, "seconds": spread(seconds), "completions": {"mean": 64.0, "max": 99}, "decode_passes": passes,
        "seconds_per_pass": seconds / passes, "tokens_per_s": 1 / seconds, "bytes_per_s": 5e9, "share_of_copy": 0.75,
    }  # fmt: skip


def result(what, *records):
    machine = {"matmul_flops_per_s": 12e9, "copy_bytes_per_s": 8e9}
    return {"what": what, "command": "python x", "records": list(records), "environment": WHERE, "machine": machine}


def test_the_line_above_a_table_says_what_ran_where():
    # Catches a table that nobody can place or repeat.
    line = speed.origin(result("step"))
    for part in ("`python x`", "7 cores of Z80", "2 cpu device(s)", "jax 9.9", "2030-01-02", "abc+", "XLA_FLAGS=--fast",
                 "product 12 GFLOP/s", "copy 8 GB/s"):  # fmt: skip
        assert part in line


def test_an_arm_is_compared_with_the_first_one():
    # Catches a ratio that is upside down: an arm that takes longer per pass, and writes fewer tokens a second.
    text = speed.table(result("rollout", rollout("64", 1.0, 50), rollout("1024", 4.0, 100)))
    cells = [cell.strip() for cell in text.splitlines()[-1].split("|")]
    assert cells[1:3] == ["1024", "4 s [2, 8]"]
    assert cells[5:8] == ["40", "2.00", "0.50"]  # ms per pass, against the first; FLOPs per pass against the first
    assert cells[9] == "0.25" and "75.0%" in cells and "25.0% (50.0%)" in cells


@pytest.mark.parametrize(("median", "want"), [(0.571, "0.571 s [0.285, 1.14]"), (0.0123, "12.3 ms [6.15, 24.6]")])
def test_seconds_carry_their_range(median, want):
    # Catches milliseconds under the name of seconds, and a median alone.
    assert speed.seconds(spread(median)) == want


def test_a_readme_is_filled_in_its_places_only_and_twice_gives_the_same(tmp_path):
    # Catches a table of another name, prose that is eaten, an old table that stays below the new one.
    text = "before\n<!-- speed: one -->\nold\n<!-- end -->\nbetween\n<!-- speed: two -->\n<!-- end -->\nafter\n"
    (tmp_path / "one.json").write_text(json.dumps(result("rollout", rollout("64", 1.0, 50))))
    filled = speed.fill(text, speed.results_in(tmp_path))
    assert filled.startswith("before\n<!-- speed: one -->\n`python x`") and filled.endswith("<!-- end -->\nafter\n")
    assert "old" not in filled and "\nbetween\n<!-- speed: two -->\nNot measured here (no two.json).\n" in filled
    assert speed.fill(filled, speed.results_in(tmp_path)) == filled
