"""Programs of which nothing is left when a test ends, in time or not."""

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def started(words: Sequence[Any], **options: Any) -> Iterator[subprocess.Popen]:
    """A program in a session of its own. Whatever runs in that session at the end is killed: its descendants too, of
    which some have process groups of their own (a launcher with job control) or have lost their parent."""
    program = subprocess.Popen(words, start_new_session=True, **options)
    try:
        yield program
    finally:
        for pid in in_session(program.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # it has ended meanwhile
                continue
        program.communicate()


def finished(words: Sequence[Any], timeout: float, **options: Any) -> subprocess.CompletedProcess:
    """Like subprocess.run with captured text. Raises subprocess.TimeoutExpired, and leaves nothing behind then."""
    with started(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as program:
        stdout, stderr = program.communicate(timeout=timeout)
    return subprocess.CompletedProcess(words, program.returncode, stdout, stderr)


def in_session(session: int) -> list[int]:
    """The processes of a session, without those that have ended and wait to be collected."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = stat.read_text().rsplit(")", 1)[1].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(of) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found
