"""Config -> the jitted functions of one run, on a mesh: rollout, log-probs, update. What `gspo.rl` runs and
`gspo.report.aot` compiles.

Nothing here reads data: of the tokenizer only the ids that end a completion and pad it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from gspo import build
from gspo.data.tokenizer import Tokenizer
from gspo.learning.critic import Critic, make_critic_step, make_value_fn
from gspo.learning.learner import make_scorer, make_train_step
from gspo.learning.microbatch import minibatch
from gspo.learning.optim import make_optimizer
from gspo.model.distribution import Sampling
from gspo.model.transformer import Transformer
from gspo.objectives.compose import Objective
from gspo.parallel.sharding import Layout
from gspo.types import Batch, Params, Rollout, TrainState, UserError


class Steps(NamedTuple):
    layout: Layout
    model: Transformer
    objective: Objective
    settings: dict[str, Any]  # of the objective, defaults filled in
    sampling: Sampling
    rollout_params: Callable[[Params], Params]  # once per rollout: what the sampler reads
    sampler: Callable[..., Rollout]  # (params, prompt_QP, prompt_lengths_Q, key) ->
    scorer: Callable  # (params, tokens_BT, prompt_lengths_B, ...) -> Scores
    minibatches: Callable[[Batch], tuple[Batch, ...]]
    train_step: Callable  # (state, batch) -> (state, metrics)
    value_fn: Callable | None  # (critic params, tokens_BT, prompt_lengths_B) -> values_BC; None without a critic
    critic_step: Callable | None  # train_step's twin for state.critic
    learning_rate: Callable[[int], Any]
    init: Callable[[jax.Array], TrainState]
    abstract: TrainState


def make_steps(config: ConfigDict, layout: Layout, tokenizer: Tokenizer) -> Steps:
    """Raises UserError for settings that contradict each other, and for rows that the devices cannot share."""
    # ------------------------------------------------------------------ config
    objective, settings = build.objective(config)
    sampling = build.sampling(config)
    updates, replay = config.updates_per_rollout, config.router_replay.mode != "disabled"
    rows = config.num_prompts * config.num_generations // updates
    micro = build.micro_batch_size(config, rows, "a minibatch")
    build.check_rows(layout, num_prompts=config.num_prompts, minibatch_rows=micro or rows)

    # ------------------------------------------------------------------ model, state
    model = build.model(config, tokenizer, layout)
    routed = replay or "router_logp_LBCX" in objective.needs or config.log.router_kl
    routed = routed or config.router_aux_loss_coef > 0 or config.router_z_loss_coef > 0
    if routed and not model.spec.num_experts:
        raise UserError(
            "router_replay.mode, router_shift_floor, router_aux_loss_coef, router_z_loss_coef, log.router_kl: a "
            "dense model has no "
            "routers; switch them off"
        )
    optimizer, learning_rate = build.optimizer(config, total_steps=config.num_rollouts * updates)
    init, abstract = build.state_on_mesh(
        layout, model, optimizer, with_ref=build.needs_reference(config, objective), num_stale=config.mismatch.stale_rollouts,
        entropy_coef=None if config.entropy_target is None else settings["entropy_coef"],
    )  # fmt: skip
    value_fn = critic_step = None
    if config.critic.enable:
        build.positive(config, "critic.learning_rate", "critic.cliprange_value")
        critic = Critic(model.spec, layout)
        critic_optimizer = make_optimizer(learning_rate=config.critic.learning_rate)
        init, abstract = build.add_critic(layout, critic, critic_optimizer, init, abstract)
        value_fn = make_value_fn(critic, completion_width=config.max_completion_length, micro_batch_size=micro or rows)
        critic_step = make_critic_step(
            critic, critic_optimizer, cliprange_value=config.critic.cliprange_value, micro_batch_size=micro,
            state_shardings=build.shardings_of(layout, abstract.critic),
        )  # fmt: skip

    # ------------------------------------------------------------------ steps
    shared = {"sampling": sampling, "chunk": config.logp_chunk}
    kept = ("logp_BC", "routes_LBTX")
    kept += ("router_logits_LBTE",) if config.log.router_kl else ()
    kept += ("router_logp_LBCX",) if "old_router_logp_LBCX" in objective.needs else ()
    scorer = make_scorer(
        model, completion_width=config.max_completion_length, keep=kept, micro_batch_size=micro or rows, **shared
    )  # fmt: skip
    sampled = build.mismatched(config, model).clone(layout=build.rollout_layout(config, layout))
    train_step = make_train_step(
        model, optimizer, objective, micro_batch_size=micro, replay=replay, **shared,
        entropy_target=config.entropy_target, entropy_step=config.entropy_step,
        router_aux_loss_coef=config.router_aux_loss_coef, router_z_loss_coef=config.router_z_loss_coef,
        state_shardings=build.shardings_of(layout, abstract),
    )  # fmt: skip
    return Steps(
        layout, model, objective, settings, sampling,
        rollout_params=build.rollout_params(config, model, layout),
        sampler=build.sampler(config, sampled, tokenizer, sampling, config.num_generations),
        scorer=scorer,
        minibatches=jax.jit(lambda batch: tuple(layout.constrain_fields(minibatch(batch, j, updates)) for j in range(updates))),
        train_step=train_step, value_fn=value_fn, critic_step=critic_step, learning_rate=learning_rate, init=init, abstract=abstract,
    )  # fmt: skip
