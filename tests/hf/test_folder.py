"""Hugging Face folders: the same numbers as transformers, nothing lost on the way in and out, and no tensor misplaced
in silence.

The comparisons with transformers skip where it or torch is missing: pip install -e '.[hf-tests]'.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from configs import base, models
from gspo import build
from gspo.data.tokenizer import CharTokenizer, make_tokenizer
from gspo.hf import folder as hf
from gspo.hf.families import FAMILIES, family_of, hf_config, read_config, spec_from_hf
from gspo.learning.sampler import make_sampler
from gspo.model.distribution import Sampling
from gspo.model.spec import TOY, ModelSpec
from gspo.model.transformer import Transformer, abstract_params
from gspo.parallel.sharding import Layout, make_mesh
from gspo.run.checkpoint import restore_params
from gspo.steps import make_model
from gspo.types import UserError
from scripts import export_hf, import_hf
from tests import model_oracle as oracle
from tests.model_oracle import quick_compiles  # noqa: F401 - a fixture

needs_transformers = pytest.mark.skipif(
    not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")),
    reason="needs torch and transformers: pip install -e '.[hf-tests]'",
)

TINY = ModelSpec(
    vocab_size=40,
    num_layers=2,
    d_model=16,
    num_heads=4,
    num_kv_heads=2,
    head_width=6,
    d_ff=24,
    rope_theta=100.0,
    moe_backend="dense",
)
TINY_MOE = dataclasses.replace(TINY, d_ff=0, num_experts=4, experts_per_token=2, d_expert=10)
SPECS = {
    "Qwen3ForCausalLM": TINY,
    "Qwen3MoeForCausalLM": TINY_MOE,
    "MixtralForCausalLM": dataclasses.replace(TINY_MOE, qk_norm=False),
    "LlamaForCausalLM": dataclasses.replace(
        TINY, qk_norm=False, tie_embeddings=True, rope_scaling=(8.0, 1.0, 4.0, 64.0)
    ),
    "OlmoeForCausalLM": dataclasses.replace(TINY_MOE, qk_norm_over="projection", norm_topk_prob=False, head_width=4),
}
all_families = pytest.mark.parametrize("family", SPECS)


def exported(folder: Path, family: str, **options):
    """(spec, params, folder) of random parameters, written by ours."""
    spec = SPECS[family]
    _, params = oracle.build(spec)
    hf.export_params(params, spec, folder, **options)
    return spec, params, folder


def assert_bit_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, g), w in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype), path
        assert np.asarray(g).tobytes() == np.asarray(w).tobytes(), path


def read_all(folder: Path) -> dict[str, np.ndarray]:
    return {name: x for file in folder.glob("*.safetensors") for name, x in safetensors.numpy.load_file(file).items()}


# ---------------------------------------------------------------- against transformers


LLAMA3 = dict(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64, rope_type="llama3"
)
SHAPE = dict(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=256,
    bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
MOE = dict(num_experts=6, num_experts_per_tok=2)


def case(name, family, *, kv, tied=False, theta=100.0, scaling=None, slow=True, **fields):
    rope = dict(scaling or dict(rope_type="default")) | dict(rope_theta=theta)
    fields = SHAPE | dict(num_key_value_heads=kv, tie_word_embeddings=tied, rope_parameters=rope) | fields
    return pytest.param(family, tuple((key, json.dumps(value)) for key, value in fields.items()), id=name,
                        marks=[pytest.mark.slow] if slow else [])  # fmt: skip


Q, QM, MX, LL, OL = "Qwen3", "Qwen3Moe", "Mixtral", "Llama", "Olmoe"
CASES = [
    case("qwen3-gqa2-untied-wide-head", Q, kv=2, head_dim=12, slow=False),
    case(
        "qwen3moe-gqa4-renormalised",
        QM,
        kv=1,
        head_dim=12,
        norm_topk_prob=True,
        moe_intermediate_size=20,
        **MOE,
        slow=False,
    ),
    case("mixtral-gqa2", MX, kv=2, num_local_experts=4, num_experts_per_tok=2, slow=False),
    case("llama3-gqa2-tied-scaled", LL, kv=2, tied=True, scaling=LLAMA3, slow=False),
    case("olmoe-gqa1-not-renormalised", OL, kv=4, norm_topk_prob=False, **MOE, slow=False),
    case("qwen3-gqa1-tied", Q, kv=4, tied=True, head_dim=8, rms_norm_eps=1e-2),
    case("qwen3-gqa4-narrow-head", Q, kv=1, head_dim=4, theta=1e6),
    case(
        "qwen3moe-gqa1-not-renormalised-tied",
        QM,
        kv=4,
        tied=True,
        head_dim=4,
        norm_topk_prob=False,
        moe_intermediate_size=20,
        **MOE,
    ),
    case(
        "qwen3moe-gqa2-one-expert",
        QM,
        kv=2,
        norm_topk_prob=True,
        moe_intermediate_size=20,
        num_experts=6,
        num_experts_per_tok=1,
    ),
    case("mixtral-gqa1-tied", MX, kv=4, tied=True, num_local_experts=8, num_experts_per_tok=3),
    case(
        "mixtral-gqa4-wide-head", MX, kv=1, head_dim=12, num_local_experts=4, num_experts_per_tok=2, rms_norm_eps=1e-2
    ),
    case("llama2-gqa1-untied", LL, kv=4, theta=1e4),
    case("llama3-gqa4-wide-head-scaled", LL, kv=1, head_dim=12, scaling=LLAMA3, theta=1e4),
    case("olmoe-gqa2-renormalised", OL, kv=2, norm_topk_prob=True, **MOE),
    case("olmoe-gqa4-tied", OL, kv=1, tied=True, norm_topk_prob=False, **MOE),
]
all_cases = pytest.mark.parametrize(("family", "fields"), CASES)
FEW = "qwen3moe-gqa4-renormalised"  # of the default run, where every case would take too long
few_cases = pytest.mark.parametrize(
    ("family", "fields"),
    [pytest.param(*c.values, id=c.id, marks=[] if c.id == FEW else pytest.mark.slow) for c in CASES],
)


@functools.cache
def torch_model(family, fields):
    """transformers' own model with random weights; norm scales are not 1, so that a forgotten one shows."""
    import torch
    import transformers

    config = getattr(transformers, f"{family}Config")(**{key: json.loads(value) for key, value in fields})
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            noise = torch.randn(param.shape, generator=generator)
            param.copy_(1 + 0.2 * noise if param.ndim == 1 else noise * param.shape[-1] ** -0.5 * 1.5)
    return model


