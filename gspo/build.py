"""Config -> plans. Every field of a config is read here, once, and nowhere else; what a config is, nobody else knows.

A plan is a frozen record of plain values (`gspo.plans`); everything after this file takes plans and numbers.
"""

from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from gspo import objectives, plans, supervised_plans
from gspo.checks import need
from gspo.data.scoring import Judging
from gspo.held import ReferencePlan, Storage
from gspo.learning.critic import POLICY_WEIGHTS, CriticPlan
from gspo.learning.learner import UpdatePlan
from gspo.model.adapters import LoRA
from gspo.model.distribution import Sampling
from gspo.model.spec import TOY, TOY_TOKENIZER
from gspo.run.identity import spec_fields, tokenizer_of
from gspo.run.stored import read_content, why_none
from gspo.types import UserError

# Of evaluations that sample nothing.
UNSAMPLED = {"num_generations_eval": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "reward": ""}
PAIR_FIELDS = ("center_rewards_coefficient", "label_smoothing")  # by which a reward model's and DPO's are known

flags.disclaim_key_flags()  # --config is a flag of the file that asks for it: --help lists it there


def define_config_flag(help_text: str) -> None:
    """--config=FILE, with --config.a.b=value for its fields; those that the file does not have are refused."""
    config_flags.DEFINE_config_file("config", None, help_text, lock_config=True)


def is_config(value: Any) -> bool:
    """Whether a config file has returned what one must return."""
    return isinstance(value, ConfigDict)


