"""Preferences: what is read, how pairs lie in their frames, and what becomes of pairs that teach nothing."""

import json

import numpy as np
import pytest

from gspo.data.preferences import PairSource, Preference, make_preferences, preference_of
from gspo.data.tokenizer import CharTokenizer, make_tokenizer
from gspo.types import UserError

TOKENIZER = make_tokenizer("chars:01 =")
GOOD = [
    {"prompt": "01=", "chosen": "1", "rejected": "01", "margin": 2},
    {"prompt": "1=", "chosen": "01", "rejected": "0"},
    {"prompt": "=", "chosen": "0", "rejected": "1 1", "margin": 0.5},
]


def written(tmp_path, rows):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


def source_of(tmp_path, rows, **changes):
    preferences = make_preferences(written(tmp_path, rows), split="train")
    sizes = dict(max_prompt_length=4, max_completion_length=4) | changes
    return PairSource(preferences, TOKENIZER, **sizes)


def test_the_system_prompt_stands_before_the_prompts_of_pairs(tmp_path):
    # Catches a reward model that reads other prompts than the policy that it is to judge.
    class Chat(CharTokenizer):
        def prompt_ids(self, prompt):
            return self.encode(" ".join(message["content"] for message in prompt))

    preferences = make_preferences(written(tmp_path, GOOD[:1]), split="train")
    tokenizer = Chat("01 =")
    source = PairSource(preferences, tokenizer, max_prompt_length=6, max_completion_length=4, system_prompt="00")
    assert source.batch(0, 1).rows.tokens_BT[0, :6].tolist() == tokenizer.encode("00 01=")


def test_a_pair_is_two_rows_the_chosen_text_first_behind_one_prompt(tmp_path):
    # Catches an exchange of the two, an end token that is missing, completions on the left, prompts on the right, the
    # margin of another pair.
    batch = source_of(tmp_path, GOOD).batch(0, 3)
    found = {}
    for row in range(6):
        P, n, length = 4, batch.rows.prompt_lengths_B[row], batch.rows.completion_lengths_B[row]
        tokens = batch.rows.tokens_BT[row]
        assert np.all(tokens[: P - n] == TOKENIZER.pad_id) and np.all(tokens[P + length :] == TOKENIZER.pad_id)
        assert tokens[P + length - 1] == TOKENIZER.eos_ids[0]
        text = TOKENIZER.decode(tokens[P : P + length - 1])
        found.setdefault(TOKENIZER.decode(tokens[P - n : P]), []).append((text, batch.margins_B[row]))
    assert found == {"01=": [("1", 2), ("01", 2)], "1=": [("01", 0), ("0", 0)], "=": [("0", 0.5), ("1 1", 0.5)]}
    assert batch.margins_B.dtype == np.float32


def test_a_process_reads_its_own_pairs_alone_and_they_are_those_of_the_whole_batch(tmp_path):
    # Catches local pairs numbered anew, and an order that depends on who reads.
    source = source_of(tmp_path, GOOD)
    whole, part = source.batch(4, 5), source.batch(4, 5, [1, 4])
    np.testing.assert_array_equal(part.rows.tokens_BT, whole.rows.tokens_BT[[2, 3, 8, 9]])
    np.testing.assert_array_equal(part.margins_B, whole.margins_B[[2, 3, 8, 9]])


def test_pairs_that_teach_nothing_are_left_out_counted_and_named(tmp_path):
    # Catches pairs that vanish without a word, and pairs of equal texts that stay: their gradient is zero for ever.
    texts = (("0=", "1", "1"), ("0=", "", "1"), ("1=", "0", "0"), (" ", "0", "1"))
    bad = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in texts]
    source = source_of(tmp_path, [GOOD[0], *bad, *GOOD[1:]])
    assert len(source) == 3
    assert source.notes == ["4 of 7 pairs left out: 2 (pairs 1, 3) with equal texts, 2 (pairs 2, 4) with an empty text"]
    assert source_of(tmp_path, GOOD).notes == []


def test_pairs_that_are_too_long_are_an_error_or_left_out_as_the_config_says(tmp_path):
    # Catches a text that is cut, whose end, what a reward model reads, is then another; and an end token not counted.
    long = [{"prompt": "0101=", "chosen": "1", "rejected": "0"}, {"prompt": "0=", "chosen": "1", "rejected": "0101"}]
    with pytest.raises(
        UserError,
        match=r"1 \(pair 3\) with a prompt longer than max_prompt_length=4; 1 \(pair 4\) "
        "with a text longer than max_completion_length=4: raise them, or set overlong_prompts='drop'",
    ):
        source_of(tmp_path, [*GOOD, *long])
    source = source_of(tmp_path, [*GOOD, *long], overlong="drop")
    assert len(source) == 3 and source.notes[0].startswith("2 of 5 pairs left out: 1 (pair 3) with a prompt longer")


