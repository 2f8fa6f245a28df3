"""Plans -> the jitted functions of one run, on a mesh: rollout, log-probs, update. What `gspo.rl` runs and
`gspo.report.aot` compiles.

Nothing here reads data: of the tokenizer only the ids that end a completion and pad it.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gspo import plans
from gspo.critic_source import critic_spec, first_params
from gspo.data.tokenizer import Tokenizer
from gspo.held import keep_reference
from gspo.learning.critic import Critic, make_critic_step, make_value_fn
from gspo.learning.learner import make_train_step
from gspo.learning.microbatch import minibatch, shared_rows, shuffled_units
from gspo.learning.optim import make_optimizer, make_schedule
from gspo.learning.sampler import in_compute_dtype, make_sampler
from gspo.learning.scores import make_scorer
from gspo.learning.state import Start, add_critic, shardings_of, state_on_mesh
from gspo.model.adapters import LoRA, merged_params
from gspo.model.distribution import Sampling
from gspo.model.experts import chosen_backend
from gspo.model.spec import ModelSpec
from gspo.model.transformer import Transformer, param_shardings
from gspo.objectives import Objective, make_objective
from gspo.parallel.sharding import ONE_DEVICE, Layout, indivisible, make_mesh
from gspo.run.checkpoint import Check, restore_params
from gspo.types import Batch, Params, Rollout, TrainState, UserError

RECORDED = ("logp_BC", "entropy_BC", "free_routes_LBTX", "margin_LBT")  # of `Scores`, in records of tokens

# ---------------------------------------------------------------------------- parts of a run


def make_layout(plan: plans.MeshPlan, devices: list[jax.Device] | None = None) -> Layout:
    """Where everything lies: the planned sizes over the devices (default: all)."""
    return Layout(make_mesh(plan.sizes, devices), plan.rules, plan.dispatch)


def make_rollout_layout(plan: plans.MeshPlan, layout: Layout) -> Layout:
    """The same devices under the rules and the dispatch of rollouts."""
    rules, dispatch = plan.rollout_rules or layout.rules, plan.rollout_dispatch or layout.dispatch
    try:
        return dataclasses.replace(layout, rules=rules, dispatch=dispatch)
    except UserError as error:
        text = str(error).replace("mesh_rules=", "rollout_mesh_rules=")
        raise UserError(text.replace("expert_dispatch=", "rollout_expert_dispatch=")) from None


def make_model(
    plan: plans.ModelPlan, tokenizer: Tokenizer, layout: Layout = ONE_DEVICE, lora: LoRA | None = None
) -> Transformer:
    spec = plan.spec(tokenizer.vocab_size)
    check_heads(layout, spec)
    return Transformer(spec, layout=layout, adapter_scale=lora and lora.scale)


def check_heads(layout: Layout, spec: ModelSpec, whose: str = "") -> None:
    """Raises UserError where heads cannot be cut evenly over the devices. whose: what the field's name begins with."""
    for axis, heads in (("heads", spec.num_heads), ("kv_heads", spec.num_kv_heads)):
        if heads % layout.parts(axis):
            raise UserError(indivisible(layout, axis, f"{whose}model.num_{axis}", heads))


def rows_per_prompt_of(plan: plans.RLPlan, layout: Layout) -> int:
    """So many neighbouring rows have their prompt in common, which runs once for them."""
    sharing = plan.rollout.num_generations if plan.update.share_prompts else 1
    return shared_rows(plan.rows_at_a_time, layout.parts("rows"), sharing)


