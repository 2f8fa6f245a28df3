"""Traces of single rollouts by jax.profiler, for TensorBoard's profile page, Perfetto or XProf.

The phases of the loop (`progress.Timer`) and the parts of the jitted steps (`jax.named_scope`) carry their names.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import jax


class Profiler:
    """`at(index)` at the start of every rollout: from there to the next call, those in `rollouts` are traced into
    <workdir>/profile/<index>. Leaving the context ends a trace."""

    def __init__(self, workdir: str | os.PathLike, rollouts: Sequence[int]):
        self._folder, self._rollouts, self._running = Path(workdir) / "profile", set(rollouts), False

    def at(self, index: int) -> None:
        self._stop()
        if index in self._rollouts:
            jax.profiler.start_trace(str(self._folder / str(index)))
            self._running = True

    def _stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
