"""How far a run is and what it costs: seconds per phase, and a live display."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gspo.parallel import distributed


def is_due(index: int, every: int) -> bool:
    """Whether what happens every so many rollouts happens at this one; never where `every` is 0."""
    return bool(every) and index % every == 0


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
            with jax.profiler.TraceAnnotation(f"phase/{phase}"):  # seen in traces (`gspo.run.profile`), else free
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


def live_on(console: Console) -> Live | None:
    """A display that is redrawn on update only: no thread of its own that would compete with the training step. None
    where nothing can be redrawn, and on all processes but the first."""
    live = console.is_terminal and not console.is_dumb_terminal and distributed.is_primary()
    return Live(console=console, auto_refresh=False) if live else None


class Progress:
    """The state of the loop: a live display on a terminal, one line per update elsewhere (CI, a file). A context
    manager.

    total  number of updates of the display (rollouts) at the end of the run
    start  number already done when a run is resumed; the ETA counts only those done here
    title  shown before the bar: the name of the run
    shown  (column, metric, format) to show, where the metric is present; the value last seen stays (evaluations are
    rare)"""

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        title: str = "rollout",
        shown: Sequence[tuple[str, str, str]] = SHOWN,
        console: Console | None = None,
    ):
        self._total, self._start, self._title, self._shown = total, start, title, shown
        self._done, self._latest, self._sample = start, {}, None
        self._began = time.perf_counter()
        self._console = console or Console()
        self._live = live_on(self._console)

    def note(self, text: str) -> None:
        """One line above the display: what the run is, warnings."""
        if distributed.is_primary():
            print(f"{self._title}: {text}", file=self._console.file, flush=True)

    def update(self, step: int, values: dict[str, Any], sample: str | None = None) -> None:
        """After rollout `step` (0-based): metrics and timings in one dict; `sample`, a completion, is shown on
        terminals only."""
        self._done, self._sample = min(step + 1, self._total), sample or self._sample
        fresh = {name: float(values[metric]) for name, metric, _ in self._shown if values.get(metric) is not None}
        self._latest |= fresh
        if self._live:
            self._live.update(self._render(), refresh=True)
        elif distributed.is_primary():
            cells = "  ".join(f"{name} {text}" for name, text in self._cells() if name in fresh)
            print(
                f"{self._title} {self._done}/{self._total}  {cells}  ETA {self._eta()}",
                file=self._console.file,
                flush=True,
            )

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
        return Group(
            head, table, *([Text(sample, style="italic dim", no_wrap=True, overflow="ellipsis")] if sample else [])
        )
