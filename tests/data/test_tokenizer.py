"""Tokenizers: round trips, hostile ids, special tokens from every place they are written in, chat templates."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gspo.data.tokenizer import ByteTokenizer, CharTokenizer, HFTokenizer, make_tokenizer
from gspo.types import UserError

CHAT = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def write_folder(folder: Path, *, config=None, generation=None, special_map=None, jinja=None) -> Path:
    """A tokenizer.json of a byte-level BPE with four special tokens, and the files around it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<eos>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, the end"] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"pad_token": "<pad>", "eos_token": "<eos>"} if config is None else config
    for name, content in (
        ("tokenizer_config", config),
        ("generation_config", generation),
        ("special_tokens_map", special_map),
    ):
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja)
    return folder


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
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_a_byte_level_bpe_gives_every_text_back(hf, text):
    # Catches: a prefix space added by the encoder, clean-up of spaces in the decoder, special tokens added around the
    # text.
    assert hf.decode(hf.encode(text)) == text


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


def test_encoding_adds_no_special_tokens_even_where_the_file_asks_for_them(tmp_path):
    # Catches: encode(add_special_tokens=True), which would put an end-of-sequence token after every prompt.
    folder = write_folder(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<eos>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<eos>": {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}},
    }
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = make_tokenizer(str(folder))
    assert 1 not in tokenizer.encode("the cat")
    # Catches: truncation saved in the file by somebody's training script, which would cut prompts without a word.
    assert tokenizer.decode(tokenizer.encode("the cat sat on the mat, the end")) == "the cat sat on the mat, the end"


def test_eos_tokens_of_all_files_count_and_the_generation_config_comes_first(tmp_path):
    # Catches: chat models whose turns end in another token than documents running to the maximum length.
    one = make_tokenizer(str(write_folder(tmp_path / "int", generation={"eos_token_id": 3})))
    many = make_tokenizer(str(write_folder(tmp_path / "list", generation={"eos_token_id": [3, 1, 3]})))
    assert (one.eos_ids, many.eos_ids) == ((3, 1), (3, 1))


def test_pad_and_eos_decode_to_nothing_even_where_the_file_does_not_call_them_special(tmp_path):
    # Catches: "348<eos>" in the eyes of the reward: such files exist, and skip_special_tokens alone would keep the
    # token.
    folder = write_folder(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [{**token, "special": False} for token in content["added_tokens"]]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = make_tokenizer(str(folder))
    assert tokenizer.decode([0, *tokenizer.encode("348"), 1, 0]) == "348"


def test_special_tokens_may_be_objects_or_stand_in_the_special_tokens_map(tmp_path):
    # Catches: {"content": "<eos>", "lstrip": false} taken for the token itself; a null in one file hiding the other
    # file's token.
    objects = write_folder(
        tmp_path / "a", config={"eos_token": {"content": "<eos>", "lstrip": False}, "pad_token": None}
    )
    mapped = write_folder(
        tmp_path / "b", config={"eos_token": None}, special_map={"eos_token": "<eos>", "pad_token": "<pad>"}
    )
    assert make_tokenizer(str(objects)).eos_ids == (1,) and make_tokenizer(str(mapped)).eos_ids == (1,)
    assert (
        make_tokenizer(str(objects)).pad_id == 1
    )  # no pad token: the eos pads; masks come from lengths, so it does no harm
    assert make_tokenizer(str(mapped / "tokenizer.json")).pad_id == 0


def test_a_prompt_goes_through_the_chat_template_where_there_is_one(tmp_path, hf):
    # Catches: a template that is ignored, or rendered without the assistant's opening, so that the model continues the
    # user.
    expected = "<|start|>user\n2 < 3?<|end|>\n<|start|>assistant\n"
    config = {"eos_token": "<eos>", "chat_template": CHAT}
    in_config = make_tokenizer(str(write_folder(tmp_path / "config", config=config)))
    assert in_config.format_prompt("2 < 3?") == expected  # and not "2 &lt; 3?"
    named = {
        "eos_token": "<eos>",
        "chat_template": [{"name": "tool", "template": "x"}, {"name": "default", "template": CHAT}],
    }
    assert make_tokenizer(str(write_folder(tmp_path / "named", config=named))).format_prompt("2 < 3?") == expected
    config["chat_template"] = "wrong"
    in_file = make_tokenizer(str(write_folder(tmp_path / "file", config=config, jinja=CHAT)))
    assert in_file.format_prompt("2 < 3?") == expected
    assert hf.format_prompt("2 < 3?") == "2 < 3?" == ByteTokenizer().format_prompt("2 < 3?")
    quoting = write_folder(tmp_path / "json", jinja="{{ messages[0].content | tojson }}{{ eos_token }}")
    assert make_tokenizer(str(quoting)).format_prompt("é < 3") == '"é < 3"<eos>'
    # The template's special tokens are single ids, not their letters.
    ids = in_file.encode(expected)
    assert ids[0] == 2 and ids.count(3) == 1


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_that_fails_or_reaches_out_is_a_user_error(tmp_path, template):
    # Catches: an unsandboxed environment: a downloaded template could run any code.
    tokenizer = make_tokenizer(str(write_folder(tmp_path, jinja=template)))
    with pytest.raises(UserError, match="chat template failed"):
        tokenizer.format_prompt("hello")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("byte", ["'byte'", "'bytes'", "chars:"]),
        ("", ["unknown tokenizer ''"]),
        ("no/such/folder", ["no/such/folder", "nothing is there"]),
        ("chars:", ["is empty"]),
        ("chars:0102", ["repeats '0'"]),
    ],
)
def test_an_unknown_tokenizer_is_one_line_that_says_what_there_is(spec, words):
    # Catches: a traceback, or a silent fallback to bytes.
    with pytest.raises(UserError) as error:
        make_tokenizer(spec)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"config": {}}, ["names no end-of-sequence token"]),
        ({"config": {"eos_token": "<end>"}}, ["eos_token '<end>' is not in the vocabulary"]),
        ({"config": {"eos_token": "<eos>", "pad_token": "[PAD]"}}, ["pad_token '[PAD]'"]),
        ({"generation": {"eos_token_id": 5000}}, ["eos_token_id 5000"]),
        ({"jinja": "{% for %}"}, ["chat_template.jinja", "does not compile"]),
    ],
)
def test_an_incomplete_folder_is_one_line_that_names_the_field(tmp_path, files, words):
    # Catches: eos silently taken as id 0 or None: no completion would ever end.
    with pytest.raises(UserError) as error:
        make_tokenizer(str(write_folder(tmp_path, **files)))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_broken_json_names_the_file(tmp_path):
    # Catches: a JSONDecodeError without a word on which of five files it was.
    folder = write_folder(tmp_path)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json"):
        make_tokenizer(str(folder))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        make_tokenizer(str(folder))
    with pytest.raises(UserError, match=r"there is no tokenizer\.json"):
        make_tokenizer(str(tmp_path.parent / tmp_path.name / ".."))


def test_an_unknown_character_names_itself_and_the_alphabet():
    # Catches: KeyError('x'), or unknown characters dropped so that the policy sees another problem than the reward.
    with pytest.raises(UserError) as error:
        make_tokenizer("chars:01=").encode("10x")
    assert "'x'" in str(error.value) and "'01='" in str(error.value)


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
    # The second run would overwrite the first: one line, exit code 2.
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    refused = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, env=environment)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "--overwrite" in refused.stderr
