"""Upcycled models are the dense model's function; the script's folders start runs, export and come back."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import tokenizers

from configs import base
from gspo import build
from gspo.data.tokenizer import make_tokenizer, save_files
from gspo.hf import folder as hf
from gspo.hf.families import read_config, spec_from_hf
from gspo.model.transformer import Transformer, abstract_params
from gspo.model.upcycle import ROUTER_STD, Upcycling
from gspo.run.checkpoint import Checkpointer, restore_params
from gspo.run.identity import identity
from gspo.steps import make_model
from gspo.types import UserError
from scripts import export_hf, import_hf, upcycle
from tests import model_oracle as oracle
from tests.hf_folders import SPECS, assert_bit_equal, exported, needs_transformers, read_all

WHOLE, SPLIT = Upcycling(4, 2), Upcycling(8, 4, split=2)
DENSE = SPECS["LlamaForCausalLM"]
TOKENS_BT, FIRST_B = np.random.default_rng(0).integers(0, 40, (3, 12)).astype(np.int32), np.array([0, 3, 5], np.int32)
REAL_BT = np.arange(12) >= FIRST_B[:, None]


@functools.cache
def dense_logits():
    return np.asarray(oracle.forward(DENSE)(oracle.build(DENSE)[1], TOKENS_BT, FIRST_B)[1])[REAL_BT]


@functools.cache
def upcycled(plan):
    """(spec, params), with a router of the size that training gives it: small ones would hide a gate that is wrong."""
    params = plan.params(oracle.build(DENSE)[1], jax.random.key(0))
    assert np.asarray(params["blocks"]["moe"]["router"]).std() == pytest.approx(ROUTER_STD, rel=0.3)
    params["blocks"]["moe"]["router"] *= 20
    return plan.spec(DENSE), params


def moe_logits(plan, *experts):
    """(free routes [L, B, T, X], logits of the real tokens); experts: those that run, in place of the free choice."""
    spec, params = upcycled(plan)
    given = experts or (-1,) * plan.experts_per_token
    routes = np.broadcast_to(np.array(given, np.int8), (spec.num_layers, *TOKENS_BT.shape, plan.experts_per_token))
    out, logits = oracle.forward(spec)(params, TOKENS_BT, FIRST_B, routes)
    return np.asarray(out.free_routes_LBTX), np.asarray(logits)[REAL_BT]


@pytest.mark.parametrize("plan", [WHOLE, SPLIT], ids=["whole", "split"])
def test_an_upcycled_model_has_the_logits_of_the_dense_one_whatever_its_router_chooses(plan):
    # Catches gates that do not sum to 1, parts in another order in up than in down, a part without its scale, a copy
    # that is chosen in part.
    expected, (routes, found) = dense_logits(), moe_logits(plan)
    assert len(np.unique(routes[:, REAL_BT])) == plan.experts, "all experts must have run"
    assert np.std(expected) > 0.3 and np.abs(found - expected).max() < 1e-5
    copies = np.sort(routes, axis=-1).reshape(*routes.shape[:-1], -1, plan.split)
    assert (copies % plan.split == np.arange(plan.split)).all() and (np.ptp(copies // plan.split, axis=-1) == 0).all()


def test_the_split_form_is_the_dense_function_for_whole_copies_only():
    # Catches the claim that it is one whatever is chosen: with a part twice, or parts at other gates, it is not.
    def error(*experts):
        return np.abs(moe_logits(SPLIT, *experts)[1] - dense_logits()).max()

    assert error(6, 7, 0, 1) < 1e-5 and error(1, 4, 5, 0) < 1e-5  # copies 3 and 0; 0 and 2
    assert error(0, 2, 4, 6) > 0.1  # the first part four times
    assert error(0, 2, 5, 7) > 0.01  # each part twice, but of copies whose gates differ


def test_noise_is_of_the_size_asked_for_and_another_for_each_expert():
    # Catches one draw for all experts, a size in absolute numbers, and noise on what is no expert.
    clean = upcycled(WHOLE)[1]
    noisy = dataclasses.replace(WHOLE, noise=0.1).params(oracle.build(DENSE)[1], jax.random.key(0))
    noisy["blocks"]["moe"]["router"] *= 20
    for name in ("gate", "up", "down"):
        added = np.asarray(noisy["blocks"]["moe"][name] - clean["blocks"]["moe"][name])
        size = added.std(axis=(2, 3)) / np.asarray(clean["blocks"]["moe"][name]).std(axis=(2, 3))
        np.testing.assert_allclose(size, 0.1, rtol=0.2)
        assert np.abs(np.corrcoef(added.reshape(8, -1)) - np.eye(8)).max() < 0.4
        noisy["blocks"]["moe"][name] = clean["blocks"]["moe"][name]
    assert_bit_equal(noisy, clean)


# ---------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """What scripts/import_hf.py writes of a Llama with a tokenizer, and keys that are no matter of ours."""
    folder = tmp_path_factory.mktemp("dense")
    exported(folder / "hf", "LlamaForCausalLM")
    ids = {token: i for i, token in enumerate(["<unk>", "</s>", "a", "b"])}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>")).save(str(folder / "hf/tokenizer.json"))
    (folder / "hf/tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    config = json.loads((folder / "hf/config.json").read_text())
    (folder / "hf/config.json").write_text(json.dumps(config | {"eos_token_id": 1, "max_position_embeddings": 99}))
    import_hf.main([f"--model-dir={folder / 'hf'}", f"--out={folder / 'imported'}"])
    return folder / "imported"


def run(source, out, *more, experts=4, experts_per_token=2):
    sizes = [f"--experts={experts}", f"--experts_per_token={experts_per_token}"]
    return upcycle.main([f"--from={source}", f"--out={out}", *sizes, *more])


@pytest.fixture(scope="module")
def made(imported):
    """The folder of an upcycled model, and that of its export."""
    run(imported, imported.parent / "moe", "--seed=3", "--mesh=fsdp=2,expert=2")
    export_hf.main([f"--checkpoint={imported.parent / 'moe'}", f"--out={imported.parent / 'out'}"])
    return imported.parent / "moe", imported.parent / "out"


def test_the_script_makes_a_folder_that_starts_a_run(made, capsys):
    # Catches a checkpoint that says it is dense, a tokenizer left behind, copies of something else, a router that
    # depends on the mesh.
    config = base.rl()
    config.init_from = str(made[0])
    plan = build.rl_plan(config)
    tokenizer = make_tokenizer(plan.data.tokenizer)
    spec = make_model(plan.model, tokenizer).spec
    assert tokenizer.encode("a") == [2] and (spec.num_experts, spec.experts_per_token, spec.d_expert) == (4, 2, 24)
    step, params = restore_params(made[0], abstract_params(Transformer(spec)))
    expected = WHOLE.params(oracle.build(DENSE)[1], jax.random.key(3))
    assert step == 0 and not np.array_equal(
        params["blocks"]["moe"]["router"], upcycled(WHOLE)[1]["blocks"]["moe"]["router"] / 20
    )
    assert_bit_equal(params, expected)


def test_an_upcycled_model_is_exported_as_a_mixtral_and_comes_back(made):
    # Catches a config.json of the dense family, and token ids and lengths that are lost on the way.
    config = read_config(made[1])
    assert config["architectures"] == ["MixtralForCausalLM"] and config["model_type"] == "mixtral"
    assert (config["eos_token_id"], config["max_position_embeddings"], config["num_local_experts"]) == (1, 99, 4)
    assert (made[1] / "tokenizer.json").read_text() == (made[0] / "tokenizer" / "tokenizer.json").read_text()
    spec = spec_from_hf(config)
    assert spec == WHOLE.spec(dataclasses.replace(DENSE, moe_backend="auto"))
    again = hf.import_params(made[1], spec, abstract_params(Transformer(spec)))
    assert_bit_equal(again, restore_params(made[0], abstract_params(Transformer(spec)))[1])
    w1 = [read_all(made[1])[f"model.layers.1.block_sparse_moe.experts.{e}.w1.weight"] for e in (0, 3)]
    np.testing.assert_array_equal(*w1)


def test_what_began_from_an_upcycled_model_is_exported_as_a_mixtral_too(made, tmp_path):
    # Catches an export that starts from the dense model's config.json, which lies beside the tokenizer of a run.
    spec = WHOLE.spec(dataclasses.replace(DENSE, moe_backend="auto"))
    tokenizer = make_tokenizer(str(made[0] / "tokenizer"))
    save_files(tokenizer, tmp_path / "run" / "tokenizer")
    assert read_config(tmp_path / "run" / "tokenizer")["architectures"] == ["LlamaForCausalLM"]
    with Checkpointer(tmp_path / "run", async_save=False, identity=identity(spec, tokenizer)) as checkpointer:
        checkpointer.save(3, {"params": upcycled(WHOLE)[1]}, {})
    export_hf.main([f"--checkpoint={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"])
    config = read_config(tmp_path / "out")
    assert config["architectures"] == ["MixtralForCausalLM"] and spec_from_hf(config) == spec
    assert (config["eos_token_id"], config["max_position_embeddings"]) == (1, 99)


@needs_transformers
def test_transformers_gives_the_dense_models_logits_from_the_exported_moe(made, imported):
    # Catches an export whose router or experts mean something else to transformers.
    import torch
    import transformers

    tokens = torch.tensor(TOKENS_BT[:1]).long()
    logits = []
    for folder in (imported.parent / "hf", made[1]):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        logits.append(model.eval().float()(tokens).logits.detach().numpy())
    assert np.std(logits[0]) > 0.3 and np.abs(logits[1] - logits[0]).max() < 1e-5


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The workdir of a run that was trained here, with a tokenizer that has no files: no hf/, no tokenizer/."""
    folder = tmp_path_factory.mktemp("plain")
    spec, params = SPECS["Qwen3ForCausalLM"], oracle.build(SPECS["Qwen3ForCausalLM"])[1]
    own = identity(spec, make_tokenizer("chars:01="))
    with Checkpointer(folder, async_save=False, identity=own) as checkpointer:
        checkpointer.save(7, {"params": params, "step": params["final_norm"]["scale"]}, {})
    return folder


