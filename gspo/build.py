"""Config -> the parts of a run. The lowest floor that reads a config object; everything below takes plain arguments.

Each function reads its own fields and checks what can be wrong with them, so that a mistake is one line before anything
is compiled."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from gspo import objectives
from gspo.data import batches, rewards, tasks
from gspo.data.tokenizer import Tokenizer, make_tokenizer
from gspo.learning import mismatch
from gspo.learning.critic import Critic
from gspo.learning.optim import make_optimizer, make_schedule
from gspo.learning.sampler import as_used, make_sampler
from gspo.model.distribution import Sampling
from gspo.model.transformer import ModelSpec, Transformer
from gspo.objectives import presets
from gspo.parallel.sharding import ONE_DEVICE, Layout, indivisible, make_mesh, tree_shardings, with_shardings
from gspo.run.checkpoint import restore_params
from gspo.types import Params, TrainState, UserError


def positive(config: ConfigDict, *fields: str) -> None:
    """Raises UserError for the first of the (dotted) fields that is not > 0."""
    for field in fields:
        node: Any = config
        for name in field.split("."):
            node = node[name]
        if node <= 0:
            raise UserError(f"{field}={node}: must be positive")


def layout(config: ConfigDict, devices: list[jax.Device] | None = None) -> Layout:
    """Where everything lies: config.mesh over the devices (default: all), under config.mesh_rules."""
    return Layout(make_mesh(config.mesh.to_dict(), devices), config.mesh_rules, config.expert_dispatch)


def rollout_layout(config: ConfigDict, layout: Layout) -> Layout:
    """The same devices under config.rollout_mesh_rules and config.rollout_expert_dispatch; "": as in training."""
    rules, dispatch = config.rollout_mesh_rules or layout.rules, config.rollout_expert_dispatch or layout.dispatch
    try:
        return dataclasses.replace(layout, rules=rules, dispatch=dispatch)
    except UserError as error:
        text = (
            str(error)
            .replace("mesh_rules=", "rollout_mesh_rules=")
            .replace("expert_dispatch=", "rollout_expert_dispatch=")
        )
        raise UserError(text) from None


def tokenizer(config: ConfigDict) -> Tokenizer:
    return make_tokenizer(config.tokenizer)


def task(config: ConfigDict, split: str) -> tasks.Task:
    return tasks.make_task(config.task.name, split=split, seed=config.seed, **config.task.options.to_dict())


def prompt_source(config: ConfigDict, split: str, tokenizer: Tokenizer) -> batches.PromptSource:
    positive(config, "max_prompt_length", "max_completion_length")
    return batches.PromptSource(
        task(config, split),
        tokenizer,
        max_prompt_length=config.max_prompt_length,
        overlong_prompts=config.overlong_prompts,
        prompt_buckets=config.prompt_buckets,
        seed=config.seed,
    )


def demonstration_source(config: ConfigDict, tokenizer: Tokenizer) -> batches.DemonstrationSource:
    positive(config, "max_prompt_length", "max_completion_length", "batch_size", "num_updates")
    return batches.DemonstrationSource(
        task(config, config.task.train_split),
        tokenizer,
        max_prompt_length=config.max_prompt_length,
        max_completion_length=config.max_completion_length,
        overlong=config.overlong_prompts,
        seed=config.seed,
    )


def model(config: ConfigDict, tokenizer: Tokenizer, layout: Layout = ONE_DEVICE) -> Transformer:
    fields = config.model.to_dict()
    if 0 < fields["vocab_size"] < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size={fields['vocab_size']}: the tokenizer has {tokenizer.vocab_size} ids (0: as many as "
            "it has)"
        )
    fields["vocab_size"] = fields["vocab_size"] or tokenizer.vocab_size
    spec = ModelSpec(**fields)
    for axis, field in (("heads", "num_heads"), ("kv_heads", "num_kv_heads")):
        if fields[field] % layout.parts(axis):
            raise UserError(indivisible(layout, axis, f"model.{field}", fields[field]))
    return Transformer(spec, layout=layout)


def objective(config: ConfigDict) -> tuple[objectives.Objective, dict[str, Any]]:
    """The preset with the fields that the config sets itself laid over it; and all its settings, defaults filled in."""
    fields = config.objective.to_dict()
    settings = presets.settings(fields.pop("preset"), **fields)
    if settings["sampler_is"] and config.old_logps != "learner":
        raise UserError("objective.sampler_is: it corrects for sampler against learner; set old_logps='learner'")
    if config.entropy_target is not None:  # the adaptive bonus, part of the train step, takes the fixed one's place
        return objectives.make_objective(**settings | {"entropy_coef": 0.0}), settings
    return objectives.make_objective(**settings), settings


def reward_functions(config: ConfigDict, source: batches.PromptSource) -> dict[str, Callable]:
    """Name -> reward; "task" is the task's own."""
    if len(config.rewards) != len(config.reward_weights):
        raise UserError(
            f"reward_weights: {len(config.reward_weights)} weights for {len(config.rewards)} rewards; give one each"
        )
    known = {"task": source.task.reward} | rewards.REWARDS
    for name in config.rewards:
        if name not in known:
            raise UserError(f"rewards: no reward named {name!r}; choose from {', '.join(known)}")
    return {name: known[name] for name in config.rewards}