@functools.cache
def imported(family, fields, folder: Path):
    """(spec, params) of transformers' model, through a folder that transformers wrote, in several shards."""
    torch_model(family, fields).save_pretrained(folder, max_shard_size="30KB")
    spec = spec_from_hf(read_config(folder), moe_backend="dense")
    return spec, hf.import_params(folder, spec, abstract_params(Transformer(spec)))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    return functools.cache(lambda *case: tmp_path_factory.mktemp("transformers"))


def padded_prompts(lengths, width=24):
    rng = np.random.default_rng(0)
    return oracle.left_padded([rng.integers(0, 40, n) for n in lengths], width, rng, 40)


def torch_logits(model, tokens_BT, first_B):
    import torch

    mask_BT = np.arange(tokens_BT.shape[1]) >= first_B[:, None]
    positions_BT = np.maximum(np.cumsum(mask_BT, axis=1) - 1, 0)
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(tokens_BT).long(),
            attention_mask=torch.tensor(mask_BT).long(),
            position_ids=torch.tensor(positions_BT),
        )
    return out.logits.numpy(), mask_BT


@needs_transformers
@all_cases
def test_float32_logits_agree_with_transformers_under_left_padding(family, fields, folder_of):
    # Catches any difference of formula or layout: a kernel not transposed, gate and up exchanged, heads interleaved,
    # QK-norm after RoPE or over the wrong width, gates of the other kind of router, an unscaled frequency, the wrong
    # eps, theta or head width.
    spec, params = imported(family, fields, folder_of(family, fields))
    tokens_BT, first_B = padded_prompts((24, 17, 9, 1))
    expected, mask_BT = torch_logits(torch_model(family, fields), tokens_BT, first_B)
    _, logits = oracle.forward(spec)(params, tokens_BT, first_B)
    error, expected = np.abs(np.asarray(logits) - expected)[mask_BT], expected[mask_BT]
    assert np.std(expected) > 0.3, "the comparison is empty if all logits are small"
    assert error.max() < 2e-4
    assert np.linalg.norm(error) / np.linalg.norm(expected) < 1e-4
    assert (error <= 2e-4 + 1e-4 * np.abs(expected)).all()


