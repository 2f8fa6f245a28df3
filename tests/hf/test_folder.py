"""Folders of safetensors, in and out, bit by bit; those that are not what they say; the scripts that read and write."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from configs import base
from gspo import build
from gspo.data.tokenizer import make_tokenizer
from gspo.hf import folder as hf
from gspo.hf.families import hf_config, read_config, spec_from_hf
from gspo.model.spec import ModelSpec
from gspo.model.transformer import Transformer, abstract_params
from gspo.parallel.sharding import Layout, make_mesh
from gspo.run.checkpoint import restore_params
from gspo.steps import make_model
from gspo.types import UserError
from scripts import export_hf, import_hf
from tests import model_oracle as oracle
from tests.hf_folders import SPECS, all_families, assert_bit_equal, exported, read_all


@all_families
def test_parameters_come_back_bit_equal_through_an_export(family, tmp_path):
    # Catches layers or experts stacked in another order, a lost transpose, a cast. Small shards, so that the index
    # counts.
    spec, params, folder = exported(tmp_path / "a", family, shard_bytes=4000)
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert spec_from_hf(read_config(folder), moe_backend="dense") == spec
    again = hf.import_params(folder, spec, abstract_params(Transformer(spec)))
    assert_bit_equal(again, params)
    hf.export_params(again, spec, tmp_path / "b", shard_bytes=4000)
    for file in sorted(folder.iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_the_names_and_shapes_on_disk_are_those_of_the_published_checkpoints(tmp_path):
    # Catches a table that is consistent with itself and with nobody else. Written by hand from the published indices.
    def layer(i, moe):
        yield from ((f"model.layers.{i}.{norm}_layernorm.weight", (16,)) for norm in ("input", "post_attention"))
        yield from (
            (f"model.layers.{i}.self_attn.{kind}_proj.weight", (size, 16))
            for kind, size in (("q", 24), ("k", 12), ("v", 12))
        )
        yield f"model.layers.{i}.self_attn.o_proj.weight", (16, 24)
        yield f"model.layers.{i}.{moe}.gate.weight", (4, 16)

    top = {"model.embed_tokens.weight": (40, 16), "model.norm.weight": (16,), "lm_head.weight": (40, 16)}
    mixtral, qwen = (top | {k: v for i in (0, 1) for k, v in layer(i, moe)} for moe in ("block_sparse_moe", "mlp"))
    for i, e in np.ndindex(2, 4):
        for ours, theirs, shape in (("gate", "w1", (10, 16)), ("up", "w3", (10, 16)), ("down", "w2", (16, 10))):
            qwen[f"model.layers.{i}.mlp.experts.{e}.{ours}_proj.weight"] = shape
            mixtral[f"model.layers.{i}.block_sparse_moe.experts.{e}.{theirs}.weight"] = shape
    qwen |= {f"model.layers.{i}.self_attn.{kind}_norm.weight": (6,) for i in (0, 1) for kind in "qk"}
    for family, expected in (("MixtralForCausalLM", mixtral), ("Qwen3MoeForCausalLM", qwen)):
        _, params, folder = exported(tmp_path / family, family)
        found = read_all(folder)
        assert {name: x.shape for name, x in found.items()} == expected
        assert set(json.loads((folder / hf.INDEX).read_text())["weight_map"]) == set(expected)
        np.testing.assert_array_equal(found["lm_head.weight"], np.asarray(params["head"]).T)
    np.testing.assert_array_equal(
        found["model.layers.1.mlp.experts.3.up_proj.weight"], params["blocks"]["moe"]["up"][1, 3].T
    )


def test_bfloat16_folders_are_read_exactly_and_written_back_unchanged(tmp_path):
    # Catches bf16 read as uint16 or float16, and an export that rounds what it need not round.
    spec = SPECS["Qwen3MoeForCausalLM"]
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), oracle.build(spec)[1])
    hf.export_params(params, spec, tmp_path / "a", dtype="bfloat16")
    assert {x.dtype.name for x in read_all(tmp_path / "a").values()} == {"bfloat16"}
    assert read_config(tmp_path / "a")["torch_dtype"] == "bfloat16"
    assert_bit_equal(hf.import_params(tmp_path / "a", spec, abstract_params(Transformer(spec))), params)


def test_the_bias_of_a_sigmoid_router_stays_float32_in_a_bfloat16_export(tmp_path):
    # Catches a bias that is rounded, after which other experts are chosen; published folders keep it in float32 too.
    spec, params, folder = exported(tmp_path, "Dots1ForCausalLM", dtype="bfloat16")
    kept = {name for name, x in read_all(folder).items() if x.dtype == np.float32}
    assert kept == {f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2)}
    again = hf.import_params(folder, spec, abstract_params(Transformer(spec)))
    bias = [tree["blocks"]["moe"]["selection"]["bias"] for tree in (again, params)]
    np.testing.assert_array_equal(*bias)
    sizes = sum(x.nbytes for x in read_all(folder).values())
    assert json.loads((folder / hf.INDEX).read_text())["metadata"]["total_size"] == sizes


def test_an_import_onto_eight_devices_reads_no_more_than_the_part_of_one_device_at_a_time(tmp_path, monkeypatch):
    # Catches an import that is whole on the host before it is cut, parts that land on the wrong device, parts that are
    # read twice.
    spec, params, folder = exported(tmp_path, "Qwen3MoeForCausalLM")
    abstract = abstract_params(Transformer(spec), Layout(make_mesh(dict(fsdp=2, expert=2, tensor=2))))
    reads, safe_open = [], hf.safetensors.safe_open

    class Recorded:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)
            self.keys = self.file.keys

        def get_slice(self, name):
            entry = self.file.get_slice(name)

            class Slice:
                get_shape, get_dtype = entry.get_shape, entry.get_dtype

                def __getitem__(self, index):
                    reads.append((name, entry[index].size))
                    return entry[index]

            return Slice()

    monkeypatch.setattr(hf.safetensors, "safe_open", Recorded)
    cut = hf.import_params(folder, spec, abstract)
    assert_bit_equal(cut, params)
    for got, want in zip(jax.tree.leaves(cut), jax.tree.leaves(abstract), strict=True):
        assert got.sharding == want.sharding
    query = [size for name, size in reads if name.endswith("0.self_attn.q_proj.weight")]
    assert query == [24 * 16 // 8] * 8  # cut by fsdp, expert and tensor
    gate = [size for name, size in reads if name.endswith("0.mlp.experts.3.gate_proj.weight")]
    assert gate == [10 * 16 // 4] * 4
    hf.export_params(cut, spec, tmp_path / "again")
    assert_bit_equal(hf.import_params(tmp_path / "again", spec, abstract_params(Transformer(spec))), params)


def test_an_export_carries_over_the_tokenizer_and_the_keys_of_the_config_that_are_not_ours(tmp_path):
    # Catches an exported model that cannot be prompted, and one that forgets its end-of-sequence token.
    source = tmp_path / "source"
    source.mkdir()
    spec = SPECS["Qwen3ForCausalLM"]
    extra = {"eos_token_id": 7, "max_position_embeddings": 99, "vocab_size": 1}
    (source / "config.json").write_text(json.dumps(hf_config(spec) | extra))
    for name in ("tokenizer.json", "merges.txt", "pytorch_model.bin"):
        (source / name).write_text(name)
    hf.export_params(oracle.build(spec)[1], spec, tmp_path / "out", source=source)
    config = read_config(tmp_path / "out")
    assert (config["eos_token_id"], config["max_position_embeddings"], config["vocab_size"]) == (7, 99, 40)
    assert (tmp_path / "out" / "merges.txt").read_text() == "merges.txt"
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    with pytest.raises(UserError, match="not empty"):
        hf.export_params(oracle.build(spec)[1], spec, tmp_path / "out")


def rewrite(folder: Path, change) -> None:
    """One file without an index, its tensors changed in place."""
    tensors = read_all(folder)
    change(tensors)
    for file in (*folder.glob("*.safetensors"), folder / hf.INDEX):
        file.unlink(missing_ok=True)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def error_of(folder: Path, spec: ModelSpec) -> str:
    with pytest.raises(UserError) as error:
        hf.import_params(folder, spec, abstract_params(Transformer(spec)))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_surplus_and_misshapen_tensors_are_all_named_in_one_error(tmp_path):
    # Catches a layer that keeps its random weights, a bias that is dropped in silence, a transposed kernel that happens
    # to fit.
    spec, _, folder = exported(tmp_path, "Qwen3MoeForCausalLM")

    def damage(tensors):
        del tensors["model.layers.1.mlp.experts.2.up_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(24, np.float32)
        tensors["model.layers.0.self_attn.o_proj.weight"] = np.zeros((24, 16), np.float32)
        tensors["model.layers.0.mlp.gate.weight"] = np.zeros((4, 16), np.int8)

    rewrite(folder, damage)
    text = error_of(folder, spec)
    assert "missing: model.norm.weight; model.layers.1.mlp.experts.2.up_proj.weight." in text
    assert "surplus: model.layers.0.self_attn.q_proj.bias." in text
    assert "model.layers.0.self_attn.o_proj.weight is [24, 16] instead of [16, 24]" in text
    assert "model.layers.0.mlp.gate.weight is I8" in text


def test_layers_that_predict_further_tokens_are_left_out_and_no_others(tmp_path):
    # Catches a published GLM-4.5, which has one such layer, that is refused; and a layer too many that is dropped.
    spec, params, folder = exported(tmp_path / "glm", "Glm4MoeForCausalLM")
    more = {"model.layers.3.eh_proj.weight": np.zeros((2, 2), np.float32)}
    rewrite(folder, lambda t: t.update(more))
    assert_bit_equal(hf.import_params(folder, spec, abstract_params(Transformer(spec))), params)
    rewrite(folder, lambda t: t.update({"model.layers.2.eh_proj.weight": np.zeros(2, np.float32)}))
    assert "surplus: model.layers.2.eh_proj.weight" in error_of(folder, spec)
    spec, _, folder = exported(tmp_path / "dots", "Dots1ForCausalLM")
    rewrite(folder, lambda t: t.update(more))
    assert "surplus: model.layers.3.eh_proj.weight" in error_of(folder, spec)


def test_a_tied_folder_may_repeat_its_head_but_not_change_it(tmp_path):
    # Catches a published folder (Qwen3-0.6B stores both) that is refused, and a head of its own that would be dropped.
    spec, params, folder = exported(tmp_path, "LlamaForCausalLM")
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(3, np.float32)}
    rewrite(folder, lambda t: t.update(buffer | {"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert_bit_equal(hf.import_params(folder, spec, abstract_params(Transformer(spec))), params)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    assert "surplus: lm_head.weight" in error_of(folder, spec)


def test_pickled_weights_are_never_opened(tmp_path):
    # Catches the execution of a downloaded program: unpickling this one would create a file.
    spec, _, folder = exported(tmp_path / "a", "Qwen3ForCausalLM")
    for file in (*folder.glob("*.safetensors"), folder / hf.INDEX):
        file.unlink()
    assert "no model.safetensors" in error_of(folder, spec)
    ran = tmp_path / "ran"
    (folder / "pytorch_model.bin").write_bytes(b"cbuiltins\nopen\n(V" + str(ran).encode() + b"\nVw\ntR.")
    assert "pytorch_model.bin" in error_of(folder, spec) and not ran.exists()


def test_broken_files_and_indices_are_one_line_errors(tmp_path):
    # Catches a traceback from inside a library; and an index that reads files outside of its folder.
    spec, _, folder = exported(tmp_path, "Qwen3ForCausalLM", shard_bytes=4000)
    index, shard = folder / hf.INDEX, sorted(folder.glob("*.safetensors"))[1]
    text, data = index.read_text(), shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    assert shard.name in error_of(folder, spec)
    shard.unlink()
    assert shard.name in error_of(folder, spec)
    shard.write_bytes(data)
    for bad, words in (
        ("[]", "weight_map"),
        ("{", "weight_map"),
        (text.replace(shard.name, "../x.safetensors"), "../x.safetensors"),
        (text.replace(shard.name, "x.bin"), "x.bin"),
    ):
        index.write_text(bad)
        assert words in error_of(folder, spec)


def test_the_scripts_bring_a_folder_in_and_out_again_unchanged(tmp_path, capsys):
    # Catches a checkpoint that init_from cannot read, flags that describe another model, tokenizer files left behind.
    spec, params, folder = exported(tmp_path / "hf", "LlamaForCausalLM", shard_bytes=5000)
    ids = {token: i for i, token in enumerate(["<unk>", "</s>", "a", "b"])}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert import_hf.main(["--model-dir", str(folder), "--out", str(tmp_path / "ckpt"), "--mesh=fsdp=2,tensor=2"]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith(f"--config.init_from={tmp_path / 'ckpt'}\n")
    config = base.rl()
    config.init_from = str(tmp_path / "ckpt")  # alone: model and tokenizer come with it
    plan = build.rl_plan(config)
    tokenizer = make_tokenizer(plan.data.tokenizer)
    assert tokenizer.encode("a") == [2] and tokenizer.eos_ids == (1,)
    assert dataclasses.replace(make_model(plan.model, tokenizer).spec, moe_backend="dense") == spec
    step, restored = restore_params(tmp_path / "ckpt", abstract_params(Transformer(spec)))
    assert step == 0
    assert_bit_equal(restored, params)

    assert export_hf.main(["--checkpoint", str(tmp_path / "ckpt"), "--out", str(tmp_path / "out")]) == 0
    assert "tokenizer.json" in capsys.readouterr().out and (tmp_path / "out" / "tokenizer.json").is_file()
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()
    assert_bit_equal(hf.import_params(tmp_path / "out", spec, abstract_params(Transformer(spec))), params)


@pytest.mark.parametrize(("script", "argv", "words"), [
    ("import_hf", ["--model-dir=nowhere", "--out=x"], "--model-dir=nowhere"), ("import_hf", ["--out=x"], "--model-dir"),
    ("export_hf", ["--checkpoint=nowhere", "--out=x"], "--checkpoint=nowhere"),
    ("export_hf", ["--checkpoint=nowhere", "--out=x", "--shard-gb=0"], "--shard-gb"),
    ("export_hf", ["--checkpoint=nowhere", "--out=x", "--dtype=float8"], "--dtype"),
])  # fmt: skip
def test_mistakes_at_the_command_line_are_one_line_and_exit_code_2(script, argv, words, monkeypatch, capsys):
    # Catches a traceback for a mistyped path.
    path = Path(__file__).parents[2] / "scripts" / f"{script}.py"
    monkeypatch.setattr(sys, "argv", [str(path), *argv])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
