"""Work of an RL step by hand: FLOPs of its three parts, and bytes that decoding has to read.

Counted are matrix products, 2 FLOPs per multiply-add, of what has to be computed and not of what a program computes:
no padding, no recomputation (remat), no router's softmax. Formulas, for one token and one layer:

    projections   2 D (N + 2 K) H + 2 N H D
    feed-forward  6 D F dense;  X 6 D F + 2 D E with experts, and 6 D F of a shared one, 2 D of its gate
    attention     4 N H s, s the columns that the token sees, itself included
    head          2 D V, where a token is predicted
    backward      twice the forward

With the prompt of a group computed once (`shared`), prompt tokens count once per group and the last completion token,
which predicts nothing, is not fed.
"""

from typing import NamedTuple

from gspo.model.spec import ModelSpec


class Sizes(NamedTuple):
    """Of one rollout: Q prompts of P tokens, G completions each, of C tokens on average; N updates."""

    prompts: int
    group: int
    prompt: int
    completion: float
    updates: int

    @property
    def rows(self) -> int:
        return self.prompts * self.group


def layer_weights(spec: ModelSpec, experts: float, dense: bool = False) -> float:
    """Numbers in the matrices of one layer, where so many of its experts count. dense: of a layer without any."""
    D, H = spec.d_model, spec.head_width
    attention = D * (spec.num_heads + 2 * spec.num_kv_heads) * H + spec.num_heads * H * D
    if dense or not spec.num_experts:
        return attention + 3 * D * spec.d_ff
    shared = 3 * D * spec.d_shared + D * spec.shared_gate
    return attention + 3 * D * spec.d_expert * experts + D * spec.num_experts + shared


def all_weights(spec: ModelSpec, experts: float) -> float:
    """Numbers in the matrices of all layers, embedding and head aside, where so many experts of each count."""
    dense = spec.num_layers - spec.moe_layers
    return spec.moe_layers * layer_weights(spec, experts) + dense * layer_weights(spec, experts, dense=True)


def active_weights(spec: ModelSpec) -> float:
    """Numbers in the matrices that one token meets, embedding and head aside."""
    return all_weights(spec, spec.experts_per_token)


def attention_flops(spec: ModelSpec, first: float, tokens: float) -> float:
    """Scores and sums of `tokens` consecutive tokens in all layers, of which the first sees first + 1 columns."""
    columns = tokens * (first + (tokens + 1) / 2)
    return 4 * spec.num_layers * spec.num_heads * spec.head_width * columns


def forward_flops(spec: ModelSpec, sizes: Sizes, *, shared: bool) -> float:
    """One pass over all rows of a rollout that predicts their completion tokens."""
    Q, B, P, C = sizes.prompts, sizes.rows, sizes.prompt, sizes.completion
    head = 2 * spec.d_model * spec.vocab_size * B * C
    if not shared:
        return 2 * active_weights(spec) * B * (P + C) + B * attention_flops(spec, 0, P + C) + head
    fed = Q * P + B * (C - 1)
    attention = Q * attention_flops(spec, 0, P) + B * attention_flops(spec, P, C - 1)
    return 2 * active_weights(spec) * fed + attention + head


def phase_flops(spec: ModelSpec, sizes: Sizes, *, shared: bool) -> dict[str, float]:
    """Of each phase of a step: rollout (prompts prefilled once per group, always), old log-probs, all updates."""
    forward = forward_flops(spec, sizes, shared=shared)
    return {
        "rollout": forward_flops(spec, sizes, shared=True),
        "old_logps": forward,
        "update": 3 * forward,
    }


def decode_bytes(spec: ModelSpec, sizes: Sizes) -> float:
    """Bytes that the decode loop of one rollout reads at least: at each of its C - 1 passes the matrices and the head
    once, in the dtype of the matmuls, and the keys and values so far, the prompt's once per group.

    With experts, those that B tokens choose at random: E (1 - (1 - X / E)^B)."""
    Q, B, P, C = sizes.prompts, sizes.rows, sizes.prompt, sizes.completion
    E, X = spec.num_experts, spec.experts_per_token
    touched = E * (1 - (1 - X / E) ** B) if E else 0
    weights = all_weights(spec, touched) + spec.d_model * spec.vocab_size
    columns = (C - 1) * Q * P + B * (C - 1) * C / 2
    cache = 2 * spec.num_layers * spec.num_kv_heads * spec.head_width * columns
    return spec.compute_dtype.itemsize * ((C - 1) * weights + cache)
