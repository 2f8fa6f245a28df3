"""Costs read from HLO text: programs compiled here for eight CPU devices, and lines copied from programs compiled for
TPUs.

Expected numbers are worked out from the shapes that went in, never from the text.
"""

import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gspo.report.collectives import Collective, by_kind
from gspo.report.hlo import size_of
from gspo.report.matmuls import window_hits
from gspo.report.program import analyse


def compiled(fn, *shapes, **options):
    """Analysis of fn, compiled for float32 arguments of these shapes (an int stands for an int32 scalar)."""
    args = [
        jax.ShapeDtypeStruct((), np.int32) if isinstance(s, int) else jax.ShapeDtypeStruct(s, np.float32)
        for s in shapes
    ]
    return analyse(jax.jit(fn).lower(*args).compile().as_text(), **options)


def of(*arguments):
    """The origins of a collective of one array of each argument."""
    return tuple(frozenset({name}) for name in arguments)


def layers(x, w_LDD):
    return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w_LDD)[0]


# ---- Compiled here ----


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


# ---- Compiled for TPUs: convolutions that were dots ----


def test_window_hits_are_those_of_a_loop_over_positions():
    # Catches an error in the congruence, for windows that no compiler has shown us yet.
    sizes = itertools.product((1, 4), (1, 2, 5), (1, 2, 3, 6), (0, 2), (1, 3, 4), (1, 2, 3, 4), (1, 2))
    for out, size, stride, pad, base, base_dilation, dilation in sizes:
        elements = {e * base_dilation for e in range(base)}
        hits = sum(o * stride + k * dilation - pad in elements for o in range(out) for k in range(size))
        assert window_hits(out, size, stride, pad, base, base_dilation, dilation) == hits


B, T, S, K, R, H = 2, 512, 512, 4, 8, 128
# a batched dot, its two gradients, and the dot that follows it in attention, forward and one gradient
BTKRH_BSKH_BKRTS = [
    ("2,4,512,512,8", "2,512,4,128,1", "2,512,4,8,128",
     "{size=2x4x8 stride=1x3x1 pad=0_0x0_0x7_7 lhs_dilate=2x4x1 rhs_reversal=0x0x1}", "0b1f2_0o12i->01bf2"),
    ("2,4,512,8,128", "2,4,512,512,8", "2,512,4,128,1", "{size=2x4x1 stride=1x3x1 "
                                                        "lhs_dilate=2x4x1}", "01fb2_0i1o2->01b2f"),
    ("2,4,512,128,1", "2,4,512,512,8", "2,512,4,8,128", "{size=2x4x8 stride=1x3x1 "
                                                        "lhs_dilate=2x4x1}", "01bf2_0i12o->01bf2"),
    ("2,4,128,8,512", "2,512,4,128,1", "2,4,8,512,512",
     "{size=2x4x8 stride=1x3x1 pad=0_0x0_0x7_7 lhs_dilate=2x4x1 rhs_reversal=0x0x1}", "0f1b2_012oi->01b2f"),
    ("2,4,8,512,512", "2,512,4,128,1", "2,4,128,8,512",
     "{size=2x4x8 stride=2x4x1 pad=1_1x3_3x7_7 lhs_dilate=1x3x1 rhs_reversal=1x1x1}", "0b1f2_01i2o->012fb"),
]  # fmt: skip


@pytest.mark.parametrize(("out", "lhs", "rhs", "window", "labels"), BTKRH_BSKH_BKRTS)
def test_a_dot_with_batch_dimensions_that_became_a_convolution_costs_what_the_dot_did(out, lhs, rhs, window, labels):
    # Catches windows multiplied out: 2 x 4 x 8 positions times as many, most of which meet holes and padding.
    text = f"""
%fused (p0: bf16[{lhs}], p1: bf16[{rhs}]) -> bf16[{out}] {{
  %p0 = bf16[{lhs}]{{3,1,4,2,0:T(8,128)(2,1)}} parameter(0)
  %p1 = bf16[{rhs}]{{4,1,3,2,0:T(8,128)(2,1)}} parameter(1)
  ROOT %c = bf16[{out}]{{3,2,4,1,0:T(8,128)(2,1)}} convolution(%p0, %p1), window={window}, dim_labels={labels}, \
metadata={{op_name="f"}}
}}

ENTRY %main (a: bf16[{lhs}], b: bf16[{rhs}]) -> bf16[{out}] {{
  %a = bf16[{lhs}]{{3,1,4,2,0:T(8,128)(2,1)}} parameter(0)
  %b = bf16[{rhs}]{{4,1,3,2,0:T(8,128)(2,1)}} parameter(1)
  ROOT %fusion = bf16[{out}]{{3,2,4,1,0:T(8,128)(2,1)}} fusion(%a, %b), kind=kOutput, calls=%fused, \
backend_config={{"flags":[]}}
}}
"""
    assert analyse(text).flops == 2 * B * T * S * K * R * H