def optimizer_of(plan: plans.OptimizerPlan) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW, and its learning rate as a function of the update."""
    fields, steps = plan.fields, plan.total_steps
    schedule = {name: fields[name] for name in ("learning_rate", "schedule", "warmup_steps")}
    return make_optimizer(total_steps=steps, **fields), make_schedule(total_steps=steps, **schedule)


def sampler_of(
    model: Transformer,
    data: plans.DataPlan,
    tokenizer: Tokenizer,
    sampling: Sampling,
    num_generations: int,
    max_num_seqs: int,
):
    return make_sampler(
        model,
        num_generations=num_generations,
        max_completion_length=data.max_completion_length,
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
        sampling=sampling,
        max_num_seqs=max_num_seqs,
    )


def make_rollout_params(plan: plans.MeshPlan, model: Transformer) -> Callable[[Params], Params]:
    """Returns the map from the learner's parameters to those that rollouts read, applied once per rollout: adapters
    merged, in the dtype of the matmuls, and laid out by the rules of rollouts. The identity where that changes nothing.
    """
    dtype, layout, target = model.spec.compute_dtype, model.layout, make_rollout_layout(plan, model.layout)
    scale = model.adapter_scale
    if dtype == jnp.float32 and target.rules == layout.rules and scale is None:
        return lambda params: params
    moved = lambda params: in_compute_dtype(merged_params(params, scale), dtype)  # noqa: E731
    return jax.jit(moved, out_shardings=param_shardings(model, target))


def check_rows(layout: Layout, **counts: int) -> None:
    """Raises UserError where rows cannot be cut evenly over the devices."""
    parts = layout.parts("rows")
    for field, rows in counts.items():
        if rows % parts:
            raise UserError(
                f"{field}={rows}: not divisible by the {parts} devices that share the rows (mesh data x fsdp x "
                f"expert); use a multiple of {parts}, or fewer devices"
            )
        owned: dict[int, set] = {}
        for device, index in layout.sharding("rows").devices_indices_map((rows,)).items():
            owned.setdefault(device.process_index, set()).add(index[0].indices(rows))
        if len({len(pieces) for pieces in owned.values()}) > 1:
            raise UserError(
                f"mesh: some processes own more of the rows ({field}={rows}) than others; choose sizes that fit the "
                "hosts"
            )


# ---------------------------------------------------------------------------- the steps of reinforcement learning


class Steps(NamedTuple):
    layout: Layout
    model: Transformer
    objective: Objective
    sampling: Sampling
    rollout_params: Callable[[Params], Params]  # once per rollout: what the sampler reads
    sampler: Callable[..., Rollout]  # (params, prompt_QP, prompt_lengths_Q, key) ->
    scorer: Callable  # (params, tokens_BT, prompt_lengths_B, ...) -> Scores
    recorder: Callable | None  # a scorer of minibatches for records of tokens; None where none is written
    minibatches: Callable[[Batch], tuple[Batch, ...]]
    reshuffled: Callable[[Batch, jax.Array], Batch]  # by a key: its rows in another order, for one more pass over them
    train_step: Callable  # (state, batch) -> (state, metrics)
    value_fn: Callable | None  # (critic params, tokens_BT, prompt_lengths_B) -> values_BC; None without a critic
    critic_step: Callable | None  # train_step's twin for state.critic
    measure: Callable | None  # (state, batch) -> metrics of the update that train_step would make; None: never wanted
    learning_rate: optax.Schedule
    start: Start
    notes: tuple[str, ...]  # lines for the log: what was chosen for the user

    @property
    def abstract(self) -> TrainState:
        return self.start.abstract


def make_steps(plan: plans.RLPlan, layout: Layout, tokenizer: Tokenizer) -> Steps:
    """Raises UserError for rows that the devices cannot share."""
    # ------------------------------------------------------------------ plan
    objective = objective_of(plan)
    updates, rows_at_a_time = plan.updates_per_rollout, plan.rows_at_a_time
    check_rows(layout, num_prompts=plan.rollout.num_prompts, minibatch_rows=rows_at_a_time)
    rows_per_prompt = rows_per_prompt_of(plan, layout)

    # ------------------------------------------------------------------ model, state
    model = make_model(plan.model, tokenizer, layout, plan.lora)
    optimizer, learning_rate = optimizer_of(plan.optimizer)
    start = state_on_mesh(
        layout,
        model,
        optimizer,
        lora=plan.lora,
        with_ref=plan.needs_reference,
        num_stale=plan.rollout.stale_rollouts,
        entropy_coef=None if plan.update.entropy_target is None else plan.objective["entropy_coef"],
    )
    start = keep_reference(start, plan.reference.storage)
    start, value_fn, critic_step = _with_critic(plan, layout, model, start, tokenizer)

    # ------------------------------------------------------------------ steps
    sampled = model.clone(
        layout=make_rollout_layout(plan.mesh, layout),
        router_noise=plan.rollout.router_noise,
        router_swap=plan.rollout.expert_swap,
    )
    seen = start.abstract.replace(ref_params=None) if plan.reference.storage.offload else start.abstract
    train_step = make_train_step(
        model,
        optimizer,
        objective,
        plan.update,
        sampling=plan.rollout.sampling,
        state_shardings=shardings_of(layout, seen),
        rows_per_prompt=rows_per_prompt,
    )
    if plan.reference.storage.offload:
        train_step = _beside_reference(train_step)

    scoring = _scoring(plan, model, rows_at_a_time, rows_per_prompt)
    minibatches, reshuffled = _cut_and_shuffle(layout, updates, rows_per_prompt)
    return Steps(
        layout=layout,
        model=model,
        objective=objective,
        sampling=plan.rollout.sampling,
        rollout_params=make_rollout_params(plan.mesh, model),
        sampler=sampler_of(sampled, plan.data, tokenizer, *plan.rollout.drawn),
        scorer=scoring(keep=_kept_scores(plan, objective)),
        recorder=scoring(keep=RECORDED) if plan.log.tokens_every else None,
        minibatches=minibatches,
        reshuffled=reshuffled,
        train_step=train_step,
        value_fn=value_fn,
        critic_step=critic_step,
        measure=jax.jit(lambda state, batch: train_step(state, batch)[1]) if plan.critic_warmup else None,
        learning_rate=learning_rate,
        start=start,
        notes=_chosen_experts(plan, model.spec, layout.parts("rows"), rows_per_prompt),
    )


def _beside_reference(train_step: Callable) -> Callable:
    """train_step for states whose reference lies in the host's memory, where it stays: no update reads it."""

    def step(state: TrainState, batch: Batch):
        new, metrics = train_step(state.replace(ref_params=None), batch)
        return new.replace(ref_params=state.ref_params), metrics

    return step


