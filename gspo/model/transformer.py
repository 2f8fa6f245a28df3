"""The decoder: one block, scanned over layers, described by data.

    (tokens, cache, routes) -> (hidden, cache, routes)

One module serves Qwen3, Qwen3-MoE, Mixtral, Llama and OLMoE; a `ModelSpec` says which (`gspo.hf.families` reads it from
a config.json). It is called on whole frames (learner), on prompts with an empty cache (prefill) and on one token with a
full one (decode): always with the frame column of the first real token, from which positions and visibility follow.
"""

from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from gspo.model.attention import Attention, KVCache, RMSNorm, kernel_init, rope_tables, visible
from gspo.model.moe import MoE
from gspo.model.routing import route_dtype
from gspo.model.spec import ModelSpec
from gspo.parallel.sharding import ONE_DEVICE, Layout, tree_shardings, with_shardings
from gspo.types import Params


class Output(NamedTuple):
    """hidden_BTD after the final norm; the cache, where one was given; and for MoE models the experts that each layer's
    router would choose freely (free_routes_LBTX, also under replay) with its float32 logits (router_logits_LBTE).
    """

    hidden_BTD: chex.Array
    cache: KVCache | None
    free_routes_LBTX: chex.Array | None
    router_logits_LBTE: chex.Array | None