@needs_transformers
@few_cases
def test_64_greedy_tokens_agree_with_transformers_token_by_token(family, fields, folder_of):
    # Catches a cache, a position or a mask that goes wrong with the length of the completion only.
    import torch

    spec, params = imported(family, fields, folder_of(family, fields))
    tokens_BT, first_B = padded_prompts((8, 5, 2), width=8)
    mask_BT = np.arange(8) >= first_B[:, None]
    out = torch_model(family, fields).generate(
        input_ids=torch.tensor(tokens_BT).long(), attention_mask=torch.tensor(mask_BT).long(), max_new_tokens=64,
        do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    sample = make_sampler(
        Transformer(spec),
        num_generations=1,
        max_completion_length=64,
        eos_ids=(-1,),
        pad_id=0,
        sampling=Sampling(temperature=0.0),
    )
    rollout = sample(params, jnp.asarray(tokens_BT), jnp.asarray(8 - first_B), jax.random.key(0))
    np.testing.assert_array_equal(rollout.tokens_BT[:, 8:], out.numpy()[:, 8:])


@needs_transformers
@few_cases
def test_transformers_loads_the_exported_folder_and_gives_the_same_logits(family, fields, folder_of, tmp_path):
    # Catches an export that only our own import understands: names, shapes, the index, a config.json that says
    # something else.
    import transformers

    spec, params = imported(family, fields, folder_of(family, fields))
    hf.export_params(params, spec, tmp_path / "out", shard_bytes=30_000, source=folder_of(family, fields))
    assert_bit_equal(hf.import_params(tmp_path / "out", spec, abstract_params(Transformer(spec))), params)
    model, info = getattr(transformers, f"{family}ForCausalLM").from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True, dtype="float32"
    )
    assert not any(info.values()), info
    tokens_BT, first_B = padded_prompts((24, 10))
    expected, mask_BT = torch_logits(torch_model(family, fields), tokens_BT, first_B)
    logits, _ = torch_logits(model.eval(), tokens_BT, first_B)
    np.testing.assert_array_equal(logits[mask_BT], expected[mask_BT])


# ---------------------------------------------------------------- in and out


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


# ---------------------------------------------------------------- folders that are not what they say


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


# ---------------------------------------------------------------- config.json


