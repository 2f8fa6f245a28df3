"""The README as it stands: its commands parse, its files exist, its code runs."""

import re
import shlex
import subprocess

import pytest

from configs import base, lab
from gspo import build
from gspo.objectives import presets, surrogates
from gspo.run import cli
from tests.tiny_runs import ROOT, command  # noqa: F401 - a fixture

README = ROOT / "README.md"
TEXT = README.read_text() if README.exists() else ""
pytestmark = pytest.mark.skipif(not TEXT, reason="there is no README.md")

BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Lines of shell blocks (continued ones joined, comments cut off), and whole commands in backticks."""
    shell = "\n".join(text for language, text in BLOCKS if language in ("bash", "sh", "shell")).replace("\\\n", " ")
    outside = re.sub(r"^```.*?^```", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`((?:python|bash) [^`]+)`", outside)
    lines = [shlex.join(shlex.split(line, comments=True)) for line in [*shell.splitlines(), *inline]]
    return list(dict.fromkeys(line for line in lines if line))


@pytest.mark.parametrize("line", commands())
def test_every_command_names_a_script_and_flags_that_exist(line, command, monkeypatch, tmp_path):  # noqa: F811
    # Catches a renamed script, config or field, and a flag that a script does not have.
    program, script, *arguments = shlex.split(line)
    if program == "pip":  # of optional packages, which tests do not install
        assert script == "install" and arguments
        return
    assert program in ("python", "bash"), f"neither python, bash nor pip: {line}"
    assert (ROOT / script).is_file(), script
    if program == "bash":
        assert subprocess.run(["bash", "-n", ROOT / script]).returncode == 0
        return
    for name in ("configs", "experiments", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "runs" / "gspo").mkdir(parents=True)  # as the commands before have left it
    (tmp_path / "runs" / "gspo" / "config.json").write_text(base.rl().to_json())
    monkeypatch.chdir(tmp_path)
    folder, _, name = script.removesuffix(".py").partition("/")
    if folder == "experiments":
        run = cli.run
        monkeypatch.setattr(
            cli, "run", lambda main, needs: run(lambda: print("parsed"), needs=needs)
        )  # all but the run itself
        assert command(name, *arguments) == (0, "parsed\n", "")
        return
    code, usage, _ = command(name, *arguments, "--help", folder=folder)
    assert code == 0 and usage
    for flag in [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]:
        assert re.search(rf"(^|[\s\[]){flag}([\s,:\]]|$)", usage), f"{script} has no {flag}"


def test_the_readme_has_commands_to_check():
    # Catches a change of the format after which the test above would pass on nothing.
    found = commands()
    assert (
        len(found) > 8 and "bash scripts/quickstart.sh" in found and any("experiments/rl.py" in line for line in found)
    )


@pytest.mark.parametrize("field", sorted(set(re.findall(r"--config\.([\w.]+)=", TEXT))))
def test_every_field_that_is_mentioned_exists(field):
    # Catches the old name of a field, also where it stands in a sentence.
    assert field in {
        *build.leaf_fields(base.rl()),
        *build.leaf_fields(base.sft()),
        *build.leaf_fields(base.labels()),
        *build.leaf_fields(lab.get_config()),
        "a.b",
        "task.options",
    }


def test_the_tree_lists_every_file_of_the_library_and_no_other():
    # Catches a file without a word on its role, and one that was moved or removed.
    tree = next(text for _, text in BLOCKS if "gspo/types.py" in text)
    listed = re.findall(r"^([\w./]+)\s{2,}\S", tree, flags=re.MULTILINE)
    assert all((ROOT / path).exists() for path in listed), [path for path in listed if not (ROOT / path).exists()]
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "gspo").rglob("*.py") if path.name != "__init__.py"}
    assert files - set(listed) == set()


def test_links_and_figures_lead_somewhere():
    # Catches a figure that was never added to the repository.
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", TEXT) if not target.startswith("http")]
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_no_placeholder_is_left():
    # Catches RESULTS_TABLE in place of the results.
    assert re.findall(r"^(?:[A-Z]+_)+[A-Z]+$|TODO|FIXME|TBD", TEXT, flags=re.MULTILINE) == []


@pytest.mark.parametrize("code", [text for language, text in BLOCKS if language == "python"])
def test_the_code_runs_as_it_stands(code):
    # Catches an example of the interface before last, and one that has lost the check at its end.
    tables = (surrogates.SURROGATES, surrogates.CONSTANTS, presets.OBJECTIVES)
    before = [dict(table) for table in tables]
    try:
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    finally:
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)
    assert "assert_allclose" in code