@pytest.mark.parametrize(
    ("out", "lhs", "rhs", "attributes", "flops"),
    [
        ("4096,1024", "4096,512", "512,1024", "dim_labels=bf_io->bf", 2 * 4096 * 512 * 1024),
        ("4,256,512", "4,256,128", "1,128,512", "window={size=1}, dim_labels=0bf_0io->0bf", 2 * 4 * 256 * 128 * 512),
        # The contracted batch as a spatial dimension: x[4, 256, 512] and dy[4, 256, 128] to dw[512, 128].
        ("512,128,1", "4,256,512", "4,256,128", "window={size=4}, dim_labels=0fb_0io->bf0", 2 * 4 * 256 * 512 * 128),
        ("256,2,128,1", "4,256,256,1", "4,256,2,128",
         "window={size=2x4 pad=1_1x0_0 rhs_reversal=1x0}, dim_labels=1fb0_1i0o->b0f1", 2 * 4 * 256 * 256 * 2 * 128),
    ],
)  # fmt: skip
def test_a_dot_without_batch_dimensions_that_became_a_convolution_costs_what_the_dot_did(
    out, lhs, rhs, attributes, flops
):
    # Catches features looked up in the order of the operands' dimensions, not of their labels; a convolution without a
    # window.
    text = f"""
ENTRY %main (a: bf16[{lhs}], b: bf16[{rhs}]) -> bf16[{out}] {{
  %a = bf16[{lhs}] parameter(0)
  %b = bf16[{rhs}] parameter(1)
  ROOT %c = bf16[{out}] convolution(bf16[{lhs}] %a, bf16[{rhs}] %b), {attributes}
}}
"""
    assert analyse(text).flops == flops


# ---- Compiled for TPUs: grouped matmuls ----