def test_any_dense_run_can_be_upcycled(plain, tmp_path, capsys):
    # Catches a script that needs files of an import; and a Qwen3 that is exported as something else.
    run(plain, tmp_path / "moe", "--split=2")
    printed = capsys.readouterr().out
    assert "Qwen3MoeForCausalLM, 2 of 4 experts run" in printed and "from step 7" in printed
    assert printed.endswith(f"--config.init_from={tmp_path / 'moe'}\n")
    config = base.sft()
    config.init_from = str(tmp_path / "moe")
    assert build.sft_plan(config).data.tokenizer == "chars:01="


def test_what_has_no_architecture_as_a_moe_trains_and_says_that_it_cannot_be_exported(tmp_path, capsys):
    # Catches Qwen2.5, which cannot be upcycled for want of a name.
    spec = SPECS["Qwen2ForCausalLM"]
    with Checkpointer(tmp_path / "run", async_save=False, identity=identity(spec, make_tokenizer("chars:01="))) as to:
        to.save(7, {"params": oracle.build(spec)[1]}, {})
    run(tmp_path / "run", tmp_path / "moe")
    assert "no Hugging Face architecture, so that it cannot be exported" in capsys.readouterr().out
    config = base.sft()
    config.init_from = str(tmp_path / "moe")
    assert make_model(build.sft_plan(config).model, make_tokenizer("chars:01=")).spec.qkv_bias
    with pytest.raises(UserError, match="no Hugging Face architecture has"):
        export_hf.main([f"--checkpoint={tmp_path / 'moe'}", f"--out={tmp_path / 'out'}"])


