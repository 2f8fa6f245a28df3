"""The families of models that Hugging Face folders hold, as data: names of tensors, and config.json <-> ModelSpec.

A row of a table pairs a leaf of our tree with the name of their tensors. Their kernels are [out, in] and one file entry
per layer and expert; ours are [in, out] and stacked, [L, ...] and [L, E, ...]. Heads need no splitting: in both, column
n · H + h of a projection is entry h of head n, and rotary positions pair entry i with i + H/2. `gspo.hf.folder` reads
the same rows for import and for export.

Sources: the configuration and modelling files of transformers 5, the tensor names of the published checkpoints.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gspo.model.spec import ModelSpec
from gspo.types import UserError

# ---------------------------------------------------------------------------------------------------- the tables


class Row(NamedTuple):
    """path: leaf of our tree. name: of their tensors, with {layer} and {expert} where there is one for each: the
    leading axes of the leaf. transposed: theirs is [out, in].
    """

    path: str
    name: str
    transposed: bool = False

    def positions(self, shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """Indices of the stacked axes, one per tensor of theirs, of a leaf of this shape."""
        return np.ndindex(shape[: self.name.count("{")])

    def tensor(self, at: tuple[int, ...]) -> str:
        return self.name.format(**dict(zip(("layer", "expert"), at, strict=False)))


LAYER = "model.layers.{layer}."
DECODER = (
    Row("embedding", "model.embed_tokens.weight"),
    Row("blocks/attention_norm/scale", LAYER + "input_layernorm.weight"),
    Row("blocks/attention/query", LAYER + "self_attn.q_proj.weight", True),
    Row("blocks/attention/key", LAYER + "self_attn.k_proj.weight", True),
    Row("blocks/attention/value", LAYER + "self_attn.v_proj.weight", True),
    Row("blocks/attention/out", LAYER + "self_attn.o_proj.weight", True),
    Row("blocks/mlp_norm/scale", LAYER + "post_attention_layernorm.weight"),
    Row("final_norm/scale", "model.norm.weight"),
    Row("head", "lm_head.weight", True),  # left out where the embeddings are tied
)
QK_NORM = (
    Row("blocks/attention/query_norm/scale", LAYER + "self_attn.q_norm.weight"),
    Row("blocks/attention/key_norm/scale", LAYER + "self_attn.k_norm.weight"),
)
MLP = tuple(Row(f"blocks/mlp/{kind}", LAYER + f"mlp.{kind}_proj.weight", True) for kind in ("gate", "up", "down"))
MOE = (
    Row("blocks/moe/router", LAYER + "mlp.gate.weight", True),
    *(
        Row(f"blocks/moe/{kind}", LAYER + f"mlp.experts.{{expert}}.{kind}_proj.weight", True)
        for kind in ("gate", "up", "down")
    ),
)
MIXTRAL_MOE = (
    Row("blocks/moe/router", LAYER + "block_sparse_moe.gate.weight", True),
    Row("blocks/moe/gate", LAYER + "block_sparse_moe.experts.{expert}.w1.weight", True),
    Row("blocks/moe/up", LAYER + "block_sparse_moe.experts.{expert}.w3.weight", True),
    Row("blocks/moe/down", LAYER + "block_sparse_moe.experts.{expert}.w2.weight", True),
)


@dataclasses.dataclass(frozen=True)
class Family:
    """model_type: of config.json. fixed: what all models of the family have in common, by ModelSpec field. keys:
    ModelSpec field -> key of config.json, besides KEYS. defaults: what a config.json that leaves a key out means
    (transformers' class defaults)."""

    model_type: str
    rows: tuple[Row, ...]
    fixed: Mapping[str, Any]
    keys: Mapping[str, str]
    defaults: Mapping[str, Any]


KEYS = dict(
    vocab_size="vocab_size", num_layers="num_hidden_layers", d_model="hidden_size", num_heads="num_attention_heads",
    num_kv_heads="num_key_value_heads", head_width="head_dim", rms_eps="rms_norm_eps",
    tie_embeddings="tie_word_embeddings",
)  # fmt: skip
EXPERTS = dict(num_experts="num_experts", experts_per_token="num_experts_per_tok")
COMMON = dict(rope_theta=1e4, rms_norm_eps=1e-6, tie_word_embeddings=False, num_key_value_heads=None, head_dim=None)

FAMILIES = {
    "Qwen3ForCausalLM": Family(
        "qwen3", DECODER + QK_NORM + MLP, dict(qk_norm=True, qk_norm_over="head", num_experts=0),
        dict(d_ff="intermediate_size"), COMMON | dict(head_dim=128, num_key_value_heads=32, use_sliding_window=False),
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe", DECODER + QK_NORM + MOE, dict(qk_norm=True, qk_norm_over="head"),
        EXPERTS | dict(d_expert="moe_intermediate_size", norm_topk_prob="norm_topk_prob"),
        COMMON | dict(num_key_value_heads=4, norm_topk_prob=False, use_sliding_window=False),
    ),
    "MixtralForCausalLM": Family(
        "mixtral", DECODER + MIXTRAL_MOE, dict(qk_norm=False, norm_topk_prob=True),
        EXPERTS | dict(num_experts="num_local_experts", d_expert="intermediate_size"),
        COMMON | dict(rope_theta=1e6, rms_norm_eps=1e-5, num_key_value_heads=8),
    ),
    "LlamaForCausalLM": Family(
        "llama", DECODER + MLP, dict(qk_norm=False, num_experts=0), dict(d_ff="intermediate_size"), COMMON
    ),
    "OlmoeForCausalLM": Family(
        "olmoe", DECODER + QK_NORM + MOE, dict(qk_norm=True, qk_norm_over="projection"),
        EXPERTS | dict(d_expert="intermediate_size", norm_topk_prob="norm_topk_prob"),
        COMMON | dict(rms_norm_eps=1e-5, norm_topk_prob=False),
    ),
}  # fmt: skip
ALIASES = {"num_experts": "num_local_experts", "num_local_experts": "num_experts"}

# Keys that change what is computed, and the values under which it is what we compute; left out, they have such a value.
COMPUTED = dict(
    hidden_act=("silu",), attention_bias=(False, None), mlp_bias=(False, None), clip_qkv=(None,),
    decoder_sparse_step=(1,),
    mlp_only_layers=(None, []), quantization_config=(None,),
)  # fmt: skip
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def family_of(spec: ModelSpec) -> str:
    """Architecture name of a spec. Raises UserError where no family computes what it says."""
    for name, family in FAMILIES.items():
        moe_fits = bool(spec.num_experts) == ("num_experts" in family.keys)
        if moe_fits and all(getattr(spec, field) == value for field, value in family.fixed.items()):
            return name
    raise UserError(
        f"no Hugging Face architecture has model.num_experts={spec.num_experts}, model.qk_norm={spec.qk_norm}, "
        f"model.qk_norm_over={spec.qk_norm_over!r} and model.norm_topk_prob={spec.norm_topk_prob} together; known are "
        f"{', '.join(FAMILIES)}"
    )


def table(spec: ModelSpec) -> tuple[Row, ...]:
    """The rows of the spec's family; no head where the embeddings are tied."""
    return tuple(row for row in FAMILIES[family_of(spec)].rows if not (spec.tie_embeddings and row.path == "head"))


# ---------------------------------------------------------------------------------------------------- config.json


def spec_from_hf(config: Mapping[str, Any], **fields: Any) -> ModelSpec:
    """The object of a config.json -> ModelSpec. fields: laid over it (dtype, moe_backend, remat).

    Raises: UserError for an architecture that is not known, for a key that is missing, or one whose value we do not
    compute."""
    names = config.get("architectures") or [
        name for name, f in FAMILIES.items() if f.model_type == config.get("model_type")
    ]
    name = names[0] if names else config.get("model_type")
    name = _decoder(name)
    if name not in FAMILIES:
        raise UserError(f"config.json: architecture {name!r} is not known; known are {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    config = dict(family.defaults) | dict(config)
    for key, allowed in COMPUTED.items():
        if key in config and config[key] not in allowed:
            raise UserError(f"config.json: {key}={config[key]!r} is not supported, only {allowed[0]!r}")
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        raise UserError(
            f"config.json: sliding_window={config['sliding_window']!r} is not supported, only full attention"
        )

    def value(key: str) -> Any:
        if key not in config and ALIASES.get(key) not in config:
            raise UserError(f"config.json has no {key!r}, which a {name} needs")
        return config[key] if key in config else config[ALIASES[key]]

    found = {field: value(key) for field, key in (KEYS | dict(family.keys)).items()}
    found["num_kv_heads"] = found["num_kv_heads"] or found["num_heads"]
    found["head_width"] = found["head_width"] or found["d_model"] // found["num_heads"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found["rope_theta"] = float(rope.get("rope_theta", config["rope_theta"]))
    return ModelSpec(**(found | dict(family.fixed) | dict(rope_scaling=_rope_scaling(rope)) | fields))


def _decoder(architecture: Any) -> str:
    """A sequence classifier has the decoder of the language model (`gspo.hf.classifier`)."""
    return str(architecture).replace("ForSequenceClassification", "ForCausalLM")


def _rope_scaling(rope: Mapping[str, Any]) -> tuple[float, ...]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"config.json: rope type {kind!r} is not supported, only 'default' and 'llama3'")
    missing = [key for key in LLAMA3 if kind == "llama3" and key not in rope]
    if missing:
        raise UserError(f"config.json: rope type 'llama3' needs {missing[0]!r}")
    return tuple(float(rope[key]) for key in LLAMA3) if kind == "llama3" else ()


def hf_config(spec: ModelSpec, *, dtype: str = "float32", base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """ModelSpec -> the object of a config.json, such that spec_from_hf gives the spec back (fields that the model does
    not use apart).

    dtype: of the tensors beside it. base: an earlier config.json of the same architecture, whose other keys are kept
    (token ids, longest position, ...). Raises UserError where the spec is of no known family, or base of another one.
    """
    name = family_of(spec)
    family = FAMILIES[name]
    if base and [_decoder(given) for given in base.get("architectures", [name])] != [name]:
        raise UserError(f"the config.json to start from is of {base['architectures'][0]}, but the model is a {name}")
    # Without a base no token has a role: the class defaults would name ids that a small vocabulary does not have.
    kept = dict(base or dict(max_position_embeddings=32768, bos_token_id=None, eos_token_id=None, pad_token_id=None))
    for key in ("rope_parameters", "rope_scaling", "dtype", "num_local_experts", "num_experts"):
        kept.pop(key, None)
    config = kept | {key: getattr(spec, field) for field, key in (KEYS | dict(family.keys)).items()}
    rope = (
        dict(zip(LLAMA3, (*spec.rope_scaling[:3], int(spec.rope_scaling[3])), strict=True)) if spec.rope_scaling else {}
    )
    return config | dict(
        architectures=[name],
        model_type=family.model_type,
        hidden_act="silu",
        rope_theta=spec.rope_theta,
        rope_scaling=dict(rope_type="llama3") | rope if rope else None,
        torch_dtype=dtype,
    )


def read_config(folder: str | Path) -> dict[str, Any]:
    """The object in <folder>/config.json. Raises UserError if it is absent or no JSON object."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no JSON object")
    return config
