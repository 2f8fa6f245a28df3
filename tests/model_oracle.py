"""The decoder, the router, the sampled distribution and the GSPO loss once more: float64 NumPy loops over single
tokens.

Written from the papers' sums, for one sequence without padding at a time, so that nothing here can share a mistake with
the frames, scans, masks and batched matmuls of the library. Sources: RMSNorm (1910.07467), RoPE (2104.09864) in the
"rotate half" layout, grouped queries (2305.13245), SwiGLU (2002.05202), Qwen3 (2505.09388), GSPO (2507.18071).
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gspo.learning.critic import Critic
from gspo.model.spec import ModelSpec
from gspo.model.transformer import Transformer

DENSE = ModelSpec(
    vocab_size=11, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_width=6, rope_theta=100.0,
    d_ff=20, tie_embeddings=True,
)  # fmt: skip
MOE = ModelSpec(
    vocab_size=11, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_width=6, rope_theta=100.0,
    num_experts=5, experts_per_token=2, d_expert=10,
)  # fmt: skip
# All that a block may have besides, and dense layers in between: a stretch of one, of one and of two like layers.
FULL = dataclasses.replace(
    MOE, num_layers=4, dense_layers=(1,), d_ff=12, router="sigmoid", routed_scale=2.5, d_shared=20, shared_gate=True,
    qkv_bias=True, out_bias=True, rotary_width=4, rope_scaling=("yarn", 4.0, 64.0),
)  # fmt: skip


# ---------------------------------------------------------------- models under test


@functools.cache
def build_critic(spec: ModelSpec):
    """(model, params) with a scalar head whose last layer is not zero, so that every parameter gets a gradient."""
    value = np.random.default_rng(1).standard_normal(spec.d_model).astype(np.float32) / 4
    return Critic(spec), {"body": build(spec)[1], "value": jnp.asarray(value)}


@functools.cache
def build(spec: ModelSpec, seed: int = 0):
    """(model, params): the shapes of `init_params`, values drawn here. Norm scales are not 1 and biases not 0, so a
    forgotten one shows."""
    model, rng = Transformer(spec), np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key == "scale":
            return jnp.asarray(1 + 0.2 * rng.standard_normal(leaf.shape), jnp.float32)
        if path[-1].key == "bias":
            return jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32)
        fan_in = leaf.shape[1] if path[-1].key == "embedding" else leaf.shape[-2]
        return jnp.asarray(rng.standard_normal(leaf.shape) * fan_in**-0.5, jnp.float32)

    return model, jax.tree_util.tree_map_with_path(draw, nn.unbox(jax.eval_shape(model.init_params, jax.random.key(0))))


@functools.cache
def forward(spec: ModelSpec):
    """Jitted (params, tokens_BT, first_B, routes) -> (Output, logits). Shared by the tests, so each shape compiles
    once."""
    model = Transformer(spec)

    @jax.jit
    def run(params, tokens_BT, first_B, routes_LBTX=None):
        out = model.apply({"params": params}, tokens_BT, first_B, routes_LBTX)
        return out, model.apply({"params": params}, out.hidden_BTD, method="logits")

    return run


def record_gradients():
    """An optimizer stage whose state is the gradient that it was last given."""

    def update(grads, state, params=None):
        return grads, grads

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


# ---------------------------------------------------------------- the decoder


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def silu(x):
    return x / (1 + np.exp(-x))


def rms_norm(x, scale, eps):
    return x / np.sqrt(np.mean(x * x) + eps) * scale


def rope(x_H, position, theta, scaling=(), width=0):
    """Turns (x_i, x_{i + H/2}) by position · frequency, and stretches them. scaling: as ModelSpec.rope_scaling. width:
    of the part of the head to which this is done; 0: all of it."""
    if width:
        return np.concatenate([rope(x_H[:width], position, theta, scaling), x_H[width:]])
    half = len(x_H) // 2
    turned = np.empty_like(x_H)
    for i in range(half):
        angle = position * slowed(theta ** (-2 * i / len(x_H)), i, half, theta, scaling)
        turned[i] = x_H[i] * np.cos(angle) - x_H[i + half] * np.sin(angle)
        turned[i + half] = x_H[i + half] * np.cos(angle) + x_H[i] * np.sin(angle)
    return turned * stretch(scaling)


def slowed(frequency, i, half, theta, scaling):
    """Frequency of pair i under a rule: by wave lengths in Llama 3.1 (low, high), by the pair's place in YaRN."""
    if not scaling:
        return frequency
    if scaling[0] == "linear":
        return frequency / scaling[1]
    if scaling[0] == "yarn":
        factor, length, fast, slow, _, truncate = scaling[1:3] + yarn_options(scaling)
        # The pair whose wave turns n times within the trained length: length · θ^(-i/half) / 2π = n.
        first, last = (half * np.log(length / (2 * np.pi * turns)) / np.log(theta) for turns in (fast, slow))
        if truncate:
            first, last = np.floor(first), np.ceil(last)
        first, last = max(first, 0), min(last, 2 * half - 1)
        slow_share = min(max((i - first) / (last - first), 0), 1)
        return slow_share * frequency / factor + (1 - slow_share) * frequency
    factor, low, high, length = scaling
    wave = 2 * np.pi / frequency
    if wave > length / low:
        return frequency / factor
    if wave > length / high:
        smooth = (length / wave - low) / (high - low)
        return (1 - smooth) * frequency / factor + smooth * frequency
    return frequency


