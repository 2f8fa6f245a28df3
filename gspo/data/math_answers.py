"""The reward "math_verify": whether two mathematical answers are the same, by the package math-verify (an optional
extra), which knows LaTeX, sets, intervals, equations and units.

It parses what the model wrote and computes with it by SymPy, which may think about 9^9^9^9 for ever. The package's own
time limits are alarms of Python, which such a computation does not hear; so it runs in the processes of
`gspo.data.reward_pool` only, which are killed when their time is up.
"""

import functools
import importlib.util
from typing import Any

from gspo.data.example import Example
from gspo.types import UserError


def check_installed(field: str = "rewards") -> None:
    """Raises UserError where it is not. field: of the config that asks for it."""
    if importlib.util.find_spec("math_verify") is None:
        package = '"math-verify[antlr4_13_2]>=0.8"'
        raise UserError(f'{field}: "math_verify" needs an optional package: pip install {package}')


@functools.lru_cache(maxsize=4096)
def _wanted(answer: str) -> Any:
    """The answer of the data, which may be LaTeX without the signs that say so. Raises ValueError where it is none."""
    from math_verify import parse

    found = parse(answer, parsing_timeout=None) or parse(f"${answer}$", parsing_timeout=None)
    if not found:
        raise ValueError(f"the answer {answer!r:.80} is no mathematics")
    return found


def math_verify(completion: str, example: Example) -> float:
    """1 where the completion's last answer (boxed first of all) equals the example's."""
    from math_verify import parse, verify

    return float(verify(_wanted(example.answer), parse(completion, parsing_timeout=None), timeout_seconds=None))
