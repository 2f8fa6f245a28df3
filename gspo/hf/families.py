"""The families of models that Hugging Face folders hold, as data: which tensors, and config.json <-> ModelSpec.

`gspo.hf.folder` reads the same rows (`gspo.hf.rows`) for import and for export.

Source: the configuration and modelling files of transformers 5.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gspo.hf.derived import (
    MULTI_TOKEN,
    ROTARY_SHARE,
    fits_deepseek,
    fits_glm,
    read_deepseek,
    read_glm,
    read_sparse,
    write_deepseek,
    write_glm,
    write_sparse,
)
from gspo.hf.rope import scaling_from_hf, scaling_to_hf
from gspo.hf.rows import (
    DECODER,
    MIXTRAL_MOE,
    MLP,
    MOE,
    QK_NORM,
    SELECTION,
    SHARED,
    SHARED_GATED,
    Row,
    with_dense_layers,
)
from gspo.model.spec import ModelSpec
from gspo.types import UserError

# ---------------------------------------------------------------------------------------------------- the tables


@dataclasses.dataclass(frozen=True)
class Family:
    """model_type: of config.json. fixed: what all models of the family have in common, by ModelSpec field. keys:
    ModelSpec field -> key of config.json, besides KEYS. defaults: what a config.json that leaves a key out means
    (transformers' class defaults). read, write: fields from keys and keys from fields that do not go one to one; fits:
    whether the keys that are written say what the spec does."""

    model_type: str
    rows: tuple[Row, ...]
    fixed: Mapping[str, Any]
    keys: Mapping[str, str]
    defaults: Mapping[str, Any]
    read: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}
    write: Callable[[ModelSpec], dict[str, Any]] = lambda spec: {}
    fits: Callable[[ModelSpec], bool] = lambda spec: True


KEYS = dict(
    vocab_size="vocab_size", num_layers="num_hidden_layers", d_model="hidden_size", num_heads="num_attention_heads",
    num_kv_heads="num_key_value_heads", head_width="head_dim", rms_eps="rms_norm_eps",
    tie_embeddings="tie_word_embeddings",
)  # fmt: skip
EXPERTS = dict(num_experts="num_experts", experts_per_token="num_experts_per_tok")
BIAS = dict(qkv_bias="attention_bias", out_bias="attention_bias")
NO_BIAS = dict(qkv_bias=False, out_bias=False)
WHOLE_HEAD = dict(rotary_width=0)
SOFTMAX = dict(router="softmax", routed_scale=1.0)
ALL_MOE = dict(dense_layers=())
SPARSE = dict(decoder_sparse_step=1, mlp_only_layers=())
DEEPSEEK = dict(
    num_experts="n_routed_experts", experts_per_token="num_experts_per_tok", d_expert="moe_intermediate_size",
    norm_topk_prob="norm_topk_prob", routed_scale="routed_scaling_factor",
)  # fmt: skip
PLAIN = WHOLE_HEAD | SOFTMAX | dict(d_shared=0, shared_gate=False)
COMMON = dict(rope_theta=1e4, rms_norm_eps=1e-6, tie_word_embeddings=False, num_key_value_heads=None, head_dim=None)

FAMILIES = {
    "Qwen3ForCausalLM": Family(
        "qwen3", DECODER + QK_NORM + MLP, WHOLE_HEAD | dict(qk_norm=True, qk_norm_over="head", num_experts=0),
        BIAS | dict(d_ff="intermediate_size"),
        COMMON | dict(head_dim=128, num_key_value_heads=32, use_sliding_window=False, attention_bias=False),
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe", DECODER + QK_NORM + MOE, PLAIN | dict(qk_norm=True, qk_norm_over="head"),
        BIAS | EXPERTS | dict(d_expert="moe_intermediate_size", norm_topk_prob="norm_topk_prob"),
        COMMON | dict(num_key_value_heads=4, norm_topk_prob=False, use_sliding_window=False, attention_bias=False,
                      **SPARSE, intermediate_size=6144),
        read_sparse, write_sparse,
    ),
    "MixtralForCausalLM": Family(
        "mixtral", DECODER + MIXTRAL_MOE, NO_BIAS | PLAIN | ALL_MOE | dict(qk_norm=False, norm_topk_prob=True),
        EXPERTS | dict(num_experts="num_local_experts", d_expert="intermediate_size"),
        COMMON | dict(rope_theta=1e6, rms_norm_eps=1e-5, num_key_value_heads=8),
    ),
    "LlamaForCausalLM": Family(
        "llama", DECODER + MLP, WHOLE_HEAD | dict(qk_norm=False, num_experts=0), BIAS | dict(d_ff="intermediate_size"),
        COMMON | dict(attention_bias=False),
    ),
    "OlmoeForCausalLM": Family(
        "olmoe", DECODER + QK_NORM + MOE, PLAIN | ALL_MOE | dict(qk_norm=True, qk_norm_over="projection"),
        BIAS | EXPERTS | dict(d_expert="intermediate_size", norm_topk_prob="norm_topk_prob"),
        COMMON | dict(rms_norm_eps=1e-5, norm_topk_prob=False, attention_bias=False),
        fits=lambda spec: spec.num_heads * spec.head_width == spec.d_model,  # it norms queries over the hidden size
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2", DECODER + MLP, WHOLE_HEAD | dict(qk_norm=False, num_experts=0, qkv_bias=True, out_bias=False),
        dict(d_ff="intermediate_size"), COMMON | dict(num_key_value_heads=32, use_sliding_window=False),
    ),
    "Qwen2MoeForCausalLM": Family(
        "qwen2_moe", DECODER + MOE + SHARED_GATED,
        WHOLE_HEAD | SOFTMAX | dict(qk_norm=False, out_bias=False, shared_gate=True),
        EXPERTS | dict(d_expert="moe_intermediate_size", d_shared="shared_expert_intermediate_size",
                       norm_topk_prob="norm_topk_prob", qkv_bias="qkv_bias"),
        COMMON | dict(num_key_value_heads=16, norm_topk_prob=False, use_sliding_window=False, qkv_bias=True,
                      shared_expert_intermediate_size=5632, **SPARSE, intermediate_size=5632),
        read_sparse, write_sparse,
    ),
    "Dots1ForCausalLM": Family(
        "dots1", DECODER + QK_NORM + MOE + SELECTION + SHARED,
        WHOLE_HEAD | dict(qk_norm=True, qk_norm_over="head", router="sigmoid", shared_gate=False),
        BIAS | DEEPSEEK,
        COMMON | dict(norm_topk_prob=False, routed_scaling_factor=1.0, attention_bias=False, sliding_window=4096,
                      max_window_layers=62, first_k_dense_replace=0, intermediate_size=10944),
        read_deepseek, write_deepseek, fits_deepseek,
    ),
    "Glm4MoeForCausalLM": Family(
        "glm4_moe", DECODER + QK_NORM + MOE + SELECTION + SHARED,
        dict(out_bias=False, qk_norm_over="head", router="sigmoid", shared_gate=False),
        DEEPSEEK | dict(qkv_bias="attention_bias", qk_norm="use_qk_norm"),
        COMMON | dict(rms_norm_eps=1e-5, num_key_value_heads=8, norm_topk_prob=True, routed_scaling_factor=1.0,
                      attention_bias=False, use_qk_norm=False, n_shared_experts=1, first_k_dense_replace=1,
                      intermediate_size=10944, **{ROTARY_SHARE: 0.5, MULTI_TOKEN: 1}),
        read_glm, write_glm, fits_glm,
    ),
}  # fmt: skip
ALIASES = {"num_experts": "num_local_experts", "num_local_experts": "num_experts"}

# Keys that change what is computed, and the values under which it is what we compute; left out, they have such a value.
# Those that a family has a default for, it reads.
COMPUTED = dict(
    hidden_act=("silu",), attention_bias=(False, None), mlp_bias=(False, None), clip_qkv=(None,),
    decoder_sparse_step=(1,),
    mlp_only_layers=(None, []), quantization_config=(None,), first_k_dense_replace=(0, None), n_group=(1, None),
    topk_group=(1, None), scoring_func=("sigmoid", "noaux_tc"), topk_method=("noaux_tc",),
    partial_rotary_factor=(1.0, None),
)  # fmt: skip
# What another architecture's config.json says of the texts, and not of what is computed.
OF_TEXTS = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
# What does not hold of an export: how the source's tensors were packed, its layers and its code.
OF_SOURCE = (
    "rope_parameters", "rope_scaling", "dtype", "num_local_experts", "num_experts", "quantization_config", "auto_map",
)  # fmt: skip
# Fields of a spec by which families differ.
TELLING = (
    "num_experts", "qk_norm", "qk_norm_over", "qkv_bias", "out_bias", "norm_topk_prob", "d_shared", "shared_gate",
    "router", "routed_scale", "dense_layers", "rotary_width",
)  # fmt: skip


def surplus_layers(spec: ModelSpec) -> bool:
    """Whether folders of the spec's family may hold layers after the last one, which are no part of the policy."""
    return MULTI_TOKEN in FAMILIES[family_of(spec)].defaults


def family_of(spec: ModelSpec) -> str:
    """Architecture name of a spec. Raises UserError where no family computes what it says."""
    for name, family in FAMILIES.items():
        moe_fits = bool(spec.num_experts) == ("num_experts" in family.keys)
        if not moe_fits or not family.fits(spec):
            continue
        keys = _keys(family, spec)  # fields that share one must agree
        said = dict(family.fixed) | {field: keys[key] for field, key in family.keys.items()}
        if all(getattr(spec, field) == value for field, value in said.items()):
            return name
    fields = ", ".join(f"model.{field}={getattr(spec, field)!r}" for field in TELLING)
    raise UserError(f"no Hugging Face architecture has {fields} together; known are {', '.join(FAMILIES)}")


def _keys(family: Family, spec: ModelSpec) -> dict[str, Any]:
    """The keys of a config.json that describe the spec."""
    return {key: getattr(spec, field) for field, key in (KEYS | dict(family.keys)).items()} | family.write(spec)


def table(spec: ModelSpec) -> tuple[Row, ...]:
    """The rows of the spec's family: those that it has."""

    def there(row: Row) -> bool:
        return not (row.needs and not getattr(spec, row.needs)) and not (spec.tie_embeddings and row.path == "head")

    rows = tuple(row for row in FAMILIES[family_of(spec)].rows if there(row))
    return with_dense_layers(rows, spec) if spec.num_experts and spec.dense_layers else rows


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
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    partly = {ROTARY_SHARE: rope[ROTARY_SHARE]} if ROTARY_SHARE in rope else {}  # where transformers 5 keeps it
    config = dict(family.defaults) | dict(config) | partly
    for key, allowed in COMPUTED.items():
        if key not in family.defaults and key in config and config[key] not in allowed:
            raise UserError(f"config.json: {key}={config[key]!r} is not supported, only {allowed[0]!r}")
    if _slides(config, family):
        raise UserError(
            f"config.json: sliding_window={config['sliding_window']!r} is not supported, only full attention"
        )

    def value(key: str) -> Any:
        if key not in config and ALIASES.get(key) not in config:
            raise UserError(f"config.json has no {key!r}, which a {name} needs")
        return config[key] if key in config else config[ALIASES[key]]

    found = {field: value(key) for field, key in (KEYS | dict(family.keys)).items()}
    found |= {field: bool(found[field]) for field in BIAS if field in found}  # null: none
    found["num_kv_heads"] = found["num_kv_heads"] or found["num_heads"]
    found["head_width"] = found["head_width"] or found["d_model"] // found["num_heads"]
    found["rope_theta"] = float(rope.get("rope_theta", config["rope_theta"]))
    found |= family.read(config)
    return ModelSpec(**(found | dict(family.fixed) | dict(rope_scaling=scaling_from_hf(config)) | fields))


def _decoder(architecture: Any) -> str:
    """A sequence classifier has the decoder of the language model (`gspo.hf.classifier`)."""
    return str(architecture).replace("ForSequenceClassification", "ForCausalLM")


def _slides(config: Mapping[str, Any], family: Family) -> bool:
    """Whether some layer sees a window of the sequence alone."""
    if not config.get("sliding_window") or not config.get("use_sliding_window", True):
        return False
    if config.get("layer_types") is not None:
        return "sliding_attention" in config["layer_types"]
    begin = config["max_window_layers"] if "max_window_layers" in family.defaults else 0
    return begin < config.get("num_hidden_layers", math.inf)


def hf_config(spec: ModelSpec, *, dtype: str = "float32", base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """ModelSpec -> the object of a config.json, such that spec_from_hf gives the spec back (fields that the model does
    not use apart).

    dtype: of the tensors beside it. base: an earlier config.json, whose other keys are kept; one of another
    architecture, that of the dense model which has become a MoE or of the model that lent its tokenizer, gives the
    token ids and the longest position alone. Raises UserError where the spec is of no known family."""
    name = family_of(spec)
    family = FAMILIES[name]
    same = base and [_decoder(given) for given in base.get("architectures", [name])] == [name]
    # Without a base no token has a role: the class defaults would name ids that a small vocabulary does not have.
    nothing = dict(max_position_embeddings=32768, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    kept = ({} if same else nothing) | {
        key: value for key, value in (base or {}).items() if (same or key in OF_TEXTS) and key not in OF_SOURCE
    }
    if "layer_types" in kept:
        kept["layer_types"] = ["full_attention"] * spec.num_layers
    config = kept | _keys(family, spec)
    return config | dict(
        architectures=[name],
        model_type=family.model_type,
        hidden_act="silu",
        rope_theta=spec.rope_theta,
        rope_scaling=scaling_to_hf(spec.rope_scaling),
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
