"""The distribution that tokens are drawn from: temperature, top-k, top-p, min-p. One definition for sampler and
learner.

A ratio π_θ/π_old is a ratio of probabilities of what was really sampled. A sampler that cuts the tail of the softmax
while the learner scores the whole softmax gives ratios that are wrong before the first update; so both shape their
logits here."""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from gspo.types import UserError

REMOVED = -1e30  # finite: probability exactly 0 in float32, and no NaN in gradients


@dataclasses.dataclass(frozen=True)
class Sampling:
    """temperature > 0 (0 is greedy, for evaluation only); top_k = 0, top_p = 1, min_p = 0 switch the cuts off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        for field, ok, remedy in (
            ("temperature", self.temperature >= 0, "must be >= 0 (0 is greedy)"),
            ("top_k", self.top_k >= 0, "must be >= 0 (0 keeps all tokens)"),
            ("top_p", 0 < self.top_p <= 1, "must be in (0, 1] (1 keeps all tokens)"),
            ("min_p", 0 <= self.min_p < 1, "must be in [0, 1) (0 keeps all tokens)"),
        ):
            if not ok:
                raise UserError(f"rollout.{field}={getattr(self, field)}: {remedy}")

    @property
    def cuts(self) -> bool:
        return bool(self.top_k) or self.top_p < 1 or self.min_p > 0


def shape_logits(logits: chex.Array, sampling: Sampling, keep: chex.Array | None = None) -> chex.Array:
    """float32 logits [..., V] -> logits of the distribution that is sampled: divided by the temperature, cut tokens at
    -1e30.

    The cuts are applied in the usual order: top-k, then top-p on what is left, then min-p. keep: [...] int32, one token
    that is never cut: the learner passes the token that was sampled, since under the updated policy it may fall outside
    the kept set, and a ratio of 0 would carry no gradient. With unchanged weights it lies inside, and learner and
    sampler agree."""
    chex.assert_type(logits, jnp.float32)
    if sampling.temperature == 0:  # the greedy distribution puts everything on the argmax
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(logits.shape[-1]) == best, 0.0, REMOVED)
    logits = logits / sampling.temperature
    if not sampling.cuts:
        return logits
    kept = jax.lax.stop_gradient(logits)
    vocab = logits.shape[-1]
    if 0 < sampling.top_k < vocab:
        kept = jnp.where(kept >= jax.lax.top_k(kept, sampling.top_k)[0][..., -1:], kept, REMOVED)
    if sampling.top_p < 1:
        falling = jnp.flip(jnp.sort(kept, axis=-1), axis=-1)
        prob = jax.nn.softmax(falling, axis=-1)
        before = jnp.cumsum(prob, axis=-1) - prob  # the token that crosses top_p is kept
        smallest = jnp.min(jnp.where(before < sampling.top_p, falling, jnp.inf), axis=-1, keepdims=True)
        kept = jnp.where(kept >= smallest, kept, REMOVED)
    if sampling.min_p > 0:
        kept = jnp.where(kept >= jnp.max(kept, axis=-1, keepdims=True) + jnp.log(sampling.min_p), kept, REMOVED)
    inside = kept > REMOVED / 2
    if keep is not None:
        inside |= jnp.arange(vocab) == keep[..., None]
    return jnp.where(inside, logits, REMOVED)


def log_prob(shaped_logits: chex.Array, tokens: chex.Array) -> chex.Array:
    """[..., V] shaped logits, [...] tokens -> [...] float32 log-probabilities."""
    chosen = jnp.take_along_axis(shaped_logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(shaped_logits, axis=-1)


def entropy(shaped_logits: chex.Array) -> chex.Array:
    """[..., V] shaped logits -> [...] entropy in nats: log Z - Σ p z, where a cut token adds nothing."""
    log_z = jax.nn.logsumexp(shaped_logits, axis=-1)
    prob = jnp.exp(shaped_logits - log_z[..., None])
    return log_z - jnp.sum(prob * jnp.where(prob > 0, shaped_logits, 0.0), axis=-1)
