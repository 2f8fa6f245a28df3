"""The runs of many arms, side by side: each a process of its own on one core, until all have ended.

A finished run is never made again, one that was stopped goes on where it was, and whoever stops the whole has runs of
all arms alike: they go seed by seed. What has been recorded elsewhere (`gspo.report.ledger`) counts as finished. A core
that could only wait for a cold start compiles meanwhile what the arms will run.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console, Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gspo import build, rl, sft
from gspo.parallel import distributed
from gspo.report import tables
from gspo.run import machine
from gspo.run.cli import StopSignal
from gspo.run.progress import duration, live_on
from gspo.run.workdir import check_config
from gspo.types import Diverged, UserError

LOG, DIVERGED = "log.txt", "diverged.txt"  # in a run's folder: what it prints; why it could not go on
MISTAKE = 2  # exit code of a user's mistake
_CONTEXT = multiprocessing.get_context("forkserver")  # whose server imports jax and the rest once, not for each run


class Run(NamedTuple):
    """One training. cold: the folder of the run whose weights it begins with; None: it is a cold start itself."""

    arm: str
    seed: int
    folder: Path
    config: Any
    cold: Path | None

    @property
    def name(self) -> str:
        return f"{self.arm}, seed {self.seed}"

    @property
    def length(self) -> int:
        """Rollouts, or updates of a cold start."""
        return self.config.num_rollouts if self.cold else self.config.num_updates

    @property
    def lines(self) -> tables.Lines:
        return tables.lines_of(self.folder, "metrics.jsonl")

    @property
    def done(self) -> int:
        """Rollouts, or updates, of which the metrics are written."""
        return _last_step(self.lines)

    @property
    def diverged(self) -> bool:
        """Whether its loss stopped being a number, so that nothing follows."""
        return (self.folder / DIVERGED).exists()

    @property
    def ended(self) -> bool:
        return self.done >= self.length or self.diverged or self._reached

    @property
    def _reached(self) -> bool:
        """Whether it is a cold start whose target ended it early: then its last line says so."""
        target, lines = None if self.cold else self.config.get("target_pass_at_1"), self.lines
        return target is not None and bool(lines) and lines[-1].get("eval/pass@1", -1.0) >= target


def _last_step(lines: tables.Lines) -> int:
    return lines[-1]["step"] if lines else 0


def train_one(run: Run, **options: Any) -> None:
    """In this process. One whose loss is no longer a number has ended: the reason is kept."""
    try:
        if run.cold:
            rl.train(build.rl_plan(run.config, str(run.folder)), str(run.folder), title=run.name, **options)
        else:
            sft.train(build.sft_plan(run.config, str(run.folder)), str(run.folder), title=run.name, **options)
    except Diverged as reason:
        if distributed.is_primary():
            (run.folder / DIVERGED).write_text(f"{reason}\n")


def train_all(
    runs: Sequence[Run],
    *,
    workers: int = 0,
    ended: Callable[[Run], None] = lambda run: None,
    **options: Any,
) -> None:
    """Trains what has not ended, cold starts before what begins with them.

    workers: how many at a time; 0: one for each core of a CPU, one on an accelerator or where there are many processes.
    ended: called after each. options: those of `rl.train` and `sft.train`. Raises UserError when a run has failed, as
    soon as the others have come to a checkpoint."""
    for run in runs:
        build.run_plan(run.config)  # all mistakes that a config shows, before the first of many hours
        check_config(run.folder, run.config.to_dict(), options.get("allow_changed_config", False))
    waiting = [run for run in runs if not run.ended]
    many = jax.distributed.is_initialized()
    workers = workers or (1 if many or machine.has_accelerator() else machine.cores())
    if many or (machine.has_accelerator() and workers == 1):
        for run in waiting:
            train_one(run, **options)
            ended(run)
        return
    _Crew(waiting, workers, ended, options).work()


Child = Callable[[Run, int, dict[str, Any]], None]  # what a process does: (run, its core, options)


class _Job(NamedTuple):
    """A process at work: on the run, or on a rehearsal of it, which leaves compiled programs and nothing else."""

    process: Any
    run: Run
    place: int
    rehearses: bool


class _Crew:
    """Processes at work on runs, each pinned to a core of its own where there are enough: a run's numbers are those of
    one core, however many run beside it."""

    def __init__(
        self,
        waiting: list[Run],
        workers: int,
        ended: Callable[[Run], None],
        options: dict[str, Any],
        child: Child | None = None,
        rehearsal: Child | None = None,
    ):
        self.waiting, self.ended, self.options = waiting, ended, options
        self.child, self.rehearsal = child or _child, rehearsal or _rehearsal
        self.starts = {run.folder: run for run in waiting if not run.cold}
        self.rehearsed: set[str] = set()  # arms; the programs of all seeds of one are the same
        self.board = Board(len(waiting), sum(run.length - run.done for run in waiting))
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [-1]
        self.places = [cores[i % len(cores)] for i in range(workers)]  # free ones
        self.going: dict[int, _Job] = {}  # by the sentinel of its process
        ours = [name for name in sys.modules if name.partition(".")[0] in ("gspo", "configs", "experiments")]
        multiprocessing.set_forkserver_preload(ours)

    def work(self) -> None:
        failure = None
        with StopSignal() as stop, self.board:
            while self.going or (self.waiting and not failure and not stop.requested):
                while self.places and not failure and not stop.requested and self._start_next():
                    pass
                for sentinel in wait(list(self.going), timeout=0.5):
                    failure = self._end(sentinel) or failure
                if failure or stop.requested:
                    for job in self.going.values():
                        job.process.terminate()  # it saves what it has, and leaves
                self.board.draw([job.run for job in self.going.values() if not job.rehearses], self.waiting)
        if stop.requested:
            raise stop.leave(
                f"{self.board.ended} of {self.board.total} runs ended; start the same command again to go on"
            )
        if failure:
            raise UserError(failure)

    def _start_next(self) -> bool:
        """Starts the first run whose cold start has ended, else a rehearsal of one that waits for it. Whether there was
        one."""
        unfinished = {run.folder for run in self.waiting} | {job.run.folder for job in self.going.values()}
        ready = next((run for run in self.waiting if run.cold not in unfinished), None)
        if ready is not None:
            self.waiting.remove(ready)
            ready.folder.mkdir(parents=True, exist_ok=True)
            self._start(ready, self.child)
            return True
        new = (run for run in self.waiting if run.cold in self.starts and run.arm not in self.rehearsed)
        soon = next(new, None)
        if soon is None or jax.config.jax_compilation_cache_dir is None:  # or nobody would find what it has compiled
            return False
        self.rehearsed.add(soon.arm)
        self._start(from_nothing(soon, self.starts[soon.cold]), self.rehearsal, rehearses=True)
        return True

    def _start(self, run: Run, child: Child, rehearses: bool = False) -> None:
        place = self.places.pop(0)
        process = _CONTEXT.Process(target=child, args=(run, place, self.options))
        process.start()
        self.going[process.sentinel] = _Job(process, run, place, rehearses)

    def _end(self, sentinel: int) -> str | None:
        """Notes that a process has ended; why it failed, or None. One that only rehearsed fails nobody: the run itself
        will say what is wrong."""
        process, run, place, rehearses = self.going.pop(sentinel)
        process.join()
        self.places.append(place)
        if rehearses:
            return None
        if process.exitcode == 0:
            self.ended(run)
            self.board.tell(run)
        elif process.exitcode not in (128 + signal.SIGTERM, -signal.SIGTERM):
            lines = (run.folder / LOG).read_text().strip().splitlines() or ["it said nothing"]
            return f"{run.name} failed: {lines[-1].removeprefix('error: ')} ({run.folder / LOG})"
        return None


class Board:
    """How far the whole is: on a terminal a table of what runs and how long all will take, elsewhere a line for each
    run that has ended. A context manager."""

    SECONDS = 2.0  # between two looks at the files of the runs

    def __init__(self, total: int, steps: int):
        self.total, self.ended, self.steps, self.left = total, 0, steps, steps
        self.began, self.drawn = time.perf_counter(), 0.0
        self.live = live_on(Console())

    def __enter__(self) -> "Board":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def draw(self, going: Sequence[Run], waiting: Sequence[Run]) -> None:
        if time.perf_counter() < self.drawn + self.SECONDS:
            return
        self.drawn = time.perf_counter()
        seen = [(run, run.lines) for run in going]
        self.left = sum(run.length - _last_step(lines) for run, lines in seen) + sum(run.length for run in waiting)
        if not self.live:
            return
        table = Table.grid(padding=(0, 2))
        for run, lines in seen:
            done = _last_step(lines)
            reward = next((line["reward/mean"] for line in reversed(lines) if "reward/mean" in line), None)
            said = "compiling" if not lines else "" if reward is None else f"reward {reward:.3f}"
            table.add_row(run.name, ProgressBar(run.length, done, width=30), f"{done}/{run.length}", said)
        head = Text(f"{self.ended} of {self.total} runs, {self.eta()} left", style="bold")
        self.live.update(Group(head, table), refresh=True)

    def tell(self, run: Run) -> None:
        """A run has ended."""
        self.ended += 1
        how = "diverged" if run.diverged else "done"
        line = f"{self.ended}/{self.total}  {run.name}: {how}  ETA {self.eta()}"
        if self.live:
            self.live.console.print(line, highlight=False)
        else:
            print(line, flush=True)

    def eta(self) -> str:
        done = self.steps - self.left
        return duration((time.perf_counter() - self.began) / done * self.left) if done > 0 else "-"


def from_nothing(run: Run, start: Run) -> Run:
    """The run with weights of its own in place of those of its cold start, of which it has model and tokenizer."""
    config, begun = run.config.copy_and_resolve_references(), start.config
    given = {name: value for name, value in config.model.to_dict().items() if value is not None}
    config.update(model=begun.model.to_dict() | given, tokenizer=config.tokenizer or begun.tokenizer, init_from="")
    return run._replace(config=config)


def _child(run: Run, place: int, options: dict[str, Any]) -> None:
    """The process of one run. What it prints goes into a file of the run's folder."""
    _settle(run.folder / LOG, place)
    try:
        train_one(run, **options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(MISTAKE)


def _rehearsal(run: Run, place: int, options: dict[str, Any]) -> None:
    """The process of one rehearsal, which nobody hears."""
    _settle(Path(os.devnull), place)
    rl.rehearse(build.rl_plan(run.config))


def _settle(log: Path, place: int) -> None:
    """This process prints into a file, stays on its core, and ends with its parent."""
    os.setpgrp()  # Ctrl-C is the parent's to hear, which then stops all
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if place >= 0:
        os.sched_setaffinity(0, {place})
    machine.keep_heap()
    machine.keep_programs()


def _end_with_parent() -> None:
    """SIGTERM when the parent has been killed: nobody would wait for this one."""
    wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
