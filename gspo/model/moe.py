"""Mixture-of-Experts layer: a router, and experts that `gspo.model.dispatch` brings the tokens to."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from gspo.model.attention import Bias, kernel_init
from gspo.model.dispatch import dispatch
from gspo.model.experts import BACKENDS
from gspo.model.routing import compared, route, swap_experts, top_k_experts
from gspo.parallel.sharding import ONE_DEVICE, Layout


class MoE(nn.Module):
    """Router (float32) and SwiGLU experts. x_BTD, given routes [B, T, X] or None -> (y_BTD, free_BTX, router_logits_BTE
    float32, log σ(z) of a sigmoid router). routed_scale: factor on all gates."""

    num_experts: int
    experts_per_token: int
    expert_width: int
    norm_topk_prob: bool
    backend: str
    dtype: jnp.dtype
    layout: Layout = ONE_DEVICE
    noise: float = 0.0
    swap: float = 0.0
    router: str = "softmax"
    routed_scale: float = 1.0

    @nn.compact
    def __call__(self, x_BTD, given_BTX=None):
        B, T, D = x_BTD.shape
        E, F, X = self.num_experts, self.expert_width, self.experts_per_token

        def weight(name, shape, *axes):
            init = (
                nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=(0,))
                if len(shape) == 3
                else kernel_init
            )
            return self.param(name, nn.with_partitioning(init, axes), shape, jnp.float32)

        x_MD = x_BTD.reshape(B * T, D)
        router_DE = self.layout.gathered(weight("router", (D, E), "embed", None), "embed", None)
        # float32 whatever the compute dtype: a rounded logit can change an expert, and then the whole token changes.
        logits_ME = jnp.matmul(x_MD.astype(jnp.float32), router_DE, precision=jax.lax.Precision.HIGHEST)
        if self.noise:  # mismatch injection: a router that is not the learner's
            logits_ME += self.noise * jax.random.normal(self.make_rng("router"), logits_ME.shape)
        bias_E = None
        if self.router == "sigmoid":
            logits_ME, bias_E = jax.nn.log_sigmoid(logits_ME), Bias("norm", name="selection")(E)
        given_MX = None if given_BTX is None else given_BTX.reshape(B * T, X)
        if self.swap:
            own_MX = top_k_experts(compared(logits_ME, bias_E), X)
            given_MX = swap_experts(self.make_rng("router"), own_MX, E, self.swap)
        gates_MX, used_MX, free_MX = route(
            logits_ME, X, renormalise=self.norm_topk_prob, given_MX=given_MX, bias_E=bias_E, scale=self.routed_scale
        )
        if self.swap:
            free_MX = used_MX  # the swapped experts are the choice of this router
        chex.assert_shape(gates_MX, (B * T, X))
        weights = (
            weight("gate", (E, D, F), "expert", "expert_embed", "mlp"),
            weight("up", (E, D, F), "expert", "expert_embed", "mlp"),
            weight("down", (E, F, D), "expert", "mlp", "expert_embed"),
        )
        y_BTD = dispatch(
            self.layout,
            BACKENDS[self.backend],
            x_BTD,
            gates_MX.reshape(B, T, X),
            used_MX.reshape(B, T, X),
            *weights,
            dtype=self.dtype,
        )
        return y_BTD, free_MX.reshape(B, T, X), logits_ME.reshape(B, T, E)
