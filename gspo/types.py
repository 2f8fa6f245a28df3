"""The dimension key, and the few records that cross file borders.

Dimension key. Every array of rank >= 1 that crosses a function border carries its dimensions as a suffix, `logp_BC`
say:

    B  rows (one completion each)     D  model width             E  experts
    N  query heads                    L  layers                  X  experts chosen per token
    Q  prompts (questions)            K  key/value heads         F  width of one feed-forward layer or expert
    G  completions per prompt         H  width of one head
    P  prompt frame, left-padded      V  vocabulary
    C  completion frame, right-padded S  key positions
    T  the whole frame, P + C

One sequence is one frame of T = P + C tokens: the prompt ends at column P - 1, the completion starts at column P.

    column      0 ......... P-len ..... P-1 | P ......... P+len-1 ....... T-1
    token       pad  ...    prompt          | completion           ...    pad

Sampler and learner share the frame, its positions and its mask, so that everything they compute can be compared element
by element. Masks come from the two lengths, never from token ids: a sampled pad token is a token like any other."""

from typing import Any

import chex
import flax.struct
import jax.numpy as jnp

Params = Any  # a nested dict of arrays, as linen's `init` returns it under "params"


class UserError(Exception):
    """A mistake of the user's: one line that names the field and the remedy. `gspo.run.cli.run` turns it into exit code
    2."""


def completion_mask(lengths_B: chex.Array, width: int) -> chex.Array:
    """[B] completion lengths -> [B, C] bool, True on the first `length` columns."""
    return jnp.arange(width)[None, :] < lengths_B[:, None]


@flax.struct.dataclass
class Rollout:
    """What the sampler returns for B = Q * G rows; the G rows of a prompt are neighbours.

    tokens_BT            int32   the frames: prompt and completion
    prompt_lengths_B     int32
    completion_lengths_B int32   tokens sampled, the end-of-sequence token included
    logp_BC              float32 log-probability of each sampled token under softmax(logits / temperature), without the
                         cuts that shaped the draw (`gspo.model.distribution` says why); 0 after the end
    routes_LBTX          int     experts chosen by each layer for each token; -1 where nothing was recorded. None for
                         dense models
    truncated_B          bool    the row was cut off at C tokens without an end-of-sequence token
    decode_steps         int32   scalar: tokens that the decode loop drew per row, the length of the longest completion
    """

    tokens_BT: chex.Array
    prompt_lengths_B: chex.Array
    completion_lengths_B: chex.Array
    logp_BC: chex.Array
    routes_LBTX: chex.Array | None
    truncated_B: chex.Array
    decode_steps: chex.Array


@flax.struct.dataclass
class Batch:
    """What one update of the policy needs, for B rows.

    tokens_BT, prompt_lengths_B, completion_lengths_B: the frames, as in `Rollout`
    loss_mask_BC  bool     completion tokens that count in the loss
    advantages_BC float32  one value per token (constant along a row for every method without a critic)
    old_logp_BC   float32  log-probs of the policy that produced the rollout; fixed for all updates of the rollout
    ref_logp_BC   float32  log-probs of the reference policy; None without a KL term
    sampler_logp_BC float32 log-probs of the distribution that was sampled, where old_logp_BC was recomputed by the
    learner
    routes_LBTX   int      experts that the rollout policy chose: what drift is measured against, and what a replaying
    step runs old_router_logp_LBCX float32 log-probs that its routers gave to those experts, at the columns that predict
    a token (RSPO) old_router_logits_LBTE float32 logits of its routers, where the drift of routers is to be measured as
    a KL old_values_BC, returns_BC float32 the critic's values before the updates, and what it should have said (PPO)
    """

    tokens_BT: chex.Array
    prompt_lengths_B: chex.Array
    completion_lengths_B: chex.Array
    loss_mask_BC: chex.Array
    advantages_BC: chex.Array
    old_logp_BC: chex.Array
    ref_logp_BC: chex.Array | None = None
    sampler_logp_BC: chex.Array | None = None
    routes_LBTX: chex.Array | None = None
    old_router_logp_LBCX: chex.Array | None = None
    old_router_logits_LBTE: chex.Array | None = None
    old_values_BC: chex.Array | None = None
    returns_BC: chex.Array | None = None


@flax.struct.dataclass
class TrainState:
    """Everything an update changes. `step` counts optimizer updates; `ref_params` is None where nothing reads a
    reference; `entropy_coef` is the weight of the entropy bonus, float32, None where it is fixed (then it belongs to
    the objective); `critic` is the state of the value model, None for methods that compare completions with each other.
    `stale_params` are the parameters of the last rollouts, oldest first, from which a sampler that lags behind on
    purpose draws.
    """

    step: chex.Array
    params: Params
    opt_state: Any
    ref_params: Params | None = None
    entropy_coef: chex.Array | None = None
    critic: "TrainState | None" = None
    stale_params: tuple[Params, ...] = ()
