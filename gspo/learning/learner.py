"""The one jitted update that every algorithm here shares.

It knows nothing of GRPO or GSPO: it scores the completions, hands the arrays to an objective, and follows the gradient.
What is swapped is the objective (`gspo.objectives`); supervised fine-tuning is one more of them.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from gspo.checks import not_negative
from gspo.learning.drift import router_metrics
from gspo.learning.microbatch import accumulated_gradient
from gspo.learning.scores import Scores, router_logp, score_completions
from gspo.masked import Metrics, masked_mean, over_updates
from gspo.model.distribution import Sampling
from gspo.model.routing import balance_loss, router_kl, z_loss
from gspo.model.transformer import Transformer
from gspo.objectives import Loss
from gspo.types import Batch, LossInputs, Params, TrainState, UserError


@dataclasses.dataclass(frozen=True)
class UpdatePlan:
    """How an update is made, whatever its objective.

    micro_batch_size: rows per forward and backward pass (0: all). The gradient does not depend on it: sums are
    accumulated, and divided once by the summed count. chunk: columns whose token logits exist at a time.
    share_prompts: whether the prompt of a group runs once, forward and backward, or with each of its completions.

    entropy_target (nats per token): with state.entropy_coef, an adaptive entropy bonus. The coefficient rises by
    entropy_step after an update that saw less entropy than the target and falls, not below 0, after one that saw more.
    Skywork-OR1 (2505.22312) §4.

    router_aux_loss_coef, router_z_loss_coef: weights of the routers' load-balance and z losses over completion tokens,
    means over rows.
    """

    micro_batch_size: int = 0
    chunk: int = 128
    share_prompts: bool = True
    entropy_target: float | None = None
    entropy_step: float = 0.0
    router_aux_loss_coef: float = 0.0
    router_z_loss_coef: float = 0.0

    def __post_init__(self):
        if self.chunk <= 0:
            raise UserError(f"logp_chunk={self.chunk}: must be positive")
        not_negative(self, "router_aux_loss_coef", "router_z_loss_coef", off="no such loss")
        not_negative(self, "entropy_step", off="the coefficient stays as it is")

    def check_rows(self, rows: int, what: str) -> None:
        """Raises UserError unless `rows`, those of one update, come out even."""
        size = self.micro_batch_size
        if size < 0 or (size and rows % size):
            raise UserError(f"micro_batch_size={size}: must divide the {rows} rows of {what} (0: all at once)")

    @property
    def router_losses(self) -> bool:
        return self.router_aux_loss_coef > 0 or self.router_z_loss_coef > 0


@dataclasses.dataclass(frozen=True, eq=False)
class Update:
    """The parts of an update: what is trained, by which optimizer, towards what, and how. sampling: how the sampler
    shapes the distribution whose log-probs are taken. shardings: a TrainState of them, where the new state lies; None
    on one device. rows_per_prompt: as in `score_completions`."""

    model: Transformer
    optimizer: optax.GradientTransformation
    objective: Loss
    plan: UpdatePlan
    sampling: Sampling
    shardings: TrainState | None = None
    rows_per_prompt: int = 1


def make_train_step(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    objective: Loss,
    plan: UpdatePlan = UpdatePlan(),
    *,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    state_shardings: TrainState | None = None,
    rows_per_prompt: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns jitted `train_step(state, batch) -> (state, metrics)`; the given state is donated.

    The experts in batch.replayed_routes_LBTX, where there are any, run instead of the routers' choices. With or without
    replay, the routers' free choices are compared with batch.old_routes_LBTX.

    state_shardings: a TrainState of shardings, where the new state lies. Without it the partitioner may move arrays
    (norm scales onto the fsdp axis, say), and every function that is called with the state is compiled a second time.
    None on one device. rows_per_prompt: so many neighbours of a batch have their prompt in common, which then runs
    once."""
    update = Update(model, optimizer, objective, plan, sampling, state_shardings, rows_per_prompt)
    return jit_update(partial(train_step, update), state_shardings)


