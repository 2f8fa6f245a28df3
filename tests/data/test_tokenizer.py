"""Tokenizers: round trips, hostile ids, what identifies one, and the script that trains one."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo.data.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    HFTokenizer,
    difference,
    fingerprint,
    make_tokenizer,
    save_files,
)
from gspo.types import UserError
from tests.tokenizer_folders import CHAT, write_folder


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> HFTokenizer:
    return make_tokenizer(str(write_folder(tmp_path_factory.mktemp("hf"))))


@settings(deadline=None)
@given(st.text())
def test_bytes_give_every_text_back(text):
    # Catches: code points taken for bytes; "\r\n" or NUL lost. Lone surrogates have no UTF-8 and may change.
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert all(0 <= i < 256 for i in ids)
    assert tokenizer.decode(ids) == text.encode("utf-8", "replace").decode()


@settings(deadline=None)
@given(ids=st.lists(st.integers(-(2**40), 2**40)))
def test_no_ids_make_decode_raise(hf, ids):
    # Catches: an untrained policy that samples broken UTF-8, special tokens or ids beyond the tokenizer (model
    # vocabularies are padded to round sizes), and with one of them ends the run.
    for tokenizer in (ByteTokenizer(), CharTokenizer("01="), hf):
        assert isinstance(tokenizer.decode(ids), str)
        assert isinstance(tokenizer.decode([i % (tokenizer.vocab_size + 3) for i in ids]), str)


@pytest.mark.parametrize("spec", ["bytes", "chars:0123456789=", "folder"])
def test_pad_and_eos_are_ids_of_the_vocabulary_and_decode_to_nothing(spec, hf):
    # Catches: eos left in the text that a reward sees ("348<eos>" is no exact match); an embedding table one row too
    # small.
    tokenizer = hf if spec == "folder" else make_tokenizer(spec)
    ids = tokenizer.encode("314=")
    assert tokenizer.pad_id < tokenizer.vocab_size and all(eos < tokenizer.vocab_size for eos in tokenizer.eos_ids)
    assert not {tokenizer.pad_id, *tokenizer.eos_ids} & set(ids)
    assert tokenizer.decode([tokenizer.pad_id, *ids, *tokenizer.eos_ids, tokenizer.pad_id]) == "314="


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("byte", ["'byte'", "'bytes'", "chars:"]),
        ("", ["tokenizer='': unknown"]),
        ("no/such/folder", ["no/such/folder", "nothing is there"]),
        ("chars:", ["tokenizer='chars:': the alphabet is empty"]),
        ("chars:0102", ["repeats '0'"]),
    ],
)
def test_an_unknown_tokenizer_is_one_line_that_says_what_there_is(spec, words):
    # Catches: a traceback, or a silent fallback to bytes.
    with pytest.raises(UserError) as error:
        make_tokenizer(spec)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_an_unknown_character_names_itself_and_the_alphabet():
    # Catches: KeyError('x'), or unknown characters dropped so that the policy sees another problem than the reward.
    with pytest.raises(UserError) as error:
        make_tokenizer("chars:01=").encode("10x")
    assert "'x'" in str(error.value) and "tokenizer='chars:01='" in str(error.value)


def test_the_training_script_writes_a_folder_that_loads_back(tmp_path):
    # Catches: a saved tokenizer without pad and eos; a vocabulary without all bytes, which cannot write "é";
    # overwritten work.
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(
            json.dumps({"prompt": f"What is {i} plus {i}, said the {i}th cat?", "answer": str(2 * i)}) + "\n"
            for i in range(50)
        )
    )
    script = Path(__file__).parents[2] / "scripts" / "train_tokenizer.py"
    arguments = [f"--task=jsonl:{data}", f"--out={tmp_path / 'out'}", "--vocab_size=280"]
    assert runpy.run_path(str(script))["main"](arguments) == 0
    tokenizer = make_tokenizer(str(tmp_path / "out"))
    assert 258 < tokenizer.vocab_size <= 280 and tokenizer.decode([tokenizer.pad_id, *tokenizer.eos_ids]) == ""
    assert tokenizer.decode(tokenizer.encode("What is é 12?")) == "What is é 12?"
    assert len(tokenizer.encode("What is")) < 7  # merges were learned
    assert len(tokenizer.encode("1212")) == 4  # digit by digit
    # Mistakes in the task name the flags of this script, not the fields of a run.
    for flag, words in (
        ("--size=0", "--size=0: "),
        ("--size=99", "--size=99: "),
        ("--task=jsnl:x", "--task='jsnl:x': "),
    ):
        with pytest.raises(UserError, match=f"^{words}"):
            runpy.run_path(str(script))["main"]([*arguments, flag, "--overwrite"])
    # The second run would overwrite the first: one line, exit code 2.
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    refused = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, env=environment)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "--overwrite" in refused.stderr


# ---------------------------------------------------------------------------- identity


def test_each_single_change_of_a_tokenizer_changes_its_fingerprint(tmp_path):
    # Catches: weights continued under another alphabet, token table or template of the same sizes: no shape would tell.
    def folder(name, **changes):
        return write_folder(tmp_path / name, **{"jinja": CHAT, "generation": {"eos_token_id": 3}} | changes)

    base = folder("base")
    other_id = folder("other_id")
    content = json.loads((base / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other_id / "tokenizer.json").write_text(json.dumps(content))
    merges = folder("merges")
    content = json.loads((base / "tokenizer.json").read_text())
    content["model"]["merges"][:2] = content["model"]["merges"][1::-1]
    (merges / "tokenizer.json").write_text(json.dumps(content))
    specs = {
        "alphabet": ("chars:01=", "chars:10="),
        "kind": ("bytes", "chars:01="),
        "tokenizer_json": (str(base), str(other_id)),
        "tokenizer_json of merges": (str(base), str(merges)),
        "eos_ids": (str(base), str(folder("eos", generation={"eos_token_id": 2}))),
        "pad_id": (str(base), str(folder("pad", config={"pad_token": "<|start|>", "eos_token": "<eos>"}))),
        "chat_template": (str(base), str(folder("chat", jinja=CHAT + " "))),
        "special_tokens": (
            str(base),
            str(folder("bos", config={"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<|start|>"})),
        ),
    }
    for what, pair in specs.items():
        one, other = (fingerprint(make_tokenizer(spec)) for spec in pair)
        assert difference(one, one) is None
        assert difference(one, other).startswith(what.partition(" ")[0]), what
    bos = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<eos>"}
    plain, begun = (folder(f"begun{add}", config=bos | {"add_bos_token": add}) for add in (False, True))
    assert "prefix_ids is [], not [1]" in difference(*(fingerprint(make_tokenizer(str(f))) for f in (plain, begun)))


def test_a_fingerprint_says_nothing_of_where_the_files_lie_or_how_they_are_laid_out(tmp_path):
    # Catches: a run refused because its folder was moved, or its JSON indented by another program.
    one, other = (write_folder(tmp_path / name, jinja=CHAT) for name in "ab")
    content = json.loads((other / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (other / "tokenizer.json").write_text(json.dumps(dict(reversed(content.items())), indent=7))
    tokenizers = [make_tokenizer(str(folder)) for folder in (one, other)]
    assert [tokenizer.spec for tokenizer in tokenizers] == [str(one), str(other)]
    assert difference(*map(fingerprint, tokenizers)) is None


@pytest.mark.parametrize("spec", ["bytes", "chars:10=", "folder", "file"])
def test_a_saved_tokenizer_comes_back_from_its_fingerprint_and_its_files(spec, tmp_path):
    # Catches: a checkpoint that cannot be read once the folder of the tokenizer is gone; a fingerprint that is no JSON.
    source = write_folder(tmp_path / "source", jinja=CHAT, generation={"eos_token_id": [3, 1]})
    (source / "model.safetensors").write_bytes(b"weights")
    if spec == "file":
        (source / "tokenizer.json").rename(source / "mine.json")
    tokenizer = make_tokenizer({"folder": str(source), "file": str(source / "mine.json")}.get(spec, spec))
    saved = json.loads(json.dumps(fingerprint(tokenizer)))
    names = save_files(tokenizer, tmp_path / "kept" / "tokenizer")
    for file in source.iterdir():
        file.unlink()
    again = make_tokenizer(str(tmp_path / "kept" / "tokenizer") if names else saved["spec"])
    assert difference(fingerprint(again), saved) is None
    assert again.prompt_ids("10=") == tokenizer.prompt_ids("10=")
    if spec in ("folder", "file"):
        assert sorted(names) == [
            "chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"
        ]  # fmt: skip
        assert sorted(path.name for path in (tmp_path / "kept" / "tokenizer").iterdir()) == sorted(names)
    else:
        assert names == [] and not (tmp_path / "kept").exists()
