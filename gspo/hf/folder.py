"""Hugging Face folders in and out: safetensors <-> parameters, by the tables of `gspo.hf.families`.

Nothing is whole in memory that need not be: an import reads, leaf by leaf, the slices that this process's devices hold,
straight from the files; an export fetches layer by layer and writes shards of bounded size, laid out as the published
checkpoints are. Only safetensors are read: a pickle is a program.
"""

import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from gspo.data.hf_tokenizer import FILES
from gspo.hf.families import family_of, hf_config, read_config, surplus_layers, table
from gspo.hf.rows import Row
from gspo.model.spec import ModelSpec
from gspo.model.transformer import Transformer, abstract_params
from gspo.parallel import distributed
from gspo.types import Params, UserError

INDEX = "model.safetensors.index.json"
CARRIED = (  # files that an export takes over from the folder it was imported from, or from the tokenizer's
    *FILES,
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
DTYPES = {"F32": 4, "BF16": 2, "F16": 2}  # what is read, and its bytes; float32 holds each of them exactly
OF_LAYER = re.compile(r"model\.layers\.(\d+)\.")
log = logging.getLogger(__name__)
IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")  # a constant that some Llama 2 folders carry


# ---------------------------------------------------------------------------------------------------- import


def _flat(spec: ModelSpec, tree: Params) -> dict[str, Any]:
    """{path: leaf}, asserting that the table knows every leaf and the tree has every row."""
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    abstract = flax.traverse_util.flatten_dict(abstract_params(Transformer(spec)), sep="/")
    shapes = {path: leaf.shape for path, leaf in abstract.items()}
    assert {row.path for row in table(spec)} == shapes.keys(), (
        "the table of this family does not cover the model's parameters"
    )
    if {path: tuple(leaf.shape) for path, leaf in flat.items()} != shapes:
        raise UserError("the parameters are of another shape than the model's spec says")
    return flat


def import_params(folder: str | Path, spec: ModelSpec, abstract: Params, besides: Sequence[str] = ()) -> Params:
    """Reads the safetensors of a folder: model.safetensors, or the shards that model.safetensors.index.json names.

    abstract: tree of jax.ShapeDtypeStruct as `gspo.model.transformer.abstract_params` gives it; the arrays come back
    with its dtypes and shardings (the first device where it names none). Each process reads what its own devices hold,
    one leaf at a time. bfloat16 and float16 become float32 exactly. besides: names of tensors that the folder may hold,
    too.
    Raises: UserError that names every tensor that is missing, surplus, of another shape or of another kind than DTYPES;
    or if there are no safetensors, or damaged ones. Pickled weights are never opened.
    """
    tensors = {name: file for name, file in _open(Path(folder)).items() if name not in besides}
    return read_params(table(spec), spec, abstract, tensors, where=folder)


def read_params(
    rows: tuple[Row, ...], spec: ModelSpec, abstract: Params, tensors: dict[str, Any], *, where: str | Path
) -> Params:
    """`import_params` from tensors that are open: {name: what has get_slice(name)}, as safetensors' files have it.

    rows: the table of the spec, under the names of these tensors. where: what errors call their source.
    """
    wanted = _flat(spec, abstract)
    _check(where, rows, spec, wanted, tensors)
    params = {}
    for row in rows:
        leaf = wanted[row.path]
        sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.devices()[0])
        read = partial(_read, row, leaf, tensors, {})
        params[row.path] = jax.block_until_ready(jax.make_array_from_callback(leaf.shape, sharding, read))
    return flax.traverse_util.unflatten_dict(params, sep="/")


