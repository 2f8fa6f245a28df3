"""Records of tokens: what sampler, learner and routers said of every token of a rollout, in files that NumPy reads.

`--config.log.tokens_every=N` writes one file for each rollout of N, <workdir>/tokens/ROLLOUT.PROCESS.npz, whole or not
at all; every process writes the rows that lie on its devices. A file is never changed. Columns, schema 1:

    about            JSON: {"format": "gspo.tokens", "version": 1, "rollout", "updates", "num_generations",
                     "tokenizer" (spec), "eos_ids", "objective" (all settings), "layers", "experts",
                     "experts_per_token"}; the last three are 0 for a dense model

    one entry for each row of the rollout, R of them
    row              int32   its number in the rollout
    group            int32   its prompt's number: neighbours share one
    update           int32   which of the updates trained on it, from 0
    length           int32   tokens of the completion, the end-of-sequence token included
    reward           float32 raw, as the reward functions say
    truncated        bool    cut off at the frame's end

    one entry for each prompt
    prompt_group     int32   the `group` that it belongs to
    prompt_length    int32
    prompt_token     int32   ids of all prompts, one after the other

    one entry for each completion token, row after row: N = sum of `length`
    token            int32   id
    mask             bool    whether the loss counts it
    advantage        float32
    sampler_logp     float32 log-probs under the sampler,
    old_logp         float32 under the old policy; where there is no `sampler_logp`, both are this,
    logp             float32 under the policy that its update started from: what the objective saw,
    after_logp       float32 under the policy after the last update of the rollout,
    ref_logp         float32 under the reference, where there is one
    entropy          float16 nats, with `logp`
    old_routes       int8    [N, L, X] experts that the old policy chose in each layer for predicting the token, and
    routes           int8    [N, L, X] those that the routers chose with `logp` (free choices, also under replay);
                             int16 above 128 experts; not there for dense models
    margin           float16 [N, L] distance in router logits from the last chosen expert to the next, with `routes`

`read(...)` joins the files of a rollout; its dict of columns makes pandas frames as it stands.
"""

import io
import json
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gspo.run import disk
from gspo.types import UserError

FOLDER, FORMAT, VERSION = "tokens", "gspo.tokens", 1
NAME = re.compile(r"(\d+)\.(\d+)\.npz")
ROWS = ("row", "group", "update", "length", "reward", "truncated")
TOKENS = ("token", "mask", "advantage", "old_logp", "logp", "after_logp", "entropy")
OPTIONAL = ("sampler_logp", "ref_logp", "old_routes", "routes", "margin")
PROMPTS = ("prompt_group", "prompt_length", "prompt_token")


class Record(NamedTuple):
    """A rollout as it was recorded."""

    about: dict[str, Any]
    columns: dict[str, np.ndarray]  # as above, of the rows of all processes, in their order

    @property
    def starts(self) -> np.ndarray:
        """[R + 1] where the tokens of each row begin, and the end of all."""
        return np.concatenate([[0], np.cumsum(self.columns["length"])])

    @property
    def prompts(self) -> dict[int, np.ndarray]:
        """group -> the ids of its prompt."""
        ends = np.cumsum(self.columns["prompt_length"])
        parts = np.split(self.columns["prompt_token"], ends[:-1])
        return dict(zip(self.columns["prompt_group"].tolist(), parts, strict=True))


# ---------------------------------------------------------------------------- writing


def write(workdir: Path, process: int, about: dict[str, Any], columns: dict[str, np.ndarray]) -> Path:
    """Writes the rows of one process. Equal columns give equal bytes. Raises UserError where the disk is full."""
    path = workdir / FOLDER / f"{about['rollout']:06d}.{process}.npz"
    written, content = {"format": FORMAT, "version": VERSION} | about, io.BytesIO()
    np.savez_compressed(content, about=np.array(json.dumps(written)), **columns)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write_whole(path, content.getvalue())
    except OSError as error:
        if not disk.is_full(error):
            raise
        raise disk.full(f"the record {path.name}", path.parent, content.getbuffer().nbytes) from error
    return path


def forget(workdir: Path, first: int) -> None:
    """Removes the records of rollout `first` and of those after it: a run that goes on there writes them again."""
    for rollout, paths in files(workdir).items():
        for path in paths if rollout >= first else ():
            path.unlink()


# ---------------------------------------------------------------------------- reading


