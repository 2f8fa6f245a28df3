"""Oracles: the papers' sums as float64 loops over Python floats, and finite differences of them.

Written from the equations, one function per method, with the papers' own constants; nothing is shared with the library
and little between them. Every loss takes

    (p, q, old, adv, mask)      nested lists or [B, C] NumPy arrays

where p holds log π_θ, and q the same numbers wherever an equation stops the gradient: `gradient` differentiates p with
q held. All return the loss to be minimised, −J, averaged over the rows with at least one token where J is a mean over
sequences."""

import math

import numpy as np


def tokens_of(mask, i):
    return [t for t in range(len(mask[i])) if mask[i][t]]


def rows_of(mask):
    return [i for i in range(len(mask)) if tokens_of(mask, i)]


def clamp(x, low, high):
    return low if x < low else high if x > high else x


def gradient(loss, p, *rest, step=1e-6):
    """Central differences of loss(p, q = p, *rest) in p."""
    p = np.array(p, dtype=np.float64)
    q = p.copy()
    grad = np.zeros_like(p)
    for index in np.ndindex(*p.shape):
        above, below = p.copy(), p.copy()
        above[index] += step
        below[index] -= step
        grad[index] = (loss(above, q, *rest) - loss(below, q, *rest)) / (2 * step)
    return grad


# ---------------------------------------------------------------------------- one per preset


def clipped_token_sums(p, old, adv, mask, low, high):
    """Σ_t min(w A, clip(w, low, high) A) of each row with tokens, and its number of tokens."""
    sums = []
    for i in rows_of(mask):
        total = 0.0
        for t in tokens_of(mask, i):
            w = math.exp(p[i][t] - old[i][t])
            total += min(w * adv[i][t], clamp(w, low, high) * adv[i][t])
        sums.append((total, len(tokens_of(mask, i))))
    return sums


def grpo(p, q, old, adv, mask):
    """GSPO paper eq. 2-3, with the clip range of its §5.1."""
    sums = clipped_token_sums(p, old, adv, mask, 1 - 0.2, 1 + 0.27)
    return -sum(total / n for total, n in sums) / max(len(sums), 1)


def dapo(p, q, old, adv, mask):
    """DAPO eq. 8: one mean over all tokens."""
    sums = clipped_token_sums(p, old, adv, mask, 1 - 0.2, 1 + 0.28)
    return -sum(total for total, _ in sums) / max(sum(n for _, n in sums), 1)


def ppo(p, q, old, adv, mask):
    sums = clipped_token_sums(p, old, adv, mask, 1 - 0.2, 1 + 0.2)
    return -sum(total for total, _ in sums) / max(sum(n for _, n in sums), 1)


def dr_grpo(p, q, old, adv, mask):
    """Dr. GRPO: every sequence over the same constant, here the width of the frame."""
    sums = clipped_token_sums(p, old, adv, mask, 1 - 0.2, 1 + 0.2)
    return -sum(total / len(mask[0]) for total, _ in sums) / max(len(sums), 1)


def dual_clip(p, q, old, adv, mask):
    """Dual-clip PPO: max(min(.), 3 A) where A < 0. GRPO's range and aggregation."""
    rows = []
    for i in rows_of(mask):
        values = []
        for t in tokens_of(mask, i):
            w, a = math.exp(p[i][t] - old[i][t]), adv[i][t]
            inner = min(w * a, clamp(w, 0.8, 1.27) * a)
            values.append(max(inner, 3.0 * a) if a < 0 else inner)
        rows.append(sum(values) / len(values))
    return -sum(rows) / max(len(rows), 1)


