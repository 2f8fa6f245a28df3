"""Leaves of our parameters and the tensors of Hugging Face folders, as tables.

A row pairs a leaf of our tree with the name of their tensors. Their kernels are [out, in] and one file entry per layer
and expert; ours are [in, out] and stacked, [L, ...] and [L, E, ...]. Heads need no splitting: in both, column n · H + h
of a projection is entry h of head n, and rotary positions pair entry i with i + H/2.

Source: the tensor names of the published checkpoints.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gspo.model.spec import ModelSpec


class Row(NamedTuple):
    """path: leaf of our tree. name: of their tensors, with {layer} and {expert} where there is one for each: the
    leading axes of the leaf. transposed: theirs is [out, in]. needs: field of the spec without which there is no such
    leaf. float32: an export keeps it so, whatever the dtype of the rest. layers: their number of each layer of a stack;
    (): the same as its place.
    """

    path: str
    name: str
    transposed: bool = False
    needs: str = ""
    float32: bool = False
    layers: tuple[int, ...] = ()

    def positions(self, shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """Indices of the stacked axes, one per tensor of theirs, of a leaf of this shape."""
        return np.ndindex(shape[: self.name.count("{")])

    def layer(self, at: tuple[int, ...]) -> int:
        """Their number of the layer at this place in a stack."""
        return self.layers[at[0]] if self.layers else at[0]

    def tensor(self, at: tuple[int, ...]) -> str:
        numbers = (self.layer(at), *at[1:]) if at else ()
        return self.name.format(**dict(zip(("layer", "expert"), numbers, strict=False)))


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
    *(
        Row(f"blocks/attention/{ours}_bias/bias", LAYER + f"self_attn.{theirs}_proj.bias", needs=field)
        for ours, theirs, field in (
            ("query", "q", "qkv_bias"),
            ("key", "k", "qkv_bias"),
            ("value", "v", "qkv_bias"),
            ("out", "o", "out_bias"),
        )
    ),
)
QK_NORM = (
    Row("blocks/attention/query_norm/scale", LAYER + "self_attn.q_norm.weight", needs="qk_norm"),
    Row("blocks/attention/key_norm/scale", LAYER + "self_attn.k_norm.weight", needs="qk_norm"),
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
SHARED_GATED = (
    *(
        Row(f"blocks/shared/{kind}", LAYER + f"mlp.shared_expert.{kind}_proj.weight", True)
        for kind in ("gate", "up", "down")
    ),
    Row("blocks/shared_gate", LAYER + "mlp.shared_expert_gate.weight", True),
)
SHARED = tuple(
    Row(f"blocks/shared/{kind}", LAYER + f"mlp.shared_experts.{kind}_proj.weight", True)
    for kind in ("gate", "up", "down")
)
SELECTION = (Row("blocks/moe/selection/bias", LAYER + "mlp.gate.e_score_correction_bias", float32=True),)

OF_EXPERTS = ("blocks/moe/", "blocks/shared")  # where a dense layer has an MLP


def with_dense_layers(rows: tuple[Row, ...], spec: ModelSpec) -> tuple[Row, ...]:
    """The rows of a Mixture of Experts some of whose layers are dense: those of its two stacks."""
    stacks: dict[str, list[int]] = {"blocks": [], "dense_blocks": []}
    for layer in range(spec.num_layers):
        stacks[spec.stack_of(layer)].append(layer)
    found = []
    for row in (*rows, *MLP):
        if not row.path.startswith("blocks/"):
            found.append(row)
            continue
        if row not in MLP:
            found.append(row._replace(layers=tuple(stacks["blocks"])))
        if not row.path.startswith(OF_EXPERTS):
            found.append(row._replace(path=f"dense_{row.path}", layers=tuple(stacks["dense_blocks"])))
    return tuple(found)
