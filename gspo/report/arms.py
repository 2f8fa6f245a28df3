"""Several runs that differ in what is laid over one config, from one cold start: the arms of a comparison."""

from pathlib import Path
from typing import Any

from gspo import build, rl, sft
from gspo.types import UserError


def train_arms(config: Any, workdir: Path, **options: Any) -> dict[str, list[Path]]:
    """The cold start, then each arm with each seed from it. Returns arm -> its folders, one per seed.

    config   with the fields of configs/quickstart.py: cold_start, base, seeds, arms
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
