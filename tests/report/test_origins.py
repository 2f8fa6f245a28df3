"""Experts that come together on one device, by whatever collective and in whatever shape: noticed; and what only looks
like them: not."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gspo.report.aot import Cost
from gspo.report.program import Program, analyse
from gspo.report.verdicts import no_gathered_experts

L, E, D, F = 3, 8, 16, 12
BY_EXPERT, BY_LAYER = P("x"), P(None, "x")
MODEL = SimpleNamespace(num_experts=E, d_model=D, d_expert=F)
needs_eight = pytest.mark.skipif(jax.device_count() < 8, reason="eight devices, real or virtual")


def verdict(program: Program) -> tuple[bool, str]:
    return no_gathered_experts(MODEL, [Cost("step", 1, 0.0, 0, 0, 0, 0, 0.0, 0.0, {}, program)])


def compiled(fn, params, tokens=None, *, mesh=(8,), cut=BY_EXPERT) -> Program:
    """fn(params, tokens) as compiled for 8 devices. params: {name: shape}, each cut by `cut`; tokens: a shape, its rows
    cut. fn runs on each device, on its parts, and gives one number."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(mesh), ("x", "y")[: len(mesh)])

    def array(shape, spec):
        return jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, spec))

    arguments = {"moe": {name: array(shape, cut) for name, shape in params.items()}}
    tokens = array(tokens or (8, 8), P("x"))

    def step(params, tokens):
        run = jax.shard_map(fn, mesh=mesh, in_specs=(cut, P("x")), out_specs=P(), check_vma=False)
        return run(params["moe"], tokens)

    return analyse(jax.jit(step).lower(arguments, tokens).compile().as_text())


def gathered(w, axis=0, name="x"):
    return jax.lax.all_gather(w, name, axis=axis, tiled=True)


def summed_into_zeros(w):
    """What XLA makes of some gathers: each device writes its part into zeros, and all add up."""
    zeros = jnp.zeros((E, *w.shape[1:]), w.dtype)
    return jax.lax.psum(jax.lax.dynamic_update_slice_in_dim(zeros, w, jax.lax.axis_index("x"), 0), "x")


def use(w):
    """One number that depends on all of w, so that nothing is optimised away."""
    return jnp.sum(jnp.sin(w.astype(jnp.float32)))


def layer_by_layer(params, gather):
    return jax.lax.scan(lambda total, w: (total + use(gather(w)), None), 0.0, params["gate"])[0]


ONE, TWO = {"gate": (E, D, F)}, {"gate": (E, D, F), "up": (E, D, F)}
STACK = {"gate": (L, E, D, F)}


@needs_eight
@pytest.mark.parametrize(
    ("fn", "params", "cut", "kind"),
    [
        (lambda p, _: use(gathered(p["gate"])), ONE, BY_EXPERT, "all-gather"),
        (lambda p, _: use(gathered(p["gate"].astype(jnp.bfloat16))), ONE, BY_EXPERT, "all-gather"),
        (lambda p, _: use(gathered(p["gate"].swapaxes(1, 2))), ONE, BY_EXPERT, "all-gather"),
        (lambda p, _: use(summed_into_zeros(p["gate"])), ONE, BY_EXPERT, "all-reduce"),
        (lambda p, _: use(gathered(jnp.concatenate([p["gate"], p["up"]], -1))), TWO, BY_EXPERT, "all-gather"),
        (lambda p, _: use(summed_into_zeros(jnp.concatenate([p["gate"], p["up"]], -1))), TWO, BY_EXPERT, "all-reduce"),
        (lambda p, _: use(gathered(p["gate"].reshape(-1))), ONE, BY_EXPERT, "all-gather"),
        (lambda p, _: use(gathered(p["gate"].reshape(-1, F))), ONE, BY_EXPERT, "all-gather"),
        (lambda p, _: layer_by_layer(p, gathered), STACK, BY_LAYER, "all-gather"),
        (lambda p, _: layer_by_layer(p, summed_into_zeros), STACK, BY_LAYER, "all-reduce"),
        (lambda p, _: use(gathered(p["gate"], axis=1)), STACK, BY_LAYER, "all-gather"),
    ],
    ids=[
        "as it is", "in bfloat16", "transposed", "all-reduce", "gate and up", "gate and up, all-reduce", "flat",
        "experts and rows in one", "in a loop", "in a loop, all-reduce", "all layers at once",
    ],
)  # fmt: skip
def test_all_experts_on_one_device_are_noticed_by_every_route(fn, params, cut, kind):
    # Catches a look at all-gathers of exactly [E, D, F] alone.
    holds, text = verdict(compiled(fn, params, cut=cut))
    assert not holds and f"weights of all experts to one device: {kind} " in text and "['gate']" in text