RAGGED_DOT = """
%select (rows: bf16[2048,512], mask: pred[8,2048]) -> bf16[8,2048,512] {
  %rows = bf16[2048,512]{1,0:T(8,128)(2,1)} parameter(0)
  %mask = pred[8,2048]{1,0:T(8,128)(4,1)S(1)} parameter(1)
  ROOT %select.2 = bf16[8,2048,512]{2,1,0:T(8,128)(2,1)} broadcast(%rows), dimensions={1,2}
}

%convolution_select_fusion (kernel.2: bf16[8,2048,768], activations.2: bf16[2048,512], \
output_mask: pred[8,2048]) -> bf16[8,512,768] {
  %activations.2 = bf16[2048,512]{1,0:T(8,128)(2,1)} parameter(1)
  %output_mask = pred[8,2048]{1,0:T(8,128)(4,1)S(1)} parameter(2)
  %fusion.2 = bf16[8,2048,512]{2,1,0:T(8,128)(2,1)} fusion(%activations.2, %output_mask), kind=kLoop, calls=%select
  %kernel.2 = bf16[8,2048,768]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %convolution-base-dilated = bf16[8,512,768]{2,1,0:T(8,128)(2,1)} convolution(%fusion.2, %kernel.2), \
window={size=8 stride=7 lhs_dilate=8}, dim_labels=0fb_0io->0bf
}

ENTRY %main (x: bf16[2048,512], w: bf16[8,512,768], sizes: s32[8], dy: bf16[8,2048,768], \
mask: pred[8,2048]) -> bf16[8,512,768] {
  %x = bf16[2048,512]{1,0:T(8,128)(2,1)} parameter(0), sharding={replicated}, metadata={op_name="x"}
  %w = bf16[8,512,768]{2,1,0:T(8,128)(2,1)} parameter(1), sharding={replicated}, metadata={op_name="w"}
  %sizes = s32[8]{0:T(128)} parameter(2), sharding={replicated}, metadata={op_name="sizes"}
  %dy = bf16[8,2048,768]{2,1,0:T(8,128)(2,1)} parameter(3)
  %mask = pred[8,2048]{1,0:T(8,128)(4,1)S(1)} parameter(4)
  %ragged-dot-metadata = (s32[9]{0:T(128)}, s32[23]{0:T(128)}, s32[23]{0:T(128)}, \
s32[1]{0:T(128)}) custom-call(%sizes), \
custom_call_target="tpu_custom_call", operand_layout_constraints={s32[8]{0}}, \
metadata={op_name="ragged-dot-metadata"}, \
backend_config={"custom_call_config":{"body":"bW9kdWxlIHsKICBmdW5jLmZ1bmM","needs_layout_passes":true}}
  %get-tuple-element = s32[1]{0:T(128)} get-tuple-element(%ragged-dot-metadata), index=3
  %get-tuple-element.1 = s32[9]{0:T(128)} get-tuple-element(%ragged-dot-metadata), index=0
  %get-tuple-element.2 = s32[23]{0:T(128)} get-tuple-element(%ragged-dot-metadata), index=1
  %get-tuple-element.3 = s32[23]{0:T(128)} get-tuple-element(%ragged-dot-metadata), index=2
  %ragged-dot-none.1 = bf16[2048,768]{1,0:T(8,128)(2,1)} custom-call(%get-tuple-element, %get-tuple-element.1, \
%get-tuple-element.2, %get-tuple-element.3, %get-tuple-element, /*index=5*/%x, %w), \
custom_call_target="tpu_custom_call", \
operand_layout_constraints={s32[1]{0}, s32[9]{0}, s32[23]{0}, s32[23]{0}, s32[1]{0}, bf16[2048,512]{1,0}, \
bf16[8,512,768]{2,1,0}}, \
frontend_attributes={mosaic_fusion_entry_point="true",ragged_dot_tiling="128,512,768"}, \
metadata={op_name="jit(f)/ragged_dot_general/ragged-dot-none"}, \
backend_config={"custom_call_config":{"body":"bW9kdWxlIHsKICBmdW5jL"}}
  ROOT %fusion.4 = bf16[8,512,768]{2,1,0:T(8,128)(2,1)} fusion(%dy, %x, %mask), kind=kOutput, \
calls=%convolution_select_fusion, backend_config={"mask_aggregator_config":{"mask_value":0,\
"iteration_skipper_mode":"ITERATION_SKIPPER_MODE_ITERATION_INDICES"}}
}
"""


def test_grouped_matmuls_of_a_tpu_cost_the_rows_times_one_expert_each():
    # Catches every expert's product with every row (eight times the work), a kernel that is not seen, its metadata that
    # is, and a share of existing rows that the weights' gradient does not get.
    forward = weight_gradient = 2 * 2048 * 512 * 768
    assert analyse(RAGGED_DOT).flops_by_kind == {"dot": 0, "ragged": forward + weight_gradient}
    assert analyse(RAGGED_DOT, ragged_share=0.25).flops == (forward + weight_gradient) / 4


def test_a_masked_convolution_whose_tiles_are_not_skipped_costs_all_of_it():
    # Catches a compiler that multiplies with zeros reported as if it did not.
    text = RAGGED_DOT.replace("ITERATION_SKIPPER_MODE_ITERATION_INDICES", "NONE")
    assert analyse(text).flops_by_kind == {"dot": 8 * 2 * 2048 * 512 * 768, "ragged": 2 * 2048 * 512 * 768}


