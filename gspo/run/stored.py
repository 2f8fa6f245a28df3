"""One checkpoint on disk: a tree by the names of its leaves, and what is read back from the folder of one step. Its
layout is told in `gspo.run.checkpoint`, which writes it.
"""

import logging
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from gspo.model.adapters import LoRA
from gspo.parallel import distributed
from gspo.run import disk
from gspo.run.seal import check_seal
from gspo.types import UserError

BEST_METRIC = "eval/pass@1"  # ranks the checkpoints of a run, unless they name another
BASE = "base"  # the folder of a run with adapters that holds the weights under them, as a workdir of its own

# ---------------------------------------------------------------------------------------------------- trees by name


def named(tree: Any) -> dict[str, Any]:
    """Tree -> {"params/layers/query": leaf}, in the order of the leaves. None and empty nodes have no leaves."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    by_name = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}
    if len(by_name) != len(flat):
        raise ValueError("two leaves of the state have the same name: a key contains '/'")
    return by_name


def describe(leaf: Any) -> str:
    """float32[3, 4]"""
    return f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"


def check_fits(where: Path, saved: dict[str, str], wanted: dict[str, Any], cast: bool) -> None:
    """UserError with the first arrays that differ in presence, shape or (unless `cast`) dtype."""
    key = (lambda text: text[text.index("[") :]) if cast else (lambda text: text)
    now = {name: describe(leaf) for name, leaf in wanted.items()}
    differ = [f"{name}: saved {saved.get(name, 'nothing')}, now {now.get(name, 'absent')}"
              for name in dict.fromkeys([*now, *saved])
              if name not in saved or name not in now or key(saved[name]) != key(now[name])]  # fmt: skip
    if differ:
        more = f"; and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise UserError(f"{where} is of another model or optimizer: {'; '.join(differ[:3])}{more}. "
                        "Use the config that it was saved with, or another folder")  # fmt: skip


# ---------------------------------------------------------------------------- reading one folder


def step_dirs(root: Path) -> list[Path]:
    """The folders of all steps, latest first, the damaged ones included and the temporary ones not."""
    found = [entry for entry in root.iterdir() if entry.is_dir() and entry.name.isdecimal()] if root.is_dir() else []
    return sorted(found, key=lambda entry: int(entry.name), reverse=True)


def check_seals(step_dir: Path) -> None:
    """Each process checks its share. Raises in all of them where one has found damage: what is damaged is not read."""
    found = None
    try:
        check_seal(step_dir, jax.process_index(), jax.process_count())
    except Exception as error:  # a damaged file or seal: missing, cut short, not JSON
        found = error
    if distributed.any_process(found is not None):
        raise found or ValueError("another process has found a damaged file")


def _reader(handler: Any) -> ocp.Checkpointer:
    """Reads without waiting for other processes: what one of them cannot read, the others must not wait for
    (`gspo.run.checkpoint` has all processes agree afterwards)."""
    alone = ocp.options.MultiprocessingOptions(primary_host=None, active_processes={jax.process_index()})
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def read_meta(step_dir: Path) -> dict[str, Any]:
    """{"meta", "metrics", "arrays"} of one checkpoint. Raises anything if it is damaged."""
    with _reader(ocp.JsonCheckpointHandler()) as reader:
        content = reader.restore(step_dir / "meta", args=ocp.args.JsonRestore())
    if not {"meta", "metrics", "arrays"} <= content.keys():
        raise ValueError("meta is not complete")
    return content


def read_arrays(step_dir: Path, wanted: dict[str, Any]) -> dict[str, jax.Array]:
    """The named arrays, with the dtype and sharding of `wanted` (the first device where it has none)."""

    def target(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    targets = {name: target(leaf) for name, leaf in wanted.items()}
    stored = {name: leaf for name, leaf in targets.items() if leaf.size}  # the empty ones were left out by `save`
    arrays = {
        name: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding) for name, leaf in targets.items() if not leaf.size
    }
    args = ocp.args.PyTreeRestore(
        stored, restore_args=ocp.checkpoint_utils.construct_restore_args(stored), partial_restore=True
    )
    with _reader(ocp.PyTreeCheckpointHandler()) as reader:
        arrays |= reader.restore(step_dir / "state", args=args)
    return jax.block_until_ready(arrays)


def read_content(path: str | os.PathLike) -> dict[str, Any] | None:
    """What the latest readable checkpoint of a workdir, its checkpoints folder, or the folder of one step holds
    beside its arrays; None where there is none. The path may choose one: see `steps_at`."""
    quieten_orbax()
    for step_dir in steps_at(Path(path).absolute()):
        try:
            return read_meta(step_dir)
        except Exception:  # damaged: whoever restores it will say so
            continue
    return None


def steps_at(path: Path) -> list[Path]:
    """The folders of the steps of a workdir or its checkpoints folder, latest first; or that of the one step given, as
    its folder or as runs/x@120; or that of the best, runs/x@best."""
    path, step = split_step(path)
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if step == "best":
        return _best(step_dirs(root))
    if step:
        return [step_dir for step_dir in step_dirs(root) if step_dir.name == step]
    return [path] if path.name.isdecimal() and (path / "meta").exists() else step_dirs(root)


def split_step(path: Path) -> tuple[Path, str]:
    """runs/x@best -> (runs/x, "best"); (path, "") where it chooses no step, or is there as it stands."""
    folder, _, step = path.name.rpartition("@")
    chosen = bool(folder) and (step == "best" or step.isdecimal()) and not path.exists()
    return (path.with_name(folder), step) if chosen else (path, "")


def _best(step_dirs: list[Path]) -> list[Path]:
    """The one with the best score, of several the latest; none where none was saved with a score."""
    scores = []
    for step_dir in step_dirs:
        try:
            content = read_meta(step_dir)
            score = content["metrics"].get(content.get("best_metric") or BEST_METRIC, math.nan)
        except Exception:  # damaged
            continue
        if not math.isnan(score):
            scores.append((score, int(step_dir.name), step_dir))
    return [max(scores)[-1]] if scores else []


def why_none(path: str | os.PathLike, empty: str = "no checkpoint can be read in it") -> str:
    """Why `steps_at` finds nothing that could be read, for a message. empty: what it says of a folder without steps."""
    folder, step = split_step(Path(path).absolute())
    if not folder.exists():
        return "no such folder"
    kept = [step_dir.name for step_dir in reversed(steps_at(folder))]
    if not step or not kept:
        return empty
    have = (
        "no checkpoint was saved with an evaluation" if step == "best" else f"no checkpoint of step {step} can be read"
    )
    return f"{have}; there are steps {', '.join(kept)}"


def adapters_at(path: str | os.PathLike) -> LoRA | None:
    """What the parameters of a checkpoint are adapters of; None where they are the weights themselves."""
    content = read_content(path) or {}
    lora = (content.get("identity") or {}).get("lora")
    return lora and LoRA(**lora)


def root_at(path: str | os.PathLike) -> Path:
    """The workdir of a workdir, of its checkpoints folder, or of the folder of one step that is there."""
    return steps_at(Path(path).absolute())[0].parents[1]


def quieten_orbax() -> None:
    """Drops what Orbax logs below WARNING, about twenty lines per save, and its tracebacks where the disk is full, of
    which every thread of a save has one; absl's other users keep their voice."""
    logger = absl_logging.get_absl_logger()
    if _not_orbax_chatter not in logger.filters:
        logger.addFilter(_not_orbax_chatter)


def _not_orbax_chatter(record: logging.LogRecord) -> bool:
    if f"{os.sep}orbax{os.sep}" not in record.pathname:
        return True
    full = record.exc_info is not None and disk.is_full(record.exc_info[1])  # raised by `wait`, too, which says it
    return record.levelno >= logging.WARNING and not full
