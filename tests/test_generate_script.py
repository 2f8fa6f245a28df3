"""scripts/generate.py: what it prints is what the model draws, with its own log-probs, through its own template."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo.data.tokenizer import make_tokenizer, save_files
from gspo.model.spec import ModelSpec
from gspo.run.checkpoint import Checkpointer
from gspo.run.identity import identity
from scripts import generate
from tests import model_oracle as oracle
from tests.tiny_runs import command, kept_compiles  # noqa: F401 - fixtures
from tests.tokenizer_folders import CHAT, write_family, write_folder

SIZES = dict(num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, head_width=8, d_ff=16, moe_backend="dense")


def save(workdir, tokenizer) -> tuple[ModelSpec, dict]:
    spec = ModelSpec(vocab_size=tokenizer.vocab_size, **SIZES)
    params = oracle.build(spec)[1]
    save_files(tokenizer, workdir / "tokenizer")
    with Checkpointer(workdir, async_save=False, identity=identity(spec, tokenizer)) as checkpointer:
        checkpointer.save(0, {"params": params}, {})
    return spec, params


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """(workdir, tokenizer, spec, params) of a model of the ten digits."""
    workdir, tokenizer = tmp_path_factory.mktemp("digits"), make_tokenizer("chars:0123456789")
    return workdir, tokenizer, *save(workdir, tokenizer)


@pytest.fixture
def run(command, digits):  # noqa: F811
    """run(*arguments) -> (stdout, stderr); it has to end well."""

    def run(*arguments) -> tuple[str, str]:
        code, out, err = command("generate", f"--workdir={digits[0]}", "--max_tokens=8", *arguments, folder="scripts")
        assert code == 0, err
        return out, err

    return run


@pytest.mark.parametrize(("temperature", "scored_at"), [(2.0, 2.0), pytest.param(0.0, 1.0, marks=pytest.mark.slow)])
def test_the_tokens_and_their_log_probs_are_those_of_the_model(run, digits, temperature, scored_at):
    # Catches a prompt that is shifted or padded into sight, log-probs at another temperature, a missing end.
    _, tokenizer, spec, params = digits
    out, err = run("--logps", f"--temperature={temperature}", "31415")
    text, *lines, last = out.splitlines()
    shown = [re.fullmatch(r" *(-?[\d.]+)  '(.*)'(  \(end\))?", line).groups() for line in lines]
    ids = [tokenizer.eos_ids[0] if end else (tokenizer.encode(t) or [tokenizer.pad_id])[0] for _, t, end in shown]
    printed = [float(logp) for logp, _, _ in shown]
    assert text == tokenizer.decode(ids)
    assert ("cut off at --max_tokens=8" in err) == (ids[-1] not in tokenizer.eos_ids)
    assert len(ids) == 8 or ids[-1] in tokenizer.eos_ids
    total, count = re.fullmatch(r" *(-?[\d.]+)  over (\d+) tokens", last).groups()
    assert float(total) == pytest.approx(sum(printed), abs=1e-2) and int(count) == len(ids)

    frame = tokenizer.encode("31415") + ids
    tokens_BT, first_B = np.pad([frame], ((0, 0), (13 - len(frame), 0))), np.array([13 - len(frame)])
    _, logits = oracle.forward(spec)(params, jnp.asarray(tokens_BT), jnp.asarray(first_B))
    logp_CV = np.asarray(jax.nn.log_softmax(logits[0, -len(ids) - 1 : -1] / scored_at))
    np.testing.assert_allclose(printed, logp_CV[np.arange(len(ids)), ids], atol=2e-4)
    if temperature == 0:
        np.testing.assert_array_equal(ids, logp_CV.argmax(axis=-1))


def test_draws_follow_the_seed_and_a_question_may_come_from_standard_input(run, monkeypatch):
    # Catches completions of a question that are all alike, a seed that nothing reads, a line end that becomes part of
    # the question (which this alphabet would refuse).
    out, _ = run("--num=4", "27")
    assert re.findall(r"^\[\d/4\]$", out, re.M) == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    assert len(set(re.split(r"\[\d/4\]\n", out)[1:])) > 1
    assert run("--num=4", "--seed=0", "27")[0] == out != run("--num=4", "--seed=1", "27")[0]
    monkeypatch.setattr("sys.stdin", type("Piped", (), {"isatty": lambda _: False, "read": lambda _: "27\n"})())
    assert run("--num=4")[0] == out
    lines = iter(["27", "27"])

    def typed(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda _: True})())
    monkeypatch.setattr("builtins.input", typed)
    answers, _ = run("--num=4")
    assert answers.startswith(out) and answers[len(out) :] not in ("\n", f"{out}\n")  # each question has its own noise


def test_a_question_goes_through_the_template_of_the_weights_unless_it_is_raw(tmp_path, monkeypatch, capsys):
    # Catches a policy that is asked in another form than it was trained on.
    tokenizer = make_tokenizer(str(write_folder(tmp_path / "files", jinja=CHAT)))
    save(tmp_path / "run", tokenizer)
    seen = []

    def make_sampler(*_, **fields):
        def sample(params, prompt_QP, lengths_Q, key):
            seen.append(tokenizer._tokenizer.decode(prompt_QP[0, -lengths_Q[0] :].tolist(), skip_special_tokens=False))
            raise KeyboardInterrupt

        return sample

    monkeypatch.setattr(generate, "make_sampler", make_sampler)
    for flags in ((), ("--raw",)):
        with pytest.raises(KeyboardInterrupt):
            generate.main(["--workdir", str(tmp_path / "run"), *flags, "the cat"])
    assert seen == ["<|start|>user\nthe cat<|end|>\n<|start|>assistant\n", "the cat"]


def test_a_text_that_has_its_beginning_gets_no_second_one(tmp_path):
    # Catches two BOS tokens before a raw text that was printed with one.
    tokenizer = make_tokenizer(str(write_family(tmp_path, "llama3")))
    text = tokenizer._tokenizer.decode(tokenizer.prefix_ids, skip_special_tokens=False)
    assert text and generate.raw_ids(tokenizer, "the cat") == [*tokenizer.prefix_ids, *tokenizer.encode("the cat")]
    assert generate.raw_ids(tokenizer, f"{text}the cat") == tokenizer.encode(f"{text}the cat")
    assert generate.raw_ids(make_tokenizer("bytes"), "a") == [97]


def test_mistakes_are_one_line(command, digits):  # noqa: F811
    # Catches a traceback for a mistyped folder or flag.
    workdir = digits[0]
    for arguments, words in (
        (["x"], "--workdir"),
        (["--workdir=nowhere", "1"], "--workdir=nowhere: no checkpoint"),
        ([f"--workdir={workdir}", "--num=0", "1"], "--num=0: must be positive"),
        ([f"--workdir={workdir}", "--temperature=-1", "1"], "--temperature=-1.0: must be >= 0"),
        ([f"--workdir={workdir}", "--top_k=3", "1"], "--top_k=3"),
        ([f"--workdir={workdir}", ""], "the question is empty"),
        ([f"--workdir={workdir}", "what?"], "character 'w'"),
    ):
        code, out, err = command("generate", *arguments, folder="scripts")
        assert (code, out, err.count("\n")) == (2, "", 1) and words in err, err