@needs_eight
@pytest.mark.parametrize(
    ("fn", "options"),
    [
        # The gradient of experts that each device holds whole, summed over the rows of all.
        (
            lambda p, x: use(jax.lax.psum(jnp.einsum("md,ef->edf", x, p["gate"][:, 0] + jnp.sum(x)), "x")),
            {"params": ONE, "cut": P(), "tokens": (64, D)},
        ),
        # Tokens, as many as experts have columns.
        (lambda p, x: use(gathered(x)) + use(p["gate"]), {"params": ONE, "tokens": (E * F, D)}),
        # FSDP: the width of the experts that a device holds, half of all.
        (
            lambda p, _: use(gathered(p["gate"], axis=1, name="y")),
            {"params": ONE, "mesh": (2, 4), "cut": P("x", "y")},
        ),
        # The same of gate and up at once: as many elements as all experts' gates have, and half of each.
        (
            lambda p, _: use(gathered(jnp.concatenate([p["gate"], p["up"]], -1), axis=1, name="y")),
            {"params": TWO, "mesh": (2, 4), "cut": P("x", "y")},
        ),
        # A number made of the weights.
        (lambda p, _: jax.lax.psum(use(p["gate"]), "x"), {"params": ONE}),
    ],
    ids=["gradient", "tokens", "fsdp", "fsdp, gate and up", "norm"],
)
def test_what_has_their_shape_and_is_none_of_them_raises_no_alarm(fn, options):
    # Catches an alarm at every all-reduce of a gradient, after which nobody reads the report.
    program = compiled(fn, **options)
    assert any(c.kind in ("all-gather", "all-reduce") for c in program.collectives)
    holds, text = verdict(program)
    assert holds, text


# ---- Lines as a TPU's compiler writes them ----

