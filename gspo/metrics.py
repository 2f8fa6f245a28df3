"""What a run writes down: JSON lines always, TensorBoard and Weights & Biases when asked for, and a live display.

Three files, because they are used differently:

    metrics.jsonl   one line per rollout, a function of the seed alone: a run killed and resumed ends with the same bytes
    samples.jsonl   sampled completions with their rewards; a function of the seed too
    timings.jsonl   seconds and tokens per second: never the same twice
"""

import contextlib
import importlib
import json
import logging
import math
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gspo import distributed
from gspo.types import UserError

log = logging.getLogger(__name__)
FILES = ("metrics.jsonl", "samples.jsonl", "timings.jsonl")


# ---------------------------------------------------------------------------------------------------- JSON lines


def plain(value: Any) -> Any:
    """jax and NumPy values -> what JSON holds. NaN and infinities become null: valid JSON, and pandas reads it as NaN again."""
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
    """The lines of a file as dicts; a last line cut short by a kill is left out. Raises ValueError on any other broken line."""
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
    wandb        a Weights & Biases run, `project` and `config` given on; resumed runs continue it
    Raises: UserError if a package that was asked for is not installed.
    """

    def __init__(self, workdir: str | os.PathLike, *, tensorboard: bool = False, wandb: bool = False, project: str = "gspo",
                 config: dict[str, Any] | None = None):  # fmt: skip
        self._workdir = Path(workdir).absolute()
        self._primary = distributed.is_primary()
        self._tensorboardX = _require("tensorboardX", "tensorboard") if tensorboard else None
        self._wandb = _require("wandb", "wandb") if wandb else None
        self._event_writer = self._wandb_run = None
        self._wandb_options = {"project": project, "config": config}
        if self._primary:
            self._workdir.mkdir(parents=True, exist_ok=True)
            self._files = {name: open(self._workdir / name, "ab") for name in FILES}  # noqa: SIM115 closed by `close`

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
        """Cuts what was written after `offset` was taken. None: everything, for a run that died before its first checkpoint."""
        for name, file in self._files.items() if self._primary else ():
            wanted, size = (offset or {}).get(name, 0), file.seek(0, os.SEEK_END)
            if size < wanted:
                log.warning("%s has %d bytes, the checkpoint knew %d: earlier lines are lost", self._workdir / name, size, wanted)
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
            self._files[name].write(json.dumps(plain(content), allow_nan=False).encode() + b"\n")
            self._files[name].flush()

    def _loggers(self, step: int, values: dict[str, Any]) -> None:
        """Scalars to TensorBoard and W&B. Both open at the first value: only then is the step known from which to go on."""
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
                    id_file.write_text(secrets.token_hex(4))
                self._wandb_run = self._wandb.init(**self._wandb_options, dir=str(self._workdir), name=self._workdir.name,
                                                   id=id_file.read_text(), resume="allow")  # fmt: skip
            self._wandb_run.log(scalars, step=step)


def _require(package: str, option: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{option} was asked for but {package} is not installed: pip install {package}") from error


# ---------------------------------------------------------------------------------------------------- timer


class Timer:
    """Seconds per phase of the loop, added up until they are taken.

        with timer("rollout"): ...
        timer.take()  # {"rollout": 1.7, ...}, and back to zero

    jax returns before the device has finished: a phase that should contain its own work ends with `block_until_ready`.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, {}
        return taken


# ---------------------------------------------------------------------------------------------------- live display

SHOWN = (  # column, metric, format
    ("reward", "reward/mean", "{:.3f}"),
    ("pass@1", "eval/pass@1", "{:.3f}"),
    ("clipped", "clip_ratio/tokens", "{:.2%}"),
    ("experts changed", "routing/experts_changed", "{:.2%}"),
    ("length", "completions/mean_length", "{:.1f}"),
    ("loss", "loss", "{:.4f}"),
    ("tokens/s", "tokens_per_second", "{:,.0f}"),
)


def duration(seconds: float) -> str:
    """75.2 -> 1:15, 3700 -> 1:01:40"""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class Progress:
    """The state of the loop: a live display on a terminal, one line per update elsewhere (CI, a file). A context manager.

    total  number of updates of the display (rollouts) at the end of the run
    start  number already done when a run is resumed; the ETA counts only those done here
    title  shown before the bar: the name of the run
    shown  (column, metric, format) to show, where the metric is present; the value last seen stays (evaluations are rare)
    """

    def __init__(self, total: int, *, start: int = 0, title: str = "rollout", shown: Sequence[tuple[str, str, str]] = SHOWN,
                 console: Console | None = None):  # fmt: skip
        self._total, self._start, self._title, self._shown = total, start, title, shown
        self._done, self._latest, self._sample = start, {}, None
        self._began = time.perf_counter()
        self._console = console or Console()
        live = self._console.is_terminal and not self._console.is_dumb_terminal and distributed.is_primary()
        # Redrawn on update only: no thread of its own that would compete with the training step.
        self._live = Live(console=self._console, auto_refresh=False) if live else None

    def note(self, text: str) -> None:
        """One line above the display: what the run is, warnings."""
        if distributed.is_primary():
            print(f"{self._title}: {text}", file=self._console.file, flush=True)

    def update(self, step: int, values: dict[str, Any], sample: str | None = None) -> None:
        """After rollout `step` (0-based): metrics and timings in one dict; `sample`, a completion, is shown on terminals only."""
        self._done, self._sample = min(step + 1, self._total), sample or self._sample
        fresh = {name: float(values[metric]) for name, metric, _ in self._shown if values.get(metric) is not None}
        self._latest |= fresh
        if self._live:
            self._live.update(self._render(), refresh=True)
        elif distributed.is_primary():
            cells = "  ".join(f"{name} {text}" for name, text in self._cells() if name in fresh)
            print(f"{self._title} {self._done}/{self._total}  {cells}  ETA {self._eta()}", file=self._console.file, flush=True)

    def __enter__(self) -> "Progress":
        self._began = time.perf_counter()
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def _cells(self) -> list[tuple[str, str]]:
        return [(name, form.format(self._latest[name])) for name, _, form in self._shown if name in self._latest]

    def _eta(self) -> str:
        here = self._done - self._start
        return duration((time.perf_counter() - self._began) / here * (self._total - self._done)) if here > 0 else "-"

    def _render(self) -> Group:
        head = Table.grid(padding=(0, 1))
        head.add_row(Text(self._title, style="bold"), ProgressBar(self._total, self._done, width=40),
                     Text(f"{self._done}/{self._total}"), Text(f"ETA {self._eta()}", style="cyan"))  # fmt: skip
        table = Table.grid(padding=(0, 3))
        table.add_row(*(Text(name, style="dim") for name, _ in self._cells()))
        table.add_row(*(Text(text, style="bold") for _, text in self._cells()))
        # The sample is model output: Text, never markup, one line, control characters made visible.
        sample = "".join(c if c.isprintable() else repr(c)[1:-1] for c in self._sample or "")
        return Group(head, table, *([Text(sample, style="italic dim", no_wrap=True, overflow="ellipsis")] if sample else []))
