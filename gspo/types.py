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

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import flax.struct
import jax.numpy as jnp

Params = Any  # a nested dict of arrays, as linen's `init` returns it under "params"
LORA = "lora"  # where low-rank adapters lie beside the weights of the blocks (`gspo.model.adapters`)


class UserError(Exception):
    """A mistake of the user's: one line that names the field and the remedy. `gspo.run.cli.run` turns it into exit code
    2."""


class Diverged(UserError):
    """A run whose loss or gradient is no longer a number."""


def array(dims: str = "", **keywords) -> Any:
    """A field of a record that holds an array with these dimensions, letters of the key above; "": a scalar. Whatever
    cuts a record into rows or lays it out on a mesh reads them here (`map_arrays`), never in the field's name."""
    return flax.struct.field(metadata={"dims": dims}, **keywords)


def map_arrays(function: Callable[..., Any], record: Any, *others: Any) -> Any:
    """function(dims, array, *arrays of the others) on every array of a record, as a record of its kind. Fields that are
    None stay None, records inside of it and tuples of them are entered. Raises TypeError for a field that nobody
    declared."""

    def one(field):
        x, *more = (getattr(each, field.name) for each in (record, *others))
        if x is None:
            return None
        if "dims" in field.metadata:
            return function(field.metadata["dims"], x, *more)
        if isinstance(x, tuple):
            return tuple(map_arrays(function, *each) for each in zip(x, *more, strict=True))
        if not dataclasses.is_dataclass(x):
            raise TypeError(f"{type(record).__name__}.{field.name} declares no dimensions: see gspo.types.array")
        return map_arrays(function, x, *more)

    return record.replace(**{field.name: one(field) for field in dataclasses.fields(record)})


def row_axis(dims: str) -> int:
    """Where the rows lie in an array of these dimensions. Raises ValueError where it has none."""
    return dims.index("B")


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
    routes_LBTX          int     experts that ran in each layer for each token; -1 where nothing was recorded. None for
                         dense models
    truncated_B          bool    the row was cut off at C tokens without an end-of-sequence token
    decode_steps         int32   scalar: tokens that the decode loop drew per row, the length of the longest completion;
                         where rows are decoded some at a time, per slot, on the device with most
    """

    tokens_BT: chex.Array = array("BT")
    prompt_lengths_B: chex.Array = array("B")
    completion_lengths_B: chex.Array = array("B")
    logp_BC: chex.Array = array("BC")
    routes_LBTX: chex.Array | None = array("LBTX")
    truncated_B: chex.Array = array("B")
    decode_steps: chex.Array = array()


@flax.struct.dataclass
class LossInputs:
    """The arrays that an objective reads, for B rows of C completion tokens. Floats of any kind, float32 as a rule.
    Where the mask is False they may hold anything, inf and NaN included. None: not given.

    logp_BC          log-probs of the completion tokens under the policy: what the gradient goes to. None in a batch,
                     until the learner has scored it; likewise entropy_BC and router_logp_LBCX
    old_logp_BC      the same under the policy that produced the rollout, fixed over all updates of the rollout
    advantages_BC    one value per token (constant along a row for every method without a critic)
    mask_BC          bool, completion tokens that count
    ref_logp_BC      log-probs under the reference policy, for a KL term
    entropy_BC       of the policy's distribution at each position, in nats
    sampler_logp_BC  log-probs under the distribution that was sampled, where old_logp_BC was computed by the learner
    router_logp_LBCX, old_router_logp_LBCX
                     log-probs of the experts that the old policy chose, under the routers now and then, at the columns
                     that predict a token (RSPO)
    """

    logp_BC: chex.Array | None = array("BC")
    old_logp_BC: chex.Array = array("BC")
    advantages_BC: chex.Array = array("BC")
    mask_BC: chex.Array = array("BC")
    ref_logp_BC: chex.Array | None = array("BC", default=None)
    entropy_BC: chex.Array | None = array("BC", default=None)
    sampler_logp_BC: chex.Array | None = array("BC", default=None)
    router_logp_LBCX: chex.Array | None = array("LBCX", default=None)
    old_router_logp_LBCX: chex.Array | None = array("LBCX", default=None)


@flax.struct.dataclass
class Batch:
    """What one update of the policy needs, for B rows.

    tokens_BT, prompt_lengths_B, completion_lengths_B: the frames, as in `Rollout`
    inputs                       what the objective reads, but for what the learner is to compute from the frames
    old_routes_LBTX        int   experts that the policy of the rollout chose: what drift is measured against, and whose
                                 log-probs RSPO compares
    replayed_routes_LBTX   int   experts that run in the update in place of the routers' choices; None: these run
    old_router_logits_LBTE float32 logits of the rollout policy's routers, where the drift of routers is to be measured
                                 as a KL
    old_values_BC, returns_BC float32 the critic's values before the updates, and what it should have said (PPO)
    segments_BT            int   rows that hold several examples, one behind the other from column 0 on: which one a
                                 column is of, and it sees that one alone. The frame is then one of P = 1
    """

    tokens_BT: chex.Array = array("BT")
    prompt_lengths_B: chex.Array = array("B")
    completion_lengths_B: chex.Array = array("B")
    inputs: LossInputs
    old_routes_LBTX: chex.Array | None = array("LBTX", default=None)
    replayed_routes_LBTX: chex.Array | None = array("LBTX", default=None)
    old_router_logits_LBTE: chex.Array | None = array("LBTE", default=None)
    old_values_BC: chex.Array | None = array("BC", default=None)
    returns_BC: chex.Array | None = array("BC", default=None)
    segments_BT: chex.Array | None = array("BT", default=None)


@flax.struct.dataclass
class TrainState:
    """Everything an update changes. `step` counts optimizer updates; `ref_params` is None where nothing reads a
    reference; `entropy_coef` is the weight of the entropy bonus, float32, None where it is fixed (then it belongs to
    the objective); `critic` is the state of the value model, None for methods that compare completions with each other.
    `stale_params` are the parameters of the last rollouts, oldest first, from which a sampler that lags behind on
    purpose draws. `frozen` are the weights under low-rank adapters, which no update changes: then `params` are the
    adapters, as are those of the reference and the stale ones; None where the weights themselves are trained.
    """

    step: chex.Array
    params: Params
    opt_state: Any
    ref_params: Params | None = None
    entropy_coef: chex.Array | None = None
    critic: "TrainState | None" = None
    stale_params: tuple[Params, ...] = ()
    frozen: Params | None = None

    def full(self, params: Params) -> Params:
        """What the model is applied to, of parameters such as `params`."""
        return params if self.frozen is None else attached(self.frozen, params)

    @property
    def policy(self) -> Params:
        return self.full(self.params)

    @property
    def weights(self) -> Params:
        """Those of the model, without adapters."""
        return self.params if self.frozen is None else self.frozen

    @property
    def saved(self) -> "TrainState":
        """What a checkpoint holds: all but the frozen weights, which a run saves once."""
        return self.replace(frozen=None)


def attached(weights: Params, adapters: Params) -> Params:
    """One tree of weights and of the adapters of their blocks. Nothing is copied."""
    return {**weights, "blocks": {**weights["blocks"], LORA: adapters["blocks"]}}
