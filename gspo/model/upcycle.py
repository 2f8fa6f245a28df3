"""Sparse upcycling: a dense model as a Mixture of Experts that begins as the same function (2212.05055).

The feed-forward f of each layer is copied into experts behind a fresh router; all else stays as it is.

    whole    every expert is f. The gates of the chosen ones sum to 1, so Σ_j g_j f(x) = f(x) whatever is chosen.
    split    the F neurons of f are cut into N parts, f = Σ_p f_p, and expert c·N + p computes N·f_p: part p of copy c.
             The N experts of a copy begin with one router column between them (the virtual groups of 2410.07524), so
             they tie, and are chosen together, with a gate of g_c / N each: Σ_c Σ_p (g_c / N) · N f_p(x) = f(x).

The split form is exact as long as a token takes whole copies. Where it takes one part twice and another not at all, or
parts with unequal gates, it leaves the dense function: no scale mends that, N is only right on average. Training unties
the columns, and so gives the router the choice of parts, which is what finer experts are for.
Noise on the copies ends either identity, and lets experts differ before the first update.
"""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp

from gspo.model.spec import ModelSpec
from gspo.types import Params, UserError

ROUTER_STD = 0.02  # small: the first choices are close, and a balance loss can still move them


@dataclasses.dataclass(frozen=True)
class Upcycling:
    """What becomes of a feed-forward layer. experts: of each layer, copies · split. split: parts of a copy, 1 for whole
    ones. noise: standard deviation of what is added to each copy, in those of its matrix."""

    experts: int
    experts_per_token: int
    split: int = 1
    noise: float = 0.0

    def __post_init__(self):
        def need(ok, field, remedy):
            if not ok:
                raise UserError(f"--{field}={getattr(self, field)}: {remedy}")

        need(self.split >= 1, "split", "must be at least 1 (1: whole copies)")
        need(self.noise >= 0, "noise", "must not be negative")
        need(self.experts >= 1, "experts", "must be positive")
        need(0 < self.experts_per_token <= self.experts, "experts_per_token", f"must be in 1..{self.experts}")
        for field in ("experts", "experts_per_token"):
            need(getattr(self, field) % self.split == 0, field, f"must be a multiple of --split={self.split}")

    def spec(self, dense: ModelSpec) -> ModelSpec:
        """The Mixture of Experts that a dense model becomes. Raises UserError where it is none, or cannot be cut."""
        if dense.num_experts:
            raise UserError(f"--from: its model has {dense.num_experts} experts already; upcycling takes a dense one")
        if dense.d_ff % self.split:
            raise UserError(f"--split={self.split}: must divide the {dense.d_ff} neurons of a feed-forward layer")
        return dataclasses.replace(
            dense,
            d_ff=0,
            num_experts=self.experts,
            experts_per_token=self.experts_per_token,
            d_expert=dense.d_ff // self.split,
            norm_topk_prob=True,  # gates that sum to 1: what makes it the dense function
        )

    def params(self, dense: Params, key: chex.PRNGKey, shardings: Params | None = None) -> Params:
        """Parameters of a dense model -> those of `spec`, float32.

        shardings: where the new tree lies (the first device where it is None). One leaf at a time is made, so that
        beside both trees there is only what the noise of one leaf takes."""
        blocks = dict(dense["blocks"])
        mlp, keys = blocks.pop("mlp"), jax.random.split(key, 4)
        places = {} if shardings is None else shardings["blocks"]["moe"]

        def make(name, function, *arrays):
            return jax.jit(function, out_shardings=places.get(name))(*arrays)

        def experts(w, neurons, scale, key):
            return self._noisy(scale * self._copied(w, neurons), key)

        L, D = mlp["gate"].shape[:2]
        moe = {
            "router": make("router", partial(self._router, shape=(L, D)), keys[0]),
            "gate": make("gate", partial(experts, neurons=2, scale=1, key=keys[1]), mlp["gate"]),
            "up": make("up", partial(experts, neurons=2, scale=1, key=keys[2]), mlp["up"]),
            "down": make("down", partial(experts, neurons=1, scale=self.split, key=keys[3]), mlp["down"]),
        }
        return {**dense, "blocks": {**blocks, "moe": moe}}

    def _router(self, key: chex.PRNGKey, shape: tuple[int, int]) -> chex.Array:
        """[L, D, E] of shape [L, D]; the experts of a copy have one column."""
        columns = ROUTER_STD * jax.random.normal(key, (*shape, self.experts // self.split), jnp.float32)
        return jnp.repeat(columns, self.split, axis=2)

    def _copied(self, w: chex.Array, neurons: int) -> chex.Array:
        """[L, ., .] with the neurons on that axis -> [L, E, ., .], its parts copy after copy."""
        parts = jnp.stack(jnp.split(w, self.split, axis=neurons), axis=1)
        return jnp.tile(parts, (1, self.experts // self.split, 1, 1))

    def _noisy(self, w_LE: chex.Array, key: chex.PRNGKey) -> chex.Array:
        """Each copy with noise of its own."""
        if not self.noise:
            return w_LE
        std_L = jnp.std(w_LE, axis=(1, 2, 3), keepdims=True)
        return w_LE + self.noise * std_L * jax.random.normal(key, w_LE.shape, w_LE.dtype)
