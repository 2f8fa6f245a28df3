"""A checkpoint knows its model: what was trained, and by which tokenizer, is saved with the weights and compared
wherever they are taken. The same weights under another top-k of experts, RoPE base or alphabet have the same shapes and
say something else.
"""

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gspo.data.tokenizer import Tokenizer, difference, fingerprint, make_tokenizer, now
from gspo.model.adapters import LoRA
from gspo.model.spec import ModelSpec
from gspo.model.transformer import abstract_params
from gspo.parallel import distributed
from gspo.parallel.sharding import Layout
from gspo.run.checkpoint import restore_params
from gspo.run.stored import read_content, split_step
from gspo.types import Params, UserError

log = logging.getLogger(__name__)
HOW_IT_RUNS = (
    "dtype",
    "moe_backend",
    "remat",
    "attention_chunk",
    "scan_layers",
)  # fields of a spec that change no weight's meaning
POLICY, REWARD_MODEL = "policy", "reward model"  # kinds of weights; an identity without "kind" is a policy's
TOKENIZER = "tokenizer"  # the folder of a run that holds a copy of its tokenizer's files


def identity(
    spec: ModelSpec, tokenizer: Tokenizer | None, *, kind: str = POLICY, lora: LoRA | None = None
) -> dict[str, Any]:
    """JSON values: {"model": the fields of the spec that give weights their meaning, "tokenizer": its fingerprint,
    "date": the day that its chat template writes}. Without a tokenizer the last two are None. "kind": what the weights
    are, where they are no policy. "lora": what gives adapters their meaning, where it is they that are saved."""
    fields = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(spec).items()
        if name not in HOW_IT_RUNS
    }
    known = None if tokenizer is None else fingerprint(tokenizer)
    own = {"model": fields, "tokenizer": known, "date": getattr(tokenizer, "date", None)}
    own |= {} if kind == POLICY else {"kind": kind}
    return own if lora is None else own | {"lora": dataclasses.asdict(lora)}


def kind_of(saved: Mapping[str, Any] | None) -> str:
    """What the weights are of which this is the identity."""
    return (saved or {}).get("kind", POLICY)


def check_identity(where: str | os.PathLike, saved: Mapping[str, Any] | None, now: Mapping[str, Any]) -> None:
    """Raises UserError with the first field in which the weights at `where` were trained otherwise. Weights that were
    saved without an identity are taken as they are, with a warning."""
    if saved is None:
        log.warning("%s does not say what model its weights are of: only shapes can be compared", where)
        return
    if kind_of(saved) != kind_of(now):
        raise UserError(f"{where}: the weights are those of a {kind_of(saved)}, where a {kind_of(now)} is wanted")
    for name, value in now["model"].items():
        if name in saved["model"] and saved["model"][name] != value:
            raise UserError(
                f"model.{name}={value}: the weights in {where} were trained with {saved['model'][name]}; leave it out, "
                "or take other weights"
            )
    if saved["tokenizer"] is not None and now["tokenizer"] is not None:
        found = difference(now["tokenizer"], saved["tokenizer"])
        if found:
            raise UserError(
                f"tokenizer={now['tokenizer']['spec']}: the weights in {where} were trained with another one; its "
                f"{found}"
            )


def restore_known(path: str | os.PathLike, model: Any, layout: Layout, now: Mapping[str, Any]) -> tuple[int, Params]:
    """`restore_params` for a model of this identity on its devices: (step, parameters). Raises UserError where
    `check_identity` does, before anything is read."""
    return restore_params(path, abstract_params(model, layout), lambda where, saved: check_identity(where, saved, now))


def spec_fields(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a ModelSpec in a saved identity; JSON has lists for tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in saved["model"].items()}


def check_adapters(where: str | os.PathLike, saved: Mapping[str, Any] | None, now: Mapping[str, Any]) -> None:
    """Raises UserError where the adapters of a run that goes on are not those that its config asks for."""
    began, wanted = ((each or {}).get("lora") or {"rank": 0} for each in (saved, now))
    for name in wanted.keys() & began.keys():
        if saved is not None and wanted[name] != began[name]:
            raise UserError(
                f"lora.{name}={wanted[name]}: the run in {where} began with {began[name]}; keep it, or start another "
                "run from this one (init_from)"
            )


def saved_identity(path: str | os.PathLike) -> dict[str, Any] | None:
    """What the latest checkpoint of a workdir (or a folder of checkpoints, or that of one step) says of its model; None
    where there is none, or where it does not say."""
    content = read_content(path)
    return None if content is None else content.get("identity")


def spec_of(saved: Mapping[str, Any]) -> ModelSpec:
    """The model of a saved identity; how it runs is left at its defaults."""
    return ModelSpec(**spec_fields(saved))


def tokenizer_of(saved: Mapping[str, Any], path: str | os.PathLike) -> str | None:
    """The tokenizer of a saved identity as a config would name it: itself, or the folder of files beside the
    weights."""
    if saved["tokenizer"] is None:
        return None
    own = saved["tokenizer"]["spec"]
    return own if own == "bytes" or own.startswith("chars:") else str(run_folder(path) / TOKENIZER)


def dated_tokenizer(spec: str, date: str | None) -> Tokenizer:
    """`make_tokenizer(spec)` for a run that began on that day; None: today. The day, which a chat template may write
    into prompts, is the same in all processes."""
    return make_tokenizer(spec, date=distributed.text_of_primary(date or now()))


def run_folder(path: str | os.PathLike) -> Path:
    """The workdir of a checkpoint: of itself, of its folder of checkpoints, or of one step in it (runs/x@best too)."""
    path, _ = split_step(Path(path).absolute())
    return next((p for p in (path, *path.parents[:2]) if (p / "checkpoints").is_dir()), path)
