"""Checkpoints: everything that a bit-equal resume needs, written by Orbax while the next rollout already runs.

On disk, under <workdir>/checkpoints, one folder per step:

    <step>/state/   the arrays, by name ("params/layers/attention/query"). Names and not a tree, so that None, empty
                    tuples and the node types of optax never reach the disk: they come back from the tree that the
                    caller restores into.
    <step>/meta/    JSON: the caller's meta, the metrics, and the dtype and shape of every array
    <step>/SEAL.*   digests of all files, one seal per process that wrote some (gspo.run.seal)

Of a run with adapters they hold these; the weights under them are saved once, in <workdir>/base, the same way.

A folder takes its final name only when it is complete, so a killed process leaves at worst a temporary folder, which
the next run removes, or a complete folder without a seal, which is read unchecked. A folder that was damaged later is
passed over with a warning and kept as <step>.broken.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from gspo.model.adapters import LoRA, abstract_adapters, merge_into
from gspo.parallel import distributed
from gspo.run import disk, stored
from gspo.run.seal import write_seal
from gspo.types import UserError

log = logging.getLogger(__name__)
Check = Callable[[Path, dict[str, Any] | None], None]  # (folder, the identity saved there); raises UserError


@jax.jit
def _all_finite(named: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.isfinite(leaf).all() for name, leaf in named.items()}


def _read_latest(
    step_dirs: Sequence[Path], tree: Any, prefix: str = "", cast: bool = False, check: Check | None = None
):
    """The latest checkpoint that can be read -> (folder, tree, meta, damaged folders that were passed over).

    Raises: UserError if it does not fit `tree`, or what `check` raises, or if every folder is damaged.
    """
    wanted = {prefix + name: leaf for name, leaf in stored.named(tree).items()}
    damaged = {}
    for step_dir in step_dirs:
        try:
            stored.check_seals(step_dir)
            meta = stored.read_meta(step_dir)
            saved = {name: text for name, text in meta["arrays"].items() if name.startswith(prefix)}
            if check is not None:
                check(step_dir, meta.get("identity"))
            stored.check_fits(step_dir, saved, wanted, cast)
            arrays = stored.read_arrays(step_dir, wanted)
        except UserError:
            raise
        except Exception as error:  # a damaged folder fails in many ways: JSON, missing files, TensorStore
            damaged[step_dir] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if distributed.any_process(step_dir in damaged):
            damaged.setdefault(step_dir, "another process cannot read it")
            continue
        for broken, why in damaged.items():
            log.warning("checkpoint %s cannot be read, falling back to step %s (%s)", broken, step_dir.name, why)
        return (
            step_dir,
            jax.tree.unflatten(jax.tree.structure(tree), [arrays[name] for name in wanted]),
            meta,
            list(damaged),
        )
    reasons = "; ".join(f"step {step_dir.name}: {why}" for step_dir, why in damaged.items())
    raise UserError(f"no checkpoint in {step_dirs[0].parent} can be read; move them away to start again ({reasons})")


def restore_params(path: str | os.PathLike, abstract_params: Any, check: Check | None = None) -> tuple[int, Any]:
    """The parameters of another run, for `init_from` and for evaluation: (step, params). Reads only, changes nothing on
    disk.

    path             a workdir, its checkpoints folder, or the folder of one step; runs/x@best or runs/x@120 for one
                     that is not the latest
    abstract_params  tree of jax.ShapeDtypeStruct; the arrays come back with its dtypes (cast where they were saved in
                     another) and its shardings (the first device where it names none)
    check            called with the folder and the identity that was saved there, before anything is read
    Of a run with adapters they are the weights that it began with, and the adapters merged into them.
    Raises: UserError if there is no checkpoint, none can be read, or the latest one is of another model shape.
    """
    lora = stored.adapters_at(path)
    if lora is None:
        return _restore(path, abstract_params, check)
    step, adapters = _restore(path, abstract_adapters(lora, abstract_params), check)
    return step, merge_into(restore_base(path, abstract_params), adapters, lora.scale)


def restore_adapters(path: str | os.PathLike, abstract_params: Any) -> tuple[int, LoRA | None, Any]:
    """As `restore_params`, of a run with adapters these alone: (step, what they are, adapters). Of another: (0, None,
    None)."""
    lora = stored.adapters_at(path)
    if lora is None:
        return 0, None, None
    step, adapters = _restore(path, abstract_adapters(lora, abstract_params), None)
    return step, lora, adapters


def _restore(path: str | os.PathLike, abstract_params: Any, check: Check | None) -> tuple[int, Any]:
    stored.quieten_orbax()
    path = Path(path).absolute()
    step_dirs = stored.steps_at(path)
    if not step_dirs:
        raise UserError(f"no checkpoint in {path}: {stored.why_none(path, empty='it holds none yet')}")
    step_dir, params, _, _ = _read_latest(step_dirs, abstract_params, prefix="params/", cast=True, check=check)
    return int(step_dir.name), params


def restore_state(path: str | os.PathLike, abstract_state: Any) -> Any:
    """The whole state that was saved in the folder of one step, runs/x/checkpoints/120 say, bit by bit. Reads only.
    Raises UserError where it is not there, cannot be read, or is of another model or optimizer."""
    stored.quieten_orbax()
    path = Path(path).absolute()
    if not path.is_dir():
        raise UserError(f"no checkpoint {path}: {stored.why_none(f'{path.parent.parent}@{path.name}')}")
    return _read_latest([path], abstract_state)[1]


def save_base(workdir: str | os.PathLike, weights: Any, identity: dict[str, Any]) -> None:
    """Saves the weights under the adapters of a run that begins, once, as a checkpoint of their own in
    <workdir>/base: what they were read from may go on, or go away."""
    own = {name: value for name, value in identity.items() if name != "lora"}
    with Checkpointer(Path(workdir) / stored.BASE, keep_last=1, identity=own, async_save=False) as checkpointer:
        checkpointer.save(0, {"params": weights}, {}, force=True)


def restore_base(path: str | os.PathLike, abstract_params: Any) -> Any:
    """The weights under the adapters of a run, given as for `restore_params`."""
    return _restore(stored.root_at(path) / stored.BASE, abstract_params, None)[1]


# ---------------------------------------------------------------------------- the checkpoints of a run


@dataclasses.dataclass
class _Keep:
    """Orbax preservation policy: the last `last` steps, and the `best` of those that have a score (higher is
    better)."""

    last: int
    best: int
    scores: dict[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = sorted(info.step for info in checkpoints)
        scored = sorted((step for step in steps if step in self.scores), key=lambda step: (self.scores[step], step))
        kept = set(steps[-self.last :]) | set(scored[len(scored) - min(self.best, len(scored)) :])
        return [info.step in kept for info in checkpoints]


class Checkpointer:
    """Saves and restores the state of one run; a context manager.

    workdir      checkpoints go to <workdir>/checkpoints
    keep_last    number of latest checkpoints kept, at least 1. With 1 there is nothing to fall back to
    keep_best    number of best ones kept besides (True: one), by `best_metric`, the name of an entry of `metrics`;
                 higher is better; a checkpoint saved without it, or with NaN, has no rank
    identity     what is saved, as JSON values: given to whoever takes the weights (`gspo.run.identity`)
    async_save   write in the background; an error of a write is raised by the next `save`, `wait` or `close`
    Raises: UserError on settings that contradict each other.
    """

    def __init__(self, workdir: str | os.PathLike, *, keep_last: int = 2, keep_best: bool | int = False,
                 best_metric: str | None = None, identity: dict[str, Any] | None = None,
                 async_save: bool = True):  # fmt: skip
        if keep_last < 1:
            raise UserError(f"keep_last is {keep_last}: at least one checkpoint must be kept")
        if keep_best and not best_metric:
            raise UserError("keep_best needs best_metric, the metric that ranks checkpoints")
        stored.quieten_orbax()
        self._root = Path(workdir).absolute() / "checkpoints"
        self._best_metric, self._identity = best_metric, identity
        self._async_save = async_save
        self._finisher = concurrent.futures.ThreadPoolExecutor(1)
        self._unfinished: concurrent.futures.Future | None = None
        self._needs = (0, 0)  # step and bytes of what is being written
        self._failed = False
        self._keep = _Keep(keep_last, int(keep_best), {})
        # Orbax would read the metrics of every step here, and stop at a damaged one: the scores are read below instead.
        self._manager = ocp.CheckpointManager(self._root, options=ocp.CheckpointManagerOptions(
            preservation_policy=self._keep, enable_async_checkpointing=async_save, cleanup_tmp_directories=True,
            lightweight_initialize=True))  # fmt: skip
        for step_dir in stored.step_dirs(self._root) if keep_best else []:
            try:
                self._score(int(step_dir.name), stored.read_meta(step_dir)["metrics"])
            except Exception:  # damaged: `restore` will say so
                continue

    def save(self, step: int, state: Any, meta: dict[str, Any], metrics: dict[str, float] | None = None,
             force: bool = False) -> bool:  # fmt: skip
        """Saves `state`, a tree of jax arrays, under `step`. Returns False if that step is there already.

        The arrays may be donated as soon as this returns, in asynchronous mode too: accelerators copy them to the host
        before, and on CPU the views that the writer holds make XLA copy instead of reuse the buffers of the next
        donated call.
        meta     JSON values; given back by `restore`
        metrics  for `best_metric`
        force    replaces the checkpoint of that step, and waits until that is done
        Raises: UserError, and saves nothing, where a parameter of the policy or the critic is NaN or infinite: such a
        checkpoint would only push out a good one."""
        self.wait()
        target = self._root / str(step)
        if target.exists() and not force:
            return False
        named = stored.named(state)
        trained = ("params/", "critic/params/")
        finite = jax.device_get(_all_finite({name: leaf for name, leaf in named.items() if name.startswith(trained)}))
        if not all(finite.values()):
            raise UserError(
                f"step {step}: {min(finite, key=finite.get)} is not finite; nothing was saved{self.last_good()}"
            )
        replaced = self._set_aside(target, "replaced") if target.exists() else None
        content = {"meta": meta, "metrics": {name: float(value) for name, value in (metrics or {}).items()},
                   "arrays": {name: stored.describe(leaf) for name, leaf in named.items()},
                   "identity": self._identity, "best_metric": self._best_metric}  # fmt: skip
        content = json.loads(json.dumps(content))  # a copy: the caller may change `meta` while the writer runs
        self._score(step, content["metrics"])
        self._needs = step, sum(leaf.nbytes for leaf in named.values())
        with self._full_disk_in_one_line():
            self._manager.save(step, force=True, args=ocp.args.Composite(
                # Orbax refuses empty arrays
                state=ocp.args.PyTreeSave({name: leaf for name, leaf in named.items() if leaf.size}),
                meta=ocp.args.JsonSave(content)))  # fmt: skip
        self._unfinished = self._finisher.submit(self._finish, self._root / str(step))
        if replaced or not self._async_save:
            self.wait()
        if replaced and distributed.is_primary():
            shutil.rmtree(replaced)
        return True

    def restore(self, abstract_state: Any, check: Check | None = None) -> tuple[int, Any, dict[str, Any]] | None:
        """The latest checkpoint that can be read: (step, state, meta), or None if there is none at all.

        abstract_state  tree of jax.ShapeDtypeStruct; its shardings need not be those of the run that saved (no
                        sharding: the first device). Values come back bit-equal.
        Later checkpoints that are damaged are reported in one line each, and renamed, so that their step can be saved
        again. Raises: UserError if none can be read, or if the latest one is of another model; nothing on disk is
        touched then."""
        self.wait()
        step_dirs = stored.step_dirs(self._root)
        if not distributed.all_equal(int(step_dirs[0].name) if step_dirs else -1):
            raise UserError(
                f"{self._root}: the processes see different checkpoints; put --workdir on storage that all hosts share"
            )
        if not step_dirs:
            return None
        step_dir, state, content, damaged = _read_latest(step_dirs, abstract_state, check=check)
        for broken in damaged:
            self._set_aside(broken, "broken")
        return int(step_dir.name), state, content["meta"]

    def steps(self) -> list[int]:
        """The steps on disk, in rising order; one that is still being written is not among them."""
        return [int(step_dir.name) for step_dir in reversed(stored.step_dirs(self._root))]

    def last_good(self) -> str:
        """ "; the last good checkpoint is step 3", for the message of a run that has to stop. Empty if there is
        none."""
        self.wait()
        return f"; the last good checkpoint is step {self.steps()[-1]}" if self.steps() else ""

    def wait(self) -> None:
        """Returns when everything saved so far is on disk. Raises the error of the writer, if it had one: a UserError
        where the disk is full."""
        if self._unfinished is not None:
            unfinished, self._unfinished = self._unfinished, None  # an error is raised once
            with self._full_disk_in_one_line():
                unfinished.result()

    def close(self) -> None:
        """Waits, and ends the threads of the writer."""
        try:
            self.wait()
        finally:
            self._finisher.shutdown()
            if not self._failed:  # it would raise the error of the writer a second time
                self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if not (isinstance(error, Exception) and distributed.lost_a_process(error)):  # which cannot finish its part
            self.close()

    @contextlib.contextmanager
    def _full_disk_in_one_line(self) -> Iterator[None]:
        """Makes a UserError of the writer's error where the disk is full, and room by removing the unfinished
        folder."""
        try:
            yield
        except Exception as error:
            self._failed = True
            if not disk.is_full(error):
                raise
            step, needed = self._needs
            partial = list(self._root.glob(f"{step}.orbax-checkpoint-tmp*"))
            safe = f"; the last good checkpoint is step {self.steps()[-1]}" if self.steps() else "; there is none yet"
            told = disk.full(f"checkpoint {step}", self._root, needed, sum(map(disk.size_of, partial)), safe)
            for folder in partial if distributed.is_primary() else ():
                shutil.rmtree(folder, ignore_errors=True)  # what is left of it, the next start removes
            raise told from error

    def _finish(self, step_dir: Path) -> None:
        """In the background: waits until Orbax has written and renamed the folder, then seals what this process wrote.
        No process comes here before the folder has its name: Orbax has them all wait for one another."""
        self._manager.wait_until_finished()
        if step_dir.exists():
            write_seal(step_dir, jax.process_index())

    def _score(self, step: int, metrics: dict[str, float]) -> None:
        value = metrics.get(self._best_metric, math.nan)
        if math.isnan(value):
            self._keep.scores.pop(step, None)
        else:
            self._keep.scores[step] = value

    def _set_aside(self, step_dir: Path, suffix: str) -> Path:
        """Renames <step> to <step>.<suffix> (or .<suffix>-2, ...), a name that Orbax does not take for a step."""
        distributed.barrier("all look for a free name")
        aside, n = step_dir.with_name(f"{step_dir.name}.{suffix}"), 1
        while aside.exists():
            aside, n = step_dir.with_name(f"{step_dir.name}.{suffix}-{n + 1}"), n + 1
        distributed.barrier("all have found the same one")
        if distributed.is_primary():
            step_dir.rename(aside)
        distributed.barrier("set aside")
        self._manager.reload()
        return aside