@jax.named_scope("update")
def train_step(update: Update, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """One update: scores, gradient, optimizer, metrics."""
    objective, plan, inputs = update.objective, update.plan, batch.inputs
    grads, scores = gradient_of(update, state, batch)
    with jax.named_scope("optimizer"):
        updates, opt_state = update.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    new_state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
    # Metrics see the whole minibatch at once, outside the gradient: exact under any split into micro-batches.
    _, metrics = objective(inputs_of(scores, batch))
    metrics = metrics | {"grad_norm": over_updates(optax.global_norm(grads))}
    if plan.entropy_target is not None:
        coef = _adapted(plan, state.entropy_coef, masked_mean(scores.entropy_BC, inputs.mask_BC).value)
        new_state = new_state.replace(entropy_coef=coef)
        metrics["entropy_coef"] = over_updates(coef)
    if scores.free_routes_LBTX is not None:
        metrics |= router_metrics(update.model.spec.num_experts, scores, batch)
    return new_state, metrics


def gradient_of(update: Update, state: TrainState, batch: Batch) -> tuple[Params, Scores]:
    """The gradient of the objective at state.params, and the scores of all rows: what an update follows."""
    of_part = partial(
        loss_of_part, update, entropy_coef=state.entropy_coef, count_per_row=_count_per_row(update, batch.inputs)
    )
    loss_fn = lambda params, part: of_part(state.full(params), part)  # noqa: E731
    shardings = None if update.shardings is None else update.shardings.params
    size = update.plan.micro_batch_size
    return accumulated_gradient(loss_fn, state.params, batch, size, shardings, update.rows_per_prompt)


def loss_of_part(
    update: Update, params: Params, part: Batch, *, entropy_coef: chex.Array | None, count_per_row: chex.Array
) -> tuple[chex.Array, tuple[chex.Array, Scores]]:
    """(sum of the loss over the rows of a micro-batch, (its count, the scores)), for `accumulated_gradient`."""
    objective, plan = update.objective, update.plan
    scores = score_completions(
        update.model,
        params,
        part.tokens_BT,
        part.prompt_lengths_B,
        part.inputs.mask_BC.shape[1],
        sampling=update.sampling,
        chunk=plan.chunk,
        replayed_routes_LBTX=part.replayed_routes_LBTX,
        rows_per_prompt=update.rows_per_prompt,
        segments_BT=part.segments_BT,
    )
    scores = beside_old_routers(scores, part, "router_logp_LBCX" in objective.needs)
    with jax.named_scope("loss"):
        loss, _ = objective(inputs_of(scores, part))
        total = loss.total
        if plan.entropy_target is not None:
            total -= entropy_coef * objective.aggregate(scores.entropy_BC, part.inputs.mask_BC).total
        if plan.router_losses:
            scores = with_router_losses(scores, part)
            losses_B = plan.router_aux_loss_coef * scores.balance_B + plan.router_z_loss_coef * scores.z_loss_B
            total += count_per_row * jnp.sum(losses_B)
    return total, (loss.count, scores.replace(router_logits_LBTE=None))


def inputs_of(scores: Scores, batch: Batch) -> LossInputs:
    """The arrays of the objective: those of the batch, and what the learner has computed."""
    return batch.inputs.replace(
        logp_BC=scores.logp_BC, entropy_BC=scores.entropy_BC, router_logp_LBCX=scores.router_logp_LBCX
    )


def beside_old_routers(scores: Scores, part: Batch, with_logp: bool) -> Scores:
    """Scores with what is said of the routers against those of the rollout: with_logp, the log-probs of the experts
    that these chose; and the KL from them, where their logits are known."""
    logp_LBCX = kl_LBT = None
    if with_logp:
        logp_LBCX = router_logp(scores.router_logits_LBTE, part.old_routes_LBTX, part.inputs.mask_BC.shape[1])
    if part.old_router_logits_LBTE is not None and scores.router_logits_LBTE is not None:
        kl_LBT = router_kl(part.old_router_logits_LBTE, scores.router_logits_LBTE)
    return scores.replace(router_logp_LBCX=logp_LBCX, router_kl_LBT=kl_LBT)


def _count_per_row(update: Update, inputs: LossInputs) -> chex.Array | float:
    """What the loss will be divided by, per row: a mean over rows stays one, whatever the objective's aggregation
    counts. 0 where no loss needs it."""
    if not update.plan.router_losses:
        return 0.0
    count = update.objective.aggregate(jnp.zeros_like(inputs.old_logp_BC), inputs.mask_BC).count
    return count / jnp.maximum(jnp.sum(jnp.any(inputs.mask_BC, axis=1)), 1)


def _adapted(plan: UpdatePlan, coef: chex.Array, entropy: chex.Array) -> chex.Array:
    """The entropy coefficient after an update that saw this entropy."""
    step = jnp.where(entropy < plan.entropy_target, plan.entropy_step, -plan.entropy_step)
    return jnp.maximum(coef + step, 0.0)


def with_router_losses(scores: Scores, part: Batch) -> Scores:
    """Scores with the load-balance and z losses of each row's completion tokens."""
    mask_BC = part.inputs.mask_BC
    mask_BT = jnp.pad(mask_BC, ((0, 0), (part.tokens_BT.shape[1] - mask_BC.shape[1], 0)))
    balance_B = balance_loss(scores.router_logits_LBTE, scores.free_routes_LBTX, mask_BT)
    return scores.replace(balance_B=balance_B, z_loss_B=z_loss(scores.router_logits_LBTE, mask_BT))


def jit_update(step: Callable, state_shardings: Any | None) -> Callable:
    """jit of (state, batch) -> (state, metrics): the state is donated and stays where it lies, metrics are whole on
    every device."""
    if state_shardings is None:
        return jax.jit(step, donate_argnums=0)
    everywhere = NamedSharding(jax.tree.leaves(state_shardings)[0].mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, everywhere))


def make_ref_sync(mixup_alpha: float) -> Callable[[Params, Params], Params]:
    """Returns jitted `sync(params, ref_params)`: π_ref <- α π_θ + (1 - α) π_ref, in parameters. TR-DPO (2404.09656),
    TRL's names."""
    return jax.jit(lambda params, ref: jax.tree.map(lambda p, r: mixup_alpha * p + (1 - mixup_alpha) * r, params, ref))