def _with_critic(
    plan: plans.RLPlan, layout: Layout, model: Transformer, start: Start, tokenizer: Tokenizer
) -> tuple[Start, Callable | None, Callable | None]:
    """The start of the policy and its critic, Steps.value_fn and Steps.critic_step; without a critic, the start as it
    is, and None."""
    if not plan.critic:
        return start, None, None
    spec, width = critic_spec(plan.critic, model.spec), plan.data.max_completion_length
    check_heads(layout, spec, whose="critic's ")
    critic = Critic(spec, layout)
    # Its schedule counts its own updates, which begin with the first rollout.
    fields = {**plan.optimizer.fields, **plan.critic.optimizer_changes}
    try:
        optimizer, _ = optimizer_of(plans.OptimizerPlan(fields, plan.num_rollouts * plan.updates))
        start = add_critic(layout, critic, optimizer, start, first_params(plan.critic, critic, tokenizer))
    except UserError as error:
        raise UserError(f"critic: {error}") from None
    step = make_critic_step(
        critic,
        optimizer,
        cliprange_value=plan.critic.cliprange_value,
        micro_batch_size=plan.update.micro_batch_size,
        state_shardings=shardings_of(layout, start.abstract.critic),
    )
    return start, make_value_fn(critic, completion_width=width, micro_batch_size=plan.rows_at_a_time), step


def _cut_and_shuffle(layout: Layout, updates: int, rows_per_prompt: int) -> tuple[Callable, Callable]:
    """Steps.minibatches and Steps.reshuffled. Rows that have their prompt in common stay neighbours in both."""

    def minibatches(batch: Batch) -> tuple[Batch, ...]:
        return tuple(layout.constrain_fields(minibatch(batch, j, updates)) for j in range(updates))

    def reshuffled(batch: Batch, key: jax.Array) -> Batch:
        return layout.constrain_fields(shuffled_units(batch, key, rows_per_prompt))

    return jax.jit(minibatches), jax.jit(reshuffled)


def _scoring(plan: plans.RLPlan, model: Transformer, rows_at_a_time: int, rows_per_prompt: int) -> Callable:
    """`make_scorer` for this run, but for what is kept of the scores."""
    return partial(
        make_scorer,
        model,
        completion_width=plan.data.max_completion_length,
        micro_batch_size=rows_at_a_time,
        rows_per_prompt=rows_per_prompt,
        sampling=plan.rollout.sampling,
        chunk=plan.update.chunk,
    )


