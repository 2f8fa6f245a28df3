"""Matmuls in HLO text copied from programs compiled for TPUs: convolutions that were dots, grouped matmuls.

Expected numbers are worked out from the shapes that went in, never from the text.
"""

import itertools

import pytest

from gspo.report.matmuls import window_hits
from gspo.report.program import analyse


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


def test_a_megabyte_of_kernel_in_each_line_does_not_matter():
    # Catches a regular expression that looks through blobs; seconds would become minutes.
    blob = f'backend_config={{"custom_call_config":{{"body":"{"QUJD" * 250_000}"'
    assert analyse(RAGGED_DOT.replace("backend_config={", blob)).flops == 2 * 2 * 2048 * 512 * 768
