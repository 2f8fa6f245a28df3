"""Preferences from a judge: the judge's own order, what is left out, and a model that is asked in both orders."""

import collections
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from gspo import build, label
from gspo.data.preferences import make_preferences
from gspo.data.tokenizer import make_tokenizer, save_files
from gspo.judge import ModelJudge, load_judge
from gspo.model.spec import ModelSpec
from gspo.policy import load_policy
from gspo.run.checkpoint import Checkpointer
from gspo.run.identity import identity
from gspo.types import UserError
from tests import model_oracle as oracle
from tests.test_config import Watched
from tests.tiny_runs import kept_compiles  # noqa: F401 - a fixture

SIZES = dict(num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, head_width=8, d_ff=16, moe_backend="dense")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """The workdir of an untrained policy of three digits."""
    workdir, tokenizer = tmp_path_factory.mktemp("policy"), make_tokenizer("chars:012=AB ")
    spec = ModelSpec(vocab_size=tokenizer.vocab_size, **SIZES)
    save_files(tokenizer, workdir / "tokenizer")
    with Checkpointer(workdir, async_save=False, identity=identity(spec, tokenizer)) as checkpointer:
        checkpointer.save(0, {"params": oracle.build(spec)[1]}, {})
    return workdir


def config_of(policy, tmp_path, **changes):
    """Prompts of four digits, answers of two characters."""
    for split, numbers in (("train", range(60)), ("test", range(60, 81))):
        prompts = [np.base_repr(n, 3).rjust(4, "0") for n in numbers]
        lines = [json.dumps({"prompt": p + "=", "answer": p[:2]}) for p in prompts]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    config = base.labels()
    config.init_from, config.judge = str(policy), "matching_characters"
    config.task.name, config.task.options = f"jsonl:{tmp_path}/{{split}}.jsonl", {}
    config.max_prompt_length, config.max_completion_length = 5, 12
    config.num_prompts, config.num_eval_prompts, config.prompts_at_a_time = 60, 21, 16
    config.mesh.data = 1
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config


