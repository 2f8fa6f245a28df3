"""One prompt and the completions that follow it as one row, so that the prompt runs once, forward and backward.

    G frames of a group     prompt | completion 0
                            prompt | completion 1              as one row of P + G·C columns
                            ...
                            prompt | completion 0 | completion 1 | ...

Exact: a completion's columns have the positions and see the columns that they have and see in their own frame. Rows of
all other kinds (routes, router logits) are packed and unpacked alike.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from gspo.model.attention import MASKED, attend, visible
from gspo.model.columns import cut_columns, join_columns


class Packing(NamedTuple):
    """prompt_width P; completions G to each prompt. B rows are B / G groups of neighbours, J = P + G·C columns each."""

    prompt_width: int
    completions: int

    def pack(self, x: chex.Array, axis: int = 0) -> chex.Array:
        """[..., B, T, ...] -> [..., B/G, J, ...], rows at `axis`, columns behind them. Of the G copies of a prompt the
        first one stays."""
        P, G = self
        x = jnp.moveaxis(x, (axis, axis + 1), (0, 1))
        rows, width, *rest = x.shape
        x_QGT = x.reshape(rows // G, G, width, *rest)
        completions_QJ = x_QGT[:, :, P:].reshape(rows // G, G * (width - P), *rest)
        packed = jnp.concatenate([x_QGT[:, 0, :P], completions_QJ], axis=1)
        return jnp.moveaxis(packed, (0, 1), (axis, axis + 1))

    def unpack(self, x: chex.Array, axis: int = 0) -> chex.Array:
        """Inverse of `pack`: every completion behind its prompt again."""
        P, G = self
        x = jnp.moveaxis(x, (axis, axis + 1), (0, 1))
        groups, width, *rest = x.shape
        prompts = jnp.broadcast_to(x[:, None, :P], (groups, G, P, *rest))
        frames = jnp.concatenate([prompts, x[:, P:].reshape(groups, G, (width - P) // G, *rest)], axis=2)
        return jnp.moveaxis(frames.reshape(groups * G, -1, *rest), (0, 1), (axis, axis + 1))

    def positions(self, first_Q: chex.Array, width: int) -> chex.Array:
        """[Q, J] int32: the position of each column in its own frame, 0 at the prompt's first token."""
        P, G = self
        column_J = jnp.concatenate([jnp.arange(P), jnp.tile(jnp.arange((width - P) // G) + P, G)])
        return jnp.maximum(column_J - first_Q[:, None], 0)

    def predicting(self, hidden_QJD: chex.Array) -> chex.Array:
        """[B, C, D]: what predicts each completion token, the last column of the prompt and all of the completion but
        its last."""
        P, G = self
        groups, width, D = hidden_QJD.shape
        last_QG1D = jnp.broadcast_to(hidden_QJD[:, None, P - 1 : P], (groups, G, 1, D))
        own_QGCD = hidden_QJD[:, P:].reshape(groups, G, (width - P) // G, D)
        return jnp.concatenate([last_QG1D, own_QGCD[:, :, :-1]], axis=2).reshape(groups * G, -1, D)


def attend_packed(packing: Packing, q_QJNH, k_QJKH, v_QJKH, first_Q: chex.Array, chunk: int = 0) -> chex.Array:
    """`attend` for packed rows: prompts see themselves, completions their prompt and themselves. Returns [Q, J, N, H].

    chunk: query columns whose scores exist at a time, as in `attend`."""
    P, G = packing
    Q, J, N, H = q_QJNH.shape
    C = (J - P) // G
    q_QPNH, k_QPKH, v_QPKH = (x[:, :P] for x in (q_QJNH, k_QJKH, v_QJKH))
    prompts_QPNH = attend(q_QPNH, k_QPKH, v_QPKH, visible(first_Q, 0, P, P), chunk)

    seen_QP = jnp.arange(P) >= first_Q[:, None]
    q_QGCNH, k_QGCKH, v_QGCKH = (x[:, P:].reshape(Q, G, C, *x.shape[2:]) for x in (q_QJNH, k_QJKH, v_QJKH))

    def piece(q_QGcNH, column_c):
        return _behind(q_QGcNH, column_c, k_QPKH, v_QPKH, seen_QP, k_QGCKH, v_QGCKH)

    if 0 < chunk < C:
        parts = cut_columns(q_QGCNH.reshape(Q * G, C, N, H), chunk)
        columns = cut_columns(jnp.arange(C)[None], chunk)[:, 0]
        out = jax.lax.map(
            jax.checkpoint(lambda part: piece(part[0].reshape(Q, G, chunk, N, H), part[1])), (parts, columns)
        )
        out_QGCNH = join_columns(out.reshape(len(parts), Q * G, chunk, N, H), C)
    else:
        out_QGCNH = piece(q_QGCNH, jnp.arange(C))
    return jnp.concatenate([prompts_QPNH, out_QGCNH.reshape(Q, G * C, N, H)], axis=1)


def _behind(q_QGCNH, column_C, k_QPKH, v_QPKH, seen_QP, k_QGSKH, v_QGSKH):
    """Queries of completions at these columns -> softmax over the prompt and over the completion up to that column."""
    Q, G, C, N, H = q_QGCNH.shape
    K = k_QPKH.shape[2]
    P, S = k_QPKH.shape[1], k_QGSKH.shape[2]
    q_QKGRCH = jnp.transpose(q_QGCNH.reshape(Q, G, C, K, N // K, H) * H**-0.5, (0, 3, 1, 4, 2, 5))
    to_prompt = jnp.einsum("QKGRCH,QPKH->QKGRCP", q_QKGRCH, k_QPKH, preferred_element_type=jnp.float32)
    to_own = jnp.einsum("QKGRCH,QGSKH->QKGRCS", q_QKGRCH, k_QGSKH, preferred_element_type=jnp.float32)
    to_prompt = jnp.where(seen_QP[:, None, None, None, None], to_prompt, MASKED)
    to_own = jnp.where(jnp.arange(S) <= column_C[:, None], to_own, MASKED)
    weight = jax.nn.softmax(jnp.concatenate([to_prompt, to_own], axis=-1), axis=-1).astype(v_QPKH.dtype)
    out_QKGRCH = jnp.einsum("QKGRCP,QPKH->QKGRCH", weight[..., :P], v_QPKH, preferred_element_type=jnp.float32)
    out_QKGRCH += jnp.einsum("QKGRCS,QGSKH->QKGRCH", weight[..., P:], v_QGSKH, preferred_element_type=jnp.float32)
    out_QGCKRH = jnp.transpose(out_QKGRCH.astype(v_QPKH.dtype), (0, 2, 4, 1, 3, 5))
    return out_QGCKRH.reshape(Q, G, C, N, H)
