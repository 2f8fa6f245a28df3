"""Rewards: (completion, example) -> float. Strings only, pure, and never an exception.

A policy under training writes anything: a million digits, 1/0, half a bracket. So a reward function reads and compares,
and evaluates nothing; its patterns match in linear time, and a number too large to be meant is simply not a number.
Numbers are compared as exact fractions: 0.5, 1/2 and .50 are equal, 0.333 and 1/3 are not.

A new reward is a function here and a line in `REWARDS`; configs then know it by its name.
"""

import re
from collections.abc import Callable
from fractions import Fraction

from gspo.data.example import Example
from gspo.types import UserError

RewardFunction = Callable[[str, Example], float]

# One number. Each alternative consumes all the digits it can and nothing after them can fail, so a search over n
# characters takes O(n). A minus sign counts only where no operand stands before it: "10-7" ends in 7, "= -7" in -7.
# ASCII digits only.
_NUMBER = re.compile(
    r"""(?P<minus>(?<![\w.)\]}%])[-−])? \\?\$? (?P<minus_after_dollar>(?<=\$)[-−])?
        (?P<digits>[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)
        (?:[eE](?P<exponent>[-+]?[0-9]+))?
        (?:[ ]?/[ ]?(?P<denominator>[0-9]+))?""",
    re.VERBOSE,
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{(-?[0-9]{1,40})\}\{([0-9]{1,40})\}")
_MAX_DIGITS = 100  # int() is quadratic in the digits, and raises past a few thousand
_MAX_EXPONENT_DIGITS = 4  # with the sign; 10**exponent would otherwise fill the memory


def _value(match: re.Match[str]) -> Fraction | None:
    """The number that `_NUMBER` found; None for 1/0 and for sizes that nobody means."""
    exponent, denominator = match["exponent"] or "0", match["denominator"] or "1"
    whole, point, decimals = match["digits"].partition(".")
    pieces = whole.rstrip(",").split(",")
    one_number = len(pieces) == 1 or (len(pieces[0]) <= 3 and all(len(piece) == 3 for piece in pieces[1:]))
    whole = (
        "".join(pieces) if one_number else pieces[-1]
    )  # 1,080 is one number; 1,2,3 are three, and the last one counts
    if max(len(whole) + len(decimals), len(denominator)) > _MAX_DIGITS or len(exponent) > _MAX_EXPONENT_DIGITS:
        return None
    if int(denominator) == 0:
        return None
    value = Fraction(f"{whole or 0}{point}{decimals}") * Fraction(10) ** int(exponent) / int(denominator)
    negative = one_number and (match["minus"] or match["minus_after_dollar"])
    return -value if negative else value


def _boxed(text: str) -> str:
    r"""What stands in the last \boxed{...} (up to the end where it is not closed); the whole text where there is
    none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return text
    depth, start = 1, start + len("\\boxed{")
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return text[start:]


def _last_number(text: str) -> Fraction | None:
    """The value of the last number in the text, within the last box where there is one; None where there is no
    number."""
    text = _LATEX_FRACTION.sub(r"\1/\2", _boxed(text).replace("{,}", ",").replace("\\,", ","))
    last = None
    for last in _NUMBER.finditer(text):  # noqa: B007
        pass
    return None if last is None else _value(last)


def _number_after_hash(text: str) -> Fraction | None:
    """The number right after the last "####"; None where the marker or the number is missing."""
    _, marker, rest = text.rpartition("####")
    match = _NUMBER.match(rest.lstrip()) if marker else None
    return None if match is None else _value(match)


def _equal(value: Fraction | None, answer: str) -> float:
    return float(value is not None and value == _last_number(answer))


def exact_match(completion: str, example: Example) -> float:
    """1 where completion and answer are the same text, apart from white space around them."""
    return float(completion.strip() == example.answer.strip())


def numeric_answer(completion: str, example: Example) -> float:
    r"""1 where the last number in the completion equals the answer.

    Understood: 1,080  $5.00  50% (the sign is dropped: 50)  -3  3/4  \frac{3}{4}  1e3  \boxed{7}, and a period that
    ends the sentence. A box goes before numbers that follow it.
    """
    return _equal(_last_number(completion), example.answer)


def hash_answer(completion: str, example: Example) -> float:
    """1 where the number right after the last "####" equals the answer: GSM8K's own format. 0 without the marker."""
    return _equal(_number_after_hash(completion), example.answer)


def format_hash(completion: str, example: Example) -> float:
    """1 where the completion has "#### <number>", whatever the number: a reward for the format alone."""
    return float(_number_after_hash(completion) is not None)


def matching_characters(completion: str, example: Example) -> float:
    """The share of places at which completion and answer have the same character, counted over the longer of the
    two."""
    same = sum(mine == right for mine, right in zip(completion, example.answer, strict=False))
    return same / max(len(completion), len(example.answer), 1)


REWARDS: dict[str, RewardFunction] = {
    "exact_match": exact_match,
    "numeric_answer": numeric_answer,
    "hash_answer": hash_answer,
    "format_hash": format_hash,
    "matching_characters": matching_characters,
}


def overlong_penalty(length_tokens: int, max_length: int, buffer: int) -> float:
    """DAPO's soft punishment of long completions (arXiv 2503.14476, eq. 13), added to the reward.

    All three are counted in tokens. With L = max_length and b = buffer:

        0                  |y| <= L - b
        (L - b - |y|) / b  L - b < |y| <= L     (-1 at |y| = L)
        -1                 |y| > L
    """
    if not 0 <= buffer <= max_length:
        raise UserError(
            f"overlong_buffer.len={buffer}: must be in 0..{max_length}, the tokens of max_completion_length"
        )
    over = length_tokens - (max_length - buffer)
    return 0.0 if over <= 0 else -1.0 if over >= buffer else -over / buffer