def test_labels_that_contradict_each_other_are_kept_and_told(tmp_path):
    # Catches a file of which a part has chosen and rejected exchanged.
    swapped = {"prompt": "01=", "chosen": "01", "rejected": "1"}
    source = source_of(tmp_path, [*GOOD, swapped])
    assert len(source) == 4
    (note,) = source.notes
    assert note.startswith("warning: 1 (pair 3) in the data the other way round too") and "swapped" in note


def test_a_source_without_a_usable_pair_is_an_error_that_says_why(tmp_path):
    # Catches an endless search for a pair.
    with pytest.raises(UserError, match=r"none of its 1 pairs can be used: 1 \(pair 0\) with equal texts"):
        source_of(tmp_path, [{"prompt": "0=", "chosen": "1", "rejected": "1"}])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "x: expected an object with the fields prompt, chosen, rejected, not list"),
        ({"prompt": "a", "choosen": "b", "rejected": "c"}, "x: field 'chosen' is missing, there are 'prompt', "
         "'choosen', 'rejected'; did you mean 'choosen'\\?; task.options.chosen_field names another one"),
        ({"chosen": "a b", "rejected": "a c"}, "x: field 'prompt' is missing"),
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, "x: field 'chosen': should be a text, or a list with one "
         "message of the assistant, not 3"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": -1}, "x: 'margin' is -1: the rejected text would be "
         "the better one; are 'chosen' and 'rejected' exchanged\\?"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "1"}, "x: field 'margin' should be a number"),
        ({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "chosen": "b",
          "rejected": "c"}, "x: field 'prompt': a conversation of user, assistant; only one message of the user"),
        ({"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"},
         "x: field 'chosen': a conversation of user; only one message of the assistant"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_meant_is_one_line_with_its_place(row, message):
    # Catches a KeyError of a file of another format, and labels that say the opposite of their rating.
    with pytest.raises(UserError, match=f"^{message}"):
        preference_of(row, "x")


def test_messages_are_read_in_the_forms_of_the_hub():
    # Catches a list taken for its text, and a prompt that stands twice, before and in the completion.
    user, good, bad = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
    for row in (
        {"prompt": "q", "chosen": [user, good], "rejected": [user, bad]},
        {"prompt": [user], "chosen": [good], "rejected": [bad]},
        {"prompt": "q", "chosen": "a", "rejected": "b", "margin": None},
    ):
        assert preference_of(row, "x") == Preference("q", "a", "b")


def test_columns_may_have_other_names_and_an_unknown_option_is_refused(tmp_path):
    # Catches options that are dropped.
    name = written(tmp_path, [{"question": "q", "better": "a", "worse": "b", "gap": 3}])
    options = dict(prompt_field="question", chosen_field="better", rejected_field="worse", margin_field="gap")
    assert make_preferences(name, split="train", **options)[0] == Preference("q", "a", "b", 3.0)
    with pytest.raises(UserError, match=r"task.options.chosen: task .* has only .*did you mean 'chosen_field'"):
        make_preferences(name, split="train", chosen="better")


@pytest.mark.parametrize(
    ("name", "message"),
    [("json:x", "no preferences of that name; there are jsonl:<path>"), ("jsonl:", "no preferences of that name"),
     ("jsonl:nowhere/{split}.jsonl", "there is no file nowhere/train.jsonl")],
)  # fmt: skip
def test_data_that_is_not_there_is_one_line(name, message):
    # Catches a FileNotFoundError.
    with pytest.raises(UserError, match=message):
        make_preferences(name, split="train")


def test_the_toy_prefers_the_right_answer_and_its_splits_share_no_prompt():
    # Catches a hidden preference that nobody knows, and held-out pairs that were trained on.
    train, test = (make_preferences("running_sum", split=s, size=200, num_digits=6) for s in ("train", "test"))
    prompts = {pair.prompt for pair in (train[i] for i in range(200))}
    equal = 0
    for i in range(200):
        pair, total, answer = test[i], 0, ""
        for digit in pair.prompt[:-1]:
            total = (total + int(digit)) % 10
            answer += str(total)
        assert pair.chosen == answer and pair.prompt not in prompts
        equal += pair.chosen == pair.rejected
    assert 0.88**6 * 200 * 0.5 < equal < 0.88**6 * 200 * 1.5