def optimizer(config: ConfigDict, total_steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW as config.optimizer says, and its learning rate as a function of the update."""
    fields = config.optimizer.to_dict()
    schedule = {name: fields[name] for name in ("learning_rate", "schedule", "warmup_steps")}
    return make_optimizer(total_steps=total_steps, **fields), make_schedule(total_steps=total_steps, **schedule)


def sampling(config: ConfigDict) -> Sampling:
    if config.temperature <= 0:
        raise UserError(
            f"temperature={config.temperature}: training needs a positive one; 0 (greedy) is for eval.temperature"
        )
    return Sampling(config.temperature, config.top_k, config.top_p, config.min_p)


def sampler(config: ConfigDict, model: Transformer, tokenizer: Tokenizer, sampling: Sampling, num_generations: int):
    return make_sampler(
        model,
        num_generations=num_generations,
        max_completion_length=config.max_completion_length,
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
        sampling=sampling,
    )


def mismatched(config: ConfigDict, model: Transformer) -> Transformer:
    """The model as the sampler runs it: the learner's, or one that differs on purpose (config.mismatch)."""
    m = config.mismatch
    if m.params not in mismatch.ROUNDINGS:
        raise UserError(f"mismatch.params={m.params!r}: choose one of {', '.join(mismatch.ROUNDINGS)}")
    if m.router_noise < 0 or not 0 <= m.expert_swap <= 1 or m.stale_rollouts < 0:
        raise UserError(
            "mismatch: router_noise and stale_rollouts must not be negative, and expert_swap lies in [0, 1]"
        )
    differs = m.params != "float32" or m.router_noise or m.expert_swap or m.stale_rollouts
    if differs and config.old_logps != "learner":
        raise UserError("mismatch: the sampler's log-probs are then not the old policy's; set old_logps='learner'")
    if (m.router_noise or m.expert_swap) and not model.spec.num_experts:
        raise UserError("mismatch.router_noise and mismatch.expert_swap: a dense model has no routers")
    if m.expert_swap and model.spec.experts_per_token == model.spec.num_experts:
        raise UserError("mismatch.expert_swap: all experts run, there is none to swap in")
    return model.clone(router_noise=m.router_noise, router_swap=m.expert_swap)


def rollout_params(config: ConfigDict, model: Transformer, layout: Layout) -> Callable[[Params], Params]:
    """Returns the map from the learner's parameters to those that rollouts read, applied once per rollout: in the dtype
    of the matmuls, and laid out by config.rollout_mesh_rules. The identity where that changes nothing.
    """
    dtype, target = model.spec.compute_dtype, rollout_layout(config, layout)
    if dtype == jnp.float32 and target.rules == layout.rules:
        return lambda params: params
    shardings = tree_shardings(target, jax.eval_shape(model.init_params, jax.random.key(0)))
    return jax.jit(lambda params: as_used(params, dtype), out_shardings=shardings)


def micro_batch_size(config: ConfigDict, rows: int, what: str) -> int:
    """config.micro_batch_size, checked against the rows of one update."""
    size = config.micro_batch_size
    if size < 0 or (size and rows % size):
        raise UserError(f"micro_batch_size={size}: must divide the {rows} rows of {what} (0: all at once)")
    return size


def check_rows(layout: Layout, **counts: int) -> None:
    """Raises UserError where rows cannot be cut evenly over the devices."""
    parts = layout.parts("rows")
    for field, rows in counts.items():
        if rows % parts:
            raise UserError(
                f"{field}={rows}: not divisible by the {parts} devices that share the rows (mesh data x fsdp x "
                "expert); "
                f"use a multiple of {parts}, or fewer devices"
            )
        owned: dict[int, set] = {}
        for device, index in layout.sharding("rows").devices_indices_map((rows,)).items():
            owned.setdefault(device.process_index, set()).add(index[0].indices(rows))
        if len({len(pieces) for pieces in owned.values()}) > 1:
            raise UserError(
                f"mesh: some processes own more of the rows ({field}={rows}) than others; choose sizes that fit the "
                "hosts"
            )


def needs_reference(config: ConfigDict, objective: objectives.Objective) -> bool:
    """Whether anything reads a reference policy; raises UserError where one is kept in step for nothing."""
    needed = "ref_logp_BC" in objective.needs or config.reward_kl_coef > 0
    if config.sync_ref_model:
        positive(config, "ref_model_sync_steps")
        if not needed:
            raise UserError("sync_ref_model: nothing reads the reference; set objective.beta or reward_kl_coef")
        if not 0 < config.ref_model_mixup_alpha <= 1:
            raise UserError(f"ref_model_mixup_alpha={config.ref_model_mixup_alpha}: must be in (0, 1]")
    return needed


def state_on_mesh(
    layout: Layout,
    model: Transformer | Critic,
    optimizer: optax.GradientTransformation,
    *,
    with_ref: bool = False,
    entropy_coef: float | None = None,
    num_stale: int = 0,
) -> tuple[Callable[[jax.Array], TrainState], TrainState]:
    """Returns (init, abstract): a jitted `init(key) -> TrainState` whose arrays are born on their devices, never whole
    on one; and the same state as ShapeDtypeStructs with shardings, which a checkpoint is restored into.
    """
    boxed = jax.eval_shape(model.init_params, jax.random.key(0))
    param_shardings = tree_shardings(layout, boxed)

    def init(key) -> TrainState:
        params = nn.unbox(model.init_params(key))
        coef = None if entropy_coef is None else jnp.float32(entropy_coef)
        ref_params, stale_params = params if with_ref else None, (params,) * num_stale
        return TrainState(jnp.int32(0), params, optimizer.init(params), ref_params, coef, stale_params=stale_params)

    shapes = jax.eval_shape(init, jax.random.key(0))
    everywhere = layout.sharding()
    shardings = TrainState(
        step=everywhere,
        params=param_shardings,
        opt_state=optax.tree_utils.tree_map_params(
            optimizer,
            lambda _, sharding: sharding,
            shapes.opt_state,
            param_shardings,
            transform_non_params=lambda _: everywhere,
        ),
        ref_params=param_shardings if with_ref else None,
        entropy_coef=None if entropy_coef is None else everywhere,
        stale_params=(param_shardings,) * num_stale,
    )
    return jax.jit(init, out_shardings=shardings), with_shardings(shapes, shardings)


def add_critic(
    layout: Layout,
    critic: Critic,
    optimizer: optax.GradientTransformation,
    init: Callable[[jax.Array], TrainState],
    abstract: TrainState,
) -> tuple[Callable[[jax.Array], TrainState], TrainState]:
    """The (init, abstract) of `state_on_mesh`, with the state of a critic in it."""
    critic_init, critic_abstract = state_on_mesh(layout, critic, optimizer)
    return lambda key: init(key).replace(critic=critic_init(jax.random.fold_in(key, 1))), abstract.replace(
        critic=critic_abstract
    )


def shardings_of(layout: Layout, abstract: TrainState) -> TrainState | None:
    """Where each array of the state lies, for `make_train_step`; None on one device."""
    return jax.tree.map(lambda x: x.sharding, abstract) if layout.several else None


def initial_state(config: ConfigDict, init: Callable[[jax.Array], TrainState], abstract: TrainState) -> TrainState:
    """A fresh state; with config.init_from, the parameters of that run, for the policy, the reference and the body of
    the critic."""
    state = init(jax.random.fold_in(jax.random.key(config.seed), 0))
    if not config.init_from:
        return state
    _, params = restore_params(config.init_from, abstract.params)
    ref_params = None if state.ref_params is None else copy_tree(params)
    critic = state.critic
    if critic is not None:
        body = {name: copy_tree(params[name]) for name in critic.params["body"]}
        critic = critic.replace(params=critic.params | {"body": body})
    stale_params = tuple(copy_tree(params) for _ in state.stale_params)
    return state.replace(params=params, ref_params=ref_params, critic=critic, stale_params=stale_params)


def copy_tree(params: Params) -> Params:
    """A tree of its own buffers: the train step donates the policy's."""
    return jax.tree.map(jnp.copy, params)


def describe_layout(config: ConfigDict, layout: Layout) -> str:
    """One line for the log: devices, processes, and what is cut along what."""
    sizes = " x ".join(f"{axis}={size}" for axis, size in layout.mesh.shape.items() if size > 1)
    experts = (
        f", experts by {layout.dispatch} in groups of {layout.parts('expert')}" if layout.parts("expert") > 1 else ""
    )
    rules = (
        f"{layout.rules!r}, rollouts {config.rollout_mesh_rules!r}" if config.rollout_mesh_rules else repr(layout.rules)
    )
    if config.rollout_expert_dispatch:
        experts += f", in rollouts by {config.rollout_expert_dispatch}"
    return f"{layout.mesh.size} devices in {jax.process_count()} process(es), mesh {sizes}, rules {rules}{experts}"


def describe(model: Transformer, abstract: TrainState) -> str:
    """One line for the log: size of the model."""
    sizes = {path: leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(abstract.params)}
    total, spec = sum(sizes.values()), model.spec
    if not spec.num_experts:
        return f"dense model, {spec.num_layers} layers, {total:,} parameters"
    expert = sum(
        size for path, size in sizes.items() if jax.tree_util.keystr(path[-1:]).strip("[']") in ("gate", "up", "down")
    )
    active = total - expert + expert * spec.experts_per_token // spec.num_experts
    return (
        f"MoE model, {spec.num_layers} layers, {spec.num_experts} experts of which {spec.experts_per_token} run, "
        f"{total:,} parameters, {active:,} active"
    )