def yarn_options(scaling):
    """(fast, slow, attention, truncate) of ("yarn", factor, length, ...), defaults filled in."""
    given = scaling[3:]
    return (*given, *(32, 1, None, True)[len(given) :])


def stretch(scaling):
    """YaRN's factor on queries and keys."""
    if not scaling or scaling[0] != "yarn":
        return 1.0
    attention = yarn_options(scaling)[2]
    return 0.1 * np.log(scaling[1]) + 1 if attention is None else attention


def top_k(z, k):
    """Indices of the k largest, in falling order; of equals the lower index first."""
    return sorted(range(len(z)), key=lambda e: (-z[e], e))[:k]


def gates_of(z_E, chosen, renormalise, sigmoid=False, scale=1.0):
    """Gate of each chosen expert: its share of the full softmax, or its sigmoid; renormalised over the chosen ones or
    not; times a factor."""
    p = 1 / (1 + np.exp(-z_E)) if sigmoid else softmax(z_E)
    total = sum(p[e] for e in chosen) if renormalise else 1.0
    return [scale * p[e] / total for e in chosen]


def margins(params, spec, router_LTE):
    """[L, T] distance from the last chosen expert to the next, in what a router compares."""
    scores = router_LTE
    if spec.router == "sigmoid":
        scores = np.exp(router_LTE) + params["blocks"]["moe"]["selection"]["bias"][:, None]
    falling = -np.sort(-scores, axis=-1)
    return falling[..., spec.experts_per_token - 1] - falling[..., spec.experts_per_token]


def swiglu(x, w_gate, w_up, w_down):
    return (silu(x @ w_gate) * (x @ w_up)) @ w_down


def attention(p, spec, h_TD):
    T, N, K, H = len(h_TD), spec.num_heads, spec.num_kv_heads, spec.head_width
    bias = lambda name, there: p[f"{name}_bias"]["bias"] if there else 0.0  # noqa: E731
    q = (h_TD @ p["query"] + bias("query", spec.qkv_bias)).reshape(T, N, H)
    k = (h_TD @ p["key"] + bias("key", spec.qkv_bias)).reshape(T, K, H)
    v = (h_TD @ p["value"] + bias("value", spec.qkv_bias)).reshape(T, K, H)
    for x, name in (q, "query_norm"), (k, "key_norm"):
        for t in range(T):
            if spec.qk_norm and spec.qk_norm_over == "projection":
                x[t] = rms_norm(x[t].reshape(-1), p[name]["scale"], spec.rms_eps).reshape(x[t].shape)
            for n in range(x.shape[1]):
                if spec.qk_norm and spec.qk_norm_over == "head":
                    x[t, n] = rms_norm(x[t, n], p[name]["scale"], spec.rms_eps)
                x[t, n] = rope(x[t, n], t, spec.rope_theta, spec.rope_scaling, spec.rotary_width)
    mixed = np.zeros((T, N, H))
    for t in range(T):
        for n in range(N):
            kv = n // (N // K)
            weight = softmax(np.array([q[t, n] @ k[s, kv] / np.sqrt(H) for s in range(t + 1)]))
            for s in range(t + 1):
                mixed[t, n] += weight[s] * v[s, kv]
    return mixed.reshape(T, N * H) @ p["out"] + bias("out", spec.out_bias)