def labelled(config, folder):
    made = label.label(build.label_plan(config, str(folder)), str(folder))
    return made, {split: [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
                  for split in made}  # fmt: skip


@pytest.fixture(scope="module")
def pairs(policy, tmp_path_factory):
    """(config, folder, summary, lines of each split) of a judge that counts right characters."""
    tmp_path = tmp_path_factory.mktemp("data")
    config = config_of(policy, tmp_path)
    return config, tmp_path / "out", *labelled(config, tmp_path / "out")


def test_every_field_is_read(pairs):
    # Catches a field that a user sets and nothing heeds.
    config, read = pairs[0], set()
    build.label_plan(Watched(config, read))
    assert read == {name for name in build.leaf_fields(config) if not name.startswith("mesh.")}  # taken whole


def share(text: str, answer: str) -> float:
    return sum(a == b for a, b in zip(text, answer, strict=False)) / max(len(text), len(answer))


def test_the_judge_decides_and_every_prompt_is_accounted_for(pairs):
    # Catches chosen and rejected exchanged, a pair of one's own split in the other, prompts of padding that are
    # labelled twice, pairs lost without a count.
    _, _, made, lines = pairs
    for split, prompts in (("train", 60), ("test", 21)):
        found = made[split]
        assert found["prompts"] == prompts == found["pairs"] + sum(found["left_out"].values())
        assert found["pairs"] == len(lines[split]) > 0
        assert max(collections.Counter(line["prompt"] for line in lines[split]).values()) == 1
        for line in lines[split]:
            answer = line["prompt"][:2]
            difference = share(line["chosen"], answer) - share(line["rejected"], answer)
            assert difference > 0 and line["difference"] == pytest.approx(difference, abs=1e-6)
    assert not {line["prompt"] for line in lines["train"]} & {line["prompt"] for line in lines["test"]}


def test_the_files_are_data_for_a_reward_model(pairs):
    _, folder, made, lines = pairs
    read = make_preferences(label.pairs_of(folder), split="train")
    assert len(read) == made["train"]["pairs"] and read[0].chosen == lines["train"][0]["chosen"]
    assert make_preferences(label.pairs_of(folder), split="train", margin_field="difference")[0].margin > 0


def test_what_is_there_is_not_made_again_and_not_overwritten(pairs):
    # Catches labels that are drawn anew under a reward model that was trained on them.
    config, folder, made, _ = pairs
    before = (folder / "train.jsonl").stat().st_mtime_ns
    assert labelled(config, folder)[0] == made and (folder / "train.jsonl").stat().st_mtime_ns == before
    other = config.copy_and_resolve_references()
    other.seed = 1
    with pytest.raises(UserError, match="seed"):
        labelled(other, folder)


def test_labels_of_a_temperature_are_drawn_as_bradley_and_terry_say(monkeypatch):
    # Catches a temperature that multiplies, labels that ignore it, draws that depend on what was left out.
    judged = type("Judged", (), {})()
    n = 4000
    judged.texts, judged.examples = ["a", "b"] * n, [type("E", (), {"prompt": "p"})()] * (2 * n)
    judged.truncated_B, judged.failed_BR = np.zeros(2 * n, bool), np.zeros((2 * n, 1), bool)
    rng = np.random.default_rng(0)
    lines = [label._line(judged, q, 0.4, 0.5, rng) for q in range(n)]
    share_first = np.mean([line["chosen"] == "a" for line in lines])
    assert abs(share_first - 1 / (1 + np.exp(-0.4 / 0.5))) < 4 * np.sqrt(0.25 / n)
    assert {line["difference"] for line in lines} == {0.4, -0.4}


def test_texts_of_any_characters_are_written_in_whatever_encoding_the_system_has(policy, tmp_path, monkeypatch):
    # Catches half of a surrogate pair, as JSON may have it, on which the run dies when all its work is done; and text
    # beyond ASCII that is written in the encoding of the locale, which is not that in which data is read.
    line = {"prompt": "é\ud83d=", "chosen": "日", "rejected": "b", "difference": 1.0}
    monkeypatch.setattr(label, "_Labeller", lambda plan: lambda split, count, turn: ([line], {"pairs": 1}))
    _, lines = labelled(config_of(policy, tmp_path), tmp_path / "out")
    assert lines == {"train": [line], "test": [line]}
    assert (tmp_path / "out" / "train.jsonl").read_bytes().isascii()
    assert make_preferences(label.pairs_of(tmp_path / "out"), split="train")[0].chosen == "日"


TEMPLATE = "{prompt}A {first}B {second}"


def test_a_model_is_asked_in_both_orders(policy):
    # Catches log-odds of the wrong tokens or column, padding in sight, an order that counts twice, rows out of place.
    loaded = load_policy(policy, "judge")
    judge = ModelJudge(loaded, TEMPLATE, rows=3)
    prompts, firsts, seconds = (
        ["01=", "2=", "0120=", "1=", "22="],
        ["01", "", "2", "110", "0"],
        ["2", "101", "", "0", "12"],
    )
    found = judge(prompts, firsts, seconds)
    a, b = (loaded.tokenizer.encode(name)[0] for name in "AB")

    @jax.jit
    def logits(params, ids_1T):
        out = loaded.model.apply({"params": params}, ids_1T, jnp.zeros(1, jnp.int32))
        return loaded.model.apply({"params": params}, out.hidden_BTD, method="logits")

    def odds(prompt, first, second):  # alone, without padding
        ids = jnp.array([loaded.tokenizer.prompt_ids(TEMPLATE.format(prompt=prompt, first=first, second=second))])
        logp_V = jax.nn.log_softmax(logits(loaded.params, ids)[0, -1])
        return float(logp_V[a] - logp_V[b])

    forth = np.array([odds(*each) for each in zip(prompts, firsts, seconds, strict=True)])
    back = np.array([odds(*each) for each in zip(prompts, seconds, firsts, strict=True)])
    np.testing.assert_allclose(found.preference_N, (forth - back) / 2, atol=2e-6)
    np.testing.assert_array_equal(found.firm_N, forth * back < 0)
    swapped = judge(prompts, seconds, firsts)
    np.testing.assert_allclose(swapped.preference_N, -found.preference_N, atol=2e-6)


def test_a_model_as_judge_labels_what_a_policy_wrote(policy, tmp_path):
    # Catches, besides a line that is not as the judge says, a seed below 0 that only labelling does not take.
    config = config_of(policy, tmp_path, judge=f"model:{policy}", judge_template=TEMPLATE, seed=-1)
    made, lines = labelled(config, tmp_path / "out")
    judge = load_judge(config.judge, TEMPLATE)
    line = lines["train"][0]
    verdict = judge([line["prompt"]], [line["chosen"]], [line["rejected"]]).preference_N[0]
    assert verdict == pytest.approx(line["difference"], abs=1e-5) and verdict > 0
    assert 0 <= made["train"]["firm"] <= 1


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("init_from", "", "init_from"),
        ("init_from", "nowhere", "init_from=nowhere"),
        ("judge", "nobody", "judge: no reward named 'nobody'"),
        ("judge", "model:nowhere", "judge='model:nowhere'"),
        ("judge", "nobody:knows", "^judge: 'nobody:knows': importing 'nobody'"),
        ("judge", "reward_model:runs/rm", "^judge='reward_model:runs/rm': trained reward models are for `rewards`"),
        ("task.eval_split", "train", "^task.eval_split='train': the pairs of each split are a file of its name"),
        ("judge_template", "{prompt} {first}", "judge_template: {second} is not in it"),
        ("judge_template", "{prompt} {first} {second} {third}", "judge_template"),
        ("temperature", 0.0, "temperature=0"),
        ("label_temperature", -1.0, "label_temperature"),
        ("num_prompts", 0, "num_prompts"),
    ],
)
def test_mistakes_are_one_line_that_names_the_field(policy, tmp_path, field, value, says):
    config = config_of(policy, tmp_path, **{field: value})
    with pytest.raises(UserError, match=says.replace("{", r"\{").replace("(", r"\(")) as error:
        labelled(config, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out" / "labels.json").exists()
