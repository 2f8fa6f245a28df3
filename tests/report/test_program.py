"""Costs read from HLO text of programs compiled here for eight CPU devices.

Expected numbers are worked out from the shapes that went in, never from the text.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gspo.report.collectives import Collective, by_kind
from gspo.report.hlo import size_of
from gspo.report.program import analyse
from tests.report_programs import compiled, layers


def test_a_dot_costs_two_flops_for_each_multiply_add():
    # Catches multiply-adds counted once, and the contracted dimension taken from the wrong side.
    program = compiled(lambda a, b: a @ b, (8, 16), (16, 32))
    assert program.flops == 2 * 8 * 16 * 32
    assert program.flops_by_kind == {"dot": 2 * 8 * 16 * 32, "ragged": 0}


def test_batch_dimensions_of_a_dot_count_once():
    # Catches batch dimensions squared, or left out: they stand in both operands and in the result.
    program = compiled(lambda q, k: jnp.einsum("btkrh,bskh->bkrts", q, k), (2, 32, 2, 4, 16), (2, 24, 2, 16))
    assert program.flops == 2 * (2 * 32 * 24 * 2 * 4 * 16)


def test_a_convolution_counts_the_inputs_of_its_group_and_no_padding():
    # Catches groups that see all channels, and multiplications with padding: windows of 3 at stride 2 on 9 elements,
    # padded by one on either side, meet 2 + 3 + 3 + 3 + 2 of them.
    program = compiled(
        lambda x, w: jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", feature_group_count=2),
        (2, 6, 9, 9),
        (8, 3, 3, 3),
    )
    assert program.flops == 2 * (2 * 8 * 3 * 13 * 13)


def test_the_body_of_a_scan_counts_as_often_as_it_runs_and_nested_scans_multiply():
    # Catches what XLA's cost analysis does: a model of seven layers costs as much as one.
    one = 2 * 32 * 16 * 16
    assert compiled(layers, (32, 16), (7, 16, 16)).flops == 7 * one

    def twice_nested(x, w):
        return jax.lax.scan(lambda x, _: (layers(x, w), None), x, None, length=5)[0]

    program = compiled(twice_nested, (32, 16), (7, 16, 16))
    assert program.flops == 5 * 7 * one and program.unknown_loops == 0


def test_a_loop_that_nobody_can_tell_the_trips_of_counts_as_often_as_the_caller_says_and_is_reported():
    # Catches a decode loop counted once without a word, and its inner scan losing its own count.
    def generate(x, w, n):
        return jax.lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, layers(c[1], w)), (0, x))

    one = 7 * 2 * 32 * 16 * 16
    shapes = (32, 16), (7, 16, 16), 0
    assert compiled(generate, *shapes).flops == one
    program = compiled(generate, *shapes, unknown_trips=100)
    assert program.flops == 100 * one and program.unknown_loops == 1


def test_the_gradient_of_a_checkpointed_scan_costs_four_forward_passes():
    # Catches rematerialised matmuls left out, and a backward loop that is missed: forward, forward again, two products
    # backward.
    def loss(x, w):
        return jnp.sum(jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.sin(x @ w), None)), x, w)[0])

    assert compiled(jax.grad(loss, (0, 1)), (32, 16), (7, 16, 16)).flops == 4 * 7 * (2 * 32 * 16 * 16)


def test_every_branch_of_a_conditional_counts():
    # Catches the branch nobody looked into.
    program = compiled(lambda n, x, w: jax.lax.cond(n > 0, lambda: x @ w, lambda: jnp.sin(x)), 0, (8, 16), (16, 16))
    assert program.flops == 2 * 8 * 16 * 16


def test_a_computation_counts_for_each_call():
    # Catches calls that are passed by, and a computation remembered as done.
    text = """