def files(workdir: Path) -> dict[int, list[Path]]:
    """Rollout -> its files, both rising. What is called otherwise is left alone."""
    found: dict[int, list[Path]] = {}
    for path in (workdir / FOLDER).glob("*.npz"):
        match = NAME.fullmatch(path.name)
        if match:
            found.setdefault(int(match[1]), []).append(path)
    return {rollout: sorted(found[rollout], key=lambda p: int(p.name.split(".")[1])) for rollout in sorted(found)}


def read(paths: list[Path]) -> Record:
    """The files of one rollout as one record, every row once. Raises UserError, one line, for a file that is cut short,
    of another kind or of a later schema."""
    parts = [_read_one(path) for path in paths]
    about, columns = parts[0]
    for path, (other, more) in zip(paths[1:], parts[1:], strict=True):
        if other != about or more.keys() != columns.keys():
            raise UserError(f"{path}: it is no part of the rollout that {paths[0].name} is of; remove one of them")
    if len(parts) == 1:
        return Record(about, columns)
    return Record(about, _joined([columns for _, columns in parts]))


def _read_one(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            if not isinstance(about, dict) or about.get("format") != FORMAT:
                raise ValueError("another format")
            if about["version"] > VERSION:
                raise UserError(
                    f"{path}: its schema is {about['version']}, this version reads up to {VERSION}; use the version "
                    "that wrote it"
                )
            names = [name for name in (*ROWS, *PROMPTS, *TOKENS, *OPTIONAL) if name in file.files]
            columns = {name: file[name] for name in names}
        _check(columns)
    except (OSError, KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: not a whole record of tokens ({_reason(error)}); remove it") from None
    return about, columns


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:120] or type(error).__name__


def _check(columns: dict[str, np.ndarray]) -> None:
    """Raises ValueError unless the columns are those of one record."""
    missing = [name for name in (*ROWS, *PROMPTS, *TOKENS) if name not in columns]
    if missing:
        raise ValueError(f"no column {missing[0]!r}")
    tokens = int(columns["length"].sum())
    sizes = dict.fromkeys(ROWS, len(columns["row"])) | dict.fromkeys((*TOKENS, *OPTIONAL), tokens)
    sizes |= {"prompt_length": len(columns["prompt_group"]), "prompt_token": int(columns["prompt_length"].sum())}
    for name, size in sizes.items():
        if name in columns and len(columns[name]) != size:
            raise ValueError(f"column {name!r} has {len(columns[name])} entries and not {size}")
    if "routes" in columns and columns["routes"].shape != columns["old_routes"].shape:
        raise ValueError("routes of two shapes")


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Rows, prompts and tokens of several processes in the order of the rollout. A row that lies on several is taken
    once."""
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    rows, prompts = (np.unique(whole[name], return_index=True)[1] for name in ("row", "prompt_group"))
    return _chosen(whole, rows, prompts)


def taken(record: Record, rows: np.ndarray) -> Record:
    """Some rows of a record (positions, rising), with their prompts."""
    columns = record.columns
    prompts = np.flatnonzero(np.isin(columns["prompt_group"], columns["group"][rows]))
    return record._replace(columns=_chosen(columns, rows, prompts))


def _chosen(columns: dict[str, np.ndarray], rows: np.ndarray, prompts: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of these rows and prompts, in their order."""
    order = dict.fromkeys(ROWS, rows) | {"prompt_group": prompts, "prompt_length": prompts}
    order |= dict.fromkeys((*TOKENS, *OPTIONAL), _spans(columns["length"], rows))
    order["prompt_token"] = _spans(columns["prompt_length"], prompts)
    return {name: column[order[name]] for name, column in columns.items()}


def _spans(lengths: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Where the entries of the chosen spans lie, of spans that follow each other."""
    starts = np.cumsum(lengths) - lengths
    return np.concatenate([np.arange(0)] + [np.arange(starts[i], starts[i] + lengths[i]) for i in chosen])


def experts_changed(old_X: np.ndarray, new_X: np.ndarray) -> np.ndarray:
    """[..., X] -> [...] how many of the experts that the old policy chose are not among those now chosen; 255 where -1
    stands for not recorded. As `gspo.model.routing.changed`, in numbers and not in shares."""
    kept_X = (old_X[..., :, None] == new_X[..., None, :]).any(axis=-1)
    changed = (~kept_X).sum(axis=-1)
    return np.where((old_X < 0).any(axis=-1), 255, changed).astype(np.uint8)
