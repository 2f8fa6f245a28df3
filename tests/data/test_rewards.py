"""Rewards: what counts as the same number, what counts as an answer, and texts that were written to break them."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo.data.example import Example
from gspo.data.rewards import REWARDS, exact_match, format_hash, hash_answer, numeric_answer, overlong_penalty
from gspo.types import UserError


def example(answer: str) -> Example:
    return Example("question", answer)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("The answer is 1,080.", "1080"),
        ("so $5.00 in all", "5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("50%", "50"),
        ("minus three is -3", "-3"),
        ("x = −3", "-3"),
        ("10-7", "7"),
        ("10 - 3 = 7", "7"),
        (r"\frac{3}{4}", "0.75"),
        ("3/4", "6/8"),
        ("3 / 4", ".75"),
        ("0.1", "1/10"),
        (r"\boxed{42} by rule 7", "42"),
        (r"\boxed{\dfrac{1}{2}}", "1/2"),
        (r"first \boxed{1}, rather \boxed{2}", "2"),
        (r"$1{,}080$", "1080"),
        ("1e3", "1000"),
        ("2.5E-1", "1/4"),
        ("1,2,3", "3"),
        ("007", "7"),
        ("5km", "5"),
        ("12,345,678.90", "12345678.9"),
    ],
)
def test_equal_numbers_are_equal_however_they_are_written(completion, answer):
    # Catches: comparison of strings; a comma that cuts 1,080 to 80; the minus of a subtraction taken for a sign; the
    # final period read as a decimal point; a box that is ignored.
    assert numeric_answer(completion, example(answer)) == 1.0
    assert hash_answer(f"#### {answer}", example(answer)) == 1.0


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("7 or 8", "7"),
        ("7", "-7"),
        ("0.3333333", "1/3"),
        ("1080", "80"),
        ("1/0", "0"),
        ("1e999999999", "1"),
        ("1e999999999", "999999999"),
        ("", "0"),
        ("none", "0"),
        ("٤٢", "42"),
        ("4２", "42"),
        (r"\boxed{} 42", "42"),
        ("nan", "nan"),
        ("inf", "inf"),
        ("42", "forty-two"),
    ],
)
def test_other_numbers_and_no_numbers_score_nothing(completion, answer):
    # Catches: any mention of the answer counted as the answer; rounding; 1/0 read as 1 or as 0; NaN equal to itself.
    assert numeric_answer(completion, example(answer)) == 0.0


@settings(deadline=None)
@given(st.fractions(min_value=-(10**9), max_value=10**9, max_denominator=10**6), st.integers(0, 3))
def test_every_fraction_is_read_back(value: Fraction, zeros: int):
    # Catches: a parser that loses signs, digits or denominators for some value that nobody put into a table.
    text = f"{value.numerator}/{value.denominator}"
    assert numeric_answer(f"= {text}.", example(text)) == 1.0
    assert numeric_answer(f"= {value.numerator:,}.{'0' * zeros} ", example(str(value.numerator))) == 1.0
    assert numeric_answer(text, example(f"{value.numerator + 1}/{value.denominator}")) == 0.0


@pytest.mark.parametrize(
    ("completion", "score", "form"),
    [
        ("so it is 42\n#### 42", 1.0, 1.0),
        ("####42", 1.0, 1.0),
        ("#### $42.00", 1.0, 1.0),
        ("#### 41\n#### 42 apples", 1.0, 1.0),
        ("#### 42\n#### 41", 0.0, 1.0),
        ("#### 41 42", 0.0, 1.0),
        ("42", 0.0, 0.0),
        ("#### the answer is 42", 0.0, 0.0),
        ("### 42", 0.0, 0.0),
        ("#### 1/0", 0.0, 0.0),
        ("42 ####", 0.0, 0.0),
    ],
)
def test_the_hash_format_wants_the_number_right_after_the_last_mark(completion, score, form):
    # Catches: a policy that is paid for listing candidates, or for the right number anywhere in the text.
    assert hash_answer(completion, example("42")) == score
    assert format_hash(completion, example("42")) == form


def test_an_exact_match_forgives_only_the_white_space_around_it():
    # Catches: prefixes or substrings that count ("348" in "3481").
    assert exact_match(" 348\n", example("348")) == 1.0
    assert [exact_match(text, example("348")) for text in ("3481", "34", "3 48", "")] == [0.0] * 4


HOSTILE = {
    "a million digits": "9" * 10**6,
    "a million numbers": "1 " * 500_000,
    "a million groups": "1" + ",000" * 250_000 + "0",
    "decimal points": "1." * 500_000,
    "exponents": "1e" * 500_000,
    "a huge exponent": "#### 1e" + "9" * 10**6,
    "division by zero": "#### 1/0",
    "divisions": "1/" * 500_000,
    "a huge denominator": "1/" + "9" * 10**6,
    "signs": "-$" * 500_000,
    "open boxes": r"\boxed{" * 140_000,
    "nested brackets": r"\boxed{" + "{" * 10**6 + "}" * 10**5,
    "half fractions": r"\frac{1}" * 120_000,
    "hash marks": "#" * 10**6,
    "spaces": "#### " + " " * 10**6 + "7",
    "NUL": "\0" * 10**6,
    "Unicode digits": "٣" * 10**6,
    "lone surrogates": "\ud800" * 1000,
    "code": "__import__('os').system('touch pwned')",
    "a tower of powers": "9**9**9**9",
    "nothing": "",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_gets_a_float_at_once_and_is_never_run(text, tmp_path, monkeypatch):
    # Catches: int() on a million digits (raises), 10**999999999 (fills the memory), patterns that backtrack in
    # quadratic time, eval. Measured: under 0.3 s for the slowest of these on a busy core.
    monkeypatch.chdir(tmp_path)
    for function in REWARDS.values():
        start = time.process_time()
        score = function(text, example("7"))
        assert type(score) is float and 0.0 <= score <= 1.0
        assert time.process_time() - start < 1.0
    assert not list(tmp_path.iterdir())


@settings(deadline=None)
@given(st.text(), st.text())
def test_no_text_makes_a_reward_raise(completion, answer):
    # Catches: an answer of the data set, instead of the completion, that a reward cannot read.
    for name, function in REWARDS.items():
        score = function(completion, example(answer))
        assert score in (0.0, 1.0) or (name == "matching_characters" and 0 < score < 1)


def test_matching_characters_count_over_the_longer_text():
    # Catches a share that a long completion keeps, or a short one gets for what it did not say.
    cases = {"348": 1.0, "349": 2 / 3, "3": 1 / 3, "348000": 1 / 2, "": 0.0, "834": 0.0}
    for completion, share in cases.items():
        assert REWARDS["matching_characters"](completion, example("348")) == share
    assert REWARDS["matching_characters"]("", example("")) == 0.0


def test_the_overlong_penalty_is_the_one_of_dapo_and_counts_tokens():
    # Catches: a slope over the maximum instead of the buffer; a penalty that goes on below -1 or starts too early.
    lengths = [0, 80, 81, 90, 99, 100, 101, 500]
    penalties = [overlong_penalty(length, max_length=100, buffer=20) for length in lengths]
    assert penalties == pytest.approx([0, 0, -0.05, -0.5, -0.95, -1, -1, -1])
    assert [overlong_penalty(length, 100, 0) for length in (100, 101)] == [0.0, -1.0]
    with pytest.raises(UserError, match=r"overlong_buffer\.len=200"):
        overlong_penalty(5, 100, 200)