def test_mistakes_are_one_line(plain, made, tmp_path):
    # Catches a traceback, experts of half a neuron, a folder that is overwritten.
    for source, out, more, sizes, words in (
        (made[0], tmp_path / "a", (), {}, "--from: its model has 4 experts already"),
        (tmp_path / "none", tmp_path / "a", (), {}, "none: there is no such folder"),
        (tmp_path, tmp_path / "a", (), {}, "no checkpoint"),
        (plain, made[0], (), {}, "already holds checkpoints"),
        (plain, tmp_path / "a", (), {"experts_per_token": 5}, "--experts_per_token=5: must be in 1..4"),
        (plain, tmp_path / "a", ("--split=3",), {}, "--experts=4: must be a multiple of --split=3"),
        (plain, tmp_path / "a", ("--split=2",), {"experts_per_token": 1}, "--experts_per_token=1: must be a multiple"),
        (plain, tmp_path / "a", ("--split=5",), {"experts": 10, "experts_per_token": 5}, "must divide the 24 neurons"),
        (plain, tmp_path / "a", ("--noise=-1",), {}, "--noise=-1.0: must not be negative"),
        (plain, tmp_path / "a", (), {"experts": "x"}, "--experts"),
    ):
        with pytest.raises(UserError) as error:
            run(source, out, *more, **sizes)
        assert words in str(error.value) and "\n" not in str(error.value), words
    assert not (tmp_path / "a").exists()
