"""Configs: every field has a reader and an effect; every config file loads, and is of the same fields and types as the
base."""

import importlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import base
from gspo import build
from gspo.learning.optim import make_optimizer
from gspo.learning.scores import score_completions
from gspo.steps import make_layout, objective_of, optimizer_of
from tests.tiny_runs import (  # noqa: F401 - a fixture
    ROOT,
    dpo_config,
    kept_compiles,
    parts_of,
    reward_model_config,
    rl_config,
    sft_config,
    stateful_config,
)

HELPERS = ("base", "from_run", "models", "paper")  # what config files import; no experiments of their own
FILES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", *HELPERS))


# ---------------------------------------------------------------------------- every field has a reader


class WatchedDict(dict):
    """A dict that notes which of its entries are asked for, also by `**`."""

    def __init__(self, entries, note):
        super().__init__(entries)
        self.note = note

    def __getitem__(self, name):
        self.note(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.note(name)
        return super().get(name, default)

    def pop(self, name, *default):
        self.note(name)
        return super().pop(name, *default)

    def __iter__(self):  # that it is overridden makes `**` ask for each entry
        return super().__iter__()


class Watched:
    """A config that notes which of its leaves are read. As a whole it is only ever saved, which does not count."""

    def __init__(self, config, read, prefix=""):
        self._config, self._read, self._prefix = config, read, prefix

    def __getattr__(self, name):
        value = getattr(self._config, name)
        if isinstance(value, ConfigDict):
            return Watched(value, self._read, f"{self._prefix}{name}.")
        self._read.add(self._prefix + name)
        return value

    def __getitem__(self, name):
        return getattr(self, name)

    def get(self, name, default=None):
        return getattr(self, name) if name in self._config else default

    def __contains__(self, name):
        return name in self._config

    def to_dict(self):
        content = self._config.to_dict()
        return WatchedDict(content, lambda name: self._read.add(self._prefix + name)) if self._prefix else content


def test_watching_counts_what_is_used_and_not_what_is_saved():
    # Catches a watch that would call every field read.
    read = set()
    config = Watched(ConfigDict({"a": 1, "b": 2, "c": {"d": 3, "e": 4, "f": 5}, "g": {"h": 6, "i": 7}, "j": 8}), read)
    config.to_dict()
    part = config.c.to_dict()
    assert read == set()
    assert (config.a, config["b"], part.pop("d"), part["e"], part.get("f"), config.get("j")) == (1, 2, 3, 4, 5, 8)
    assert read == {"a", "b", "c.d", "c.e", "c.f", "j"}
    (lambda h, i: None)(**config.g.to_dict())
    assert {"g.h", "g.i"} < read


@pytest.mark.parametrize(
    ("plan_of", "config_of"),
    [
        (build.rl_plan, stateful_config),
        (build.sft_plan, sft_config),
        (build.reward_model_plan, reward_model_config),
        (build.dpo_plan, dpo_config),
    ],
    ids=["rl", "sft", "reward_model", "dpo"],
)
def test_every_field_is_read(tmp_path, plan_of, config_of):
    # Catches a field that a user sets and nothing heeds. A plan is made of values, except that it hands on two sections
    # as dicts: what a loop makes of these is made here. No other part of a run has anything left to read.
    config, read = config_of(tmp_path), set()
    plan = plan_of(Watched(config, read))
    make_layout(plan.mesh)
    optimizer_of(plan.optimizer)
    assert read == set(build.leaf_fields(config))


# ---------------------------------------------------------------------------- every field has an effect

# A value for each field of config.model that must change the program; fields that it needs beside it.
OTHER_MODELS = {
    "vocab_size": {"vocab_size": 16}, "num_layers": {"num_layers": 2}, "d_model": {"d_model": 8},
    "num_heads": {"num_heads": 4}, "num_kv_heads": {"num_kv_heads": 2}, "head_width": {"head_width": 4},
    "d_ff": {"num_experts": 0, "d_ff": 8},
    "num_experts": {"num_experts": 8}, "experts_per_token": {"experts_per_token": 1}, "d_expert": {"d_expert": 4},
    "norm_topk_prob": {"norm_topk_prob": False}, "rope_theta": {"rope_theta": 1e5}, "rms_eps": {"rms_eps": 1e-3},
    "rope_scaling": {"rope_scaling": (8.0, 1.0, 4.0, 8192.0)}, "qk_norm": {"qk_norm": False},
    "qk_norm_over": {"qk_norm_over": "projection"},
    "rotary_width": {"rotary_width": 2}, "dense_layers": {"num_layers": 2, "dense_layers": (1,), "d_ff": 8},
    "router": {"router": "sigmoid"}, "routed_scale": {"routed_scale": 2.5}, "d_shared": {"d_shared": 8},
    "shared_gate": {"d_shared": 8, "shared_gate": True}, "qkv_bias": {"qkv_bias": True},
    "out_bias": {"out_bias": True}, "tie_embeddings": {"tie_embeddings": True},
    "dtype": {"dtype": "bfloat16"}, "moe_backend": {"moe_backend": "ragged"}, "remat": {"remat": True},
    "attention_chunk": {"attention_chunk": 2},
    "scan_layers": {"scan_layers": True},
}  # fmt: skip


def test_every_field_of_the_model_changes_the_program(tmp_path):
    # Catches a field that reaches the ModelSpec and no further.
    def program(**changes):
        config = rl_config(tmp_path, **{f"model.{name}": value for name, value in changes.items()})
        model = parts_of(config)[3]
        boxed = jax.eval_shape(model.init_params, jax.random.key(0))

        def score(params):
            return score_completions(model, params, jnp.zeros((2, 5), jnp.int32), jnp.full(2, 2), 3).logp_BC

        return str(jax.make_jaxpr(score)(nn.unbox(boxed)))

    assert OTHER_MODELS.keys() == set(base.model().keys())
    usual, dense = program(), program(num_experts=0, d_ff=16)
    for name, changes in OTHER_MODELS.items():
        assert program(**changes) not in (usual, dense), name


def test_every_field_of_the_optimizer_changes_the_update():
    # Catches a field that make_optimizer takes and drops.
    def updates(**changes):
        optimizer = make_optimizer(total_steps=4, **base.optimizer().to_dict() | changes)
        params = {"w": jnp.array([1.0, -2.0, 3.0]), "router": jnp.ones(2)}
        state, seen = optimizer.init(params), []
        for step in range(3):
            update, state = optimizer.update(
                {"w": jnp.array([0.3, -2.0, 1.0]) * (step + 1), "router": jnp.ones(2)}, state, params
            )
            seen.append(jax.tree.map(lambda x: x.tolist(), update))
        return seen

    others = {"learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 2, "beta1": 0.5, "beta2": 0.5, "eps": 0.1,
              "weight_decay": 0.1, "max_grad_norm": 3.0, "lr_scale": "router=0.5"}  # fmt: skip
    assert others.keys() == set(base.optimizer().keys())
    for name, value in others.items():
        assert updates(**{name: value}) != updates(), name


OTHER_OBJECTIVES = {
    "preset": {"preset": "grpo"}, "importance_sampling_level": {"importance_sampling_level": "token"},
    "surrogate": {"surrogate": "cispo"}, "epsilon": {"epsilon": 0.1}, "epsilon_high": {"epsilon_high": 0.1},
    "delta": {"delta": 5.0}, "temperature_pos": {"surrogate": "sapo", "temperature_pos": 2.0},
    "temperature_neg": {"surrogate": "sapo", "temperature_neg": 2.0},
    "cap": {"preset": "minirl", "cap": 2.0}, "loss_agg_mode": {"loss_agg_mode": "token-mean"},
    "loss_norm_length": {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_norm_length": 3}, "beta": {"beta": 0.5},
    "kl_loss_type": {"beta": 0.1, "kl_loss_type": "k2"}, "kl_importance": {"beta": 0.1, "kl_importance": "stopped"},
    "entropy_coef": {"entropy_coef": 0.1}, "sampler_is": {"sampler_is": "mis"}, "sampler_is_low": {"sampler_is": "tis",
    "sampler_is_low": 0.7}, "sampler_is_high": {"sampler_is": "tis", "sampler_is_high": 7.0},
    "off_policy_mask_threshold": {"off_policy_mask_threshold": 0.1}, "router_shift_floor": {"router_shift_floor": 0.5},
}  # fmt: skip


def test_every_field_of_the_objective_changes_the_objective(tmp_path):
    # Catches a field whose value ends in the settings. Each is compared with the objective that differs in that field
    # alone.
    def objective(changes):
        changes = {f"objective.{name}": value for name, value in changes.items()}
        return objective_of(build.rl_plan(rl_config(tmp_path, old_logps="learner", **changes)))

    assert OTHER_OBJECTIVES.keys() == set(base.rl().objective.keys())
    for name, changes in OTHER_OBJECTIVES.items():
        without = {other: value for other, value in changes.items() if other != name}
        assert objective(changes) != objective(without), name


# ---------------------------------------------------------------------------------------------------- config files


def load(name: str, *overrides: str) -> ConfigDict:
    """As the scripts do: through the flags, overrides and all."""
    holder, path = flags.FlagValues(), str(ROOT / "configs" / f"{name}.py")
    arguments = ["script", f"--config={path}", *overrides]
    config_flags.DEFINE_config_file("config", None, flag_values=holder, sys_argv=arguments, lock_config=True)
    holder(arguments)
    return holder.config


def sections(config: ConfigDict) -> list[ConfigDict]:
    """The config and all that is nested in it."""
    return [config, *(part for value in config.values() if isinstance(value, ConfigDict) for part in sections(value))]


def assert_like(config: ConfigDict, model: ConfigDict, where: str):
    """The same fields with values of the same types; None where the base has a placeholder. A task brings its own
    options."""
    free = "task.options."
    fields, wanted = ({f for f in build.leaf_fields(c) if not f.startswith(free)} for c in (config, model))
    assert fields == wanted, where
    values, defaults = (ConfigDict(c.to_dict()) for c in (config, model))
    for field in wanted:
        value, default = values, defaults
        for part in field.split("."):
            value, default = value[part], default[part]
        assert default is None or type(value) is type(default), (
            f"{where}: {field} is {value!r}, in the base it is {default!r}"
        )


@pytest.mark.parametrize("name", [name for name in FILES if name != "lab"])  # which describes no run: it looks at some
def test_every_config_file_loads_with_the_fields_and_types_of_the_base(name):
    # Catches a mistyped assignment (ConfigDict takes any name), 1 for True, a list for a tuple, a config that cannot be
    # overridden.
    config = load(name)
    runs = {"num_rollouts": base.rl(), "center_rewards_coefficient": base.reward_model(),
            "label_smoothing": base.dpo(), "label_temperature": base.labels(), "num_updates": base.sft()}  # fmt: skip
    parts = sections(config)
    kinds = [(part, [model for field, model in runs.items() if field in part]) for part in parts]
    found = [(part, models[0]) for part, models in kinds if models]
    assert found, f"{name} describes no run"
    for part, model in found:
        assert_like(part, model, name)
    for part in parts:
        assert part.is_locked
    field = (
        next(field for field in build.leaf_fields(config) if field.split(".")[-1] == "seed")
        if "seed" not in config
        else "seed"
    )
    changed = load(name, f"--config.{field}=7")
    for part in field.split("."):
        changed = changed[part]
    assert changed == 7


@pytest.mark.parametrize("name", FILES)
def test_every_config_file_has_a_run_card(name):
    # Catches a file of numbers without a word on what it is for or what it costs.
    card = importlib.import_module(f"configs.{name}").__doc__ or ""
    assert len(card.strip().splitlines()) >= 3, f"configs/{name}.py: its docstring is the run card"
    assert "cost" in card.lower(), f"configs/{name}.py: the run card does not say what the run costs"


@pytest.mark.parametrize("make", [base.rl, base.sft])
def test_a_locked_config_refuses_unknown_fields_and_wrong_types(make):
    # Catches overrides that land in a field of their own.
    config = make().lock()
    with pytest.raises(AttributeError):
        config.num_promts = 3
    with pytest.raises(TypeError):
        config.seed = "many"
    with pytest.raises(TypeError):
        config.eval.temperature = "hot"


@pytest.mark.parametrize("make", [base.rl, base.sft, base.reward_model, base.dpo])
def test_two_configs_share_nothing(make):
    # Catches a section that is made once and changed by every config that uses it.
    first, second = make(), make()
    first.model.num_layers = 99
    first.optimizer.learning_rate = 9.0
    assert second.model.num_layers != 99 and second.optimizer.learning_rate != 9.0 and make() == second
