"""The decoder: L times one block, described by data.

    (tokens, routes) -> (hidden, routes)          whole frames, or groups packed behind their prompts: the learner
    (prompts) -> caches, (token, caches) -> ...   prefill and decode: the sampler

One module serves all families of `gspo.hf.families`; a `ModelSpec` says which. Parameters are stacked by layer; blocks
run as a loop over them, or one after the other where there are few (`ModelSpec.scan_layers`). It is always called with
the frame column of the first real token, from which positions and visibility follow.
"""

from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from gspo.model.adapters import MERGED, merged_block
from gspo.model.attention import Attention, Mix, RMSNorm, attend, kernel_init, visible, within
from gspo.model.cache import Caches, KVCache, StackedCache, attend_cached
from gspo.model.layers import layers_of, scanned, stretches, unrolled
from gspo.model.moe import MoE
from gspo.model.packing import Packing, attend_packed
from gspo.model.rope import rope_tables
from gspo.model.routing import route_dtype
from gspo.model.spec import ModelSpec
from gspo.parallel.sharding import ONE_DEVICE, Layout, tree_shardings, with_shardings
from gspo.types import LORA, Params


class Output(NamedTuple):
    """hidden_BTD after the final norm; and for MoE models the experts that each layer's router would choose freely
    (free_routes_LBTX, also under replay) with its float32 logits (router_logits_LBTE; log σ(z) of a sigmoid router).
    """

    hidden_BTD: chex.Array
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
    """x + attention(norm(x)), then x + feed-forward(norm(x)). Returns (x_BTD, what mix keeps, free_BTX, logits_BTE)."""

    spec: ModelSpec
    layout: Layout
    router_noise: float
    router_swap: float
    dense: bool

    @nn.compact
    def __call__(self, x_BTD, given_BTX, rope, mix: Mix):
        s = self.spec
        rows = lambda x: self.layout.constrain(x, "rows", None, None)  # noqa: E731
        attention = Attention(
            s.num_heads, s.num_kv_heads, s.head_width, s.qk_norm, s.rms_eps, s.compute_dtype, s.qk_norm_over,
            self.layout, s.qkv_bias, s.out_bias, name="attention",
        )  # fmt: skip
        normed_BTD = RMSNorm(s.rms_eps, name="attention_norm")(x_BTD)
        with jax.named_scope("attention"):
            mixed_BTD, kept = attention(normed_BTD, rope, mix)
        x_BTD = rows(x_BTD + mixed_BTD)
        h_BTD = RMSNorm(s.rms_eps, name="mlp_norm")(x_BTD)
        if self.dense:
            return rows(x_BTD + SwiGLU(s.d_ff, s.compute_dtype, self.layout, name="mlp")(h_BTD)), kept, None, None
        moe = MoE(
            s.num_experts, s.experts_per_token, s.d_expert, s.norm_topk_prob, s.moe_backend, s.compute_dtype,
            self.layout, self.router_noise, self.router_swap, s.router, s.routed_scale, name="moe",
        )  # fmt: skip
        with jax.named_scope("moe"):
            y_BTD, free_BTX, logits_BTE = moe(h_BTD, given_BTX)
            if s.d_shared:
                y_BTD += self._shared_expert(h_BTD)
        return rows(x_BTD + y_BTD), kept, free_BTX.astype(route_dtype(s.num_experts)), logits_BTE

    def _shared_expert(self, h_BTD):
        """What every token's shared expert adds to its routed ones, times σ(h w) where there is a gate."""
        s = self.spec
        y_BTD = SwiGLU(s.d_shared, s.compute_dtype, self.layout, name="shared")(h_BTD)
        if not s.shared_gate:
            return y_BTD
        axes = ("embed", None)
        w_D1 = self.param("shared_gate", nn.with_partitioning(kernel_init, axes), (s.d_model, 1), jnp.float32)
        return y_BTD * jax.nn.sigmoid(h_BTD @ self.layout.gathered(w_D1.astype(s.compute_dtype), *axes))


