"""GGUF files in: llama.cpp's format, one file that holds a model's metadata and its tensors, mostly quantised.

The metadata become the object of a config.json (`config_of`), from which `gspo.hf.families` makes the spec; the tensors
fill the same rows as a folder's do, under llama.cpp's names, and are dequantised slice by slice as they are read. What
llama.cpp's converter does to a Hugging Face folder is undone:

- Llama and Mixtral: rows 2i and 2i + 1 of a head of the query and key projections are entries i and i + H/2 of ours,
  since llama.cpp turns neighbours. Qwen3 is left as it is.
- Experts of a layer are one tensor, [E, out, in].
- Llama 3.1's scaled frequencies are a tensor of divisors, `rope_freqs`, instead of the four numbers of their rule.
- Numbers of the metadata are float32: 1e-5 is there as 9.99999974e-06, and is meant as 1e-5.

Reading and dequantisation are those of the optional package gguf, by llama.cpp's authors. Sources: llama.cpp's
convert_hf_to_gguf.py and gguf-py."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gspo.hf import folder
from gspo.hf.families import FAMILIES, KEYS, table
from gspo.hf.rope import LLAMA3
from gspo.hf.rows import Row
from gspo.model.spec import ModelSpec
from gspo.types import Params, UserError

ARCHITECTURES = {  # general.architecture, whether it has experts -> ours
    ("llama", False): "LlamaForCausalLM",
    ("llama", True): "MixtralForCausalLM",
    ("qwen3", False): "Qwen3ForCausalLM",
    ("qwen3moe", True): "Qwen3MoeForCausalLM",
}
PERMUTED = ("llama",)  # whose query and key rows the converter reorders
LAYER = "blk.{layer}."
NAMES = {  # leaf of our tree -> tensor; [{expert}] is a slice of one
    "embedding": "token_embd.weight",
    "blocks/attention_norm/scale": LAYER + "attn_norm.weight",
    "blocks/attention/query": LAYER + "attn_q.weight",
    "blocks/attention/key": LAYER + "attn_k.weight",
    "blocks/attention/value": LAYER + "attn_v.weight",
    "blocks/attention/out": LAYER + "attn_output.weight",
    "blocks/attention/query_norm/scale": LAYER + "attn_q_norm.weight",
    "blocks/attention/key_norm/scale": LAYER + "attn_k_norm.weight",
    "blocks/mlp_norm/scale": LAYER + "ffn_norm.weight",
    "blocks/mlp/gate": LAYER + "ffn_gate.weight",
    "blocks/mlp/up": LAYER + "ffn_up.weight",
    "blocks/mlp/down": LAYER + "ffn_down.weight",
    "blocks/moe/router": LAYER + "ffn_gate_inp.weight",
    "blocks/moe/gate": LAYER + "ffn_gate_exps.weight[{expert}]",
    "blocks/moe/up": LAYER + "ffn_up_exps.weight[{expert}]",
    "blocks/moe/down": LAYER + "ffn_down_exps.weight[{expert}]",
    "final_norm/scale": "output_norm.weight",
    "head": "output.weight",
}
ROPE_FREQS = "rope_freqs.weight"
# Keys that change what is computed, and the values under which it is what we compute; left out, it is.
COMPUTED = {
    "attention.sliding_window": (0,), "attention.scale": (0.0,), "attention.clamp_kqv": (0.0,),
    "logit_scale": (0.0, 1.0), "embedding_scale": (0.0, 1.0), "residual_scale": (0.0, 1.0),
    "expert_shared_count": (0,), "expert_gating_func": (0, 1), "expert_weights_scale": (0.0, 1.0),
    "leading_dense_block_count": (0,), "use_parallel_residual": (False,),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- the file


class Tensor:
    """One tensor, or one expert of a stacked one, as float32; indexed by slices, as those of safetensors are.

    data: its rows as they are stored, [out, bytes or numbers]. order: which of them each row of ours is; None: the
    same.
    """

    def __init__(self, data: np.ndarray, kind: Any, shape: tuple[int, ...], order: np.ndarray | None = None) -> None:
        self.data, self.kind, self.shape, self.order = data, kind, shape, order

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return "F32"  # whatever it is stored as

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        rows, *columns = index
        if not columns:  # a vector is a single row, which may be cut only after it is numbers
            return gguf().dequantize(self.data, self.kind)[rows]
        part = self.data[rows] if self.order is None else self.data[self.order[rows]]
        return gguf().dequantize(part, self.kind)[:, *columns]


class File(NamedTuple):
    """path: where it lies. metadata: all keys with Python values. tensors: by name."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key of the architecture: get("block_count") is metadata["llama.block_count"], say."""
        return self.metadata.get(f"{self.metadata.get('general.architecture')}.{key}", default)

    def number(self, key: str, default: float | None = None) -> Any:
        """The same, which must be one number; a float is the shortest decimal that float32 takes for it."""
        value = self.get(key, default)
        if isinstance(value, list) and len(set(value)) == 1:  # one for each layer
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            said = "is missing" if value is None else f"is {value!r:.40} instead of a number"
            raise UserError(f"{self.path}: {self.metadata['general.architecture']}.{key} {said}")
        return float(str(np.float32(value))) if isinstance(value, float) else value