def test_a_kernel_that_contracts_the_rows_costs_the_rows_too():
    # Catches the shapes of the forward kernel read into that of the gradient: [rows, K] x [rows, N] -> [groups, K, N].
    text = """
ENTRY %main (x: bf16[2048,512], dy: bf16[2048,768], sizes: s32[8]) -> bf16[8,512,768] {
  %x = bf16[2048,512]{1,0} parameter(0)
  %dy = bf16[2048,768]{1,0} parameter(1)
  %sizes = s32[8]{0} parameter(2)
  ROOT %k = bf16[8,512,768]{2,1,0} custom-call(%sizes, %x, %dy), custom_call_target="tpu_custom_call", \
metadata={op_name="a/ragged_dot"}
}
"""
    assert analyse(text).flops_by_kind == {"dot": 0, "ragged": 2 * 2048 * 512 * 768}


@pytest.mark.parametrize(
    ("out", "rhs", "attributes"),
    [
        (
            "2048,768",
            "8,512,768",
            "lhs_contracting_dims={1}, rhs_contracting_dims={1}, lhs_ragged_dims={0}, rhs_group_dims={0}",
        ),
        ("8,512,768", "2048,768", "lhs_contracting_dims={0}, rhs_contracting_dims={0}, lhs_ragged_dims={0}"),
    ],
)
def test_a_ragged_dot_that_no_compiler_expanded_costs_the_same_in_both_forms(out, rhs, attributes):
    # Catches groups that multiply the cost where the rows are contracted.
    text = f"""
ENTRY %main (x: bf16[2048,512], y: bf16[{rhs}], sizes: s32[8]) -> bf16[{out}] {{
  %x = bf16[2048,512] parameter(0)
  %y = bf16[{rhs}] parameter(1)
  %sizes = s32[8] parameter(2)
  ROOT %r = bf16[{out}] ragged-dot(%x, %y, %sizes), {attributes}
}}
"""
    assert analyse(text, ragged_share=0.5).flops_by_kind == {"dot": 0, "ragged": 2048 * 512 * 768}


# ---- Compiled for TPUs: loops and collectives ----

STATE = "(s32[]{:T(128)}, bf16[1024,512]{1,0:T(8,128)(2,1)}, /*index=2*/s32[]{:T(128)})"
TPU_LOOP = f"""
%compare_of (p0: s32[], p1: s32[]) -> pred[] {{
  %p0 = s32[]{{:T(128)}} parameter(0)
  %p1 = s32[]{{:T(128)}} parameter(1)
  ROOT %lt.9 = pred[]{{:T(512)}} compare(%p0, %p1), direction=LT
}}

%wide.region_1.2_spmd (wide.param.1: (s32[], bf16[1024,512], /*index=2*/s32[])) -> pred[] {{
  %constant.13.clone.1 = s32[]{{:T(128)}} constant(6), metadata={{op_name="jit(moe)/shard_map" stack_frame_id=3}}
  %wide.param.1 = {STATE} parameter(0)
  %get-tuple-element.53 = s32[]{{:T(128)}} get-tuple-element(%wide.param.1), index=0, \
metadata={{op_name="jit(moe)/shard_map"}}
  %get-tuple-element.54 = s32[]{{:T(128)}} get-tuple-element(%wide.param.1), index=2
  ROOT %lt.3 = pred[]{{:T(512)}} compare(%get-tuple-element.53, %constant.13.clone.1), direction=LT, \
backend_config={{"flags":[]}}
}}

%wide.region_0.1_spmd.sunk (wide.param.2: (s32[], bf16[1024,512], /*index=2*/s32[])) -> (s32[], bf16[1024,512], \
/*index=2*/s32[]) {{
  %wide.param.2 = {STATE} parameter(0)
  %get-tuple-element.93 = s32[]{{:T(128)}} get-tuple-element(%wide.param.2), index=0
  %get-tuple-element.94 = bf16[1024,512]{{1,0:T(8,128)(2,1)}} get-tuple-element(%wide.param.2), index=1
  %get-tuple-element.95 = s32[]{{:T(128)}} get-tuple-element(%wide.param.2), index=2
  %constant.6.sunk = s32[]{{:T(128)}} constant(1)
  %add.12 = s32[]{{:T(128)}} add(%get-tuple-element.93, %constant.6.sunk), backend_config={{"flag_configs":[]}}
  %psum.1 = bf16[1024,512]{{1,0:T(8,128)(2,1)}} all-reduce(%get-tuple-element.94), replica_groups=[16,4]<=[64], \
to_apply=%add
  ROOT %tuple.17 = {STATE} tuple(%add.12, %psum.1, /*index=2*/%get-tuple-element.95)
}}

ENTRY %main.4_spmd (param.6: bf16[1024,512], param.7: s32[]) -> bf16[1024,512] {{
  %constant.14.clone.1 = s32[]{{:T(128)}} constant(0), metadata={{op_name="jit(moe)/shard_map" stack_frame_id=3}}
  %constant.15 = s32[]{{:T(128)}} constant(2)
  %param.6 = bf16[1024,512]{{1,0:T(8,128)(2,1)}} parameter(0), sharding={{devices=[4,1]<=[4]}}, metadata={{op_name="x"}}
  %param.7 = s32[]{{:T(128)}} parameter(1)
  %copy.14 = s32[]{{:T(128)}} copy(%constant.14.clone.1), backend_config={{"flag_configs":[]}}
  %tuple.15 = {STATE} tuple(%copy.14, %param.6, /*index=2*/%constant.15)
  %while.10 = {STATE} while(%tuple.15), condition=%wide.region_1.2_spmd, body=%wide.region_0.1_spmd.sunk
  ROOT %get-tuple-element.29 = bf16[1024,512]{{1,0:T(8,128)(2,1)}} get-tuple-element(%while.10), index=1
}}
"""


