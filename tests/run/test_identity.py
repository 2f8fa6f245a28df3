"""Weights are taken by the model and the tokenizer that they were trained with, and by no other."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from gspo import build, rl, sft
from gspo.data.tokenizer import make_tokenizer
from gspo.evaluate import evaluate_workdir
from gspo.learning.state import Start
from gspo.model.spec import ModelSpec
from gspo.resume import open_run, tokenizer_of_run
from gspo.run.checkpoint import Checkpointer
from gspo.run.identity import HOW_IT_RUNS, check_identity, identity, saved_identity, spec_fields
from gspo.run.stored import read_content
from gspo.types import TrainState, UserError
from tests.tiny_runs import (  # noqa: F401 - fixtures
    assert_bit_equal,
    command,
    kept_compiles,
    rl_config,
    sft_config,
    state_of,
)
from tests.tokenizer_folders import CHAT, write_folder

SPEC = ModelSpec(8, 1, 16, 2, 1, 8, 24, 4, 2, 8, rope_theta=1e4)
TEN = "chars:01 ="
OTHER = {
    "vocab_size": 9, "num_layers": 2, "d_model": 8, "num_heads": 1, "num_kv_heads": 2, "head_width": 4, "d_ff": 8,
    "num_experts": 8, "experts_per_token": 1, "d_expert": 4, "norm_topk_prob": False, "rope_theta": 1e6,
    "rope_scaling": ("yarn", 4.0, 64.0), "rms_eps": 1e-5, "qk_norm": False, "qk_norm_over": "projection",
    "dense_layers": (0,), "router": "sigmoid", "routed_scale": 2.5, "d_shared": 8, "shared_gate": True,
    "rotary_width": 4, "qkv_bias": True, "out_bias": True,
    "tie_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def cold(tmp_path_factory):
    folder = tmp_path_factory.mktemp("identity")
    changes = {"num_updates": 2, "eval.every": 0, "eval.num_prompts": 2, "model.rope_theta": 5e3}
    sft.train(build.sft_plan(sft_config(folder, **changes)), folder / "cold")
    return folder / "cold"


def open_config(cold, **changes):
    """A config that says nothing of model and tokenizer."""
    config = rl_config(cold.parent, init_from=str(cold), num_rollouts=1, **changes)
    for field in config.model:
        if field not in HOW_IT_RUNS and f"model.{field}" not in changes:
            config.model[field] = None
    if "tokenizer" not in changes:
        config.tokenizer = None
    return config


def test_every_field_of_a_spec_is_compared_but_those_of_how_it_runs():
    # Catches a field that somebody adds and nobody compares.
    assert {*OTHER, *HOW_IT_RUNS} == {field.name for field in dataclasses.fields(ModelSpec)}


@pytest.mark.parametrize("field", OTHER)
def test_each_field_changed_alone_is_refused_by_name(field):
    # Catches weights under another top-k, RoPE base or normalisation: the same shapes, other numbers.
    tokenizer = make_tokenizer(TEN)
    saved = json.loads(json.dumps(identity(SPEC, tokenizer)))
    check_identity("runs/cold", saved, identity(SPEC, tokenizer))
    changed = identity(SPEC, tokenizer)
    changed["model"] |= {field: list(OTHER[field]) if isinstance(OTHER[field], tuple) else OTHER[field]}
    with pytest.raises(UserError, match=rf"^model\.{field}=.*the weights in runs/cold were trained with"):
        check_identity("runs/cold", saved, changed)


def test_a_field_that_weights_were_saved_without_is_not_compared_and_tuples_come_back():
    # Catches a checkpoint of an earlier version that no longer loads, and a rule that comes back as a list, which no
    # jitted function takes.
    spec = dataclasses.replace(SPEC, rope_scaling=("yarn", 4.0, 64.0, 32.0, 1.0, 1.5))
    saved = json.loads(json.dumps(identity(spec, None)))
    assert ModelSpec(**spec_fields(saved)) == spec
    del saved["model"]["qkv_bias"]
    check_identity("runs/old", saved, identity(spec, None))
    assert ModelSpec(**spec_fields(saved)) == spec


def test_the_order_of_an_alphabet_is_part_of_a_model():
    # Catches digits that change places, which no shape tells.
    saved, other = (identity(SPEC, make_tokenizer(text)) for text in (TEN, "chars:10 ="))
    with pytest.raises(
        UserError, match=r"^tokenizer=chars:10 =: the weights in x were trained with another one; its alphabet"
    ):
        check_identity("x", saved, other)


def test_how_a_model_runs_is_free(cold, tmp_path):
    # Catches a checkpoint that only the backend of its training may read.
    config = open_config(cold, **{"model.moe_backend": "blocked", "model.dtype": "bfloat16", "model.remat": True})
    rl.train(build.rl_plan(config), tmp_path)


def test_init_from_alone_brings_model_and_tokenizer(cold, tmp_path):
    # Catches a start with the toy's top-k, RoPE base or alphabet under the weights of another model.
    line = rl.train(build.rl_plan(open_config(cold)), tmp_path / "open")
    said = rl_config(cold.parent, init_from=str(cold), num_rollouts=1, **{"model.rope_theta": 5e3})
    assert rl.train(build.rl_plan(said), tmp_path / "said") == line
    assert_bit_equal(state_of(said, tmp_path / "open")[1], state_of(said, tmp_path / "said")[1])
    assert saved_identity(tmp_path / "open") == saved_identity(cold)


@pytest.mark.parametrize(("field", "value", "saved"), [
    ("model.experts_per_token", 1, 2), ("model.rope_theta", 1e4, 5e3), ("model.norm_topk_prob", False, True),
])  # fmt: skip
def test_a_field_that_contradicts_init_from_is_named(cold, field, value, saved):
    # Catches a flag that silently wins over the weights, or loses to them.
    with pytest.raises(UserError, match=rf"^{field}={value}: init_from=.* was trained with {saved}; leave it out"):
        build.rl_plan(open_config(cold, **{field: value}))


def test_another_alphabet_is_refused_where_the_weights_are_read(cold, tmp_path):
    # Catches a tokenizer of the same size whose ids mean something else.
    with pytest.raises(UserError, match=r"^tokenizer=chars:10 =: the weights in .* were trained with another one"):
        rl.train(build.rl_plan(open_config(cold, tokenizer="chars:10 =")), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_resuming_and_evaluating_compare_too(cold, tmp_path):
    # Catches a changed config that was allowed for its learning rate and changes the model.
    plan = build.sft_plan(sft_config(cold.parent, **{"num_updates": 2, "model.rope_theta": 7e3, "eval.num_prompts": 2}))
    with pytest.raises(UserError, match=r"^model\.rope_theta=7000.0: the weights in .* were trained with 5000.0"):
        sft.train(plan, cold, allow_changed_config=True)
    with pytest.raises(UserError, match=r"^model\.rope_theta=7000.0"):
        evaluate_workdir(plan, cold)


def test_weights_that_do_not_say_what_they_are_are_taken_with_a_warning(caplog):
    # Catches checkpoints of earlier versions that can no longer be read.
    check_identity("runs/old", None, identity(SPEC, make_tokenizer(TEN)))
    assert "runs/old does not say what model" in caplog.text


def test_a_run_is_evaluated_without_its_config(cold, command):  # noqa: F811
    # Catches an evaluation that needs the flags of the run repeated, and one that cannot change how many prompts it
    # takes.
    code, stdout, stderr = command("evaluate", f"--workdir={cold}", "--config.eval.num_prompts=3")
    assert code == 0, stderr
    assert json.loads(stdout.splitlines()[-1])["step"] == 2 and len(stdout.splitlines()) == 4
    assert np.isfinite(json.loads(stdout.splitlines()[-1])["eval/pass@1"])


def test_a_run_goes_on_without_what_it_began_with(cold, tmp_path):
    # Catches a run that turns into the toy, or is refused, once the folder of its cold start is gone.
    start = tmp_path / "cold"
    shutil.copytree(cold, start)
    config = open_config(cold)
    config.init_from = str(start)
    rl.train(build.rl_plan(config, str(tmp_path / "run")), tmp_path / "run")
    shutil.rmtree(start)
    config.num_rollouts = 2
    plan = build.rl_plan(config, str(tmp_path / "run"))
    rl.train(plan, tmp_path / "run", allow_changed_config=True)
    assert plan.model.fields["rope_theta"] == 5e3
    with pytest.raises(UserError, match=r"^init_from=.*cold: no such folder"):
        rl.train(build.rl_plan(config, str(tmp_path / "other")), tmp_path / "other")


def test_the_day_of_a_run_is_that_on_which_it_began_and_its_folder_is_read_once_for_that(tmp_path, monkeypatch):
    # Catches prompts that bear another day after a resume, and a plan, made without a look into the folder of its run,
    # by which they would.
    tokenizer = make_tokenizer(str(write_folder(tmp_path / "hf", jinja=CHAT)), date="2026-01-31T23:59:00")
    began = identity(dataclasses.replace(SPEC, vocab_size=tokenizer.vocab_size), tokenizer)
    with Checkpointer(tmp_path / "run", identity=began) as checkpointer:
        checkpointer.save(0, {"params": {"embedding": jnp.zeros((8, 16))}}, {})
    read = []
    monkeypatch.setattr(build, "read_content", lambda path: (read.append(path), read_content(path))[1])
    config = open_config(tmp_path / "run", tokenizer=tokenizer.spec)
    config.init_from = ""
    plan = build.rl_plan(config, str(tmp_path / "run"))
    assert tokenizer_of_run(plan).date == tokenizer.date and read == [str(tmp_path / "run")]
    plan = dataclasses.replace(plan, date=None)
    model = ModelSpec(**plan.model.fields)
    start = Start(None, None, TrainState(None, {"embedding": jnp.zeros((8, 16))}, None))
    with pytest.raises(UserError, match=r"the run began on 2026-01-31T23:59:00, not 20.*with its workdir"):
        open_run(plan, tmp_path / "run", start, model, tokenizer_of_run(plan), allow_changed_config=True)


def test_weights_without_a_tokenizer_ask_for_one(cold, tmp_path):
    # Catches the toy's alphabet under the vocabulary of a released model.
    with Checkpointer(tmp_path, identity=identity(SPEC, None)) as checkpointer:
        checkpointer.save(0, {"params": {"embedding": jnp.zeros((8, 16))}}, {})
    config = open_config(cold)
    config.init_from = str(tmp_path)
    with pytest.raises(UserError, match=r"^tokenizer: the weights of init_from=.* were saved without one; name it"):
        build.rl_plan(config)
    config.tokenizer = TEN
    assert build.rl_plan(config).data.tokenizer == TEN