def read_tensor(folder: str | Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor of a folder, float32, on the host. Raises UserError where it is not there, or of another shape."""
    tensors = _open(Path(folder))
    found = list(tensors[name].get_slice(name).get_shape()) if name in tensors else "not there"
    if found != list(shape):
        raise UserError(f"{folder}: {name} is {found}, where {list(shape)} is wanted")
    return np.asarray(tensors[name].get_tensor(name), np.float32)


def _open(folder: Path) -> dict[str, Any]:
    """{tensor name: the open file that holds it}. Only headers are read."""
    if (folder / INDEX).is_file():
        try:
            files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{folder / INDEX} is not an index: it needs an object 'weight_map' of tensor and file names"
            ) from None
        bad = [file for file in files if Path(str(file)).name != file or not str(file).endswith(".safetensors")]
        if bad:
            raise UserError(f"{folder / INDEX} names {bad[0]!r}, which is no safetensors file of the folder")
    elif (folder / "model.safetensors").is_file():
        files = ["model.safetensors"]
    else:
        pickles = sorted(path.name for end in ("bin", "pt", "pth", "ckpt") for path in folder.glob(f"*.{end}"))
        why = (
            f", only pickled weights ({pickles[0]}), which are programs and never loaded: save them as safetensors"
            if pickles
            else ""
        )
        raise UserError(f"{folder} holds no model.safetensors and no {INDEX}{why}")
    tensors: dict[str, Any] = {}
    for file in files:
        try:
            handle = safetensors.safe_open(folder / file, framework="numpy")
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{folder / file} cannot be read: {str(error).splitlines()[0]}") from None
        twice = [name for name in handle.keys() if name in tensors]  # noqa: SIM118 - not a dict
        if twice:
            raise UserError(f"{folder}: tensor {twice[0]} is in two files")
        tensors |= dict.fromkeys(handle.keys(), handle)
    return tensors


def _check(
    where: str | Path, rows: tuple[Row, ...], spec: ModelSpec, wanted: Mapping[str, Any], tensors: dict[str, Any]
) -> None:
    expected = {}
    for row in rows:
        shape = tuple(wanted[row.path].shape)
        for at in row.positions(shape):
            one = shape[len(at) :]
            expected[row.tensor(at)] = list(reversed(one)) if row.transposed else list(one)
    surplus = {name for name in tensors if name not in expected and not IGNORED.fullmatch(name)}
    if surplus_layers(spec):
        later = {name for name in surplus if (at := OF_LAYER.match(name)) and int(at[1]) >= spec.num_layers}
        surplus -= later
        if later:
            log.info("%s: %d tensors of layers that predict further tokens are left out", where, len(later))
    if (
        spec.tie_embeddings
        and "lm_head.weight" in surplus
        and _same(tensors, "lm_head.weight", "model.embed_tokens.weight")
    ):
        surplus.discard("lm_head.weight")  # some folders store the tied head too
    missing = [name for name in expected if name not in tensors]
    problems = {"missing": missing, "surplus": sorted(surplus), "mis-shaped": [], "dtype": []}
    for name, shape in expected.items():
        if name in tensors:
            entry = tensors[name].get_slice(name)
            if list(entry.get_shape()) != shape:
                problems["mis-shaped"].append(f"{name} is {list(entry.get_shape())} instead of {shape}")
            if entry.get_dtype() not in DTYPES:
                problems["dtype"].append(f"{name} is {entry.get_dtype()} instead of {', '.join(DTYPES)}")
    found = [f"{kind}: {'; '.join(names[:20])}" + f" and {len(names) - 20} more" * (len(names) > 20)
             for kind, names in problems.items() if names]  # fmt: skip
    if found:
        raise UserError(f"{where} does not hold the {family_of(spec)} that it describes. {'. '.join(found)}")


def _same(tensors: dict[str, Any], one: str, other: str, rows: int = 4096) -> bool:
    """Whether two tensors are equal, compared a few rows at a time."""
    if other not in tensors:
        return False
    a, b = tensors[one].get_slice(one), tensors[other].get_slice(other)
    if a.get_shape() != b.get_shape():
        return False
    size = a.get_shape()[0]
    parts = [slice(start, min(start + rows, size)) for start in range(0, size, rows)]
    return all(np.array_equal(a[part], b[part]) for part in parts)


def _read(row: Row, leaf: Any, tensors: dict[str, Any], done: dict, index: tuple[slice, ...]) -> np.ndarray:
    """The part `index` of a leaf. done: parts read before; devices that hold the same part share it."""
    ranges = tuple(s.indices(size)[:2] for s, size in zip(index, leaf.shape, strict=True))
    if ranges not in done:
        part = np.empty([stop - start for start, stop in ranges], leaf.dtype)
        stacked = row.name.count("{")
        inner = tuple(slice(*r) for r in ranges[stacked:])
        for at in np.ndindex(part.shape[:stacked]):
            name = row.tensor(tuple(start + i for i, (start, _) in zip(at, ranges, strict=False)))
            entry = tensors[name].get_slice(name)
            part[at] = entry[inner[::-1]].T if row.transposed else entry[inner]
        done[ranges] = part
    return done[ranges]


# ---------------------------------------------------------------------------------------------------- export


def export_params(
    params: Params,
    spec: ModelSpec,
    out: str | Path,
    *,
    dtype: str = "float32",
    shard_bytes: int = 5 * 10**9,
    source: str | Path | None = None,
    besides: Mapping[str, np.ndarray] | None = None,
    config_keys: Mapping[str, Any] | None = None,
) -> list[str]:
    """Writes a folder that `transformers` and `import_params` load: shards, their index, config.json. Returns the files
    carried over.

    params: of one or many devices or processes; every process must call. dtype: "float32" loses nothing; "bfloat16"
    halves the folder, and is exact only for parameters that are bfloat16 numbers (biases of sigmoid routers stay
    float32). source: folder whose tokenizer files, and other keys of config.json, are taken over. The config.json is
    written last, so that a folder that was cut short does not load. besides: further tensors, on the host. config_keys:
    laid over the config.json.
    Raises: UserError if `out` is not an empty or new folder, cannot be written, or if the spec is of no known family.
    """
    out, kind = Path(out), np.dtype(jnp.dtype(dtype))
    base = read_config(source) if source and (Path(source) / "config.json").is_file() else None
    config = hf_config(spec, dtype=dtype, base=base) | dict(config_keys or {})
    besides = {name: np.ascontiguousarray(tensor.astype(kind)) for name, tensor in (besides or {}).items()}
    leaves = _flat(spec, params)
    rows = table(spec)
    shards = _plan(rows, leaves, kind, shard_bytes)
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    primary, fetch, carried = distributed.is_primary(), _fetcher(leaves), []
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise UserError(f"{out} is not empty: choose another folder")
        distributed.barrier("export: all have seen the empty folder")
        for file, shard in zip(files, shards, strict=True):
            tensors = {}
            for row, at in shard:
                tensor = fetch(row, at)
                tensor = (tensor.T if row.transposed else tensor).astype(_kept(row, kind))
                tensors[row.tensor(at)] = np.ascontiguousarray(tensor)
            if file == files[-1]:
                tensors |= besides
            if primary:
                safetensors.numpy.save_file(tensors, out / file, metadata={"format": "pt"})
        if primary:
            total = sum(leaves[row.path].size * _kept(row, kind).itemsize for row in rows)
            total += sum(tensor.nbytes for tensor in besides.values())
            weight_map = {row.tensor(at): file for file, shard in zip(files, shards, strict=True) for row, at in shard}
            weight_map |= dict.fromkeys(besides, files[-1])
            (out / INDEX).write_text(
                json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
            )
            for file in files:
                shutil.copymode(out / INDEX, out / file)  # the library's are for their owner only
            carried = carry_over(source, out) if source else []
            (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from None
    return carried


def _kept(row: Row, kind: np.dtype) -> np.dtype:
    """The dtype of a row's tensors in an export of this one."""
    return np.dtype(np.float32) if row.float32 else kind


def _plan(
    rows: tuple[Row, ...], leaves: Mapping[str, Any], kind: np.dtype, limit: int
) -> list[list[tuple[Row, tuple[int, ...]]]]:
    """All tensors, layer by layer, cut into shards of at most `limit` bytes (a tensor that is larger has its own)."""
    entries = [(row, at) for row in rows for at in row.positions(leaves[row.path].shape)]
    last = max(row.layer(at) for row, at in entries if at) + 1
    place = {"embedding": -1, "final_norm/scale": last, "head": last}
    entries.sort(
        key=lambda entry: entry[0].layer(entry[1]) if entry[1] else place[entry[0].path]
    )  # stable: the experts of a leaf stay neighbours
    shards: list[list] = [[]]
    room = limit
    for row, at in entries:
        size = int(np.prod(leaves[row.path].shape[len(at) :])) * _kept(row, kind).itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append((row, at))
        room -= size
    return shards


def _fetcher(leaves: Mapping[str, Any]):
    """fetch(row, at) -> one tensor on the host, as ours. Keeps the last layer of one leaf: its experts are fetched
    together."""
    kept: dict[tuple, np.ndarray] = {}

    def fetch(row: Row, at: tuple[int, ...]) -> np.ndarray:
        key = (row.path, *at[:1])
        if key not in kept:
            leaf = leaves[row.path]
            part = leaf[at[0]] if at else leaf
            whole = isinstance(part, np.ndarray) or part.is_fully_addressable
            kept.clear()
            kept[key] = np.asarray(part) if whole else multihost_utils.process_allgather(part, tiled=True)
        return kept[key][at[1:]]

    return fetch


def carry_over(source: str | Path, out: str | Path) -> list[str]:
    """Copies the tokenizer's files, as far as there are any; returns their names."""
    found = [name for name in CARRIED if (Path(source) / name).is_file()]
    for name in found:
        shutil.copyfile(Path(source) / name, Path(out) / name)
    return found
