"""Two distributions over the next token: the one that is drawn from, and the one under which every token is scored.

    scored   p = softmax(logits / temperature)                                 sampler and learner alike
    drawn    q = p cut by top-k, then top-p, then min-p, and renormalised      the sampler only

A ratio π_θ/π_old is a ratio of p on both sides, and the log-probs that the sampler records are those of p, whatever
cuts it applied. Why not of q:

- A cut flips by rounding. Sampler and learner compute the same logits in another order; a token that sits on the edge
  of a cut is kept by one and removed by the other, and every log-prob of that row then moves by the log of its mass: a
  hundredth of a nat, which stops an honest run at its check and lies outside of GSPO's clip range. Under p the ratio
  before the first update is 1 up to rounding.
- To replay the sampler's kept set instead, V bits per token would have to be kept.
- p is what the gradient should move: under q, a token outside of the kept set gets no gradient at all.

What this costs: the completions come from q, and nothing here corrects for that. Tokens of the tail are never drawn, so
never judged. The mean of ∇ log p under q is ∇ log(kept mass) and not 0, so that advantages which do not average to 0
also move mass into the kept set or out of it. Without cuts q = p, and none of this applies. The correction between
sampler and learner (`sampler_is`) compares p with p: it measures numerics and staleness, not the cuts."""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from gspo.types import UserError

REMOVED = -1e30  # finite, so that differences with it are not NaN; a token with it has probability 0 in float32


@dataclasses.dataclass(frozen=True)
class Sampling:
    """temperature > 0 (0 is greedy, for evaluation only); top_k = 0, top_p = 1, min_p = 0 switch the cuts off.

    A value out of its range is a UserError that starts with the field's name: whoever took the value from a group of
    fields puts the group before it."""

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
                raise UserError(f"{field}={getattr(self, field)}: {remedy}")


def scored_logits(logits: chex.Array, sampling: Sampling) -> chex.Array:
    """float32 logits [..., V] -> logits of p: divided by the temperature, uncut. Greedy tokens are scored at
    temperature 1: the limit would give log-prob 0 to every one of them, which says nothing."""
    chex.assert_type(logits, jnp.float32)
    return logits / (sampling.temperature or 1.0)


def drawn_logits(logits: chex.Array, sampling: Sampling) -> chex.Array:
    """float32 logits [..., V] -> logits of q: those of p, with -1e30 for the tokens that are cut.

    The cuts are applied in the usual order: top-k, then top-p on what is left, then min-p. Tokens that tie on the edge
    of a cut are all kept. At temperature 0 only the argmax is left, of equals the first."""
    kept = scored_logits(logits, sampling)
    vocab = logits.shape[-1]
    if sampling.temperature == 0:
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(vocab) == best, kept, REMOVED)
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
    return kept


def draw(key: chex.PRNGKey, logits: chex.Array, sampling: Sampling) -> tuple[chex.Array, chex.Array]:
    """float32 logits [..., V] -> tokens [...] int32 drawn from q, and their log-probs [...] float32 under p.

    By inversion: the first token at which the summed probability passes one uniform number. Gumbel noise would take V
    of them, a fifth of the time of a small model's rollout. One number in 2^23 is 0, which the first token of the
    vocabulary would pass however improbable it is: half a step is the least."""
    kept = drawn_logits(logits, sampling)
    weight = jnp.exp(kept - jnp.max(kept, axis=-1, keepdims=True))
    summed = jnp.cumsum(weight, axis=-1)
    uniform = jnp.maximum(jax.random.uniform(key, (*logits.shape[:-1], 1)), 2.0**-24)
    passed = summed > uniform * summed[..., -1:]
    # A sum taken in parallel need not stay where it is at a token of weight 0: only those that are kept may be hit.
    vocab, held = logits.shape[-1], weight > 0
    first = jnp.min(jnp.where(passed & held, jnp.arange(vocab), vocab), axis=-1)
    last = jnp.max(jnp.where(held, jnp.arange(vocab), 0), axis=-1)  # where rounding lets no sum pass
    tokens = jnp.minimum(first, last).astype(jnp.int32)
    return tokens, log_prob(scored_logits(logits, sampling), tokens)


def log_prob(logits: chex.Array, tokens: chex.Array) -> chex.Array:
    """[..., V] logits, [...] tokens -> [...] float32 log-probabilities under their softmax."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def entropy(logits: chex.Array) -> chex.Array:
    """[..., V] logits -> [...] entropy of their softmax in nats: log Z - Σ p z."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return log_z - jnp.sum(jnp.exp(logits - log_z[..., None]) * logits, axis=-1)
