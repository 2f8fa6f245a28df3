"""What fixes a model: its sizes and its arithmetic, as data."""

import dataclasses

import jax.numpy as jnp

from gspo.model.experts import BACKENDS
from gspo.model.rope import rule_of
from gspo.types import UserError

# The model of a run that names none and starts from none: about 450k parameters. And its tokenizer.
TOY = {
    "vocab_size": 0, "num_layers": 4, "d_model": 64, "num_heads": 4, "num_kv_heads": 2, "head_width": 16, "d_ff": 0,
    "num_experts": 8, "experts_per_token": 2, "d_expert": 64, "norm_topk_prob": True,
    "dense_layers": (), "router": "softmax", "routed_scale": 1.0, "d_shared": 0, "shared_gate": False,
    "rope_theta": 1e4, "rotary_width": 0,
    "rope_scaling": (), "rms_eps": 1e-6, "qk_norm": True, "qk_norm_over": "head", "qkv_bias": False,
    "out_bias": False, "tie_embeddings": False,
}  # fmt: skip
UNROLLED_LAYERS = 8
TOY_TOKENIZER = "chars:0123456789="


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Everything that fixes the shape and the arithmetic of a model. Hashable, so that jit may take it as static.

    num_experts = 0 is a dense model of feed-forward width d_ff; else every layer holds experts of width d_expert but
    those in dense_layers, numbered from 0, which are dense too. d_shared is the width of one more expert that all
    tokens go through (0: none), times σ(h w) with shared_gate (Qwen2-MoE). router is "softmax", or "sigmoid" with a
    bias for the choice that is not trained (DeepSeek-V3, `gspo.model.routing`); routed_scale multiplies the gates of
    routed experts.
    rotary_width: how many numbers of each head are rotated (0: all; half of them in GLM-4.5).
    rope_scaling is () or a rule of `gspo.model.rope`, ("yarn", 4.0, 32768.0) for one. qk_norm_over is
    "head" (Qwen3) or "projection" (OLMoE). qkv_bias: queries, keys and values have a bias (Qwen2); out_bias: so has the
    output of attention.
    dtype is that of the matmuls ("float32" or "bfloat16"); parameters, router, softmax, norms and log-probs are
    float32. remat recomputes each block in the backward pass; attention_chunk > 0 does so with attention scores, that
    many query columns at a time, so that no [T, T] array of scores exists. scan_layers runs the layers as a loop, which
    compiles one block whatever their number; None: from more than UNROLLED_LAYERS on. Unrolled they run faster.
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
    dense_layers: tuple[int, ...] = ()
    router: str = "softmax"
    routed_scale: float = 1.0
    d_shared: int = 0
    shared_gate: bool = False
    rope_theta: float = 1e6
    rotary_width: int = 0
    rope_scaling: tuple = ()
    rms_eps: float = 1e-6
    qk_norm: bool = True
    qk_norm_over: str = "head"
    qkv_bias: bool = False
    out_bias: bool = False
    tie_embeddings: bool = False
    dtype: str = "float32"
    moe_backend: str = "auto"
    remat: bool = False
    attention_chunk: int = 0
    scan_layers: bool | None = None

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
        width = self.rotary_width
        need(width % 2 == 0 and 0 <= width <= self.head_width, "rotary_width", "must be even and <= head_width")
        try:
            rule_of(self.rope_scaling)
        except ValueError as error:
            need(False, "rope_scaling", error)
        need(self.qk_norm_over in ("head", "projection"), "qk_norm_over", "choose 'head' or 'projection'")
        need(self.dtype in ("float32", "bfloat16"), "dtype", "choose 'float32' or 'bfloat16'")
        need(self.attention_chunk >= 0, "attention_chunk", "must be >= 0 (0: all query columns at once)")
        need(self.moe_backend in BACKENDS, "moe_backend", f"choose one of {', '.join(BACKENDS)}")
        if self.num_experts:
            need(
                0 < self.experts_per_token <= self.num_experts, "experts_per_token", f"must be in 1..{self.num_experts}"
            )
            need(self.d_expert > 0, "d_expert", "must be positive in a Mixture of Experts")
            dense = self.dense_layers
            need(
                dense == tuple(sorted({*dense} & {*range(self.num_layers)})) and len(dense) < self.num_layers,
                "dense_layers",
                f"give some numbers of layers in 0..{self.num_layers - 1} in rising order, but not all (num_experts=0)",
            )
            need(self.d_ff > 0 or not dense, "d_ff", f"must be positive, the width of dense_layers={dense}")
            need(self.router in ("softmax", "sigmoid"), "router", "choose 'softmax' or 'sigmoid'")
            need(self.routed_scale > 0, "routed_scale", "must be positive")
            need(self.d_shared >= 0, "d_shared", "must be >= 0 (0: no shared expert)")
            need(self.d_shared or not self.shared_gate, "shared_gate", "there is no shared expert (d_shared=0)")
        else:
            need(self.d_ff > 0, "d_ff", "must be positive in a dense model (num_experts=0)")

    @property
    def compute_dtype(self):
        return jnp.dtype(self.dtype)

    def stack_of(self, layer: int) -> str:
        """The stack of parameters that a layer belongs to (`gspo.model.layers`)."""
        return "dense_blocks" if self.num_experts and layer in self.dense_layers else "blocks"

    @property
    def moe_layers(self) -> int:
        """Number of layers with a router."""
        return self.num_layers - len(self.dense_layers) if self.num_experts else 0

    @property
    def scanned(self) -> bool:
        """Whether the layers run as a loop."""
        return self.num_layers > UNROLLED_LAYERS if self.scan_layers is None else self.scan_layers
