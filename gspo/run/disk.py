"""Files written whole or not at all, and a full disk said in one line: what did not fit, where, how much is missing."""

import errno
import shutil
from pathlib import Path

from gspo.types import UserError

SIGNS = ("No space left on device", "Disk quota exceeded")


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it comes from, says that there is no room. TensorStore says it in words only."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(sign in str(error) for sign in SIGNS):
            return True
        error = error.__cause__ or error.__context__
    return False


def full(what: str, folder: Path, needed: int, unfinished: int = 0, more: str = "") -> UserError:
    """The error of a run that has to stop because `what`, of `needed` bytes, does not fit into `folder`.

    unfinished  bytes of it that lie there already, and make room when they are removed
    more        ends the sentence: what is safe
    """
    free = shutil.disk_usage(folder).free + unfinished
    missing = readable(max(needed - free, 1))
    return UserError(
        f"the disk is full: {what} could not be written to {folder}: it takes {readable(needed)}, {readable(free)} are "
        f"free, {missing} are missing; make room, and start the same command again{more}"
    )


def write_whole(path: Path, content: str | bytes) -> None:
    """Replaces a file so that it is never half written, wherever the process is killed. Raises OSError."""
    temporary = path.with_name(f"{path.name}.tmp")
    if isinstance(content, str):
        temporary.write_text(content)
    else:
        temporary.write_bytes(content)
    temporary.replace(path)


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder, of which some may just be vanishing; 0 if it is not there."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def readable(size: float) -> str:
    """1234567 -> "1.2 MB"."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} bytes" if units[0] == "bytes" else f"{size:.1f} {units[0]}"
