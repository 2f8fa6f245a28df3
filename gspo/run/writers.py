"""What a run writes down: JSON lines always, TensorBoard and Weights & Biases when asked for.

Three files, because they are used differently:

    metrics.jsonl   one line per rollout, a function of the seed alone: killed and resumed, a run ends with equal bytes
    samples.jsonl   sampled completions with their rewards; a function of the seed too
    timings.jsonl   seconds and tokens per second: never the same twice
"""

import importlib
import io
import json
import logging
import math
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gspo.parallel import distributed
from gspo.run import disk
from gspo.types import UserError

log = logging.getLogger(__name__)
FILES = ("metrics.jsonl", "samples.jsonl", "timings.jsonl")


def plain(value: Any) -> Any:
    """jax and NumPy values -> what JSON holds. NaN and infinities become null: valid JSON, and pandas reads it as NaN
    again."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        floating = jnp.issubdtype(value.dtype, jnp.floating)  # bfloat16 too, which NumPy does not count among them
        return plain(np.asarray(value).astype(np.float64 if floating else value.dtype).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a file as dicts; a last line cut short by a kill is left out. Raises ValueError on any other broken
    line."""
    lines = Path(path).read_bytes().split(b"\n")
    complete = lines[:-1]  # what follows the last newline was not written in full
    try:
        return [json.loads(line) for line in complete if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path} holds a line that is not JSON: {error}") from error


class MetricsWriter:
    """Writes the files of one run, on the first process only; the other processes write nothing.

    workdir      folder of the run, made if absent
    tensorboard  event files in <workdir>/tensorboard, by the tensorboardX package
    wandb        a Weights & Biases run, `project`, `name` ("": the workdir's) and `config` given on; resumed runs
                 continue it
    Raises: UserError if a package that was asked for is not installed.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        tensorboard: bool = False,
        wandb: bool = False,
        project: str = "gspo",
        name: str = "",
        config: dict[str, Any] | None = None,
    ):
        self._workdir = Path(workdir).absolute()
        self._primary = distributed.is_primary()
        self._tensorboardX = _require("tensorboardX", "tensorboard") if tensorboard else None
        self._wandb = _require("wandb", "wandb") if wandb else None
        self._event_writer = self._wandb_run = None
        self._wandb_options = {"project": project, "name": name or self._workdir.name, "config": config}
        if self._primary:
            self._workdir.mkdir(parents=True, exist_ok=True)
            self._files = {name: (self._workdir / name).open("ab", buffering=0) for name in FILES}

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """One line of metrics.jsonl for rollout `step` (0-based): only values that are a function of the seed."""
        self._line("metrics.jsonl", {"step": step, **metrics})
        self._loggers(step, metrics)

    def write_timings(self, step: int, timings: dict[str, float]) -> None:
        """One line of timings.jsonl; seconds, or tokens per second."""
        self._line("timings.jsonl", {"step": step, **timings})
        self._loggers(step, {f"time/{name}": value for name, value in timings.items()})

    def write_samples(self, step: int, samples: Sequence[dict[str, Any]]) -> None:
        """One line of samples.jsonl per sample: {"prompt", "completion", "reward", ...}."""
        for sample in samples:
            self._line("samples.jsonl", {"step": step, **sample})

    def offset(self) -> dict[str, int]:
        """{file: bytes written so far}: goes into the checkpoint, and back into `truncate` after a resume."""
        return {name: file.tell() for name, file in self._files.items()} if self._primary else {}

    def truncate(self, offset: dict[str, int] | None) -> None:
        """Cuts what was written after `offset` was taken. None: everything, for a run that died before its first
        checkpoint."""
        for name, file in self._files.items() if self._primary else ():
            wanted, size = (offset or {}).get(name, 0), file.seek(0, os.SEEK_END)
            if size < wanted:
                log.warning(
                    "%s has %d bytes, the checkpoint knew %d: earlier lines are lost",
                    self._workdir / name,
                    size,
                    wanted,
                )
                wanted = (self._workdir / name).read_bytes().rfind(b"\n") + 1
            file.truncate(wanted)
            file.seek(wanted)

    def close(self) -> None:
        for file in self._files.values() if self._primary else ():
            file.close()
        if self._event_writer:
            self._event_writer.close()
        if self._wandb_run:
            self._wandb_run.finish()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self, name: str, content: dict[str, Any]) -> None:
        if self._primary:
            # ASCII: a byte-level completion may hold half a character, which UTF-8 cannot.
            line = json.dumps(plain(content), allow_nan=False).encode() + b"\n"
            _append(self._files[name], line, self._workdir / name)

    def _loggers(self, step: int, values: dict[str, Any]) -> None:
        """Scalars to TensorBoard and W&B. Both open at the first value: only then is the step known from which to go
        on."""
        if not (self._primary and (self._tensorboardX or self._wandb)):
            return
        scalars = {name: value for name, value in plain(values).items() if isinstance(value, int | float)}
        if self._tensorboardX:
            self._event_writer = self._event_writer or self._tensorboardX.SummaryWriter(
                str(self._workdir / "tensorboard"), purge_step=step)  # fmt: skip
            for name, value in scalars.items():
                self._event_writer.add_scalar(name, value, step)
        if self._wandb:
            if self._wandb_run is None:
                id_file = self._workdir / "wandb_id"
                if not id_file.exists():
                    disk.write_whole(id_file, secrets.token_hex(4))
                self._wandb_run = self._wandb.init(
                    **self._wandb_options,
                    dir=str(self._workdir),
                    id=id_file.read_text(),
                    resume="allow",
                )
            self._wandb_run.log(scalars, step=step)


def _append(file: io.FileIO, line: bytes, path: Path) -> None:
    """Writes a whole line or nothing of it. Raises UserError where the disk is full."""
    start, left = file.tell(), line
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        file.truncate(start)
        file.seek(start)
        if not disk.is_full(error):
            raise
        raise disk.full(f"a line of {path.name}", path.parent, len(line)) from error


def _require(package: str, option: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{option} was asked for but {package} is not installed: pip install {package}") from error
