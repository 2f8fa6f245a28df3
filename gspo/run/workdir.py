"""The folder of a run: claimed by its config for good, and by its processes while they run."""

import contextlib
import datetime
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gspo.parallel import distributed
from gspo.run import disk
from gspo.types import UserError

log = logging.getLogger(__name__)
LOCK = "LOCK"  # holds one line about the run that is going on, and none after it


@contextlib.contextmanager
def hold_workdir(workdir: str | os.PathLike, config: dict[str, Any], *,
                 allow_changed_config: bool = False) -> Iterator[Path]:  # fmt: skip
    """Makes the folder of a run, and keeps every other run out of it while the context lasts; yields the folder.

    The first process holds a lock of the kernel for all of them, which ends with it, however that ends. Who only reads
    the folder needs none. The config is compared and not yet kept: `keep_config` does that, when nothing has failed.
    Raises: UserError if the folder cannot be made or written, if another run goes on in it, or if its config is another
    one and that was not allowed.
    """
    workdir = Path(workdir).absolute()
    with contextlib.ExitStack() as held:

        def claim() -> None:
            with _errors_in_one_line(workdir):
                workdir.mkdir(parents=True, exist_ok=True)
                held.enter_context(_lock(workdir))
            check_config(workdir, config, allow_changed_config)

        distributed.on_primary(claim, f"opening {workdir}")
        yield workdir


def keep_config(workdir: str | os.PathLike, config: dict[str, Any]) -> None:
    """Writes <workdir>/config.json, for a run that has started without an error. One that differs from it and is there
    already is kept as config.1.json, .2.json, ... What is not JSON is kept as its string. Raises UserError."""
    workdir = Path(workdir).absolute()
    distributed.on_primary(lambda: _keep_config(workdir, config), f"keeping the config in {workdir}")


@contextlib.contextmanager
def _lock(workdir: Path) -> Iterator[None]:
    """Raises UserError where another process has it. The file stays: to remove it would let two others lock two
    files."""
    with open(workdir / LOCK, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                f"--workdir={workdir} is in use: {holder} is running in it; wait for its end or stop it, or use "
                "another --workdir"
            ) from None
        except OSError as error:
            log.warning("%s: no locks on this file system (%s); see to it that no other run uses this folder",
                        workdir, error.strerror)  # fmt: skip
        now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now},\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


@contextlib.contextmanager
def _errors_in_one_line(workdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be used: {error.strerror}") from error


def _as_text(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=2, sort_keys=True, default=str) + "\n"


def check_config(workdir: Path, config: dict[str, Any], allow_changed_config: bool) -> None:
    """Raises UserError where the folder holds a run of another config, unless that is allowed."""
    differ = _differences_from_saved(workdir, config)
    if differ and not allow_changed_config:
        raise UserError(f"{workdir / 'config.json'} differs from this run's config: {'; '.join(differ)}. Use another "
                        "--workdir, or --allow_changed_config to go on with the new values")  # fmt: skip


def _keep_config(workdir: Path, config: dict[str, Any]) -> None:
    path = workdir / "config.json"
    differ = _differences_from_saved(workdir, config)
    with _errors_in_one_line(workdir):
        if differ:
            n = next(n for n in range(1, 1 << 20) if not path.with_name(f"config.{n}.json").exists())
            disk.write_whole(path.with_name(f"config.{n}.json"), path.read_text())
            log.warning("config changed (%s); the earlier one is kept as config.%d.json", "; ".join(differ), n)
        if differ or not path.exists():
            disk.write_whole(path, _as_text(config))


def _differences_from_saved(workdir: Path, config: dict[str, Any]) -> list[str]:
    """[] where nothing is saved."""
    path = workdir / "config.json"
    with _errors_in_one_line(workdir):
        return _config_differences(path, path.read_text(), _as_text(config)) if path.exists() else []


def flatten(node: Any, prefix: str = "") -> dict[str, str]:
    """A nested dict -> {"a.b": the value as JSON, or its string where it is none}."""
    if not isinstance(node, dict) or not node:
        return {prefix[:-1]: json.dumps(node, default=str)}
    return {name: text for key, value in node.items() for name, text in flatten(value, f"{prefix}{key}.").items()}


def _config_differences(path: Path, saved: str, now: str) -> list[str]:
    """["objective.epsilon: saved 0.2, now 0.0003", ...]. Compared as JSON text, where NaN equals NaN and 1 is not
    True."""
    try:
        before, after = flatten(json.loads(saved)), flatten(json.loads(now))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); remove it, or use another --workdir") from error
    return [f"{name}: saved {before.get(name, 'nothing')}, now {after.get(name, 'absent')}"
            for name in sorted({*before, *after}) if before.get(name) != after.get(name)]  # fmt: skip
