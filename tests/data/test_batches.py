"""Batches: the order of a run, frames, prompts that do not fit, texts of completions, rewards of a batch."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo.data.batches import (
    DemonstrationSource,
    PromptSource,
    completion_texts,
    shuffled_index,
    stopped_lengths,
)
from gspo.data.example import Example
from gspo.data.rewards import exact_match
from gspo.data.tasks import Task, make_task
from gspo.data.tokenizer import make_tokenizer
from gspo.types import UserError

BYTES = make_tokenizer("bytes")


def task_of(prompts: list[str], demonstrations: list[str] | None = None) -> Task:
    demonstrations = demonstrations or [None] * len(prompts)
    examples = [Example(p, "answer", d) for p, d in zip(prompts, demonstrations, strict=True)]
    return Task("mine", len(examples), examples.__getitem__, exact_match)


def words(count: int) -> Task:
    """Prompts of 1..count bytes."""
    return task_of(["x" * (i + 1) for i in range(count)])


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.integers(0, 2**40), st.integers(0, 5))
def test_every_epoch_holds_every_index_once(size, seed, epoch):
    # Catches: sampling with replacement: some prompts never seen, others twice.
    assert sorted(shuffled_index(size, seed, epoch * size + j) for j in range(size)) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own_and_positions_are_random_access():
    # Catches: one order for all epochs (the same prompts always share a batch); an order that depends on what was read
    # before.
    epochs = [[shuffled_index(100, 7, epoch * 100 + j) for j in range(100)] for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] and epochs[0] != list(range(100))
    assert [shuffled_index(100, 8, j) for j in range(100)] != epochs[0]
    assert shuffled_index(100, 7, 150) == epochs[1][50]
    assert 0 <= shuffled_index(100, 7, 10**12) < 100


def test_a_batch_is_a_function_of_the_cursor():
    # Catches: a resumed run that sees other prompts: two batches of 4 are one batch of 8, and a new source gives the
    # same.
    first = PromptSource(words(10), BYTES, max_prompt_length=16, seed=1)
    second = PromptSource(words(10), BYTES, max_prompt_length=16, seed=1)
    first.batch(0, 5)
    whole, halves = first.batch(24, 8), [second.batch(28, 4), second.batch(24, 4)]
    np.testing.assert_array_equal(whole.tokens_QP, np.concatenate([halves[1].tokens_QP, halves[0].tokens_QP]))
    assert whole.examples == halves[1].examples + halves[0].examples
    assert len({example.prompt for example in first.batch(0, 10).examples}) == 10


def test_prompts_stand_at_the_right_of_their_frame():
    # Catches: right padding, which would put padding between a prompt and its completion.
    source = PromptSource(words(10), BYTES, max_prompt_length=16)
    batch = source.batch(0, 10)
    assert batch.tokens_QP.shape == (10, 16) and batch.tokens_QP.dtype == batch.lengths_Q.dtype == np.int32
    for example, row, length in zip(batch.examples, batch.tokens_QP, batch.lengths_Q, strict=True):
        assert length == len(example.prompt)
        assert row.tolist() == [BYTES.pad_id] * (16 - length) + BYTES.encode(example.prompt)


def test_a_batch_takes_the_smallest_bucket_that_holds_it():
    # Catches: a width for each batch (a compilation for each batch), or a bucket too narrow for its longest prompt.
    source = PromptSource(words(12), BYTES, max_prompt_length=12, prompt_buckets=(8, 4))
    for cursor in range(50):
        batch = source.batch(cursor, 2)
        assert batch.tokens_QP.shape[1] == min(width for width in (4, 8, 12) if width >= batch.lengths_Q.max())
    with pytest.raises(UserError, match="prompt_buckets: 13"):
        PromptSource(words(2), BYTES, max_prompt_length=12, prompt_buckets=(13,))


def test_prompts_that_do_not_fit_are_counted_before_the_run():
    # Catches: prompts cut silently (another problem than the reward scores), or an error in the third hour.
    with pytest.raises(UserError) as error:
        PromptSource(words(20), BYTES, max_prompt_length=16)
    assert str(error.value) == (
        "4 of 20 prompts are longer than max_prompt_length=16 tokens (longest 20): raise it, or set "
        "overlong_prompts='drop'"
    )
    source = PromptSource(words(20), BYTES, max_prompt_length=16, overlong_prompts="drop")
    assert (len(source), source.num_dropped) == (16, 4)
    assert sorted(source.batch(0, 16).lengths_Q.tolist()) == list(range(1, 17))
    with pytest.raises(UserError, match="none is left"):
        PromptSource(task_of(["xxx", "xx"]), BYTES, max_prompt_length=1, overlong_prompts="drop")
    with pytest.raises(UserError, match="overlong_prompts='cut'"):
        PromptSource(words(2), BYTES, max_prompt_length=16, overlong_prompts="cut")
    with pytest.raises(UserError, match="example 1 of task mine has an empty prompt"):
        PromptSource(task_of(["x", ""]), BYTES, max_prompt_length=16)


def test_the_length_of_a_prompt_is_measured_after_the_chat_template():
    # Catches: prompts that fit before the template's tokens and not after them.
    class Chat(type(BYTES)):
        def format_prompt(self, text):
            return f"<user>{text}<assistant>"

    assert PromptSource(task_of(["hi"]), Chat(), max_prompt_length=19).batch(0, 1).lengths_Q.tolist() == [19]
    with pytest.raises(UserError, match="longest 19"):
        PromptSource(task_of(["hi"]), Chat(), max_prompt_length=18)


def test_demonstrations_follow_their_prompts_and_end_in_eos():
    # Catches: a policy that never learns to end; an eos that is not counted in the length, so that the loss leaves it
    # out; padding between prompt and demonstration.
    source = DemonstrationSource(
        task_of(["ab", "cde"], ["x", "yz"]), BYTES, max_prompt_length=4, max_completion_length=5
    )
    batch = source.batch(0, 2)
    pad, eos = BYTES.pad_id, BYTES.eos_ids[0]
    rows = {
        2: [pad, pad, *b"ab", *b"x", eos, pad, pad, pad],
        3: [pad, *b"cde", *b"yz", eos, pad, pad],
    }
    for row, prompt_length, length in zip(
        batch.tokens_BT, batch.prompt_lengths_B, batch.completion_lengths_B, strict=True
    ):
        assert row.tolist() == rows[int(prompt_length)] and length == prompt_length
    assert batch.tokens_BT.dtype == np.int32


def test_demonstrations_that_do_not_fit_with_their_eos_are_dropped_or_named():
    # Catches: a demonstration of exactly the maximum length whose eos falls off.
    task = task_of(["ab", "cd", "efg"], ["xxx", "xxxx", "x"])
    with pytest.raises(
        UserError, match=r"1 of 3 demonstrations are longer than max_completion_length=4 tokens \(longest 5\)"
    ):
        DemonstrationSource(task, BYTES, max_prompt_length=3, max_completion_length=4)
    with pytest.raises(UserError, match="1 of 3 prompts are longer than max_prompt_length=2"):
        DemonstrationSource(task, BYTES, max_prompt_length=2, max_completion_length=9)
    source = DemonstrationSource(task, BYTES, max_prompt_length=2, max_completion_length=4, overlong="drop")
    assert (len(source), source.num_dropped) == (1, 2)
    assert source.batch(0, 1).tokens_BT.tolist() == [[*b"ab", *b"xxx", BYTES.eos_ids[0]]]
    with pytest.raises(UserError, match="fits max_prompt_length=2 and max_completion_length=3 tokens together"):
        DemonstrationSource(
            task_of(["a", "bcd"], ["xxxxx", "x"]), BYTES, max_prompt_length=2, max_completion_length=3, overlong="drop"
        )


def test_a_task_without_demonstrations_says_so_before_the_run():
    # Catches: None encoded as the text "None".
    with pytest.raises(UserError, match="task mine has no demonstrations"):
        DemonstrationSource(words(3), BYTES, max_prompt_length=8, max_completion_length=8)


def test_demonstrations_of_the_toy_fit_its_character_tokenizer():
    # Catches: a toy whose prompt or answer leaves the alphabet of its own configs.
    tokenizer = make_tokenizer("chars:0123456789=")
    task = make_task("running_sum", split="train", size=200, num_digits=6)
    batch = DemonstrationSource(task, tokenizer, max_prompt_length=7, max_completion_length=7).batch(0, 64)
    assert batch.tokens_BT.shape == (64, 14) and set(batch.completion_lengths_B.tolist()) == {7}
    assert (batch.tokens_BT[:, -1] == tokenizer.eos_ids[0]).all()


def test_the_text_of_a_completion_ends_where_its_length_says():
    # Catches: text past the end of a row; a completion cut at a pad token that the policy really sampled; the prompt in
    # the text.
    pad, eos = BYTES.pad_id, BYTES.eos_ids[0]
    tokens_BT = np.array([
        [pad, *b"q", *b"abc", eos, *b"zz"], [*b"pq", *b"a", pad, *b"c", *b"def"], [*b"pq", eos, *b"zzzzz"],
        [*b"pq", *b"abcdef"]
    ])  # fmt: skip
    assert completion_texts(BYTES, tokens_BT, 2, np.array([4, 6, 1, 0])) == ["abc", "acdef", "", ""]


def test_a_completion_ends_with_the_token_that_completes_a_stop_string():
    # Catches: a length that counts characters, a stop string missed because it begins in one token and ends in the
    # next, the last one found instead of the first, one found behind the end of the row, text left after it.
    class Words:
        """Ids are the numbers of pieces of text."""

        pieces = ("a", "b<", "/", "x>c", "</x>", "")

        def decode(self, ids):
            return "".join(self.pieces[i] for i in ids)

    rows = [
        ([0, 0, 1, 2, 3], 5, 5, "aab</x>"),  # with the last
        ([0, 1, 2, 3, 0], 5, 4, "ab</x>"),  # b< + / + x>c: complete with the third of them, which says more
        ([0, 4, 0, 4, 5], 5, 2, "a</x>"),
        ([4, 0, 0, 0, 0], 5, 1, "</x>"),
        ([0, 0, 0, 4, 0], 3, 3, "aaa"),  # not within the row
        ([0, 1, 2, 0, 3], 5, 5, "ab</ax>c"),
        ([0, 1, 2, 3, 5], 3, 3, "ab</"),
    ]
    tokens_BT = np.array([[0, 0, *ids] for ids, *_ in rows])
    lengths_B = np.array([length for _, length, *_ in rows])
    new_B, stopped_B = stopped_lengths(Words(), tokens_BT, 2, lengths_B, ("</x>", "<never>"))
    assert stopped_B.tolist() == ["</x>" in text for *_, text in rows]
    assert new_B.tolist() == [new for *_, new, _ in rows] and new_B.dtype == np.int32
    assert completion_texts(Words(), tokens_BT, 2, new_B, ("</x>",)) == [text for *_, text in rows]
    assert lengths_B.tolist() == [5, 5, 5, 5, 3, 5, 3]  # as they were
    first, _ = stopped_lengths(Words(), tokens_BT[1:2], 2, lengths_B[:1], ("x>", "<", "c"))
    assert first.tolist() == [2]  # whichever comes first


@settings(deadline=None)
@given(st.text("ab<>", max_size=12), st.lists(st.text("ab<>", min_size=1, max_size=3), min_size=1, max_size=3))
def test_a_stop_string_is_found_where_a_scan_finds_it(text, stop):
    # Catches: a bisection that is off by one.
    tokens_BT = np.array([[0, *text.encode(), *[BYTES.pad_id] * (12 - len(text))]])
    scan = next((n for n in range(1, len(text) + 1) if any(s in text[:n] for s in stop)), len(text))
    (length,), (stopped,) = stopped_lengths(BYTES, tokens_BT, 1, np.array([len(text)]), stop)
    assert length == scan and stopped == any(s in text for s in stop)
    (cut,) = completion_texts(BYTES, tokens_BT, 1, np.array([len(text)]), stop)
    assert cut == text[:scan]


def test_prompts_from_a_file_reach_their_rows(tmp_path):
    # Catches: a lone surrogate, legal in JSON and not in UTF-8, that ends a run with an encoding error.
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "a\ud800b\0é", "answer": "x"}) + "\n")
    batch = PromptSource(make_task(f"jsonl:{path}", split="train"), BYTES, max_prompt_length=8).batch(0, 2)
    assert batch.lengths_Q.tolist() == [6, 6] and bytes(batch.tokens_QP[0, 2:].tolist()) == b"a?b\0\xc3\xa9"