def gspo(p, q, old, adv, mask, low=1 - 3e-4, high=1 + 4e-4):
    """Eq. 5 and 7: s is the |y|-th root of a ratio of sequence likelihoods. One advantage per sequence."""
    rows = []
    for i in rows_of(mask):
        ts = tokens_of(mask, i)
        likelihood_ratio_log = math.fsum(p[i][t] for t in ts) - math.fsum(old[i][t] for t in ts)
        s = math.exp(likelihood_ratio_log / len(ts))
        a = adv[i][ts[0]]
        rows.append(min(s * a, clamp(s, low, high) * a))
    return -sum(rows) / max(len(rows), 1)


def gspo_token(p, q, old, adv, mask):
    """Eq. 13 and 14: s_it = sg[s_i] π_θ(y_it) / sg[π_θ(y_it)]."""
    rows = []
    for i in rows_of(mask):
        ts = tokens_of(mask, i)
        s = math.exp(sum(q[i][t] - old[i][t] for t in ts) / len(ts))
        total = 0.0
        for t in ts:
            s_t = s * math.exp(p[i][t]) / math.exp(q[i][t])
            total += min(s_t * adv[i][t], clamp(s_t, 1 - 3e-4, 1 + 4e-4) * adv[i][t])
        rows.append(total / len(ts))
    return -sum(rows) / max(len(rows), 1)


def sequence_sum(p, q, old, adv, mask):
    """As GSPO, with the product of token ratios in place of their geometric mean, and ranges of 0.2 and 0.27."""
    rows = []
    for i in rows_of(mask):
        ts = tokens_of(mask, i)
        product = 1.0
        for t in ts:
            product *= math.exp(p[i][t]) / math.exp(old[i][t])
        a = adv[i][ts[0]]
        rows.append(min(product * a, clamp(product, 0.8, 1.27) * a))
    return -sum(rows) / max(len(rows), 1)


def luspo(p, q, old, adv, mask):
    """GSPO's loss of each sequence times its length."""
    rows = []
    for i in rows_of(mask):
        ts = tokens_of(mask, i)
        s = math.prod(math.exp(p[i][t] - old[i][t]) for t in ts) ** (1 / len(ts))
        a = adv[i][ts[0]]
        rows.append(len(ts) * min(s * a, clamp(s, 1 - 2e-3, 1 + 2.5e-3) * a))
    return -sum(rows) / max(len(rows), 1)


def cispo(p, q, old, adv, mask):
    """sg(min(w, 5)) A log π over all tokens."""
    total, n = 0.0, 0
    for i in rows_of(mask):
        for t in tokens_of(mask, i):
            total += min(math.exp(q[i][t] - old[i][t]), 5.0) * adv[i][t] * p[i][t]
            n += 1
    return -total / max(n, 1)


def gmpo(p, q, old, adv, mask, gamma=None):
    """( Π_t | min(w_t A, clip(w_t, e^−0.4, e^0.4) A) | )^(1/|y|) · sgn A; γ_t, if given, scales w_t first."""
    rows = []
    for i in rows_of(mask):
        ts = tokens_of(mask, i)
        a = adv[i][ts[0]]
        product = 1.0
        for t in ts:
            w = math.exp(p[i][t] - old[i][t]) * (gamma[i][t] if gamma is not None else 1.0)
            product *= abs(min(w * a, clamp(w, math.exp(-0.4), math.exp(0.4)) * a))
        rows.append(math.copysign(product ** (1 / len(ts)), a) if a else 0.0)
    return -sum(rows) / max(len(rows), 1)


def router_gamma(router, old_router, mask, floor=0.8):
    """γ_it = max(exp(−mean_{l,k} |log p_θ(e_k) − log p_old(e_k)|), floor); router arrays [L, B, C, X]."""
    gamma = np.ones(np.shape(mask))
    for i in range(gamma.shape[0]):
        for t in range(gamma.shape[1]):
            moved = [
                abs(router[layer][i][t][k] - old_router[layer][i][t][k])
                for layer in range(len(router))
                for k in range(len(router[0][0][0]))
            ]
            gamma[i, t] = max(math.exp(-sum(moved) / len(moved)), floor)
    return gamma