def _chosen_experts(plan: plans.RLPlan, spec: ModelSpec, devices: int, rows_per_prompt: int) -> tuple[str, ...]:
    """A line on what moe_backend "auto" stands for, with the tokens that a device has at a time."""
    if not spec.num_experts or spec.moe_backend != "auto":
        return ()
    rows = plan.rows_at_a_time
    frames = rows * plan.data.max_completion_length + rows // rows_per_prompt * plan.data.max_prompt_length
    sizes = (spec.num_experts, spec.d_model, spec.d_expert)
    found = [
        f"{chosen_backend(tokens // devices * spec.experts_per_token, *sizes)!r} in {where}"
        for where, tokens in (("updates", frames), ("decoding", plan.rollout.rows))
    ]
    return (f"model.moe_backend: {', '.join(found)}",)


def objective_settings(plan: plans.RLPlan) -> dict[str, Any]:
    """The adaptive entropy bonus, part of the train step, takes the place of the fixed one."""
    adaptive = {} if plan.update.entropy_target is None else {"entropy_coef": 0.0}
    return {**plan.objective, **adaptive}


def objective_of(plan: plans.RLPlan) -> Objective:
    return make_objective(**objective_settings(plan))


def _kept_scores(plan: plans.RLPlan, objective: Objective) -> tuple[str, ...]:
    """What of the old policy's scores a rollout is remembered by."""
    kept = ("logp_BC", "free_routes_LBTX")
    kept += ("router_logits_LBTE",) if plan.experience.router_kl else ()
    return kept + (("router_logp_LBCX",) if "old_router_logp_LBCX" in objective.needs else ())


# ---------------------------------------------------------------------------- the state they begin with


def initial_state(plan: plans.RunPlan, start: Start, check: Check | None = None) -> TrainState:
    """A fresh state; with init_from, one that begins with the parameters of that run, of which there is never a second
    copy beside random ones. check: what compares them with the model before they are read."""
    given = start.abstract.weights if start.begins_with is None else start.begins_with
    params = restore_params(plan.init_from, given, check)[1] if plan.init_from else None
    key = jax.random.fold_in(jax.random.key(plan.seed), 0)
    return start.init(key) if params is None else start.begin(params, key)


# ---------------------------------------------------------------------------- lines for the log


def describe_layout(plan: plans.MeshPlan, layout: Layout) -> str:
    """One line for the log: devices, processes, and what is cut along what."""
    sizes = " x ".join(f"{axis}={size}" for axis, size in layout.mesh.shape.items() if size > 1)
    groups = layout.parts("expert")
    experts = f", experts by {layout.dispatch} in groups of {groups}" if groups > 1 else ""
    rules = f"{layout.rules!r}, rollouts {plan.rollout_rules!r}" if plan.rollout_rules else repr(layout.rules)
    if plan.rollout_dispatch:
        experts += f", in rollouts by {plan.rollout_dispatch}"
    return f"{layout.mesh.size} devices in {jax.process_count()} process(es), mesh {sizes}, rules {rules}{experts}"


EXPERTS = (("moe", "gate"), ("moe", "up"), ("moe", "down"))  # parameters of which a token meets a part


def describe(model: Transformer, abstract: TrainState) -> str:
    """One line for the log: size of the model."""
    sizes = {path: leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(abstract.weights)}
    total, spec = sum(sizes.values()), model.spec
    if not spec.num_experts:
        return f"dense model, {spec.num_layers} layers, {total:,} parameters"
    routed = [tuple(entry.key for entry in path[-2:]) for path in sizes]
    expert = sum(n for name, n in zip(routed, sizes.values(), strict=True) if name in EXPERTS)
    dense = f" of which {len(spec.dense_layers)} dense" if spec.dense_layers else ""
    active = total - expert + expert * spec.experts_per_token // spec.num_experts
    return (
        f"MoE model, {spec.num_layers} layers{dense}, {spec.num_experts} experts of which {spec.experts_per_token} "
        f"run, {total:,} parameters, {active:,} active"
    )


def describe_adapters(lora: LoRA, abstract: TrainState) -> str:
    """One line for the log: what is trained of the model, and what the optimizer holds for it."""
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    trained, total = size(abstract.params), size(abstract.weights)
    names = ", ".join(name.removeprefix("blocks/") for name in lora.matrices(abstract.weights))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract.opt_state))
    return (
        f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}, on {names}: "
        f"{trained:,} parameters are trained ({trained / total:.2%} of the model's), the optimizer holds "
        f"{held / 1e6:,.1f} MB ({8 * total / 1e6:,.1f} MB for all weights)"
    )
