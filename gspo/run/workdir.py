"""The folder of a run, claimed by its config."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from gspo.parallel import distributed
from gspo.types import UserError

log = logging.getLogger(__name__)


def open_workdir(workdir: str | os.PathLike, config: dict[str, Any], *, allow_changed_config: bool = False,
                 check_only: bool = False) -> Path:  # fmt: skip
    """Makes the folder of a run and keeps its config in <workdir>/config.json; returns the folder.

    config                nested dict; what is not JSON is kept as its string
    allow_changed_config  a config that differs from the saved one is taken; the saved one is kept as config.1.json,
                          .2.json, ...
    check_only            nothing is kept yet: a run that fails to start must not claim the folder for its config
    Raises: UserError if the folder cannot be made or written, or if the config differs and that was not allowed.
    """
    workdir = Path(workdir).absolute()
    distributed.on_primary(
        lambda: _open_workdir(workdir, config, allow_changed_config, check_only), f"opening {workdir}"
    )
    return workdir


def _open_workdir(workdir: Path, config: dict[str, Any], allow_changed_config: bool, check_only: bool) -> None:
    path = workdir / "config.json"
    text = json.dumps(config, indent=2, sort_keys=True, default=str) + "\n"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not os.access(workdir, os.W_OK | os.X_OK):
            raise PermissionError(13, "not writable")
        saved = path.read_text() if path.exists() else None
        differ = [] if saved is None else _config_differences(path, saved, text)
        if differ and not allow_changed_config:
            raise UserError(f"{path} differs from this run's config: {'; '.join(differ)}. Use another --workdir, "
                            "or --allow_changed_config to go on with the new values")  # fmt: skip
        if check_only:
            return
        if differ:
            n = next(n for n in range(1, 1 << 20) if not path.with_name(f"config.{n}.json").exists())
            path.rename(path.with_name(f"config.{n}.json"))
            log.warning("config changed (%s); the earlier one is kept as config.%d.json", "; ".join(differ), n)
        if saved is None or differ:
            path.with_name("config.json.tmp").write_text(text)
            path.with_name("config.json.tmp").replace(path)  # never half a file, wherever the process is killed
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be used: {error.strerror}") from error


def _config_differences(path: Path, saved: str, now: str) -> list[str]:
    """["objective.epsilon: saved 0.2, now 0.0003", ...]. Compared as JSON text, where NaN equals NaN and 1 is not
    True."""

    def flatten(node: Any, prefix: str = "") -> dict[str, str]:
        if not isinstance(node, dict) or not node:
            return {prefix[:-1]: json.dumps(node)}
        return {name: text for key, value in node.items() for name, text in flatten(value, f"{prefix}{key}.").items()}

    try:
        before, after = flatten(json.loads(saved)), flatten(json.loads(now))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); remove it, or use another --workdir") from error
    return [f"{name}: saved {before.get(name, 'nothing')}, now {after.get(name, 'absent')}"
            for name in sorted({*before, *after}) if before.get(name) != after.get(name)]  # fmt: skip
