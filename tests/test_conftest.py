"""Which tests run: all but the slow ones, a third of these by commit, or everything."""

import itertools
import re
import subprocess
import time

import pytest

from tests.tiny_runs import ROOT

pytest_plugins = ["pytester"]

COMMITS = ("0000000", "0000001", "0000002")  # of three consecutive numbers, each chooses another third
FILE = """
import pytest

@pytest.fixture(scope="module")
def costly():
    print("made")

@pytest.mark.parametrize("n", range(4))
def test_quick(n): pass

@pytest.mark.slow
@pytest.mark.parametrize("n", range(12))
def test_slow(n, costly): pass

@pytest.mark.parametrize("n", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_mixed(n): pass
"""


@pytest.fixture
def suite(pytester):
    """Two files with 5 quick tests and 13 slow ones each, under this project's conftest.py and pytest options."""
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    text = (ROOT / "pyproject.toml").read_text()
    options = text[text.index("[tool.pytest.ini_options]") : text.index("[tool.ruff]")]
    options = options.replace('testpaths = ["tests"]', "")
    # Importing hypothesis, whose plugin no test here asks for, is most of what a process would do.
    pytester.makepyprojecttoml(options.replace('addopts = "', 'addopts = "-p no:hypothesispytest '))
    pytester.makepyfile(test_a=FILE, test_b=FILE)
    return pytester


def names_that_run(suite, *arguments):
    result = suite.runpytest_inprocess("-rA", *arguments)
    assert result.ret == 0, result.outlines
    return [line.removeprefix("PASSED ") for line in result.outlines if line.startswith("PASSED ")]


def is_slow(name):
    return "test_slow" in name or "test_mixed[1]" in name


def test_by_default_no_slow_test_runs_and_with_all_of_them_every_one_does(suite):
    # Catches a hook that lets slow tests into the run that everybody waits for.
    quick, everything = names_that_run(suite), names_that_run(suite, "-m", "")
    assert len(quick) == 10 and not any(map(is_slow, quick))
    assert len(everything) == 36 and set(quick) == {name for name in everything if not is_slow(name)}


def test_the_thirds_of_three_commits_are_disjoint_and_together_all_slow_tests_and_quick_ones_run_in_each(suite):
    # Catches a slow test that no commit ever runs, a hash that is another in each process, a third of everything.
    everything = names_that_run(suite, "-m", "")
    runs = [names_that_run(suite, f"--slow-third={commit}") for commit in COMMITS]
    slow = [[name for name in run if is_slow(name)] for run in runs]
    assert all(slow) and sorted(itertools.chain(*slow)) == sorted(filter(is_slow, everything))
    for run, chosen in zip(runs, slow, strict=True):
        assert len(run) - len(chosen) == 10 and not any(map(is_slow, run[:10])), "quick ones, and first"
    again = suite.runpytest_subprocess("-rA", f"--slow-third={COMMITS[0]}")  # another process, another hash()
    assert [line.removeprefix("PASSED ") for line in again.outlines if line.startswith("PASSED ")] == runs[0]


def test_after_the_deadline_no_slow_test_starts_nor_its_fixtures_and_the_summary_says_how_many_there_were(suite):
    # Catches a run that goes past its time, and one that passes without a word on what it has left out.
    arguments = ("-rA", "-s", f"--slow-third={COMMITS[0]}")
    late = suite.runpytest_inprocess(*arguments, f"--slow-before={time.time() - 1}")
    count = late.parseoutcomes()["skipped"]
    assert late.ret == 0 and late.parseoutcomes()["passed"] == 10 and 0 < count < 26
    assert "made" not in late.stdout.str()
    late.stdout.fnmatch_lines([f"slow tests: {count} chosen (third 1 of 3, by commit 0000000), {count} of them not*"])
    in_time = suite.runpytest_inprocess(*arguments, f"--slow-before={time.time() + 600}")
    assert "made" in in_time.stdout.str()
    assert in_time.parseoutcomes()["passed"] == 10 + count and "skipped" not in in_time.parseoutcomes()
    in_time.stdout.fnmatch_lines([f"slow tests: {count} chosen (third 1 of 3, by commit 0000000), 0 of them not run*"])


def test_in_two_processes_each_file_stays_in_one_and_slow_tests_come_last_and_are_counted_once(suite):
    # Catches single tests dealt to whoever is free (all then make the costly fixtures of each file), slow tests
    # of one file before quick ones of another, and a summary that counts once for each process, or nothing.
    alone = names_that_run(suite, f"--slow-third={COMMITS[0]}")
    result = suite.runpytest_subprocess("-vv", "--numprocesses=2", f"--slow-third={COMMITS[0]}")
    assert result.ret == 0, result.outlines
    done = [re.match(r"\[(gw\d)\].* PASSED (\S+)", line) for line in result.outlines]
    done = [match.groups() for match in done if match]
    assert sorted(name for _, name in done) == sorted(alone)
    for worker in ("gw0", "gw1"):
        kinds = [is_slow(name) for by, name in done if by == worker]
        assert kinds == sorted(kinds) and not kinds[0], "quick ones first, of both files"
    for file in ("test_a", "test_b"):
        for slow in (False, True):
            assert len({by for by, name in done if name.startswith(file) and is_slow(name) == slow}) == 1
    count = sum(map(is_slow, alone))
    result.stdout.fnmatch_lines([f"slow tests: {count} chosen (third 1 of 3, by commit 0000000), 0 of them not run*"])
    late = suite.runpytest_subprocess(
        "--numprocesses=2", f"--slow-third={COMMITS[0]}", f"--slow-before={time.time() - 1}"
    )
    late.stdout.fnmatch_lines([f"slow tests: {count} chosen (*), {count} of them not run for want of time"])


def test_without_the_plugin_for_several_processes_the_tests_run_in_one(suite):
    # Catches a hook or a mark that only the plugin knows, in an environment without it.
    assert suite.runpytest_subprocess("-p", "no:xdist").parseoutcomes()["passed"] == 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--slow-third=main"], "not the hash of a commit"), (["--slow-third=0000000", "-m", "slow"], "leave -m out")],
)
def test_a_choice_that_cannot_be_made_is_refused(suite, arguments, words):
    # Catches all slow tests run, or none, for a word that is no hash.
    result = suite.runpytest_inprocess(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR and words in "\n".join(result.errlines)


def test_what_continuous_integration_runs_is_the_documented_command():
    # Catches a CI that tests something else than what the README tells everybody to run.
    text = (ROOT / ".ci" / "run").read_text()
    assert "bash scripts/test.sh --slow-third=" in text and "pytest" not in text
    assert "bash scripts/test.sh " in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("given", "passed_on"),
    [([], []), (["--all", "-k", "a b"], ["-m", "", "-k", "a b"])],
)
def test_the_test_command_lints_and_passes_all_on_as_every_mark(tmp_path, given, passed_on):
    # Catches --all that pytest does not know, and words that fall apart on the way.
    (tmp_path / "python").write_text('#!/usr/bin/env bash\nprintf "<%s>" "$@"; echo\n')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "setup_env.sh").write_text(f"PYTHON={tmp_path}/python\n")
    (tmp_path / "test.sh").write_text((ROOT / "scripts" / "test.sh").read_text())
    done = subprocess.run(["bash", tmp_path / "test.sh", *given], capture_output=True, text=True, check=True)
    words = ["-m", "pytest", "--numprocesses=auto", "--maxprocesses=4", *passed_on]
    assert done.stdout.splitlines() == ["<-m><ruff><check><.>", "".join(f"<{word}>" for word in words)]