def leaf_fields(config: ConfigDict, prefix: str = "") -> list[str]:
    """Dotted names of all leaves of a config."""
    names = []
    for key, value in config.items():
        names += leaf_fields(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else [prefix + key]
    return names


def rows_to_divide(config: ConfigDict) -> tuple[int, ...]:
    """All numbers of rows that devices along the mesh axis `data` would share, in every run that a config describes. ()
    where a run has another mesh than that of all devices along `data`, and where one of several runs brings its own
    numbers: how many devices there may be is then for the user to say."""
    runs = [run for run in (config, *config.values()) if isinstance(run, ConfigDict) and "mesh" in run]
    changed = {name for field in leaf_fields(config.get("arms", ConfigDict())) for name in field.split(".")}
    if changed & {"mesh", "num_prompts", "num_generations", "updates_per_rollout", "micro_batch_size", "max_num_seqs"}:
        return ()
    if any(run.mesh.to_dict() != {"data": -1, "fsdp": 1, "expert": 1, "tensor": 1} for run in runs):
        return ()
    rows: list[int] = []
    for run in runs:
        if "num_rollouts" in run:
            minibatch = run.num_prompts * run.num_generations // max(run.updates_per_rollout, 1)
            rows += [run.num_prompts, run.micro_batch_size or minibatch]
            rows += [run.max_num_seqs] * bool(run.max_num_seqs)
        elif "label_temperature" in run:
            rows += [run.prompts_at_a_time]
        else:  # of preferences, the pairs are shared
            pairs = any(field in run for field in PAIR_FIELDS)
            rows += [run.micro_batch_size // (2 if pairs else 1) or run.batch_size]
    return tuple(rows)


def rl_plan(config: ConfigDict, workdir: str = "") -> plans.RLPlan:
    """Raises UserError for every mistake that can be seen in the config alone, and beside the weights that the run
    begins with: those in workdir where it goes on, else those of init_from."""
    critic = _critic(config, workdir)
    rollouts = config.num_rollouts - (critic.warmup_rollouts if critic else 0)
    updates = rollouts * config.updates_per_rollout * config.num_iterations
    steps, alpha = config.ref_model_sync_steps, config.ref_model_mixup_alpha
    if config.sync_ref_model:
        need(steps > 0, "ref_model_sync_steps", steps, "must be positive")
    follows = (steps, alpha) if config.sync_ref_model else (0, 1.0)
    return plans.RLPlan(
        **_common(config, workdir, total_steps=updates, eval_at_a_time=config.num_prompts),
        num_rollouts=config.num_rollouts,
        updates_per_rollout=config.updates_per_rollout,
        num_iterations=config.num_iterations,
        rollout=plans.RolloutPlan(
            num_prompts=config.num_prompts,
            num_generations=config.num_generations,
            sampling=Sampling(config.temperature, config.top_k, config.top_p, config.min_p),
            max_num_seqs=config.max_num_seqs,
            **config.mismatch.to_dict(),
        ),
        experience=_experience(config),
        preset=config.objective.preset,
        objective=_objective(config),
        critic=critic,
        reference=ReferencePlan(*follows, Storage("ref_", config.ref_dtype, config.ref_offload)),
        check_tolerance=config.check_tolerance,
    )


def sft_plan(config: ConfigDict, workdir: str = "") -> supervised_plans.SFTPlan:
    """As `rl_plan`."""
    if any(field in config for field in PAIR_FIELDS):
        raise UserError("--config: it is one of preferences, for experiments/reward_model.py or experiments/dpo.py")
    return supervised_plans.SFTPlan(
        **_supervised(config, workdir), packing=config.packing, target_pass_at_1=config.target_pass_at_1
    )


def reward_model_plan(config: ConfigDict, workdir: str = "") -> supervised_plans.RewardModelPlan:
    """As `rl_plan`."""
    return supervised_plans.RewardModelPlan(
        **_supervised(config, workdir), center_rewards_coefficient=config.center_rewards_coefficient
    )


def dpo_plan(config: ConfigDict, workdir: str = "") -> supervised_plans.DPOPlan:
    """As `rl_plan`."""
    return supervised_plans.DPOPlan(
        **_supervised(config, workdir), beta=config.beta, label_smoothing=config.label_smoothing
    )


def label_plan(config: ConfigDict, workdir: str = "") -> supervised_plans.LabelPlan:
    """As `rl_plan`."""
    own = ("num_prompts", "num_eval_prompts", "prompts_at_a_time", "judge", "judge_template", "label_temperature")
    return supervised_plans.LabelPlan(
        **_policy(config, ""),  # what is in workdir are labels
        **{name: config[name] for name in own},
        sampling=Sampling(config.temperature, config.top_k, config.top_p, config.min_p),
    )


def run_plan(config: ConfigDict, workdir: str = "") -> plans.RunPlan:
    """The plan of a run of any kind."""
    kinds = {"num_rollouts": rl_plan, "center_rewards_coefficient": reward_model_plan, "label_smoothing": dpo_plan}
    plan_of = next((plan_of for field, plan_of in kinds.items() if field in config), sft_plan)
    return plan_of(config, workdir)


def mesh_plan(config: ConfigDict) -> plans.MeshPlan:
    return plans.MeshPlan(
        sizes=config.mesh.to_dict(),
        rules=config.mesh_rules,
        dispatch=config.expert_dispatch,
        rollout_rules=config.rollout_mesh_rules,
        rollout_dispatch=config.rollout_expert_dispatch,
    )


def _supervised(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """The fields of `supervised_plans.SupervisedPlan`."""
    return _common(config, workdir, total_steps=config.num_updates, eval_at_a_time=config.eval.num_prompts) | {
        "num_updates": config.num_updates,
        "batch_size": config.batch_size,
    }


def _common(config: ConfigDict, workdir: str, *, total_steps: int, eval_at_a_time: int) -> dict[str, Any]:
    """The fields of `plans.RunPlan`. What only reinforcement learning has takes its neutral value elsewhere."""
    return _policy(config, workdir) | {
        "lora": _lora(config),
        "optimizer": plans.OptimizerPlan(config.optimizer.to_dict(), total_steps),
        "update": UpdatePlan(
            micro_batch_size=config.micro_batch_size,
            chunk=config.logp_chunk,
            share_prompts=config.get("share_prompts", False),
            entropy_target=config.get("entropy_target"),
            entropy_step=config.get("entropy_step", 0.0),
            router_aux_loss_coef=config.router_aux_loss_coef,
            router_z_loss_coef=config.router_z_loss_coef,
        ),
        "evaluation": plans.EvaluationPlan(
            **UNSAMPLED | config.eval.to_dict(), at_a_time=eval_at_a_time, max_num_seqs=config.get("max_num_seqs", 0)
        ),
        "checkpoint": plans.CheckpointPlan(**config.checkpoint.to_dict()),
        "log": plans.LogPlan(
            num_samples=config.log.num_samples,
            samples_every=config.log.get("samples_every", 0),
            tokens_every=config.log.get("tokens_every", 0),
            tensorboard=config.log.tensorboard,
            wandb=config.log.wandb,
            wandb_project=config.log.wandb_project,
            wandb_name=config.log.wandb_name,
            profile=tuple(config.get("profile_rollouts", ())),
        ),
    }


def _policy(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """The fields of `plans.PolicyPlan`."""
    weights = _first_weights(config, workdir)
    model, tokenizer = _model_and_tokenizer(config, weights)
    return {
        "written": config.to_dict(),
        "seed": config.seed,
        "init_from": config.init_from,
        "missing": weights.missing,
        "date": weights.date,
        "data": _data(config, tokenizer),
        "mesh": mesh_plan(config),
        "model": model,
        "judging": _judging(config),
    }


class _Weights(NamedTuple):
    """The weights that a run begins with."""

    where: str  # what an error calls them
    folder: str
    saved: dict[str, Any] | None = None  # their identity
    missing: str = ""  # why they cannot be read
    date: str | None = None  # the day of the run that they are of, where it is this one


def _first_weights(config: ConfigDict, workdir: str) -> _Weights:
    """Those in workdir, where they say what they are: a run that goes on knows its own model, whatever has become of
    what it began with. Else those of init_from."""
    content = read_content(workdir) if workdir else None
    own = (content or {}).get("identity")
    if own:
        return _Weights(f"the run in {workdir}", workdir, own, date=own.get("date"))
    begun = read_content(config.init_from) if config.init_from else None
    missing = ""
    if config.init_from and content is None and begun is None:
        missing = why_none(config.init_from)
    return _Weights(f"init_from={config.init_from}", config.init_from, (begun or {}).get("identity"), missing)


def _model_and_tokenizer(config: ConfigDict, weights: _Weights) -> tuple[plans.ModelPlan, str]:
    """What the config leaves open is that of the weights, else that of the toy. What it sets and they contradict is an
    error: they would mean something else. (A tokenizer is compared when it is made.)"""
    fields = config.model.to_dict()
    given = {name: fields[name] for name in fields if fields[name] is not None}
    where, folder, saved = weights[:3]
    begun = {} if saved is None else spec_fields(saved)
    for name, value in given.items():
        if name in begun and value != begun[name] and (name, value) != ("vocab_size", 0):
            raise UserError(
                f"model.{name}={value}: {where} was trained with {begun[name]}; leave it out, or start from "
                "other weights"
            )
    tokenizer = config.tokenizer
    if not tokenizer and saved is not None:
        tokenizer = tokenizer_of(saved, folder)
        if tokenizer is None:
            raise UserError(f"tokenizer: the weights of {where} were saved without one; name it")
    tokenizer = tokenizer or TOY_TOKENIZER
    return plans.ModelPlan({**TOY, **given, **begun}), tokenizer


def _critic(config: ConfigDict, workdir: str) -> CriticPlan | None:
    """Its model is that of the folder that it begins with; a run in workdir that goes on knows it, as its own."""
    fields = config.critic.to_dict()
    if not fields.pop("enable"):
        return None
    folder, model = fields["init_from"], None
    going_on = ((read_content(workdir) if workdir else None) or {}).get("identity")
    if going_on:
        model = spec_fields({"model": going_on.get("critic") or {}})
    elif folder not in ("", POLICY_WEIGHTS):
        content = read_content(folder)
        saved = (content or {}).get("identity")
        why = "it does not say what model its weights are of" if content else why_none(folder)
        need(saved is not None, "critic.init_from", folder, f"{why}; give 'policy', '', or the workdir of a run")
        need(saved["tokenizer"] is not None, "critic.init_from", folder, "its weights were saved without a tokenizer")
        model = spec_fields(saved)
    return CriticPlan(**fields, model=model)


def _judging(config: ConfigDict) -> Judging:
    if "reward_workers" not in config:  # nothing is sampled, nothing judged
        return Judging()
    return Judging(config.rewards_max_errors, config.reward_workers, config.reward_timeout_s)


def _lora(config: ConfigDict) -> LoRA | None:
    lora = LoRA(**config.lora.to_dict())
    return lora if lora.rank else None


def _data(config: ConfigDict, tokenizer: str) -> plans.DataPlan:
    return plans.DataPlan(
        task=config.task.name,
        options=config.task.options.to_dict(),
        train_split=config.task.train_split,
        eval_split=config.task.eval_split,
        tokenizer=tokenizer,
        max_prompt_length=config.max_prompt_length,
        max_completion_length=config.max_completion_length,
        overlong_prompts=config.overlong_prompts,
        prompt_buckets=tuple(config.get("prompt_buckets", ())),
        seed=config.seed,
        system_prompt=config.task.system_prompt,
        stop=tuple(config.get("stop_strings", ())),
    )


def _experience(config: ConfigDict) -> plans.ExperiencePlan:
    return plans.ExperiencePlan(
        rewards=tuple(config.rewards),
        reward_weights=tuple(config.reward_weights),
        normalize_reward_models=config.reward_model.normalize,
        clip_reward_models=config.reward_model.clip,
        reward_model_storage=Storage("reward_model.", config.reward_model.dtype, config.reward_model.offload),
        scale_rewards=config.scale_rewards,
        advantage_weight_pos=config.advantage_weight_pos,
        advantage_weight_neg=config.advantage_weight_neg,
        reward_kl_coef=config.reward_kl_coef,
        overlong_len=config.overlong_buffer.len,
        overlong_penalty_factor=config.overlong_buffer.penalty_factor,
        mask_truncated_completions=config.mask_truncated_completions,
        filter_groups=config.filter_groups.enable,
        max_num_gen_batches=config.filter_groups.max_num_gen_batches,
        old_logps=config.old_logps,
        replay=config.router_replay.mode,
        router_kl=config.log.router_kl,
    )


def _objective(config: ConfigDict) -> dict[str, Any]:
    """The preset with the fields that the config sets itself laid over it, defaults filled in."""
    fields = config.objective.to_dict()
    return objectives.settings(fields.pop("preset"), **fields)
