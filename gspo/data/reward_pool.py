"""Slow rewards in processes of their own, with a time limit per call: who hangs is killed and replaced, who crashes is
replaced, and the call counts as failed.

Each process loads the rewards by name, from the working directory; of jax's devices it has the CPU. It has no terminal:
it hears no Ctrl-C and no signal of a job scheduler to the run (which may first want to finish its rollout), and what it
or its children print goes nowhere. It ends when the run does, however that ends: its pipe closes. In a run of many
processes each has such processes of its own, for the completions that lie on its devices.
"""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from multiprocessing import connection, util
from typing import NamedTuple

import jax

from gspo.data.example import Example
from gspo.data.user_rewards import Called, attempt, load
from gspo.types import UserError

START_SECONDS = 120  # until a process has imported the rewards
# Processes are forked from a small server that has imported this file: in milliseconds, and without the run's threads.
_CONTEXT = multiprocessing.get_context("forkserver")


class Job(NamedTuple):
    """One call of a reward: one completion, or the completions of one prompt."""

    name: str
    texts: list[str]
    examples: list[Example]


class RewardPool:
    """names: of the rewards. field: of the config that has them. timeout_s: of one call. Processes start with the first
    jobs."""

    def __init__(
        self, names: Sequence[str], example: Example, field: str = "rewards", *, workers: int, timeout_s: float
    ) -> None:
        self.loaded, self.timeout_s = (list(names), example, field), timeout_s
        self._too_long = f"took longer than reward_timeout_s={timeout_s:g}"
        self._size, self._workers = workers, []
        self._close = util.Finalize(self, _end_all, args=(self._workers,), exitpriority=100)

    def run(self, jobs: Sequence[Job]) -> list[Called]:
        """What became of each job, in their order. Raises UserError where a process cannot load the rewards."""
        results: list[Called | None] = [None] * len(jobs)
        if not self._workers and jobs:
            self._workers += [_Worker(*self.loaded) for _ in range(self._size)]
            for worker in self._workers:
                worker.wait_until_ready()
        waiting = list(reversed(range(len(jobs))))
        busy: dict[_Worker, tuple[int, float]] = {}
        while waiting or busy:
            for worker in self._workers:
                while waiting and worker not in busy:
                    at = waiting.pop()
                    results[at] = worker.give(jobs[at])
                    if results[at] is None:
                        busy[worker] = (at, time.monotonic() + self.timeout_s)
            if not busy:
                continue
            left = min(until for _, until in busy.values()) - time.monotonic()
            connection.wait([worker.pipe for worker in busy], timeout=max(left, 0))
            for worker, (at, until) in list(busy.items()):
                late = time.monotonic() >= until
                answered = worker.pipe.poll()
                if not answered and not late:
                    continue
                del busy[worker]
                results[at] = worker.take() if answered else None
                if results[at] is None:
                    why = "its process ended in the middle of the call" if answered else self._too_long
                    results[at] = _failed(jobs[at], why)
                    self._replace(worker)
        return results

    def close(self) -> None:
        self._close()

    def _replace(self, worker: "_Worker") -> None:
        worker.kill()
        fresh = _Worker(*self.loaded)
        self._workers[self._workers.index(worker)] = fresh
        fresh.wait_until_ready()


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, names: list[str], example: Example, field: str) -> None:
        # What the server has imported, a new process need not.
        multiprocessing.set_forkserver_preload([__name__])
        self.pipe, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_serve, args=(theirs, names, example, field), daemon=True)
        self.process.start()
        theirs.close()

    def wait_until_ready(self) -> None:
        try:
            told = self.pipe.recv() if self.pipe.poll(START_SECONDS) else f"no answer in {START_SECONDS} s"
        except (EOFError, OSError):  # a module that crashes where it is imported, or too little memory
            told = "its process ended"
        if told:
            raise UserError(f"reward_workers: a process that was to load the rewards did not: {told}")

    def give(self, job: Job) -> Called | None:
        """Sends a job. What became of it where it cannot be sent, else None."""
        try:
            self.pipe.send(job)
        except OSError:
            return None  # the process is gone: `take` says so
        except Exception as error:  # an example that cannot be pickled
            return _failed(job, f"cannot be sent to a process of reward_workers: {type(error).__name__}: {error}"[:200])
        return None

    def take(self) -> Called | None:
        """The result; None where the process is gone."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return None

    def kill(self) -> None:
        """With everything it started."""
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _end_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()


def _failed(job: Job, why: str) -> Called:
    return Called([0.0] * len(job.texts), why)


def _serve(pipe: connection.Connection, names: list[str], example: Example, field: str) -> None:
    """What a process does: loads the rewards, says so, answers calls until the pipe closes."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    jax.config.update("jax_platforms", "cpu")  # where a reward uses jax: the accelerators are the run's
    with open(os.devnull, "r+b", buffering=0) as nowhere:
        for descriptor in (0, 1, 2):
            os.dup2(nowhere.fileno(), descriptor)
    try:
        rewards = {name: load(name, example, field) for name in names}
    except UserError as error:
        pipe.send(str(error))
        return
    pipe.send("")
    with contextlib.suppress(EOFError, OSError):
        while True:
            job = pipe.recv()
            pipe.send(attempt(rewards[job.name], job.texts, job.examples))