class Transformer(nn.Module):
    """Embedding, L blocks, final norm; `logits` maps hidden states to the vocabulary.

    layout: where arrays lie on a mesh of devices (rows must divide).
    router_noise, router_swap: mismatch injection, for samplers that are to differ from the learner on purpose. Standard
    deviation of noise on the router logits, and the rate at which a token's last expert is swapped; both draw from the
    rng stream "router".
    adapter_scale: the weight of the adapters, where the parameters have some (`gspo.model.adapters`)."""

    spec: ModelSpec
    router_noise: float = 0.0
    router_swap: float = 0.0
    layout: Layout = ONE_DEVICE
    adapter_scale: float | None = None

    def setup(self):
        s = self.spec
        init = nn.initializers.normal(s.d_model**-0.5)
        self.embedding = self.param(
            "embedding", nn.with_partitioning(init, ("vocab", "embed")), (s.vocab_size, s.d_model), jnp.float32
        )
        if not s.tie_embeddings:
            head_init = nn.with_partitioning(kernel_init, ("embed", "vocab"))
            self.head = self.param("head", head_init, (s.d_model, s.vocab_size), jnp.float32)
        self.blocks = self._block("blocks")
        if s.dense_layers and s.num_experts:
            self.dense_blocks = self._block("dense_blocks")
        self.final_norm = RMSNorm(s.rms_eps)

    @property
    def injects(self) -> bool:
        """Whether a mismatch is injected, which draws from the rng stream "router"."""
        return self.router_noise > 0 or self.router_swap > 0

    def _block(self, stack: str, **keywords: Any) -> Block:
        """A block of one of the stacks (`gspo.model.layers`)."""
        dense = stack == "dense_blocks" or not self.spec.num_experts
        return Block(self.spec, self.layout, self.router_noise, self.router_swap, dense, **keywords)

    def __call__(
        self,
        tokens_BT: chex.Array,
        first_B: chex.Array,
        routes_LBTX: chex.Array | None = None,
        *,
        packing: Packing | None = None,
        segments_BT: chex.Array | None = None,
    ) -> Output:
        """Whole frames. tokens_BT int32. first_B int32: column of each row's first real token.

        routes_LBTX: experts to use instead of the router's choice (see `gspo.model.routing`). packing: the rows are
        groups, packed so (`gspo.model.packing`): T is then J. segments_BT: a row holds several sequences, each of which
        sees itself alone (`gspo.model.attention.within`).
        """
        chex.assert_shape(first_B, (tokens_BT.shape[0],))
        if packing is None:
            return self._whole(tokens_BT, first_B, routes_LBTX, segments_BT=segments_BT)[0]

        def mix(q, k, v, _cache, _at):
            return attend_packed(packing, q, k, v, first_B, self.spec.attention_chunk), None

        return self._run(tokens_BT, packing.positions(first_B, tokens_BT.shape[1]), mix, routes_LBTX)[0]

    def _whole(self, tokens_BT, first_B, routes_LBTX=None, keep: bool = False, segments_BT=None):
        """Whole frames -> (Output, the keys and values of each layer where they are to be kept)."""
        T, chunk = tokens_BT.shape[1], self.spec.attention_chunk
        seen_BTS, positions_BT = visible(first_B, 0, T, T), jnp.maximum(jnp.arange(T) - first_B[:, None], 0)
        if segments_BT is not None:
            positions_BT, same_BTS = within(segments_BT)
            seen_BTS &= same_BTS

        def mix(q, k, v, _cache, _at):
            return attend(q, k, v, seen_BTS, chunk), (k, v) if keep else None

        return self._run(tokens_BT, positions_BT, mix, routes_LBTX)

    def prefill(self, tokens_QP: chex.Array, first_Q: chex.Array, completions: int, width: int):
        """Prompts -> (Output, caches): what `decode` reads, with room for so many completions to each prompt, of so
        many columns."""
        out, kept = self._whole(tokens_QP, first_Q, keep=True)
        if self.spec.scanned:
            return out, (StackedCache.behind(*kept, completions, width),)
        return out, tuple(KVCache.behind(k, v, completions, width) for k, v in kept)

    def decode(
        self,
        tokens_B: chex.Array,
        position_B: chex.Array,
        seen_QP: chex.Array,
        seen_BC: chex.Array,
        caches: Caches,
        column: chex.Array,
        layers: tuple[Params, ...] | None = None,
    ):
        """One token of each completion -> (Output with T = 1, caches that hold it at `column`).

        position_B: its position behind the first token of its prompt. seen_QP, seen_BC: bool, the columns of its prompt
        and of its completion that it sees, this one included. layers: the blocks' parameters layer by layer, where they
        were cut already (`layers_of`), once for all tokens.
        """

        def mix(q, k, v, cache, at):
            cache = cache.write(at, column, k[:, 0], v[:, 0])
            return attend_cached(q[:, 0], cache.read(at), seen_QP, seen_BC)[:, None], cache

        return self._run(tokens_B[:, None], position_B[:, None], mix, caches=caches, layers=layers)

    def _run(self, tokens_BT, positions_BT, mix, routes_LBTX=None, caches=None, layers=None):
        """Embedding, all blocks, final norm -> (Output, what each layer keeps).

        mix: (q, k, v, cache, at) -> (mixed, kept); cache: that of the layer, at: the layer's place in it. With caches,
        what a layer keeps is its cache."""
        s = self.spec
        x_BTD = self.layout.lookup(self.embedding.astype(s.compute_dtype), tokens_BT)
        rope = rope_tables(positions_BT, s.rotary_width or s.head_width, s.rope_theta, s.rope_scaling)
        if self.is_initializing():
            return Output(self.final_norm(self._init_blocks(x_BTD, rope, mix)), None, None), None
        params = self.variables["params"]
        key = self.make_rng("router") if self.injects else None

        def run_of(stack):
            block = self._block(stack, parent=None)

            def one(params, x_BTD, given_BTX, cache, at, index):
                rngs = None if key is None else {"router": jax.random.fold_in(key, index)}
                of_layer = lambda q, k, v: mix(q, k, v, cache, at)  # noqa: E731
                params = merged_block(params, self.adapter_scale)
                return block.apply({"params": params}, x_BTD, given_BTX, rope, of_layer, rngs=rngs)

            if s.remat:
                return jax.checkpoint(one, prevent_cse=not s.scanned)
            if LORA in params[stack]:  # else the backward pass would find a second copy of all layers' weights
                but_merged = jax.checkpoint_policies.save_anything_except_these_names(MERGED)
                return jax.checkpoint(one, prevent_cse=not s.scanned, policy=but_merged)
            return one

        runs = {part.stack: run_of(part.stack) for part in stretches(s)}
        if s.scanned:
            x_BTD, kept, free, logits = scanned(runs, params, s, x_BTD, routes_LBTX, caches)
        else:
            layers = layers_of(params, s) if layers is None else layers
            x_BTD, kept, free, logits = unrolled(runs, layers, s, x_BTD, routes_LBTX, caches)
        return Output(self.final_norm(x_BTD), free, logits), kept

    def _init_blocks(self, x_BTD, rope, mix):
        """Makes the parameters of all blocks, stacked by layer."""
        sizes: dict[str, int] = {}
        for part in stretches(self.spec):
            sizes[part.stack] = sizes.get(part.stack, 0) + part.size
        for stack, size in sizes.items():
            scan = nn.scan(
                lambda block, x_BTD, _: (block(x_BTD, None, rope, lambda q, k, v: mix(q, k, v, None, 0))[0], None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=size,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x_BTD = scan(getattr(self, stack), x_BTD, None)[0]
        return x_BTD

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