def decoder(params, spec, tokens, given_LTX=None):
    """One sequence without padding -> (logits [T, V], free routes [L, T, X], router logits [L, T, E], log σ(z) of a
    sigmoid router; both None if dense).

    L: of the layers with a router. params: a float64 tree. given_LTX: experts to run instead of the routers' choice; a
    token with a -1 routes freely.
    """
    x = params["embedding"][np.asarray(tokens)].copy()
    T, routes, logits, denses = len(tokens), [], [], 0
    for layer in range(spec.num_layers):
        dense = not spec.num_experts or layer in spec.dense_layers
        stack, place = ("dense_blocks", denses) if dense and spec.num_experts else ("blocks", layer - denses)
        denses += stack == "dense_blocks"
        p = jax.tree.map(lambda w, place=place: w[place], params[stack])
        x = x + attention(
            p["attention"], spec, np.stack([rms_norm(r, p["attention_norm"]["scale"], spec.rms_eps) for r in x])
        )
        h = np.stack([rms_norm(r, p["mlp_norm"]["scale"], spec.rms_eps) for r in x])
        if dense:
            x = x + np.stack([swiglu(r, p["mlp"]["gate"], p["mlp"]["up"], p["mlp"]["down"]) for r in h])
            continue
        moe, free, z = p["moe"], [], h @ p["moe"]["router"]
        sigmoid = spec.router == "sigmoid"
        by = 1 / (1 + np.exp(-z)) + moe["selection"]["bias"] if sigmoid else z
        for t in range(T):
            free.append(top_k(by[t], spec.experts_per_token))
            used = free[t]
            if given_LTX is not None and min(given_LTX[place][t]) >= 0:
                used = [int(e) for e in given_LTX[place][t]]
            gates = gates_of(z[t], used, spec.norm_topk_prob, sigmoid, spec.routed_scale)
            for e, gate in zip(used, gates, strict=True):
                x[t] = x[t] + gate * swiglu(h[t], moe["gate"][e], moe["up"][e], moe["down"][e])
            if spec.d_shared:
                weight = 1 / (1 + np.exp(-(h[t] @ p["shared_gate"])[0])) if spec.shared_gate else 1.0
                x[t] = x[t] + weight * swiglu(h[t], *(p["shared"][kind] for kind in ("gate", "up", "down")))
        routes.append(free)
        logits.append(-np.log1p(np.exp(-z)) if sigmoid else z)
    hidden = np.stack([rms_norm(r, params["final_norm"]["scale"], spec.rms_eps) for r in x])
    head = params["embedding"].T if spec.tie_embeddings else params["head"]
    return hidden @ head, (np.array(routes) if routes else None), (np.array(logits) if logits else None)


# ---------------------------------------------------------------- what is sampled


def distribution(logits, temperature=1.0, top_k_=0, top_p=1.0, min_p=0.0):
    """One row of logits -> probabilities of the distribution that tokens are drawn from.

    top-k, then the smallest set of most likely tokens whose probability reaches top_p, then those with at least min_p
    times the probability of the likeliest. For logits without ties.
    """
    z = np.asarray(logits, np.float64) / temperature
    order = sorted(range(len(z)), key=lambda v: -z[v])
    if top_k_:
        order = order[:top_k_]
    if top_p < 1:
        p, total, kept = softmax(z[order]), 0.0, []
        for token, prob in zip(order, p, strict=True):
            if total >= top_p:
                break
            kept.append(token)
            total += prob
        order = kept
    if min_p:
        p = softmax(z[order])
        order = [token for token, prob in zip(order, p, strict=True) if prob >= min_p * p.max()]
    prob = np.zeros(len(z))
    prob[order] = softmax(z[order])
    return prob


