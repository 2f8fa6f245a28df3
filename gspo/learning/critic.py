"""The value model of PPO: a decoder of the policy's shape with one number per position instead of logits.

V(x, y_<t) is read at the column that predicts token t, so values, log-probs and advantages share the frame of
completions. Read at the last token of a completion, the same module is a reward model (`gspo.learning.rewards`)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from gspo.checks import need, positive
from gspo.learning.learner import jit_update
from gspo.learning.microbatch import accumulated_gradient, merge_rows, num_parts, split_rows
from gspo.masked import Mean, Metrics, masked_mean, over_updates
from gspo.model.packing import Packing
from gspo.model.spec import ModelSpec
from gspo.model.transformer import Transformer
from gspo.objectives.advantages import clipped_value_loss
from gspo.parallel.sharding import ONE_DEVICE, Layout
from gspo.types import Batch, Params, TrainState, array

POLICY_WEIGHTS = "policy"  # of CriticPlan.init_from


@dataclasses.dataclass(frozen=True)
class CriticPlan:
    """The value model of PPO, how it is trained, and how advantages are taken from it.

    init_from        "policy": the body begins with the policy's first weights; "": with random ones; else the folder of
                     a run of a policy, whose body it takes, or of a reward model, whose last layer it takes as well
    warmup_rollouts  the first so many rollouts update the critic alone
    warmup_steps, weight_decay, max_grad_norm: of its optimizer; None: as the policy's
    model            fields of its ModelSpec, where those are not the policy's
    """

    learning_rate: float
    cliprange_value: float
    gamma: float
    lam: float
    init_from: str = POLICY_WEIGHTS
    warmup_rollouts: int = 0
    warmup_steps: int | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    model: Mapping[str, Any] | None = None

    def __post_init__(self):
        positive(self, "learning_rate", "cliprange_value", under="critic.")
        for name in ("gamma", "lam"):
            value = getattr(self, name)
            need(0 <= value <= 1, f"critic.{name}", value, "must lie in [0, 1]")

    @property
    def optimizer_changes(self) -> dict[str, Any]:
        """The fields in which its optimizer is not the policy's."""
        names = ("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class Critic(nn.Module):
    """tokens -> values [B, T] float32. The last layer starts at zero: an untrained critic expects nothing, and PPO is
    REINFORCE."""

    spec: ModelSpec
    layout: Layout = ONE_DEVICE

    def setup(self):
        # Tied: no head of its own, which nothing would read.
        self.body = Transformer(dataclasses.replace(self.spec, tie_embeddings=True), layout=self.layout)
        self.value = self.param(
            "value", nn.with_partitioning(nn.initializers.zeros, ("embed",)), (self.spec.d_model,), jnp.float32
        )

    def __call__(self, tokens_BT: chex.Array, first_B: chex.Array, *, packing: Packing | None = None) -> chex.Array:
        """packing: as of `Transformer`."""
        value_D = self.layout.gathered(self.value, "embed")
        return self.body(tokens_BT, first_B, packing=packing).hidden_BTD.astype(jnp.float32) @ value_D

    def init_params(self, key: chex.PRNGKey) -> Any:
        """Parameters boxed with their logical axis names, as those of the policy."""
        return self.clone(layout=ONE_DEVICE).init(key, jnp.zeros((1, 1), jnp.int32), jnp.zeros((1,), jnp.int32))[
            "params"
        ]


@flax.struct.dataclass
class Values:
    values_BC: chex.Array = array("BC")


def completion_values(
    critic: Critic, params: Params, tokens_BT: chex.Array, prompt_lengths_B: chex.Array, width: int
) -> Values:
    """The value before each of the `width` completion columns."""
    T = tokens_BT.shape[1]
    values_BT = critic.apply({"params": params}, tokens_BT, T - width - prompt_lengths_B)
    return Values(values_BT[:, T - width - 1 : T - 1])


def make_value_fn(critic: Critic, *, completion_width: int, micro_batch_size: int = 0) -> Callable[..., chex.Array]:
    """Returns jitted `values(params, tokens_BT, prompt_lengths_B) -> [B, C]`."""

    def values(params, tokens_BT, prompt_lengths_B):
        parts = num_parts(tokens_BT.shape[0], micro_batch_size)
        rows = (split_rows(tokens_BT, parts), split_rows(prompt_lengths_B, parts))
        return merge_rows(
            jax.lax.map(lambda row: completion_values(critic, params, *row, completion_width).values_BC, rows)
        )

    return jax.jit(values)


def make_critic_step(
    critic: Critic,
    optimizer: optax.GradientTransformation,
    *,
    cliprange_value: float,
    micro_batch_size: int = 0,
    state_shardings: TrainState | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns jitted `critic_step(state, batch) -> (state, metrics)` on batch.returns_BC and batch.old_values_BC; the
    state is donated.

    The loss is the clipped value loss, a mean over tokens (PPO; verl's `cliprange_value`). state_shardings: as in
    `make_train_step`."""

    def loss_of_part(params, part: Batch):
        scores = completion_values(critic, params, part.tokens_BT, part.prompt_lengths_B, part.inputs.mask_BC.shape[1])
        loss_BC = clipped_value_loss(scores.values_BC, part.old_values_BC, part.returns_BC, cliprange=cliprange_value)
        loss = masked_mean(loss_BC, part.inputs.mask_BC)
        return loss.total, (loss.count, scores)

    def critic_step(state: TrainState, batch: Batch):
        shardings = None if state_shardings is None else state_shardings.params
        grads, scores = accumulated_gradient(loss_of_part, state.params, batch, micro_batch_size, shardings)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        mask_BC, error_BC = batch.inputs.mask_BC, batch.returns_BC - scores.values_BC
        squared = masked_mean(jnp.square(error_BC), mask_BC)
        mean, mean_square = (masked_mean(x, mask_BC).value for x in (batch.returns_BC, jnp.square(batch.returns_BC)))
        variance = jnp.maximum(mean_square - mean**2, 1e-8)
        metrics = {
            "critic/loss": Mean(squared.total / 2, squared.count),
            "critic/value_mean": masked_mean(scores.values_BC, mask_BC),
            "critic/explained_variance": over_updates(1 - squared.value / variance),
            "critic/grad_norm": over_updates(optax.global_norm(grads)),
        }
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return jit_update(jax.named_scope("update")(critic_step), state_shardings)