@pytest.mark.parametrize(
    ("old", "new", "trips"),
    [
        ("", "", 6),
        # In steps of the constant 2 that came in with the state; from -1; up to the 2 that came in with the state.
        ("add(%get-tuple-element.93, %constant.6.sunk)", "add(%get-tuple-element.95, %get-tuple-element.93)", 3),
        ("%constant.14.clone.1 = s32[]{:T(128)} constant(0)", "%constant.14.clone.1 = s32[]{:T(128)} constant(-1)", 7),
        ("compare(%get-tuple-element.53, "
         "%constant.13.clone.1)", "compare(%get-tuple-element.53, %get-tuple-element.54)", 2),
        ("compare(%get-tuple-element.53, %constant.13.clone.1), direction=LT",
         "fusion(%get-tuple-element.53, %constant.13.clone.1), kind=kLoop, calls=%compare_of", 6),
        ("body=%wide.region_0.1_spmd.sunk", 'body=%wide.region_0.1_spmd.sunk, '
                                            'backend_config={"known_trip_count":{"n":"48"}}', 48),
        # Nobody can tell: a start that is an argument, a limit that counts up, another comparison.
        ("copy(%constant.14.clone.1)", "copy(%param.7)", None),
        ("compare(%get-tuple-element.53, "
         "%constant.13.clone.1)", "compare(%get-tuple-element.54, %get-tuple-element.53)", None),
        ("direction=LT, backend", "direction=NE, backend", None),
    ],
)  # fmt: skip
def test_a_loop_of_a_tpu_program_tells_its_trips_by_its_start_limit_and_step(old, new, trips):
    # Catches the one place where a constant hides that was not looked into, and a guess where there is none.
    assert old in TPU_LOOP
    program = analyse(TPU_LOOP.replace(old, new) if old else TPU_LOOP, unknown_trips=1000)
    assert program.unknown_loops == (trips is None)
    assert [c.count for c in program.collectives] == [1000 if trips is None else trips]


def test_a_limit_that_the_body_changes_is_no_limit():
    # Catches the first value of a limit taken for all of them: here the state's last place starts as 2 and is written
    # in each trip.
    text = TPU_LOOP.replace(
        "compare(%get-tuple-element.53, %constant.13.clone.1)", "compare(%get-tuple-element.53, %get-tuple-element.54)"
    )
    assert analyse(text).unknown_loops == 0
    assert (
        analyse(
            text.replace("%psum.1, /*index=2*/%get-tuple-element.95)", "%psum.1, /*index=2*/%add.12)")
        ).unknown_loops
        == 1
    )


def test_a_loop_asks_its_condition_once_more_than_it_runs_its_body():
    # Catches collectives of a decode loop's condition (is any row still going?) left out.
    asks = "  %any = s32[] all-reduce(%get-tuple-element.54), replica_groups={}\n  ROOT %lt.3"
    assert {c.shape: c.count for c in analyse(TPU_LOOP.replace("  ROOT %lt.3", asks)).collectives} == {
        "bf16[1024,512]": 6,
        "s32[]": 7,
    }


