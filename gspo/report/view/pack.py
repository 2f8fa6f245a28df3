"""Runs as the page of `scripts/view.py` holds them: one header of JSON, one block of arrays, compressed.

    content = uint32 length of the header | header, UTF-8 | padding to 8 bytes | arrays, little-endian, each at 8 bytes
    page    = base64( gzip( content ) )

The header names every array by {"at": bytes behind the header, "dtype", "size"}. Texts are in the header, JSON in
ASCII: in base64 nothing of them can end a script or start a tag.
"""

import base64
import functools
import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gspo.data.tokenizer import Tokenizer, make_tokenizer
from gspo.objectives import settings
from gspo.run import tokens
from gspo.run.identity import TOKENIZER
from gspo.run.writers import plain, read_jsonl
from gspo.types import UserError

SHOWN = ("grpo", "gspo", "gspo_token", "cispo", "sapo", "gmpo")  # presets that the page switches between
DTYPES = {"int32": "<i4", "uint8": "|u1", "float32": "<f4"}


class Block:
    """Arrays in one run of bytes; `add` returns how the header names one."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.size = 0

    def add(self, array: np.ndarray, dtype: str) -> dict[str, Any]:
        data = np.ascontiguousarray(array).astype(DTYPES[dtype]).tobytes()
        named = {"at": self.size, "dtype": dtype, "size": int(np.size(array))}
        data += b"\0" * (-len(data) % 8)
        self.parts.append(data)
        self.size += len(data)
        return named


def packed(folders: list[Path], limit: int) -> str:
    """What stands in the page for these workdirs: at most `limit` tokens of all of them, see `_records`. Raises
    UserError for a folder that holds no run, and for records that cannot be read."""
    block, names = Block(), _names(folders)
    share = limit // len(folders)
    runs = [_run(folder, name, share, block) for folder, name in zip(folders, names, strict=True)]
    header = {"runs": runs, "objectives": {name: _numbers(settings(name)) for name in SHOWN}, "limit": limit}
    text = json.dumps(plain(header), allow_nan=False).encode("ascii")
    text += b" " * (-(len(text) + 4) % 8)
    content = len(text).to_bytes(4, "little") + text + b"".join(block.parts)
    return base64.b64encode(gzip.compress(content, mtime=0)).decode("ascii")


def _names(folders: list[Path]) -> list[str]:
    """The folders' own names, or whole paths where two are called the same."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _numbers(objective: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in objective.items() if value is not None}