IN_FUSIONS = """HloModule m, num_partitions=4

%part (p0: bf16[2,16,12], p1: s32[]) -> bf16[8,16,12] {
  %p0 = bf16[2,16,12]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = bf16[] constant(0)
  %zeros = bf16[8,16,12]{2,1,0:T(8,128)(2,1)} broadcast(%zero), dimensions={}
  %c0 = s32[] constant(0)
  ROOT %put = bf16[8,16,12]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%zeros, %p0, %p1, %c0, %c0)
}

%sum (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %add = bf16[] add(%a, %b)
}

%taken (q: (bf16[2,16,12], s32[])) -> bf16[8,16,12] {
  %q = (bf16[2,16,12], s32[]) parameter(0)
  %own = bf16[2,16,12] get-tuple-element(%q), index=0
  %at = s32[] get-tuple-element(%q), index=1
  %placed = bf16[8,16,12]{2,1,0} fusion(%own, %at), kind=kLoop, calls=%part
  ROOT %all-reduce.1 = bf16[8,16,12]{2,1,0} all-reduce(%placed), replica_groups={}, to_apply=%sum
}

%not_taken (r: bf16[2,16,12]) -> bf16[8,16,12] {
  %r = bf16[2,16,12] parameter(0)
  %none = bf16[] constant(0)
  ROOT %nothing = bf16[8,16,12] broadcast(%none), dimensions={}
}

ENTRY %main (w: bf16[2,16,12], x: bf16[2,16,12], i: s32[], c: pred[]) -> bf16[8,16,12] {
  %w = bf16[2,16,12]{2,1,0} parameter(0), metadata={op_name="params[\\'moe\\'][\\'down\\']"}
  %x = bf16[2,16,12]{2,1,0} parameter(1), metadata={op_name="tokens"}
  %i = s32[] parameter(2)
  %c = pred[] parameter(3)
  %tuple = (bf16[2,16,12], s32[]) tuple(%w, %i)
  ROOT %either = bf16[8,16,12] conditional(%c, %tuple, %x), true_computation=%taken, false_computation=%not_taken
}
"""
SEVERAL = """HloModule m, num_partitions=4

ENTRY %main (w: bf16[2,16,12], x: bf16[2,16,12]) -> bf16[8,16,12] {
  %w = bf16[2,16,12]{2,1,0} parameter(0), metadata={op_name="params[\\'moe\\'][\\'down\\']"}
  %x = bf16[2,16,12]{2,1,0} parameter(1), metadata={op_name="tokens"}
  %start = ((bf16[2,16,12], bf16[2,16,12]), (bf16[8,16,12], bf16[8,16,12])) all-gather-start(%x, %w), replica_groups={}
  %done = (bf16[8,16,12], bf16[8,16,12]) all-gather-done(%start)
  ROOT %take = bf16[8,16,12] get-tuple-element(%done), index=0
}
"""
ONE_OF_TWO = """HloModule m, num_partitions=4

ENTRY %main (w: bf16[2,16,12], x: bf16[2,16,12]) -> bf16[8,16,12] {
  %w = bf16[2,16,12]{2,1,0} parameter(0), metadata={op_name="params[\\'moe\\'][\\'down\\']"}
  %x = bf16[2,16,12]{2,1,0} parameter(1), metadata={op_name="tokens"}
  %both = (bf16[2,16,12], bf16[2,16,12]) all-to-all(%x, %w), replica_groups={}
  %one = bf16[2,16,12] get-tuple-element(%both), index=1
  ROOT %all-gather.7 = bf16[8,16,12] all-gather(%one), replica_groups={}, dimensions={0}
}
"""
AHEAD = """HloModule m, num_partitions=4

%body (s: (s32[], bf16[2,16,12], bf16[9,2,16,12])) -> (s32[], bf16[2,16,12], bf16[9,2,16,12]) {
  %s = (s32[], bf16[2,16,12], bf16[9,2,16,12]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %now = bf16[2,16,12] get-tuple-element(%s), index=1
  %stack = bf16[9,2,16,12] get-tuple-element(%s), index=2
  %zero = s32[] constant(0)
  %one = s32[] constant(1)
  %all-gather.3 = bf16[8,16,12] all-gather(%now), replica_groups={}, dimensions={0}
  %next = bf16[1,2,16,12] dynamic-slice(%stack, %i, %zero, %zero, %zero), dynamic_slice_sizes={1,2,16,12}
  %ahead = bf16[2,16,12] bitcast(%next)
  %j = s32[] add(%i, %one)
  ROOT %state = (s32[], bf16[2,16,12], bf16[9,2,16,12]) tuple(%j, %ahead, %stack)
}

%condition (t: (s32[], bf16[2,16,12], bf16[9,2,16,12])) -> pred[] {
  %t = (s32[], bf16[2,16,12], bf16[9,2,16,12]) parameter(0)
  %k = s32[] get-tuple-element(%t), index=0
  %nine = s32[] constant(9)
  ROOT %less = pred[] compare(%k, %nine), direction=LT
}

ENTRY %main (w: bf16[9,2,16,12]) -> (s32[], bf16[2,16,12], bf16[9,2,16,12]) {
  %w = bf16[9,2,16,12] parameter(0), metadata={op_name="params[\\'moe\\'][\\'down\\']"}
  %c0 = s32[] constant(0)
  %empty = bf16[] constant(0)
  %first = bf16[2,16,12] broadcast(%empty), dimensions={}
  %start = (s32[], bf16[2,16,12], bf16[9,2,16,12]) tuple(%c0, %first, %w)
  ROOT %loop = (s32[], bf16[2,16,12], bf16[9,2,16,12]) while(%start), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(
    ("text", "kind"),
    [(IN_FUSIONS, "all-reduce"), (SEVERAL, "all-gather"), (ONE_OF_TWO, "all-gather"), (AHEAD, "all-gather")],
    ids=["in a fusion in a branch", "with another array", "moved with another array", "fetched a layer ahead"],
)
def test_experts_are_followed_through_fusions_branches_tuples_and_the_state_of_loops(text, kind):
    # Catches a trail that is lost at a call, in the wrong place of a tuple, or where a loop fetches what it uses next.
    holds, said = verdict(analyse(text))
    assert not holds and f"{kind} bf16[8, 16, 12] of params['moe']['down']" in said


@pytest.mark.parametrize(
    ("text", "old", "new"),
    [
        (IN_FUSIONS, "tuple(%w, %i)", "tuple(%x, %i)"),
        (SEVERAL, "all-gather-start(%x, %w)", "all-gather-start(%x, %x)"),
        (ONE_OF_TWO, "index=1", "index=0"),
        (AHEAD, "%ahead = bf16[2,16,12] bitcast(%next)", "%ahead = bf16[2,16,12] tanh(%next)"),
    ],
)
def test_the_same_collectives_of_other_values_are_fine(text, old, new):
    # Catches everything in a program that has experts taken for them.
    assert text.count(old) == 1
    holds, said = verdict(analyse(text.replace(old, new)))
    assert holds, said


def test_a_program_in_which_no_argument_is_named_as_experts_does_not_pass():
    # Catches a check that is passed because nothing is found any more: parameters renamed, names that were lost.
    holds, said = verdict(analyse(SEVERAL.replace("moe", "mixture")))
    assert not holds and said.startswith("step: no argument of the program is named as the experts' weights")
