"""Rewards of the user's own: which form a function has, what it is called with, and what it may do wrong."""

import contextlib
import io
import sys

import pytest

from gspo.data.example import Example
from gspo.data.rewards import exact_match
from gspo.data.scoring import make_scorer
from gspo.data.tasks import Task
from gspo.data.user_rewards import attempt, load
from gspo.types import UserError

ROW = Example("2+2=", "4", metadata={"level": 3, "source": "book"})

MODULE = """
import sys
import helper_of_mine

print("a line of the import")

def brevity(completion, example):
    return 1 / (1 + len(completion)) + (example.answer == "4")

def optional(completion, example, scale=2.0):
    return scale * len(completion)

def trl(completions, prompts, level, **kwargs):
    assert set(kwargs) == {"answer", "source"}
    return [len(c) + len(p) + n for c, p, n in zip(completions, prompts, level)]

def by_keyword(*, completions, answer):
    return [float(c == a) for c, a in zip(completions, answer)]

def keywords_only(**kwargs):
    return [float(len(c)) for c in kwargs["completions"]]

def chat(completions, prompts):
    assert completions[0][0]["role"] == "assistant"
    return [float(c[0]["content"] == p[-1]["content"]) for c, p in zip(completions, prompts)]

def not_applicable(completions, **kwargs):
    return [None, 1.0]

def asks(completions, solution):
    return [0.0] * len(completions)

def ids(prompts, completion_ids):
    return [0.0]

def three(a, b, c):
    return 0.0

async def later(completions, **kwargs):
    return [0.0]

def raises(completion, example):
    raise KeyError("a\\nb")

def nan(completion, example):
    return float("nan")

def words(completion, example):
    return "very good"

def nothing(completion, example):
    pass

def leaves(completion, example):
    sys.exit(3)

def prints(completion, example):
    print("\\nfirst"); print("second"); print("third", file=sys.stderr)
    return 0.5

def short(completions, **kwargs):
    return [1.0]

def number(completions, **kwargs):
    return 1.0

def infinite(completions, **kwargs):
    return [1.0, float("inf")]

def huge(completions, **kwargs):
    return [3e38, -1e39]

constant = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a module of rewards that imports its neighbour."""
    (tmp_path / "rewards_of_mine.py").write_text(MODULE)
    (tmp_path / "helper_of_mine.py").write_text("")
    (tmp_path / "broken_of_mine.py").write_text("print('before')\nraise RuntimeError('no\\nluck')")
    (tmp_path / "leaving_of_mine.py").write_text("import sys; sys.exit('bye')")
    (tmp_path / "wrong_of_mine.py").write_text("def f(:")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in list(sys.modules):
        if name.endswith("_of_mine"):
            del sys.modules[name]


def called(name, texts=("abc", "4"), examples=(ROW, ROW)):
    reward = load(f"rewards_of_mine:{name}", examples[0])
    if reward.by_group:
        return attempt(reward, texts, examples)
    parts = [attempt(reward, [text], [example]) for text, example in zip(texts, examples, strict=True)]
    return parts[0]._replace(values=[value for part in parts for value in part.values])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("brevity", [1.25, 1.5]),
        ("optional", [6.0, 2.0]),
        ("trl", [3 + 4 + 3, 1 + 4 + 3]),
        ("by_keyword", [0.0, 1.0]),
        ("keywords_only", [3.0, 1.0]),
        ("not_applicable", [0.0, 1.0]),
    ],
)
def test_the_signature_decides_how_a_reward_is_called(here, name, values):
    # Catches: TRL's completions given as prompts, a column that is missing or not asked for, an optional argument taken
    # for the data's, TRL's None counted as an error.
    assert called(name) == (values, "", "")


def test_conversations_come_as_trl_has_them(here):
    # Catches: prompts as text where a user's function reads messages.
    example = Example("user: hi", "x", messages=({"role": "user", "content": "hi"},))
    assert called("chat", ["hi", "ho"], [example, example]).values == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rewards_of_mine:missing", "has no function 'missing'"),
        ("rewards_of_mine:constant", "has no function 'constant'"),
        ("rewards_of_mine:asks", "asks for 'solution'; the data has only prompts, completions, level, source, answer"),
        ("rewards_of_mine:ids", r"takes \(prompts, completion_ids\); write def f"),
        ("rewards_of_mine:three", r"takes \(a, b, c\); write def f\(completion, example\) -> float, or"),
        ("rewards_of_mine:later", "is an async function"),
        ("broken_of_mine:f", "importing 'broken_of_mine' in .* failed: RuntimeError: no luck"),
        ("leaving_of_mine:f", r"failed: it called sys.exit\('bye'\)"),
        ("wrong_of_mine:f", "failed: SyntaxError"),
        ("absent_of_mine:f", "failed: ModuleNotFoundError: No module named 'absent_of_mine'"),
    ],
)
def test_a_reward_that_cannot_be_had_is_one_line_before_the_run(here, capfd, name, words):
    # Catches: a traceback, an exit without a word, and the module's own output in the middle of ours.
    with pytest.raises(UserError, match=rf"^rewards: '{name}'.*{words}") as error:
        load(name, ROW)
    assert "\n" not in str(error.value) and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("field", ["eval.reward", "judge"])
@pytest.mark.parametrize("name", ["absent_of_mine:f", "rewards_of_mine:missing", "rewards_of_mine:asks",
                                  "rewards_of_mine:ids", "rewards_of_mine:later", "math_verify"])  # fmt: skip
def test_a_reward_that_cannot_be_had_is_told_by_the_field_that_names_it(here, monkeypatch, field, name):
    # Catches: a mistake in eval.reward or in a judge that is sought in `rewards`.
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # of math_verify, where it is installed
    with pytest.raises(UserError, match=f"""^{field}: ['"]{name}['"]"""):
        make_scorer([name], Task("mine", 1, lambda _: ROW, exact_match), field=field)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", "KeyError: 'a\\nb'"),
        ("nan", "ValueError: returned nan"),
        ("words", "ValueError: could not convert string to float"),
        ("nothing", "TypeError: float"),
        ("leaves", "it called sys.exit(3)"),
        ("short", "ValueError: returned 1 values for 2 completions, not a list of as many floats"),
        ("number", "ValueError: returned 1.0 for 2 completions"),
        ("infinite", "ValueError: returned inf"),
        ("huge", "ValueError: returned -1e+39, more than float32 holds"),
    ],
)
def test_whatever_a_reward_does_wrong_is_a_failed_call_worth_zero(here, name, words):
    # Catches: a run that ends, a NaN that poisons its group, values of one completion given to another.
    result = called(name)
    assert result.values == [0.0, 0.0] and result.error.startswith(words) and "\n" not in result.error


def test_what_a_reward_prints_is_kept_from_the_display(here, capfd):
    # Catches: lines of a reward in the middle of a live display, and prints that vanish without a word.
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert called("prints") == ([0.5, 0.5], "", "first")
    assert out.getvalue() == "" and capfd.readouterr() == ("", "")


def test_ctrl_c_is_not_an_error_of_the_reward(here, monkeypatch):
    # Catches: an except that swallows the second Ctrl-C of somebody who wants out.
    reward = load("rewards_of_mine:raises", ROW)

    def interrupted(texts, examples):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(type(reward)("x", interrupted), ["a"], [ROW])