ASYNC_ALL_GATHER = """
%fused_computation.58 (param_0.166: bf16[2048,256]) -> (bf16[2048,256], bf16[2048,4096], u32[]) {
  %param_0.166 = bf16[2048,256]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.24 = bf16[2048,4096]{1,0:T(8,128)(2,1)} all-gather(%param_0.166), channel_id=2, \
replica_groups=[4,16]<=[16,4]T(1,0), \
dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="0"}, \
metadata={op_name="jit(loss)/while/body/squeeze"}
  ROOT %custom-call.8 = (bf16[2048,256]{1,0:T(8,128)(2,1)}, bf16[2048,4096]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) \
custom-call(%all-gather.24), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.90 (param_0.170: bf16[2048,256], param_3.36: u32[], param_9.2: bf16[4096,2048], param_10.3: \
bf16[8192,4096]) -> (bf16[8192,2048], bf16[2048,4096], u32[]) {
  %param_10.3 = bf16[8192,4096]{1,0:T(8,128)(2,1)} parameter(3)
  %param_9.2 = bf16[4096,2048]{1,0:T(8,128)(2,1)} parameter(2)
  %convolution.39 = bf16[8192,2048]{1,0:T(8,128)(2,1)} convolution(%param_10.3, %param_9.2), dim_labels=bf_io->bf
  %param_0.170 = bf16[2048,256]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.26 = bf16[2048,4096]{1,0:T(8,128)(2,1)} all-gather(%param_0.170), channel_id=2, \
replica_groups=[4,16]<=[16,4]T(1,0), \
dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="0"}, \
metadata={op_name="jit(loss)/while/body/squeeze"}
  %param_3.36 = u32[]{:S(2)} parameter(1)
  ROOT %tuple.65 = (bf16[8192,2048]{1,0:T(8,128)(2,1)}, bf16[2048,4096]{1,0:T(8,128)(2,1)}, \
u32[]{:S(2)}) tuple(%convolution.39, \
%all-gather.26, %param_3.36)
}

%fused_computation.60 (param_0.172: bf16[2048,256], param_3.38: u32[]) -> bf16[2048,4096] {
  %param_0.172 = bf16[2048,256]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.28 = bf16[2048,4096]{1,0:T(8,128)(2,1)} all-gather(%param_0.172), channel_id=2, \
replica_groups=[4,16]<=[16,4]T(1,0), \
dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="0"}, \
metadata={op_name="jit(loss)/while/body/squeeze"}
  %param_3.38 = u32[]{:S(2)} parameter(1)
  ROOT %custom-call.10 = bf16[2048,4096]{1,0:T(8,128)(2,1)} custom-call(%param_0.172, %all-gather.28, %param_3.38), \
custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (w: bf16[2048,256], wi: bf16[4096,2048], x: bf16[8192,4096]) -> bf16[2048,4096] {
  %w = bf16[2048,256]{1,0:T(8,128)(2,1)} parameter(0)
  %wi = bf16[4096,2048]{1,0:T(8,128)(2,1)} parameter(1)
  %x = bf16[8192,4096]{1,0:T(8,128)(2,1)} parameter(2)
  %async-collective-start = (bf16[2048,256]{1,0:T(8,128)(2,1)}, bf16[2048,4096]{1,0:T(8,128)(2,1)}, \
u32[]{:S(2)}) fusion(%w), \
kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%fused_computation.58, backend_config={"flag_configs":[]}
  %get-tuple-element.352 = u32[]{:S(2)} get-tuple-element(%async-collective-start), index=2
  %fusion.90 = (bf16[8192,2048]{1,0:T(8,128)(2,1)}, bf16[2048,4096]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) fusion(%w, \
%get-tuple-element.352, %wi, %x), kind=kOutput, calls=%async_collective_fusion.90
  %get-tuple-element.360 = u32[]{:S(2)} get-tuple-element(%fusion.90), index=2
  ROOT %async-collective-done = bf16[2048,4096]{1,0:T(8,128)(2,1)} fusion(%w, %get-tuple-element.360), kind=kCustom, \
calls=%fused_computation.60
}
"""


