"""Loops and collectives in HLO text copied from programs compiled for TPUs, and in one compiled for a TPU now.

Expected numbers are worked out from the shapes that went in, never from the text.
"""

import os
import subprocess
import sys

import pytest

from gspo.report.collectives import Collective, by_kind
from gspo.report.program import analyse
from tests.report_programs import of

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
