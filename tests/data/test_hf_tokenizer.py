"""Tokenizers of published models: special tokens from every place they are written in, the token a prompt begins with,
chat templates and their date.

The comparisons with transformers skip where it is missing: pip install -e '.[hf-tests]'.
"""

import datetime
import importlib.util
import json
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

from gspo.data import hf_tokenizer
from gspo.data.batches import DemonstrationSource, PromptSource
from gspo.data.example import Example
from gspo.data.rewards import exact_match
from gspo.data.tasks import Task
from gspo.data.tokenizer import ByteTokenizer, HFTokenizer, make_tokenizer
from gspo.types import UserError
from tests.tokenizer_folders import CHAT, CHAT_WITH_BOS, FAMILIES, write_family, write_folder

needs_transformers = pytest.mark.skipif(
    not importlib.util.find_spec("transformers"), reason="needs transformers: pip install -e '.[hf-tests]'"
)
TEXTS = ("the cat sat", " é 12?\n\n", "a", "<|start|>x<|end|>")


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> HFTokenizer:
    return make_tokenizer(str(write_folder(tmp_path_factory.mktemp("hf"))))


@settings(deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_a_byte_level_bpe_gives_every_text_back(hf, text):
    # Catches: a prefix space added by the encoder, clean-up of spaces in the decoder, special tokens added around the
    # text.
    assert hf.decode(hf.encode(text)) == text


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


@pytest.mark.parametrize("first", [False, True])
def test_what_is_imitated_ends_as_the_chat_template_ends_an_answer(tmp_path, first):
    # Catches demonstrations of a Llama 3 that end in <|end_of_text|>, which its generation_config.json names first and
    # its template never writes.
    generation = {"eos_token_id": [3, 1] if first else [1, 3]}
    config = {"eos_token": "<eos>"}
    folder = write_folder(tmp_path, generation=generation, config=config, jinja=CHAT)
    tokenizer = make_tokenizer(str(folder))
    assert (tokenizer.end_id, list(tokenizer.eos_ids)) == (3, generation["eos_token_id"])
    assert tokenizer.pad_id == tokenizer.eos_ids[0]  # as in the runs that were made before
    refuses = "{% for m in messages %}{{ raise_exception('no') if m.role == 'assistant' }}{% endfor %}"
    only_users = "{% for m in messages %}{{ m.content + '<|end|>' if m.role == 'user' else '' }}{% endfor %}"
    for other in (CHAT.replace("<|end|>", ""), refuses, only_users):
        (folder / "chat_template.jinja").write_text(other)
        assert make_tokenizer(str(folder)).end_id == generation["eos_token_id"][0]


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
    # A conversation is written as it stands; one user's message is the same as its text.
    talk = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 < 3?"})
    assert in_file.format_prompt(talk) == "<|start|>system\nBe brief.<|end|>\n" + expected
    assert in_file.prompt_ids(talk[1:]) == in_file.prompt_ids("2 < 3?")
    for plain in (hf, ByteTokenizer()):
        with pytest.raises(UserError, match="has no chat template, and so no way to write messages"):
            plain.prompt_ids(talk)
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


# ---------------------------------------------------------------------------- the beginning of a prompt


@needs_transformers
@pytest.mark.parametrize("template", [None, CHAT, CHAT_WITH_BOS], ids=["plain", "chat", "chat-with-bos"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_ids_are_those_of_transformers(family, template, tmp_path):
    # Catches: a base model without its BOS, a chat with two of them, a family that has none and gets one.
    import transformers

    folder = write_family(tmp_path, family, jinja=template)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), make_tokenizer(str(folder))
    if template == CHAT_WITH_BOS and theirs.bos_token is None:
        pytest.skip("no template of this family writes a BOS")
    for text in TEXTS:
        chat = [{"role": "user", "content": text}]
        expected = (
            theirs(text)["input_ids"]
            if template is None
            else theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        )
        assert ours.prompt_ids(text) == expected


@pytest.mark.parametrize(("family", "bos"), [
    ("llama2", [1]), ("mixtral", [1]), ("llama3", [0]), ("qwen3", []), ("gpt2", []), ("olmoe", [])
])  # fmt: skip
def test_a_plain_prompt_begins_as_the_package_itself_begins_it(family, bos, tmp_path):
    # Catches: a BOS that is missing, doubled, or added where the model never saw one (GPT-2 has a bos_token, and does
    # not begin texts with it); one that `encode` adds, which would stand before completions too.
    folder = write_family(tmp_path, family)
    package, ours = Tokenizer.from_file(str(folder / "tokenizer.json")), make_tokenizer(str(folder))
    for text in TEXTS:
        assert ours.prompt_ids(text) == package.encode(text, add_special_tokens=True).ids
        assert ours.encode(text) == package.encode(text, add_special_tokens=False).ids
        assert ours.prompt_ids(text) == bos + ours.encode(text)


@pytest.mark.parametrize(("in_config", "in_processor", "begins"), [
    (True, True, True), (True, False, True), (False, True, True), (False, False, False), (None, True, True),
    (None, False, False),
])  # fmt: skip
def test_either_file_may_ask_for_the_bos(in_config, in_processor, begins, tmp_path, caplog):
    # Catches: only one of the two places read; two of them counted as two tokens. Where they contradict each other,
    # tokenizer.json decides, as in transformers 5, and the log says so.
    config = {"eos_token": "<eos>", "bos_token": "<|start|>"} | (
        {} if in_config is None else {"add_bos_token": in_config}
    )
    template = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 2)])
    with caplog.at_level("WARNING", logger="absl"):
        tokenizer = make_tokenizer(
            str(write_folder(tmp_path, config=config, processor=template if in_processor else None))
        )
    assert tokenizer.prompt_ids("the cat") == [2] * begins + tokenizer.encode("the cat")
    assert ("add_bos_token=false" in caplog.text) == (in_config is False and in_processor)