%f (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8] parameter(0)
  ROOT %dot = f32[8,8] dot(f32[8,8] %p, f32[8,8] %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8] parameter(0)
  %once = f32[8,8] call(%a), to_apply=%f
  ROOT %twice = f32[8,8] call(%once), to_apply=%f
}
"""
    assert analyse(text).flops == 2 * (2 * 8 * 8 * 8)


def collective_layer(x):
    """x: [32, 16] on each device of a 2 x 4 mesh."""
    x = jnp.sin(jax.lax.all_gather(x, "inner", axis=0, tiled=True))  # [128, 16]
    x = jnp.cos(jax.lax.psum(x, "outer"))
    x = jnp.sin(jax.lax.psum_scatter(x, "inner", scatter_dimension=0, tiled=True))  # [32, 16]
    x = jnp.cos(jax.lax.ppermute(x, "inner", [(i, (i + 1) % 4) for i in range(4)]))
    return jax.lax.all_to_all(x, "inner", split_axis=0, concat_axis=1, tiled=True).reshape(32, 16)


def test_collectives_in_a_scan_have_the_bytes_of_their_larger_side_and_the_trips_as_count():
    # Catches a reduce-scatter measured by what is left, an all-gather by what went in, a count of one, groups of all
    # eight devices.
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("outer", "inner"))

    def body(x):
        return jax.lax.scan(lambda x, _: (collective_layer(x), None), x, None, length=6)[0]

    fn = jax.shard_map(
        body, mesh=mesh, in_specs=P(("outer", "inner")), out_specs=P(("outer", "inner")), check_vma=False
    )
    found = {c.kind: c for c in compiled(fn, (8 * 32, 16)).collectives}
    large, small = 128 * 16 * 4, 32 * 16 * 4
    assert {kind: (c.bytes, c.count, c.group_size) for kind, c in found.items()} == {
        "all-gather": (large, 6, 4), "all-reduce": (large, 6, 2), "reduce-scatter": (large, 6, 4),
        "collective-permute": (small, 6, 8), "all-to-all": (small, 6, 4),
    }  # fmt: skip
    assert found["all-gather"].shape == "f32[128,16]" and found["all-gather"].op_name.endswith("all_gather")


def test_totals_by_kind_multiply_bytes_by_executions_and_start_with_the_most():
    # Catches a sum of sizes that forgets how often each was moved.
    def c(kind, size, count):
        return Collective(kind, size, count, 4, "", "")

    totals = by_kind((c("all-reduce", 100, 1), c("all-gather", 30, 2), c("all-gather", 10, 5)))
    assert list(totals.items()) == [("all-gather", (7, 110)), ("all-reduce", (1, 100))]


def test_the_largest_array_is_the_stack_that_a_scan_keeps_for_its_backward_pass():
    # Catches arrays sized per layer, and what lives inside a fusion only: the broadcast of the sum is never stored.
    def fn(x, w):
        return jax.lax.scan(lambda x, w: (x := jnp.sin(x @ w), x), x, w)[1], jnp.sum(
            x[:, None] * jnp.ones((1, 4096, 1))
        )

    arrays = compiled(fn, (32, 16), (7, 16, 16)).arrays
    assert arrays[0].dims == (7, 32, 16) and arrays[0].dtype == "f32" and arrays[0].bytes == 7 * 32 * 16 * 4
    assert [a.bytes for a in arrays] == sorted((a.bytes for a in arrays), reverse=True)
    assert len(compiled(fn, (32, 16), (7, 16, 16), keep=2).arrays) == 2


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("pred", 10), ("s4", 5), ("u8", 10), ("f8e4m3fn", 10), ("bf16", 20), ("f32", 40), ("s64", 80), ("token", 0)],
)
def test_ten_elements_have_the_bytes_of_their_type(dtype, size):
    # Catches bits read as bytes, and half a byte rounded to none.
    assert size_of(dtype, (10,)) == size and size_of("s4", (3,)) == 2


def test_text_that_is_no_program_is_refused():
    # Catches zeros reported for the wrong file, and for an instruction that nobody understood.
    with pytest.raises(ValueError, match="no ENTRY computation"):
        analyse("module @jit_f { func.func public @main() }\n")
    with pytest.raises(ValueError, match="not an HLO instruction: %dot = f32"):
        analyse("ENTRY %main () -> f32[] {\n  %dot = f32[2] ?\n}\n")