def rspo(p, q, old, adv, mask, router, old_router):
    return gmpo(p, q, old, adv, mask, gamma=router_gamma(router, old_router, mask))


def sapo(p, q, old, adv, mask):
    """4/τ σ(τ(w − 1)) A with τ = 1 for A > 0 and 1.05 otherwise."""
    rows = []
    for i in rows_of(mask):
        total = 0.0
        for t in tokens_of(mask, i):
            tau = 1.0 if adv[i][t] > 0 else 1.05
            w = math.exp(p[i][t] - old[i][t])
            total += 4 / tau / (1 + math.exp(-tau * (w - 1))) * adv[i][t]
        rows.append(total / len(tokens_of(mask, i)))
    return -sum(rows) / max(len(rows), 1)


def minirl(p, q, old, adv, mask):
    """Σ_t M sg(min(w, 5)) A log π per sequence."""
    rows = []
    for i in rows_of(mask):
        total = 0.0
        for t in tokens_of(mask, i):
            w, a = math.exp(q[i][t] - old[i][t]), adv[i][t]
            masked_out = (a > 0 and w > 1.27) or (a < 0 and w < 0.8)
            total += 0.0 if masked_out else min(w, 5.0) * a * p[i][t]
        rows.append(total)
    return -sum(rows) / max(len(rows), 1)


def reinforce(p, q, old, adv, mask):
    """A log π(y|x) per sequence."""
    rows = [sum(adv[i][t] * p[i][t] for t in tokens_of(mask, i)) for i in rows_of(mask)]
    return -sum(rows) / max(len(rows), 1)


# ---------------------------------------------------------------------------- corrections, advantages


def sampler_weights(method, old, sampler, mask):
    """Weight of every token, [B, C], from the description of each method."""
    weights = np.zeros(np.shape(mask))
    for i in rows_of(mask):
        ts = tokens_of(mask, i)
        product = math.exp(sum(old[i][t] - sampler[i][t] for t in ts))
        for t in ts:
            rho = math.exp(old[i][t] - sampler[i][t])
            weights[i, t] = {
                "tis": min(rho, 2.0),
                "mis": rho if rho <= 2.0 else 0.0,
                "icepop": rho if 0.5 <= rho <= 5.0 else 0.0,
                "seq_tis": min(product, 2.0),
                "seq_mis": product if product <= 2.0 else 0.0,
                "geo_rs": 1.0 if 0.999 <= product ** (1 / len(ts)) <= 1.001 else 0.0,
            }[method]
    return weights


def group_advantages(rewards, group, scale):
    """r − mean over the spread: that of the group, of the batch, or none; sample deviation, + 1e-6."""
    rewards = [float(r) for r in rewards]
    everything = deviation(rewards)
    out = []
    for start in range(0, len(rewards), group):
        part = rewards[start : start + group]
        spread = {"group": deviation(part) + 1e-6, "batch": everything + 1e-6, "none": 1.0}[scale]
        out += [(r - sum(part) / group) / spread for r in part]
    return np.array(out)


def deviation(values):
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def leave_one_out(rewards, group):
    out = []
    for i, r in enumerate(rewards):
        start = i - i % group
        others = [rewards[j] for j in range(start, start + group) if j != i]
        out.append(r - sum(others) / len(others))
    return np.array(out)


def gae(rewards, values, mask, gamma, lam):
    """Â_t = Σ_{k≥t} (γλ)^{k−t} δ_k over the tokens of each row, as the sum and not as its recursion."""
    advantages = np.zeros(np.shape(mask))
    for i in rows_of(mask):
        ts = tokens_of(mask, i)
        for a, t in enumerate(ts):
            total = 0.0
            for b in range(a, len(ts)):
                after = values[i][ts[b + 1]] if b + 1 < len(ts) else 0.0
                total += (gamma * lam) ** (b - a) * (rewards[i][ts[b]] + gamma * after - values[i][ts[b]])
            advantages[i, t] = total
    return advantages
