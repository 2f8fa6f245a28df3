"""Several runs that differ in what is laid over one config, from one cold start: the arms of a comparison."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gspo import build, rl, sft
from gspo.report.campaign import Run, train_all
from gspo.types import UserError


def train_arms(config: Any, workdir: Path, **options: Any) -> dict[str, list[Path]]:
    """The cold start, then each arm with each seed from it. Returns arm -> its folders, one per seed.

    config   with the fields of configs/objectives.py: cold_start, base, seeds, arms
    options  those of `rl.train` and `sft.train`
    A run that is in the workdir already is resumed where it was stopped. Raises UserError."""
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise UserError(f"seeds={config.seeds}: give one number or more, each once")
    cold = workdir / "cold"
    sft.train(build.sft_plan(config.cold_start, str(cold)), str(cold), title="cold start", **options)
    folders = {arm: [workdir / folder_name(arm, seed, config.seeds) for seed in config.seeds] for arm in config.arms}
    for arm, seeds in folders.items():
        for seed, folder in zip(config.seeds, seeds, strict=True):
            changed = laid_over(config.base, config.arms[arm], seed=seed, init_from=str(cold))
            rl.train(build.rl_plan(changed, str(folder)), str(folder), title=f"{arm} (seed {seed})", **options)
    return folders


def folder_name(arm: str, seed: int, seeds: tuple[int, ...]) -> str:
    name = arm.lower().replace(" ", "_")
    return name if len(seeds) == 1 else f"{name}-{seed}"


def laid_over(base: Any, changes: Any, **fields: Any) -> Any:
    """A copy of the config `base` with `changes`, a config or a dict, and single fields over it."""
    config = base.copy_and_resolve_references()
    config.unlock()  # an arm may bring fields that the base lacks, such as options of another task
    config.update(changes)
    config.update(fields)
    return config


def runs_of(
    config: Any,
    workdir: Path,
    *,
    figures: Sequence[str] = (),
    arms: Sequence[str] = (),
    seeds: Iterable[int] = (),
) -> list[Run]:
    """What the figures of a paper need: seed by seed, the cold starts before the arms that begin with them.

    config                with the fields of configs/paper.py: cold_start, base, colds, arms, same, figures
    figures, arms, seeds  only these; empty: all. An arm may be a part of a name, "B MoE".
    Raises UserError for names that the config does not have."""
    wanted = seeds_of_arms(config, figures, arms)
    last, seeds = max((len(each) for each in wanted.values()), default=0), set(seeds)
    runs: dict[Path, Run] = {}
    for turn in range(last):  # the first seed of each arm, then the second
        for arm, own in wanted.items():
            if turn < len(own) and (not seeds or own[turn] in seeds):
                for run in _with_start(config, workdir, arm, own[turn]):
                    runs.setdefault(run.folder, run)
    if not runs:
        raise UserError(f"--seeds={','.join(map(str, sorted(seeds)))}: no arm that was asked for has one of them")
    return list(runs.values())


def _with_start(config: Any, workdir: Path, arm: str, seed: int) -> list[Run]:
    """The run of an arm, behind all that it begins with: a cold start, or ARM@ROLLOUT, a checkpoint of another arm."""
    begins, _, rollout = config.arms[arm].cold.partition("@")
    if rollout:
        before = _with_start(config, workdir, begins, seed)
        init_from = before[-1].folder / "checkpoints" / rollout
    else:
        folder = workdir / "cold" / slug(begins) / str(seed)
        cold_config = laid_over(config.cold_start, config.colds[begins], seed=seed)
        before, init_from = [Run(f"cold start {begins}", seed, folder, cold_config, None)], folder
    changed = laid_over(config.base, config.arms[arm].changes, seed=seed, init_from=str(init_from))
    return [*before, Run(arm, seed, workdir / slug(arm) / str(seed), changed, before[-1].folder)]


def trained(config: Any, workdir: Path, seeds: Iterable[int] = (), **options: Any) -> dict[str, list[Path]]:
    """Trains what `runs_of` lists, side by side. Returns arm -> its folders, one per seed. seeds: only these; empty:
    all. options: those of `campaign.train_all`."""
    runs = runs_of(config, workdir, seeds=seeds)
    train_all(runs, workers=config.workers, **options)
    folders: dict[str, list[Path]] = {}
    for run in runs:
        if run.cold:
            folders.setdefault(run.arm, []).append(run.folder)
    return folders


def seeds_of_arms(config: Any, figures: Sequence[str] = (), arms: Sequence[str] = ()) -> dict[str, list[int]]:
    """arm -> its seeds, in the order of the figures. One that stands in several has the seeds of all."""
    for name in figures:
        if name not in config.figures:
            raise UserError(f"--figures: there is no {name!r}; choose from {', '.join(config.figures)}")
    found: dict[str, list[int]] = {}
    for name in figures or config.figures:
        for arm in config.figures[name].arms:
            names = [arm, *(other for other, own in config.same.items() if own == arm)]
            if not arms or any(part in one for part in arms for one in names):
                own = found.setdefault(arm, [])
                own += [seed for seed in config.figures[name].seeds if seed not in own]
    if not found:
        raise UserError(f"--arms={','.join(arms)}: in the name of no arm; there are {', '.join(config.arms)}"[:500])
    return found


def slug(name: str) -> str:
    """A name as one of a folder or a file."""
    return re.sub(r"[^a-z0-9.+^-]+", "_", name.lower()).strip("_")
