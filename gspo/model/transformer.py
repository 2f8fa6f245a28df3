"""The decoder: one block, scanned over layers, described by data.

    (tokens, cache, routes) -> (hidden, cache, routes)

One module serves Qwen3, Qwen3-MoE, Mixtral, Llama and OLMoE; a `ModelSpec` says which (`gspo.hf.families` reads it from
a config.json). It is called on whole frames (learner), on prompts with an empty cache (prefill) and on one token with a
full one (decode): always with the frame column of the first real token, from which positions and visibility follow.
"""

import dataclasses
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from gspo.model.attention import Attention, KVCache, RMSNorm, kernel_init, rope_tables, visible
from gspo.model.experts import BACKENDS
from gspo.model.moe import MoE
from gspo.model.routing import route_dtype
from gspo.parallel.sharding import ONE_DEVICE, Layout
from gspo.types import UserError


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Everything that fixes the shape and the arithmetic of a model. Hashable, so that jit may take it as static.

    num_experts = 0 is a dense model of feed-forward width d_ff; else every layer holds experts of width d_expert.
    rope_scaling is () or the four numbers of Llama 3.1's rule (`gspo.model.attention.rope_tables`). qk_norm_over is
    "head" (Qwen3) or "projection" (OLMoE).
    dtype is that of the matmuls ("float32" or "bfloat16"); parameters, router, softmax, norms and log-probs are
    float32. remat recomputes each block in the backward pass; attention_chunk > 0 does so with attention scores, that
    many query columns at a time, so that no [T, T] array of scores exists.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    d_ff: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    d_expert: int = 0
    norm_topk_prob: bool = True
    rope_theta: float = 1e6
    rope_scaling: tuple[float, ...] = ()
    rms_eps: float = 1e-6
    qk_norm: bool = True
    qk_norm_over: str = "head"
    tie_embeddings: bool = False
    dtype: str = "float32"
    moe_backend: str = "blocked"
    remat: bool = False
    attention_chunk: int = 0

    def __post_init__(self):
        def need(ok, field, remedy):
            if not ok:
                raise UserError(f"model.{field}={getattr(self, field)!r}: {remedy}")

        for field in ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_width"):
            need(getattr(self, field) > 0, field, "must be positive")
        need(
            self.num_heads % self.num_kv_heads == 0,
            "num_heads",
            f"must be a multiple of num_kv_heads={self.num_kv_heads}",
        )
        need(self.head_width % 2 == 0, "head_width", "must be even for rotary positions")
        scaling = self.rope_scaling
        need(not scaling or (len(scaling) == 4 and min(scaling) > 0 and scaling[1] < scaling[2]), "rope_scaling",
             "give (factor, low, high, trained_length), all positive and low < high, or () for none")  # fmt: skip
        need(self.qk_norm_over in ("head", "projection"), "qk_norm_over", "choose 'head' or 'projection'")
        need(self.dtype in ("float32", "bfloat16"), "dtype", "choose 'float32' or 'bfloat16'")
        need(self.attention_chunk >= 0, "attention_chunk", "must be >= 0 (0: all query columns at once)")
        need(self.moe_backend in BACKENDS, "moe_backend", f"choose one of {', '.join(BACKENDS)}")
        if self.num_experts:
            need(
                0 < self.experts_per_token <= self.num_experts, "experts_per_token", f"must be in 1..{self.num_experts}"
            )
            need(self.d_expert > 0, "d_expert", "must be positive in a Mixture of Experts")
        else:
            need(self.d_ff > 0, "d_ff", "must be positive in a dense model (num_experts=0)")

    @property
    def compute_dtype(self):
        return jnp.dtype(self.dtype)

    def empty_cache(self, rows: int, width: int) -> KVCache:
        return KVCache.zeros(self.num_layers, rows, width, self.num_kv_heads, self.head_width, self.compute_dtype)


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
            s.num_experts, s.experts_per_token, s.d_expert, s.norm_topk_prob, s.moe_backend, s.compute_dtype, self.layout,
            self.router_noise, self.router_swap, name="moe",
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
