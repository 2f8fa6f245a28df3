"""reasoning-gym: its own scorers, never fed with programs; splits that never meet."""

import builtins
import time

import pytest

from gspo.data.tasks import make_task
from gspo.types import UserError


@pytest.fixture
def chain_sum():
    pytest.importorskip("reasoning_gym")
    return make_task("reasoning_gym:chain_sum", split="train", size=20, min_terms=2, max_terms=3)


def test_reasoning_gym_examples_are_scored_by_their_own_scorer_with_or_without_tags(chain_sum):
    # Catches: an answer inside of tags that scores 0, or thinking before the tags that is scored as part of the answer.
    example = chain_sum[3]
    assert example == chain_sum[3] and chain_sum.reward(example.answer, example) == 1.0
    wrong = str(int(example.answer) + 1)
    tagged = f"<think>{wrong}, or <answer>{wrong}</answer></think> <answer> {example.answer}\n</answer> done"
    assert chain_sum.reward(tagged, example) == 1.0
    assert chain_sum.reward(f"so <answer>{example.answer}", example) == 1.0  # cut off before the tag was closed
    assert chain_sum.reward(wrong, example) < 0.5
    assert (
        0.0 < chain_sum.reward(f"It is\n{example.answer}", example) < 1.0
    )  # the scorer's own partial credit, over lines


def test_reasoning_gym_splits_and_seeds_do_not_draw_the_same_problems(chain_sum):
    # Catches: neighbouring seeds. The package draws problem i of seed s from s + i, so seed 1 is seed 0 moved by one.
    options = {"size": 200, "min_terms": 6, "max_terms": 6, "min_digits": 6, "max_digits": 6}
    drawn = [
        {example.prompt for example in make_task("reasoning_gym:chain_sum", split=split, seed=seed, **options)}
        for split in ("train", "test")
        for seed in (0, 1)
    ]
    assert sum(map(len, drawn)) == len(set.union(*drawn)) == 800


@pytest.mark.parametrize(
    "name", ["countdown", "puzzle24", "n_queens", "spiral_matrix", "coin_flip", "complex_arithmetic"]
)
def test_no_scorer_evaluates_what_the_model_wrote(name, tmp_path, monkeypatch):
    # Catches: scorers of the package that call eval, or SymPy's parser, on the completion: code that runs, or
    # 9**9**9**9 that never ends; Fraction("1e999999999"); and "nan", which one scorer takes for the right answer.
    pytest.importorskip("reasoning_gym")
    monkeypatch.chdir(tmp_path)
    task = make_task(f"reasoning_gym:{name}", split="train", size=2)
    example = task[0]
    code = "__import__('pathlib').Path('pwned').touch()"
    for text in (
        code,
        f"<answer>[{code}]</answer>",
        "9**9**9**9",
        "(1\n+9**9**9**9)",
        "1e999999999",
        "1e9_999_999",
        "[" * 10**5,
        "nan",
    ):
        start = time.process_time()
        assert 0.0 <= task.reward(text, example) < 0.5
        assert time.process_time() - start < 2.0
    assert not list(tmp_path.iterdir())


def test_a_safe_expression_still_reaches_the_scorer_that_evaluates():
    # Catches: a guard so strict that no answer is ever right.
    pytest.importorskip("reasoning_gym")
    task = make_task("reasoning_gym:countdown", split="train", size=5)
    for example in task:
        assert task.reward(f"<answer>{example.metadata['metadata']['expression']}</answer>", example) == 1.0
        assert task.reward("1 + 1", example) < 0.5


def test_a_scorer_that_raises_counts_as_zero():
    # Catches: prime_factorization's int("a") ending a run at the first completion that is no number.
    pytest.importorskip("reasoning_gym")
    task = make_task("reasoning_gym:prime_factorization", split="train", size=2)
    assert task.reward("two times three", task[0]) == 0.0
    assert task.reward(task[0].answer, task[0]) == 1.0


def test_unsafe_or_unrepeatable_data_sets_are_refused_with_the_reason(monkeypatch):
    # Catches: a run that cannot be resumed bit-equal because problems follow the order of a set.
    pytest.importorskip("reasoning_gym")
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(UserError, match="PYTHONHASHSEED=0"):
        make_task("reasoning_gym:word_ladder", split="train", size=2)
    with pytest.raises(UserError, match="evaluates what the model wrote"):
        make_task("reasoning_gym:simple_integration", split="train", size=2)


def test_without_the_package_one_line_says_how_to_install_it(monkeypatch):
    # Catches: a bare ModuleNotFoundError for an optional extra.
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("reasoning_gym"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r'pip install "reasoning-gym>=0.1.19"'):
        make_task("reasoning_gym:chain_sum", split="train")


def test_a_mistake_in_a_reasoning_gym_task_is_one_line_with_the_nearest_name(chain_sum):
    # Catches: the package's bare asserts and TypeErrors.
    for name, options, word in (
        ("chain_sums", {}, "did you mean 'chain_sum'?"),
        ("chain_sum", {"min_term": 2}, "did you mean 'min_terms'?"),
        ("chain_sum", {"min_terms": -1}, "min_terms must be positive"),
    ):
        with pytest.raises(UserError) as error:
            make_task(f"reasoning_gym:{name}", split="train", **options)
        assert word in str(error.value) and "\n" not in str(error.value)