def test_only_what_stands_before_the_text_is_added(tmp_path):
    # Catches: the eos that some files put behind every text: no completion would ever follow it.
    both = processors.TemplateProcessing(
        single="<|start|> <pad> $A <eos>", special_tokens=[("<|start|>", 2), ("<pad>", 0), ("<eos>", 1)]
    )
    inner = processors.Sequence([processors.ByteLevel(), both])
    roberta = processors.RobertaProcessing(("<eos>", 1), ("<|start|>", 2))
    for name, processor, before in (("a", inner, [2, 0]), ("b", roberta, [2])):
        folder = write_folder(tmp_path / name, processor=processor)
        package, ours = Tokenizer.from_file(str(folder / "tokenizer.json")), make_tokenizer(str(folder))
        assert ours.prompt_ids("the cat") == before + ours.encode("the cat")
        assert [*ours.prompt_ids("the cat"), 1] == package.encode("the cat", add_special_tokens=True).ids


@pytest.mark.parametrize("family", ["llama2", "llama3"])
def test_no_prompt_begins_with_two_bos(family, tmp_path):
    # Catches: a BOS before the one that the chat template wrote, or that stands in the data as text.
    bos = {"llama2": 1, "llama3": 0}[family]
    chat = make_tokenizer(str(write_family(tmp_path / "chat", family, jinja=CHAT_WITH_BOS)))
    assert chat.prompt_ids("the cat")[0] == bos and chat.prompt_ids("the cat").count(bos) == 1
    # A template that writes none means it: transformers tokenizes a rendered chat as it stands.
    without = make_tokenizer(str(write_family(tmp_path / "without", family, jinja=CHAT)))
    assert without.prompt_ids("the cat") == without.encode(without.format_prompt("the cat"))
    plain = make_tokenizer(str(write_family(tmp_path / "plain", family)))
    written = {"llama2": "<s>", "llama3": "<|begin_of_text|>"}[family]
    assert plain.prompt_ids(f"{written}the cat").count(bos) == 1