def _run(folder: Path, name: str, limit: int, block: Block) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"no such workdir: {folder}")
    found = tokens.files(folder)
    if not found and not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder} holds no metrics.jsonl and no {tokens.FOLDER}/: is it the --workdir of a run?")
    try:
        lines = read_jsonl(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
    except ValueError as error:
        raise UserError(str(error)) from None
    records, notes = _records(folder, name, found, limit)
    return {
        "name": name,
        "metrics": _metrics(lines),
        "records": [_record(folder, record, whole, block) for record, whole in records],
        "notes": notes,
    }


def _metrics(lines: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """name -> [steps, values], of the metrics that are numbers."""
    curves: dict[str, list[list[float]]] = {}
    for line in lines:
        for metric, value in line.items():
            if metric != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                steps, values = curves.setdefault(metric, [[], []])
                steps.append(line["step"])
                values.append(value)
    return curves


# ---------------------------------------------------------------------------- what is shown, and what is left out


def _records(
    folder: Path, name: str, found: dict[int, list[Path]], limit: int
) -> tuple[list[tuple[tokens.Record, tokens.Record]], list[str]]:
    """([(what is shown of a record, the whole)], notes on what is not). The last rollout is taken first, then the
    first, then those between them, by halves, as long as they fit; of the one that does not fit, its first groups."""
    if not found:
        return [], [f"{name} has no record of tokens; --config.log.tokens_every=N writes one for each rollout of N"]
    left, shown, notes = limit, {}, []
    for rollout in _by_halves(list(found)):
        whole = tokens.read(found[rollout])
        rows = _that_fit(whole, left, at_least_one=not shown)
        if len(rows):
            shown[rollout] = (tokens.taken(whole, rows), whole)
            left -= len(shown[rollout][0].columns["token"])
        if len(rows) < len(whole.columns["row"]):
            groups = [len(np.unique(whole.columns["group"][which])) for which in (rows, slice(None))]
            if len(rows):
                notes.append(f"{name}: of rollout {rollout} the first {groups[0]} of {groups[1]} groups are shown")
            break
    if len(shown) < len(found):
        notes.append(f"{name}: {len(shown)} of {len(found)} recorded rollouts are shown; --tokens={limit} is its limit")
    return [shown[rollout] for rollout in sorted(shown)], notes


def _by_halves(rollouts: list[int]) -> list[int]:
    """The last, the first, the middle, the middles of the halves, ..."""
    order, spans = [rollouts[-1], rollouts[0]], [(0, len(rollouts) - 1)]
    while spans:
        low, high = spans.pop(0)
        middle = (low + high) // 2
        if low < middle < high:
            order.append(rollouts[middle])
            spans += [(low, middle), (middle, high)]
    return list(dict.fromkeys(order))


def _that_fit(record: tokens.Record, left: int, at_least_one: bool) -> np.ndarray:
    """Positions of the rows of the first groups that have `left` tokens at most."""
    groups, lengths = record.columns["group"], record.columns["length"]
    ends, total = [], 0
    for group in dict.fromkeys(groups.tolist()):
        total += int(lengths[groups == group].sum())
        if total > left and not (at_least_one and not ends):
            break
        ends.append(group)
    return np.flatnonzero(np.isin(groups, ends))


# ---------------------------------------------------------------------------- one record


def _record(folder: Path, record: tokens.Record, whole: tokens.Record, block: Block) -> dict[str, Any]:
    columns, about, starts = record.columns, record.about, record.starts
    piece, text = _decoding(folder, about)
    prompts = [{"group": group, "text": text(ids), "key": _key(ids)} for group, ids in record.prompts.items()]
    i4, f4, u1 = ("int32", "float32", "uint8")
    wanted = {"row": i4, "group": i4, "update": i4, "reward": f4, "truncated": u1, "token": i4, "mask": u1}
    wanted |= dict.fromkeys(("advantage", "old_logp", "logp", "after_logp", "entropy", "sampler_logp", "ref_logp"), f4)
    arrays = {name: block.add(columns[name], dtype) for name, dtype in wanted.items() if name in columns}
    arrays["start"] = block.add(starts, i4)
    if "routes" in columns:
        arrays["changed"] = block.add(tokens.experts_changed(columns["old_routes"], columns["routes"]), u1)
        arrays["margin"] = block.add(columns["margin"].min(axis=1), f4)
    return {
        "rollout": about["rollout"],
        "layers": about["layers"] if "routes" in columns else 0,
        "experts_per_token": about["experts_per_token"],
        "objective": _numbers(about["objective"]),
        "eos_ids": about["eos_ids"],
        "prompts": prompts,
        "texts": [text(columns["token"][starts[i] : starts[i + 1]]) for i in range(len(starts) - 1)],
        "pieces": {int(i): piece(int(i)) for i in np.unique(columns["token"])},
        "updates": _of_updates(whole),
        "arrays": arrays,
    }


def _of_updates(whole: tokens.Record) -> dict[str, list[int]]:
    """Of each update, what its loss divides by: rows that have a token that counts, and such tokens."""
    columns, starts = whole.columns, whole.starts
    counted = np.concatenate([[0], np.cumsum(columns["mask"])])
    of_row = counted[starts[1:]] - counted[starts[:-1]]
    updates = columns["update"]
    number = range(int(whole.about["updates"]))
    return {
        "rows": [int((of_row[updates == j] > 0).sum()) for j in number],
        "tokens": [int(of_row[updates == j].sum()) for j in number],
    }


def _key(ids: np.ndarray) -> str:
    return hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=8).hexdigest()


def _decoding(folder: Path, about: dict[str, Any]) -> tuple[Callable[[int], str], Callable[[np.ndarray], str]]:
    """(id -> its text, ids -> their text). An id without a text of its own is shown as ⟨id⟩, as half a character is;
    so are all where the tokenizer is not there any more."""
    tokenizer = _tokenizer(str(about["tokenizer"]), folder)
    if tokenizer is None:
        return lambda i: f"⟨{i}⟩", lambda ids: "".join(f"⟨{i}⟩" for i in ids)
    ends = set(about["eos_ids"])

    def piece(i: int) -> str:
        alone = "" if i in ends else tokenizer.decode([i])
        if i in ends:
            return "⟨end⟩"
        if not alone or "\ufffd" in alone:
            return f"⟨{i:02x}⟩" if tokenizer.spec == "bytes" and i < 256 else f"⟨{i}⟩"
        return alone

    return piece, lambda ids: tokenizer.decode(ids.tolist())


@functools.cache
def _tokenizer(spec: str, folder: Path) -> Tokenizer | None:
    try:
        whole = spec == "bytes" or spec.startswith("chars:")
        return make_tokenizer(spec if whole else str(folder / TOKENIZER))
    except UserError:
        return None
