"""The folder of a model that no run of ours has trained, as scripts/import_hf.py and scripts/upcycle.py write it and
`init_from` takes it: checkpoints/0, model.json, hf/ with what an export takes over, and the tokenizer's files."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gspo.model.spec import ModelSpec
from gspo.run.checkpoint import Checkpointer
from gspo.types import Params, UserError


def check_new(out: Path) -> None:
    """Raises UserError where there is a run already."""
    if (out / "checkpoints").exists():
        raise UserError(f"--out={out} already holds checkpoints: choose another folder")


@contextlib.contextmanager
def written(out: Path) -> Iterator[None]:
    """Makes the folder and its hf/; what cannot be written inside is one line."""
    try:
        (out / "hf").mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}") from None


def save(out: Path, spec: ModelSpec, own: Mapping[str, Any], params: Params, meta: Mapping[str, Any]) -> None:
    """own: the identity of the weights. meta: where they come from."""
    (out / "model.json").write_text(json.dumps(dataclasses.asdict(spec), indent=2) + "\n")
    with Checkpointer(out, keep_last=1, async_save=False, identity=own) as checkpointer:
        checkpointer.save(0, {"params": params}, meta)


def how_to_start(out: Path, tokenizer: bool) -> str:
    """A line for the user. tokenizer: whether one lies beside the weights."""
    return f"start from it with: --config.init_from={out}" + ("" if tokenizer else " --config.tokenizer=...")