def score(params, spec, prompt, completion, given_LTX=None, temperature=1.0):
    """(log-prob, entropy) of each completion token under softmax(logits / temperature), as arrays."""
    logits, _, _ = decoder(params, spec, [*prompt, *completion], given_LTX)
    rows = [distribution(logits[len(prompt) + t - 1], temperature) for t in range(len(completion))]
    logp = np.array([np.log(row[token]) for row, token in zip(rows, completion, strict=True)])
    entropy = np.array([-sum(q * np.log(q) for q in row if q > 0) for row in rows])
    return logp, entropy


def gspo_loss(logps, old_logps, advantages, epsilon, epsilon_high):
    """-1/B Σ_i min(s_i Â_i, clip(s_i) Â_i) over lists of rows of different length; eq. 5 and 7 of GSPO."""
    total = 0.0
    for logp, old, advantage in zip(logps, old_logps, advantages, strict=True):
        s = np.exp(sum(logp[t] - old[t] for t in range(len(logp))) / len(logp))
        total += min(s * advantage, np.clip(s, 1 - epsilon, 1 + epsilon_high) * advantage)
    return -total / len(logps)


# ---------------------------------------------------------------- measures of routing


def count_changes(old_LBTX, new_LBTX, mask_BT):
    """(share of experts changed, share of tokens changed in any layer) by sets, over tokens that are masked and
    recorded."""
    L, B, T, X = old_LBTX.shape
    changed, slots, tokens, moved = 0, 0, 0, 0
    for b, t in np.ndindex(B, T):
        if not mask_BT[b, t] or (old_LBTX[:, b, t] < 0).any():
            continue
        lost = [X - len(set(old_LBTX[l, b, t].tolist()) & set(new_LBTX[l, b, t].tolist())) for l in range(L)]
        changed, slots, tokens, moved = changed + sum(lost), slots + L * X, tokens + 1, moved + any(lost)
    return changed / slots, moved / tokens


def router_losses(logits_LTE, routes_LTX):
    """(load-balance loss, z-loss) of the tokens of one sequence: E Σ_e f_e P_e (2101.03961, eq. 4) and the mean of
    (log Σ_e exp z_e)² (2202.08906, eq. 5), averaged over layers; (0, 0) without a token."""
    L, T, E = logits_LTE.shape
    balance = square = 0.0
    for z_TE, routes_TX in zip(logits_LTE, routes_LTX, strict=True):
        for e in range(E if T else 0):
            f = sum(e in routes_X for routes_X in routes_TX.tolist()) / routes_TX.size
            balance += E * f * np.mean([softmax(z_E)[e] for z_E in z_TE]) / L
        square += np.mean([np.log(np.exp(z_E).sum()) ** 2 for z_E in z_TE]) / L if T else 0.0
    return balance, square


def count_load(routes_LBTX, mask_BT, experts):
    """(standard deviation / mean, max / mean - 1) of the tokens per expert, averaged over layers."""
    variation, peak = [], []
    for routes_BTX in routes_LBTX:
        load = np.zeros(experts)
        for b, t, x in np.ndindex(routes_BTX.shape):
            if mask_BT[b, t] and routes_BTX[b, t, x] >= 0:
                load[routes_BTX[b, t, x]] += 1
        variation.append(np.sqrt(np.mean((load - load.mean()) ** 2)) / load.mean())
        peak.append(load.max() / load.mean() - 1)
    return np.mean(variation), np.mean(peak)


# ---------------------------------------------------------------- frames


def left_padded(rows, width, rng, vocab):
    """Sequences -> (tokens [B, width] int32, first [B] int32); padding is junk tokens, which nothing may look at."""
    tokens = rng.integers(0, vocab, (len(rows), width))
    for b, row in enumerate(rows):
        tokens[b, width - len(row) :] = row
    return tokens.astype(np.int32), np.array([width - len(row) for row in rows], np.int32)


def directional_derivatives(loss, params, rng, eps=1e-5):
    """[(path, direction, d loss / d direction)] by central differences, one random direction for each leaf of a float64
    tree."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    found = []
    for i, (path, leaf) in enumerate(leaves):
        direction = rng.standard_normal(leaf.shape)
        values = [x for _, x in leaves]

        def at(step, i=i, leaf=leaf, direction=direction, values=values):
            return loss(jax.tree.unflatten(tree, [*values[:i], leaf + step * direction, *values[i + 1 :]]))

        found.append((jax.tree_util.keystr(path), direction, (at(eps) - at(-eps)) / (2 * eps)))
    return found