class SwiGLU(nn.Module):
    """(silu(x W_gate) ∘ (x W_up)) W_down, the dense feed-forward layer."""

    width: int
    dtype: jnp.dtype
    layout: Layout = ONE_DEVICE

    @nn.compact
    def __call__(self, x_BTD):
        D, F = x_BTD.shape[-1], self.width

        def weight(name, shape, *axes):
            w = self.param(name, nn.with_partitioning(kernel_init, axes), shape, jnp.float32).astype(self.dtype)
            return self.layout.gathered(w, *axes)

        hidden = jax.nn.silu(x_BTD @ weight("gate", (D, F), "embed", "mlp")) * (
            x_BTD @ weight("up", (D, F), "embed", "mlp")
        )
        return hidden @ weight("down", (F, D), "mlp", "embed")


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)). A scan body: (carry, layer inputs) -> (carry, layer
    outputs)."""

    spec: ModelSpec
    layout: Layout
    router_noise: float
    router_swap: float

    @nn.compact
    def __call__(self, carry, layer, given_BTX, rope, visible_BTS, start):
        x_BTD, cache = carry
        s = self.spec
        rows = lambda x: self.layout.constrain(x, "rows", None, None)  # noqa: E731
        attention = Attention(
            s.num_heads, s.num_kv_heads, s.head_width, s.qk_norm, s.rms_eps, s.compute_dtype, s.qk_norm_over,
            s.attention_chunk, self.layout, name="attention",
        )  # fmt: skip
        normed_BTD = RMSNorm(s.rms_eps, name="attention_norm")(x_BTD)
        with jax.named_scope("attention"):
            mixed_BTD, cache = attention(normed_BTD, rope, visible_BTS, cache, layer, start)
        x_BTD = rows(x_BTD + mixed_BTD)
        h_BTD = RMSNorm(s.rms_eps, name="mlp_norm")(x_BTD)
        if not s.num_experts:
            return (rows(x_BTD + SwiGLU(s.d_ff, s.compute_dtype, self.layout, name="mlp")(h_BTD)), cache), (None, None)
        moe = MoE(
            s.num_experts, s.experts_per_token, s.d_expert, s.norm_topk_prob, s.moe_backend, s.compute_dtype,
            self.layout, self.router_noise, self.router_swap, name="moe",
        )  # fmt: skip
        with jax.named_scope("moe"):
            y_BTD, free_BTX, logits_BTE = moe(h_BTD, given_BTX)
        return (rows(x_BTD + y_BTD), cache), (free_BTX.astype(route_dtype(s.num_experts)), logits_BTE)


class Transformer(nn.Module):
    """Embedding, L blocks, final norm; `logits` maps hidden states to the vocabulary.

    layout: where arrays lie on a mesh of devices (rows must divide).
    router_noise, router_swap: mismatch injection, for samplers that are to differ from the learner on purpose. Standard
    deviation of noise on the router logits, and the rate at which a token's last expert is swapped; both draw from the
    rng stream "router"."""

    spec: ModelSpec
    router_noise: float = 0.0
    router_swap: float = 0.0
    layout: Layout = ONE_DEVICE

    def setup(self):
        s = self.spec
        init = nn.initializers.normal(s.d_model**-0.5)
        self.embedding = self.param(
            "embedding", nn.with_partitioning(init, ("vocab", "embed")), (s.vocab_size, s.d_model), jnp.float32
        )
        if not s.tie_embeddings:
            head_init = nn.with_partitioning(kernel_init, ("embed", "vocab"))
            self.head = self.param("head", head_init, (s.d_model, s.vocab_size), jnp.float32)
        block = nn.remat(Block, prevent_cse=False) if s.remat else Block
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "router": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=s.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(s, self.layout, self.router_noise, self.router_swap)
        self.final_norm = RMSNorm(s.rms_eps)

    def __call__(
        self,
        tokens_BT: chex.Array,
        first_B: chex.Array,
        routes_LBTX: chex.Array | None = None,
        cache: KVCache | None = None,
        start: chex.Array | int = 0,
    ) -> Output:
        """tokens_BT int32, columns start .. start + T of the frame. first_B int32: column of each row's first real
        token.

        routes_LBTX: experts to use instead of the router's choice (see `gspo.model.routing`). cache: keys and values of
        the columns before `start`; it comes back with this call's columns filled in. Without a cache `start` must be 0.
        """
        s = self.spec
        B, T = tokens_BT.shape
        chex.assert_shape(first_B, (B,))
        x_BTD = self.layout.lookup(self.embedding.astype(s.compute_dtype), tokens_BT)
        positions_BT = jnp.maximum(start + jnp.arange(T) - first_B[:, None], 0)
        rope = rope_tables(positions_BT, s.head_width, s.rope_theta, s.rope_scaling)
        keys = T if cache is None else cache.k_LBSKH.shape[2]
        seen_BTS = visible(first_B, start, T, keys)
        layers = jnp.arange(s.num_layers)
        (x_BTD, cache), (free_LBTX, logits_LBTE) = self.blocks(
            (x_BTD, cache), layers, routes_LBTX, rope, seen_BTS, start
        )
        return Output(self.final_norm(x_BTD), cache, free_LBTX, logits_LBTE)

    def logits(self, hidden: chex.Array) -> chex.Array:
        """[..., D] -> float32 [..., V]."""
        with jax.named_scope("head"):
            kernel_DV = self.layout.gathered(self.head_kernel(), "embed", "vocab")
            logits = jnp.matmul(hidden, kernel_DV, preferred_element_type=jnp.float32)
            return self.layout.constrain(logits, "rows", *(None,) * (logits.ndim - 2), "vocab")

    def head_kernel(self) -> chex.Array:
        """[D, V] in the compute dtype, cut as ("embed", "vocab")."""
        kernel_DV = self.embedding.T if self.spec.tie_embeddings else self.head
        return kernel_DV.astype(self.spec.compute_dtype)

    def init_params(self, key: chex.PRNGKey) -> Any:
        """Parameters boxed with their logical axis names (for `tree_shardings`; `nn.unbox` strips them)."""
        tokens_BT = jnp.zeros((1, 1), jnp.int32)
        return self.clone(layout=ONE_DEVICE).init(key, tokens_BT, jnp.zeros((1,), jnp.int32))["params"]


def abstract_params(model: Any, layout: Layout | None = None) -> Params:
    """Shapes, dtypes and (with a layout) shardings of a model's parameters, as jax.ShapeDtypeStruct: what imports and
    restores fill, and where a fresh tree is born. model: a Transformer, or whatever has its `init_params`."""
    boxed = jax.eval_shape(model.init_params, jax.random.key(0))
    shapes = nn.unbox(boxed)
    return shapes if layout is None else with_shardings(shapes, tree_shardings(layout, boxed))


def param_shardings(model: Any, layout: Layout) -> Params:
    """Where each parameter lies under a layout."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_params(model, layout))
