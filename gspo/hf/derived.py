"""Fields of a ModelSpec and keys of a config.json that do not go one to one, kind by kind of Mixture of Experts."""

from collections.abc import Mapping
from typing import Any

from gspo.model.spec import ModelSpec
from gspo.types import UserError

# How many layers after the last one predict further tokens: no part of the policy, left out by an import.
MULTI_TOKEN = "num_nextn_predict_layers"
ROTARY_SHARE = "partial_rotary_factor"


def read_sparse(config: Mapping[str, Any]) -> dict[str, Any]:
    """The dense layers of the Qwen kind: those listed, and all but every so-manieth."""
    step, listed = config["decoder_sparse_step"], config["mlp_only_layers"] or ()
    if not isinstance(step, int) or step < 1:
        raise UserError(f"config.json: decoder_sparse_step={step!r} is not supported, only 1 or more")
    dense = (layer for layer in range(config["num_hidden_layers"]) if layer in listed or (layer + 1) % step)
    return _with_dense(tuple(dense), config)


def write_sparse(spec: ModelSpec) -> dict[str, Any]:
    """The keys that read_sparse reads as this; likewise those of the others."""
    return dict(decoder_sparse_step=1, mlp_only_layers=list(spec.dense_layers)) | _dense_width(spec)


def _with_dense(dense: tuple[int, ...], config: Mapping[str, Any]) -> dict[str, Any]:
    return dict(dense_layers=dense, d_ff=config["intermediate_size"]) if dense else {}


def _dense_width(spec: ModelSpec) -> dict[str, Any]:
    return dict(intermediate_size=spec.d_ff) if spec.dense_layers else {}


def read_deepseek(config: Mapping[str, Any]) -> dict[str, Any]:
    """The first layers may be dense; the shared experts, of the routed ones' width, are one that is wider."""
    count = config.get("n_shared_experts")
    if not count:
        raise UserError(f"config.json: n_shared_experts={count!r} is not supported, only 1 or more")
    dense = tuple(range(config["first_k_dense_replace"] or 0))
    return _with_dense(dense, config) | dict(d_shared=count * config["moe_intermediate_size"])


def write_deepseek(spec: ModelSpec) -> dict[str, Any]:
    keys = dict(n_shared_experts=spec.d_shared // spec.d_expert, first_k_dense_replace=len(spec.dense_layers))
    return keys | _dense_width(spec)


def fits_deepseek(spec: ModelSpec) -> bool:
    """Whether those keys can say what the spec does."""
    whole = spec.d_shared > 0 and spec.d_shared % spec.d_expert == 0
    return whole and spec.dense_layers == tuple(range(len(spec.dense_layers)))


def read_glm(config: Mapping[str, Any]) -> dict[str, Any]:
    """As read_deepseek, and a part of each head is rotated."""
    head, share = config["head_dim"] or config["hidden_size"] // config["num_attention_heads"], config[ROTARY_SHARE]
    width = head if share is None else int(head * share)
    return read_deepseek(config) | dict(rotary_width=width if width != head else 0)


def write_glm(spec: ModelSpec) -> dict[str, Any]:
    share = (spec.rotary_width or spec.head_width) / spec.head_width
    return write_deepseek(spec) | {ROTARY_SHARE: share, MULTI_TOKEN: 0}


def fits_glm(spec: ModelSpec) -> bool:
    share = spec.rotary_width / spec.head_width  # as they read it: rounded down
    return fits_deepseek(spec) and int(spec.head_width * share) == spec.rotary_width
