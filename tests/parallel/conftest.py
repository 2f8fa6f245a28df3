"""What tests of the launch scripts run them with."""

import contextlib
import json
import shutil
import sys

import pytest

from tests.launchers import TOOLS, TRAPS, write_program
from tests.processes import started


@pytest.fixture
def tools(tmp_path):
    """Environment of a script: PATH with TOOLS and the traps, which write their arguments, one JSON list a line, to
    `tools.called`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in TOOLS:
        (folder / name).symlink_to(shutil.which(name))
    for name in TRAPS:
        note = f"json.dump(['{name}', *sys.argv[1:]], out); out.write('\\n')"
        program = (
            f"#!{sys.executable}\nimport json, sys\nwith open({str(tmp_path / 'called')!r}, 'a') as out:\n    {note}\n"
        )
        write_program(folder / name, program)

    class Tools(dict):
        def called(self):
            log = tmp_path / "called"
            return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    (tmp_path / "home").mkdir()
    return Tools(PATH=str(folder), HOME=str(tmp_path / "home"), TMPDIR=str(tmp_path / "home"))


@pytest.fixture
def start():
    """subprocess.Popen of which nothing is left after the test, however that ends."""
    with contextlib.ExitStack() as stack:
        yield lambda words, **options: stack.enter_context(started(words, **options))
