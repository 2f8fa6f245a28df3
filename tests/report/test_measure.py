"""Measuring: turns, yardsticks, compilations, memory."""

import time

import jax
import jax.numpy as jnp

from gspo.report import measure


def test_functions_are_called_in_turns_and_the_first_turn_is_not_counted():
    # Catches all calls of one function before the next, and a compilation in the median.
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = measure.interleaved(functions, repeats=3)
    assert calls == list("ab" * 4) and [len(seconds[name]) for name in "ab"] == [3, 3]


def test_what_a_function_returns_is_waited_for():
    # Catches the time of a dispatch taken for the time of its work.
    class Late:
        def block_until_ready(self):
            time.sleep(0.02)

    assert min(measure.interleaved({"late": lambda: [Late()]}, repeats=2)["late"]) >= 0.02


def test_a_spread_is_median_least_and_most():
    # Catches a mean, which one slow turn moves.
    assert measure.spread([3.0, 1.0, 100.0]) == {"median": 3.0, "min": 1.0, "max": 100.0, "repeats": 3}


def test_yardsticks_do_the_work_they_are_counted_for():
    # Catches a product that XLA folds away, and a copy that is none: each returns its array.
    functions, work = measure.yardsticks(jnp.float32, small=True)
    n = round((work["matmul"] / 2) ** (1 / 3))
    assert float(functions["matmul"]()[0, 0]) == float(functions["matmul_cut"]()[-1, -1]) == n
    assert functions["copy"]().nbytes * 2 == work["copy"] and float(functions["copy"]()[0]) == 2.0
    rates = measure.rates({name: [2.0] for name in functions}, work)
    assert rates == {"matmul_flops_per_s": work["matmul"] / 2, "copy_bytes_per_s": work["copy"] / 2}


def test_compilations_are_counted_and_only_inside():
    # Catches a listener that stays, and one that misses programs.
    double, triple = jax.jit(lambda x: 2 * x + 0.125), jax.jit(lambda x: 3 * x + 0.125)
    x = jnp.ones((7,))
    with measure.compilations() as found:
        double(x)
        double(x)
    triple(x)
    assert found["programs"] == 1 and found["trace_s"] > 0 and found["lower_s"] > 0 and found["compile_s"] > 0


def test_memory_of_a_program_holds_what_it_makes_in_between():
    # Catches bytes of the result taken for those held meanwhile.
    def grams(x):
        return jnp.sum(jnp.sort(x @ x.T, axis=0)[::2])

    compiled = jax.jit(grams).lower(jnp.ones((256, 4))).compile()
    memory = measure.program_memory(compiled)
    assert memory["argument_bytes"] == 256 * 4 * 4 and memory["output_bytes"] == 4
    assert memory["temporary_bytes"] >= 256 * 256 * 4


def test_the_environment_says_where_it_ran():
    # Catches a measurement that nobody can place.
    told = measure.environment()
    assert told["platform"] == "cpu" and told["cores"] >= 1 and told["versions"]["jax"] == jax.__version__
    assert told["commit"] != "" and told["date"].startswith("20")
    assert 50e6 < measure.peak_memory()["rss_bytes"] < 1e12, "bytes, not KiB"