def test_an_all_gather_spread_over_fusions_counts_once_and_the_matmul_it_hides_behind_too():
    # Catches three all-gathers for one, none at all, or a matmul lost with the links that are skipped.
    program = analyse(ASYNC_ALL_GATHER)
    assert program.collectives == (
        Collective("all-gather", 2048 * 4096 * 2, 1, 16, "bf16[2048,4096]", "jit(loss)/while/body/squeeze", of("w")),
    )
    assert program.flops == 2 * 8192 * 4096 * 2048


ONE_OF_EACH = """HloModule jit_f, is_scheduled=true, num_partitions=64

%all-reduce-scatter (input: bf16[1024,1024]) -> bf16[512,1024] {
  %input = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.45 = bf16[1024,1024]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=47, \
replica_groups={{0,2},{1,3}}, to_apply=%add
  %constant.491 = u32[] constant(0)
  ROOT %dynamic-slice.103 = bf16[512,1024]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.45, %constant.491, \
%constant.491), \
dynamic_slice_sizes={512,1024}
}

%wrapped (p: f32[8]) -> f32[32] {
  %p = f32[8]{0} parameter(0)
  ROOT %all-gather.9 = f32[32]{0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}
}

ENTRY %main (a: bf16[1024,1024], b: f32[4], c: f32[8]) -> f32[32] {
  %a = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[4]{0} parameter(1)
  %c = f32[8]{0} parameter(2)
  %fusion.2 = bf16[512,1024]{1,0:T(8,128)(2,1)} fusion(%a), kind=kCustom, calls=%all-reduce-scatter, \
metadata={op_name="scatter"}
  %collective-permute-start = (bf16[1024,1024]{1,0:T(8,128)(2,1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, \
u32[]{:S(2)}) \
collective-permute-start(%a), channel_id=39, source_target_pairs={{0,1},{1,2},{2,0}}, metadata={op_name="permute"}
  %collective-permute-done = bf16[1024,1024]{1,0:T(8,128)(2,1)} collective-permute-done(%collective-permute-start)
  %all-gather-start = ((f32[4]{0}, f32[8]{0}), (f32[16]{0}, f32[32]{0})) all-gather-start(%b, %c), \
replica_groups=mesh['axis_0'=2,'axis_1'=4,'axis_2'=8] {'axis_0','axis_2':(4)2}, dimensions={0}, \
metadata={op_name="gather"}
  %all-gather-done = (f32[16]{0}, f32[32]{0}) all-gather-done(%all-gather-start)
  %all-reduce.27 = (f32[4]{0}, f32[8]{0}) all-reduce(%b, %c), replica_groups={}, to_apply=%add, \
metadata={op_name="reduce"}
  %async-start = ((f32[8]{0}), f32[32]{0}, s32[]) async-start(%c), calls=%wrapped
  ROOT %async-done = f32[32]{0} async-done(%async-start)
}
"""


def test_pairs_of_start_and_done_tuples_and_every_way_to_write_groups_are_read():
    # Catches a transfer counted at both ends, sizes with the operands that a start hands on, a slice of an all-reduce
    # taken for an all-reduce, and groups of all devices where a mesh's axes are named.
    assert analyse(ONE_OF_EACH).collectives == (
        Collective("reduce-scatter", 1024 * 1024 * 2, 1, 2, "bf16[1024,1024]", "scatter"),
        Collective("collective-permute", 1024 * 1024 * 2, 1, 3, "bf16[1024,1024]", "permute"),
        Collective("all-gather", (16 + 32) * 4, 1, 4, "f32[16], f32[32]", "gather", of("b", "c")),
        Collective("all-reduce", (4 + 8) * 4, 1, 64, "f32[4], f32[8]", "reduce", of("b", "c")),
        Collective("all-gather", 32 * 4, 1, 4, "f32[32]", "", of("c")),
    )


def test_arrays_are_those_that_are_stored_each_once():
    # Catches aliases (the start of a pair hands on its operands), insides of fusions, and the same array listed for
    # each layer.
    arrays = analyse(ONE_OF_EACH).arrays
    assert [(a.opcode, a.dims) for a in arrays[:4]] == [
        ("collective-permute-done", (1024, 1024)),
        ("parameter", (1024, 1024)),
        ("fusion", (512, 1024)),
        ("all-gather-done", (32,)),
    ]