def published(**changes):
    """config.json of a published Qwen3-30B-A3B, as far as it describes the model, in the style of transformers 4."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "decoder_sparse_step": 1,
        "eos_token_id": 151643,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
        "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
    } | changes  # fmt: skip


def spec_of(name: str) -> ModelSpec:
    fields = TOY | {field: value for field, value in models.model(name).to_dict().items() if value is not None}
    return ModelSpec(**fields | {"vocab_size": fields["vocab_size"] or 8192})


def test_a_published_config_describes_the_model_of_that_name():
    # Catches a constant copied wrongly, and a key that is read under another name.
    assert spec_from_hf(published(), dtype="bfloat16", moe_backend="ragged", remat=True) == spec_of("qwen3-30b-a3b")
    assert not spec_from_hf(published() | {"norm_topk_prob": False}).norm_topk_prob
    without = {
        key: value for key, value in published().items() if key not in ("norm_topk_prob", "num_experts", "head_dim")
    }
    spec = spec_from_hf(without | {"num_local_experts": 128})  # transformers 5 writes this name
    assert (spec.norm_topk_prob, spec.num_experts, spec.head_width) == (False, 128, 64)


@pytest.mark.parametrize(("changes", "words"), [
    (dict(architectures=["GPT2LMHeadModel"]), "Qwen3ForCausalLM, Qwen3MoeForCausalLM, MixtralForCausalLM, "
                                              "LlamaForCausalLM, Olmoe"),
    (dict(attention_bias=True), "attention_bias"), (dict(hidden_act="gelu"), "hidden_act"),
    (dict(mlp_only_layers=[3]), "mlp_only"),
    (dict(decoder_sparse_step=2), "decoder_sparse_step"),
    (dict(sliding_window=4096, use_sliding_window=True), "sliding_window"),
    (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "yarn"),
    (dict(rope_scaling={"type": "llama3", "factor": 4.0}), "low_freq"),
    (dict(quantization_config={"bits": 4}), "quantization_config"), (dict(num_attention_heads=30), "num_heads"),
])  # fmt: skip
def test_a_config_that_we_do_not_compute_is_an_error_and_never_an_approximation(changes, words):
    # Catches a model that loads and is subtly wrong: sliding windows, dense layers among the experts, other rotary
    # rules.
    with pytest.raises(UserError, match=words):
        spec_from_hf(published(**changes))


def test_a_config_without_a_needed_key_names_it():
    # Catches a KeyError, and a silent default for something that no default can know.
    config = published()
    del config["moe_intermediate_size"]
    with pytest.raises(UserError, match="moe_intermediate_size"):
        spec_from_hf(config)


@all_families
def test_a_spec_knows_its_family_and_survives_its_config(family):
    # Catches an export under another architecture's name, whose router or norm would differ.
    assert family_of(SPECS[family]) == family
    assert spec_from_hf(hf_config(SPECS[family]), moe_backend="dense") == SPECS[family]
    assert SPECS.keys() == FAMILIES.keys()


def test_a_spec_of_no_family_is_a_one_line_error():
    # Catches an export that drops what makes the model different.
    plain_moe = dataclasses.replace(TINY_MOE, qk_norm=False, norm_topk_prob=False)
    for odd in (dataclasses.replace(TINY, qk_norm_over="projection"), plain_moe):
        with pytest.raises(UserError, match="no Hugging Face architecture"):
            family_of(odd)


# ---------------------------------------------------------------- configs/models.py


@pytest.mark.parametrize(("name", "family", "parameters"), [
    ("toy", "Qwen3Moe", 0.45e6), ("moe-30m", "Qwen3Moe", 29e6), ("moe-150m", "Qwen3Moe", 148e6),
    ("moe-500m", "Qwen3Moe", 493e6),
    ("qwen3-0.6b", "Qwen3", 596_049_920), ("qwen3-1.7b", "Qwen3", 1_720_574_976), ("qwen3-4b", "Qwen3", 4_022_468_096),
    ("qwen3-8b", "Qwen3", 8_190_735_360), ("qwen3-30b-a3b", "Qwen3Moe", 30_532_122_624),
    ("qwen3-235b-a22b", "Qwen3Moe", 235_093_634_560), ("mixtral-8x7b", "Mixtral", 46_702_792_704),
    ("llama-3.2-1b", "Llama", 1_235_814_400), ("olmoe-1b-7b", "Olmoe", 6_919_161_856),
])  # fmt: skip
def test_models_have_the_published_number_of_parameters(name, family, parameters):
    # Catches a wrong width, depth, vocabulary or tying. Published models to the last parameter, ours to 3 in 100.
    spec = spec_of(name) if name != "toy" else dataclasses.replace(spec_of(name), vocab_size=13)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_params(Transformer(spec))))
    assert family_of(spec) == f"{family}ForCausalLM"
    assert count == parameters if parameters % 1000 else count == pytest.approx(parameters, rel=0.03)
    assert spec_from_hf(hf_config(spec), dtype=spec.dtype, moe_backend=spec.moe_backend, remat=spec.remat) == spec


def test_all_models_are_counted_and_an_unknown_name_lists_them():
    # Catches a model that was added and never counted.
    counted = test_models_have_the_published_number_of_parameters.pytestmark[0].args[1]
    assert {row[0] for row in counted} == set(models.MODELS)
    with pytest.raises(ValueError, match=r"qwen3-0\.6b"):
        models.model("gpt-2")


# ---------------------------------------------------------------- scripts


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


def test_a_vocabulary_that_is_smaller_than_the_tokenizers_is_refused():
    # Catches ids that the embedding would clamp to its last row.
    config = base.rl()
    config.model.vocab_size = 3
    with pytest.raises(UserError, match="vocab_size=3"):
        make_model(build.rl_plan(config).model, CharTokenizer("0123"))
    config.model.vocab_size = 64
    assert make_model(build.rl_plan(config).model, CharTokenizer("0123")).spec.vocab_size == 64