def read(path: str | Path) -> File:
    """Reads the metadata of a file and where its tensors lie; their numbers stay on disk.

    Raises UserError where the package is missing, for what is no GGUF file, one that is cut short, and one with tensors
    that cannot be dequantised."""
    package, path = gguf(), Path(path)
    try:
        reader = package.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        swapped = reader.byte_order == "S"
        tensors = {t.name: Tensor(t.data, t.tensor_type, tuple(t.shape.tolist()[::-1])) for t in reader.tensors}
    except Exception as error:  # the package raises what happens to go wrong while it follows damaged offsets
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a GGUF file, or is damaged or cut short: {said}") from None
    if swapped:
        raise UserError(f"{path} was written for big-endian machines: convert it again without --bigendian")
    for kind, name in {tensor.kind: name for name, tensor in tensors.items()}.items():
        data = tensors[name].data
        try:
            package.dequantize(data[:1] if data.ndim > 1 else data, kind)
        except NotImplementedError:
            raise UserError(
                f"{path}: tensor {name} is {kind.name}, which cannot be dequantised: take another file of the model, "
                "Q8_0 or F16 say"
            ) from None
    return File(path, metadata, tensors)


def gguf() -> Any:
    """The package. Raises UserError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError('GGUF files need an optional package: pip install "gguf>=0.17"') from None
    return gguf


# ---------------------------------------------------------------------------------------------------- config.json


def config_of(file: File) -> dict[str, Any]:
    """The object that the config.json of the model would hold. Raises UserError for an architecture that is not known,
    for a key that is missing, and for one whose value we do not compute."""
    name, head_width = _architecture(file), _head_width(file)
    fields = dict(
        vocab_size=file.tensors["token_embd.weight"].shape[0], num_layers=file.number("block_count"),
        d_model=file.number("embedding_length"), num_heads=file.number("attention.head_count"),
        num_kv_heads=file.number("attention.head_count_kv", file.get("attention.head_count")), head_width=head_width,
        rms_eps=file.number("attention.layer_norm_rms_epsilon"), tie_embeddings="output.weight" not in file.tensors,
    )  # fmt: skip
    d_ff = file.number("feed_forward_length")  # of an expert in Mixtral, of no layer in Qwen3-MoE
    if file.get("expert_count"):
        fields |= dict(
            num_experts=file.number("expert_count"), experts_per_token=file.number("expert_used_count"),
            d_expert=file.number("expert_feed_forward_length", d_ff),
            norm_topk_prob=bool(file.get("expert_weights_norm", True)),  # llama.cpp's, where the file does not say
        )  # fmt: skip
    else:
        fields |= dict(d_ff=d_ff)
    family = FAMILIES[name]
    config = {key: fields[field] for field, key in (KEYS | dict(family.keys)).items() if field in fields}
    tokens = {f"{role}_token_id": file.metadata.get(f"tokenizer.ggml.{key}_token_id")
              for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}  # fmt: skip
    return config | tokens | dict(
        architectures=[name], model_type=family.model_type, hidden_act="silu", attention_bias=False,
        rope_theta=float(file.number("rope.freq_base", 10000.0)), rope_scaling=_rope_scaling(file, head_width),
        max_position_embeddings=file.number("context_length", 32768), torch_dtype="float32",
    )  # fmt: skip


def _architecture(file: File) -> str:
    """As config.json calls it, once nothing speaks against it."""
    arch = file.metadata.get("general.architecture")
    name = ARCHITECTURES.get((arch, bool(file.get("expert_count", 0))))
    if name is None:
        known = ", ".join(dict.fromkeys(known for known, _ in ARCHITECTURES))
        raise UserError(f"{file.path}: architecture {arch!r} is not known; known are {known}")
    parts = file.metadata.get("split.count", 0)
    if parts > 1:
        raise UserError(f"{file.path} is one of {parts} parts: join them with llama-gguf-split --merge")
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{file.path}: tensor token_embd.weight is missing: this is no language model")
    for key, allowed in COMPUTED.items():
        if file.get(key, allowed[0]) not in allowed:
            raise UserError(f"{file.path}: {arch}.{key}={file.get(key)!r:.40} is not supported, only {allowed[0]!r}")
    return name


def _head_width(file: File) -> int:
    width = file.number("attention.key_length", file.number("embedding_length") // file.number("attention.head_count"))
    for key in ("attention.value_length", "rope.dimension_count"):
        if file.number(key, width) != width:
            arch = file.metadata["general.architecture"]
            raise UserError(
                f"{file.path}: {arch}.{key}={file.number(key)} is not supported, only the {width} of a head"
            )
    return width


def _rope_scaling(file: File, head_width: int) -> dict[str, Any] | None:
    """As config.json has it; None without scaling."""
    kind = file.get("rope.scaling.type", "none")
    if ROPE_FREQS in file.tensors:
        return _llama3_rule(file, head_width)
    if kind == "none":
        return None
    return dict(
        rope_type=kind, factor=file.number("rope.scaling.factor", 1.0),
        original_max_position_embeddings=file.number("rope.scaling.original_context_length", 0),
    )  # fmt: skip


def _llama3_rule(file: File, head_width: int) -> dict[str, Any]:
    """The four numbers whose rule (`gspo.model.rope`) gives the divisors of the frequencies that the
    file has. Low and high are 1 and 4 in every release, the trained length a power of two: where several give the same
    divisors, each is right."""
    divisors = file.tensors[ROPE_FREQS][slice(None),]
    theta, factor = file.number("rope.freq_base", 10000.0), float(divisors.max())
    turns_per_token = theta ** (-np.arange(0, head_width, 2) / head_width) / (2 * np.pi)
    for trained in (8192, *(2**n for n in range(6, 21))):
        kept = np.clip((trained * turns_per_token - 1) / (4 - 1), 0, 1)
        rule = 1 / (kept + (1 - kept) / factor)
        if divisors.shape == rule.shape and np.allclose(divisors, rule, rtol=1e-4):
            return dict(zip(LLAMA3, (factor, 1.0, 4.0, trained), strict=True), rope_type="llama3")
    raise UserError(f"{file.path}: {ROPE_FREQS} scales positions by a rule that is not Llama 3.1's")


# ---------------------------------------------------------------------------------------------------- tensors


def import_params(file: File, spec: ModelSpec, abstract: Params) -> Params:
    """`folder.import_params` of a GGUF file: float32, exactly what its tensors dequantise to. Raises UserError that
    names every tensor that is missing, surplus or of another shape."""
    rows = tuple(Row(row.path, NAMES[row.path], row.transposed) for row in table(spec))
    return folder.read_params(rows, spec, abstract, _Named(_unpacked(file, spec)).opened(), where=file.path)


class _Named(dict):
    """{name: Tensor} that reads like an open safetensors file."""

    def get_slice(self, name: str) -> Tensor:
        return self[name]

    def opened(self) -> dict[str, "_Named"]:
        return dict.fromkeys(self, self)


def _unpacked(file: File, spec: ModelSpec) -> dict[str, Tensor]:
    """The tensors one by one: experts apart, query and key rows in our order."""
    found = {}
    permuted = file.metadata["general.architecture"] in PERMUTED
    for name, tensor in file.tensors.items():
        if name.endswith("_exps.weight") and len(tensor.shape) == 3:
            for expert, data in enumerate(tensor.data):
                found[f"{name}[{expert}]"] = Tensor(data, tensor.kind, tensor.shape[1:])
        elif (
            permuted
            and name.endswith((".attn_q.weight", ".attn_k.weight"))
            and tensor.shape[0] % spec.head_width == 0  # else it is of another shape than it should be, and is named
        ):
            order = rows_of_pairs(spec.head_width, tensor.shape[0])
            found[name] = Tensor(tensor.data, tensor.kind, tensor.shape, order)
        elif name != ROPE_FREQS:
            found[name] = tensor
    return found


def rows_of_pairs(head_width: int, rows: int) -> np.ndarray:
    """[rows] int: where llama.cpp has each row of ours of a query or key projection. Entry i of a head lies in row 2i,
    entry i + H/2 in row 2i + 1."""
    return np.arange(rows).reshape(-1, head_width // 2, 2).swapaxes(1, 2).reshape(-1)