def test_a_megabyte_of_kernel_in_each_line_does_not_matter():
    # Catches a regular expression that looks through blobs; seconds would become minutes.
    blob = f'backend_config={{"custom_call_config":{{"body":"{"QUJD" * 250_000}"'
    assert analyse(RAGGED_DOT.replace("backend_config={", blob)).flops == 2 * 2 * 2048 * 512 * 768


# ---- Compiled for a TPU now ----

COMPILE_FOR_TPU = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

mesh = Mesh(np.array(topologies.get_topology_desc("v5p:2x2x1", "tpu").devices), ("x",))

def attention(q, k, v):
    p = jax.nn.softmax(jnp.einsum("btkrh,bskh->bkrts", q, k))
    return jnp.einsum("bkrts,bskh->btkrh", p, v)

def experts(x, w, sizes):
    w = jax.lax.all_gather(w, "x", axis=1, tiled=True)
    return jax.lax.ragged_dot(x, w, sizes)

def layer(x, parts):
    q, w, sizes = parts
    x = attention(x.reshape(4, 128, 2, 2, 128), q, q).reshape(512, 512)
    return jax.shard_map(experts, mesh=mesh, in_specs=(P(), P(None, "x"), P()), out_specs=P(), check_vma=False)(x, \
w, sizes), None

def loss(x, *parts):
    return jnp.sum(jax.lax.scan(layer, x, parts)[0].astype(jnp.float32) ** 2)

def array(dtype, spec, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

bf16, w_spec = jnp.bfloat16, P(None, None, "x")
args = array(bf16, P(), 512, 512), array(bf16, P(), 6, 4, 128, 2, 128), array(bf16, w_spec, 6, 8, 512, 512), \
array(jnp.int32, P(), 6, 8)
print(jax.jit(jax.grad(loss, (0, 1, 2))).lower(*args).compile().as_text())
"""


def test_a_step_compiled_for_a_tpu_costs_what_its_equations_say():
    # Catches a compiler whose text no longer looks as above. In its own process: only one may hold the TPU library, and
    # this one must stay on the CPU.
    pytest.importorskip("libtpu")
    env = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost"} | os.environ
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", COMPILE_FOR_TPU], env=env, capture_output=True, text=True)
    if "libtpu_lockfile" in done.stderr or "already in use" in done.stderr:
        pytest.skip("another process holds the TPU library")
    assert done.returncode == 0, done.stderr[-2000:]
    program = analyse(done.stdout)
    scores, product = 2 * 4 * 128 * 128 * 2 * 2 * 128, 2 * 512 * 512 * 512
    # Each of six layers: two products of attention and one of the experts, each with two more backward.
    assert program.flops_by_kind == {"dot": 6 * 3 * 2 * scores, "ragged": 6 * 3 * product}
    totals = by_kind(program.collectives)
    assert program.unknown_loops == 0 and totals["all-gather"][1] >= 6 * 8 * 512 * 512 * 2


def test_a_ragged_all_to_all_moves_what_its_smaller_side_holds():
    # Catches a buffer for the worst case, every pair of 64 devices on one of them, counted as traffic; on the way there
    # and back.
    text = """HloModule m, num_partitions=64

ENTRY %main (p: bf16[64,128], q: bf16[1024,128], n: s32[64]) -> bf16[64,128] {
  %p = bf16[64,128]{1,0} parameter(0)
  %q = bf16[1024,128]{1,0} parameter(1)
  %n = s32[64]{0} parameter(2)
  %there = bf16[1024,128]{1,0} ragged-all-to-all(%p, %q, %n, %n, %n, %n), replica_groups=[1,64]<=[64]
  ROOT %back = bf16[64,128]{1,0} ragged-all-to-all(%there, %p, %n, %n, %n, %n), replica_groups=[1,64]<=[64]
}
"""
    moved = analyse(text).collectives
    assert [(x.kind, x.bytes, x.shape, x.group_size) for x in moved] == [
        ("ragged-all-to-all", 64 * 128 * 2, "bf16[64,128]", 64)
    ] * 2