def test_a_bos_that_is_asked_for_and_not_named_is_one_line(tmp_path):
    # Catches: prompts that silently go without.
    folder = write_folder(tmp_path, config={"eos_token": "<eos>", "add_bos_token": True})
    with pytest.raises(UserError, match="add_bos_token is true, but there is no bos_token"):
        make_tokenizer(str(folder))


def test_prompts_and_demonstrations_begin_with_the_bos_and_it_counts_in_their_length(tmp_path):
    # Catches: a source that tokenizes for itself, so that the cold start never saw the BOS that rollouts begin with; a
    # frame that the BOS does not fit into.
    tokenizer = make_tokenizer(str(write_family(tmp_path, "llama3")))
    task = Task("mine", 1, [Example("a", "b", "b")].__getitem__, exact_match)
    prompts = PromptSource(task, tokenizer, max_prompt_length=2).batch(0, 1)
    rows = DemonstrationSource(task, tokenizer, max_prompt_length=2, max_completion_length=2).batch(0, 1)
    (a,), (b,) = tokenizer.encode("a"), tokenizer.encode("b")
    assert prompts.tokens_QP.tolist() == [[0, a]] and prompts.lengths_Q.tolist() == [2]
    assert rows.tokens_BT.tolist() == [[0, a, b, tokenizer.eos_ids[0]]] and rows.prompt_lengths_B.tolist() == [2]
    for source, options in ((PromptSource, {}), (DemonstrationSource, {"max_completion_length": 2})):
        with pytest.raises(UserError, match="1 of 1 prompts are longer than max_prompt_length=1"):
            source(task, tokenizer, max_prompt_length=1, **options)


# ---------------------------------------------------------------------------- the date


def test_a_template_writes_the_saved_date_on_whatever_day_it_runs(tmp_path, monkeypatch):
    # Catches: a run resumed on another day, or past midnight, whose prompts are no longer those of its first rollout.
    class Clock(datetime.datetime):
        today = (2026, 1, 31, 23, 59)

        @classmethod
        def now(cls, tz=None):
            return cls(*cls.today)

    monkeypatch.setattr(hf_tokenizer, "datetime", SimpleNamespace(datetime=Clock))
    folder = str(write_folder(tmp_path, jinja="{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}"))
    first = make_tokenizer(folder)
    date = hf_tokenizer.now()
    assert first.format_prompt("hi") == "31 Jan 2026: hi" and first.date == date == "2026-01-31T23:59:00"
    Clock.today = (2026, 2, 1, 0, 1)
    assert first.format_prompt("hi") == "31 Jan 2026: hi"  # fixed when it was made, not when it is used
    assert make_tokenizer(folder, date=date).prompt_ids("hi") == first.prompt_ids("hi")
    assert make_tokenizer(folder).format_prompt("hi") == "01 Feb 2026: hi"


def test_a_template_may_use_all_that_transformers_gives_it(tmp_path):
    # Catches templates of TRL, which mark what the model says, and those that ask whether there are tools.
    template = (
        "{% if tools is not none or documents is not none %}TOOLS{% endif %}{{ mask_token }}"
        "{% for m in messages %}{% if m.role == 'user' %}{{ m | tojson(ensure_ascii=True, separators=(',', ':'), "
        "sort_keys=True) }}{% else %}{% generation %}{% set said = m.content %}{{ said }}{% endgeneration %}{% endif %}"
        "{% endfor %}{{ said }}"
    )
    tokenizer = make_tokenizer(str(write_folder(tmp_path, config={"eos_token": "<eos>", "mask_token": "<m>"},
                                                jinja=template)))  # fmt: skip
    conversation = [{"role": "user", "content": "é"}, {"role": "assistant", "content": "yes"}]
    assert tokenizer.format_prompt(conversation) == '<m>{"content":"\\u00e9","role":"user"}yes'
    assert tokenizer.contents()["special_tokens"].keys() == {"bos_token", "eos_token", "pad_token", "unk_token"}
