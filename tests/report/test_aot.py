"""The ahead-of-time report: that it compiles what a run runs, counts what is there, and notices what must not be."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from gspo import build, reward_model
from gspo.learning.decoded import FIRST_WIDTH, cache_widths
from gspo.parallel.sharding import ONE_DEVICE, Layout, make_mesh
from gspo.report import aot
from gspo.report.collectives import COLLECTIVES, Collective
from gspo.report.hlo import Array
from gspo.report.program import Program
from gspo.report.verdicts import checks
from gspo.steps import make_layout, rows_per_prompt_of
from gspo.types import UserError
from tests.tiny_runs import ROOT, kept_compiles, reward_model_config, rl_config  # noqa: F401 - a fixture

needs_eight = pytest.mark.skipif(jax.device_count() < 8, reason="eight devices, real or virtual")
DENSE = {"model.num_experts": 0, "model.d_ff": 16, "model.num_kv_heads": 2}
MESH = {
    "mesh.data": 2,
    "mesh.fsdp": 2,
    "model.vocab_size": 16,
    "old_logps": "learner",
    "logp_chunk": 3,
    "num_prompts": 8,
}


# ---------------------------------------------------------------------------------------------------- FLOPs


def test_matmuls_are_counted_with_their_loops():
    # Catches a scan counted once, a gradient left out, and a grouped matmul counted for every group.
    x, w = jnp.zeros((6, 8)), jnp.zeros((8, 8))

    def scanned(x):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)[0]

    def decoded(x):
        return jax.lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] + 1, c[1] @ w), (0, x))[1]

    one = 2 * 6 * 8 * 8
    count = lambda f, *args, **more: aot.matmul_flops(jax.make_jaxpr(f)(*args).jaxpr, **more)  # noqa: E731
    assert count(scanned, x) == 5 * one
    assert count(jax.jit(jax.checkpoint(scanned)), x) == 5 * one
    assert count(jax.grad(lambda w: (x @ w).sum()), w) == 2 * one  # the product, and its transpose
    assert count(decoded, x, unknown_trips=7) == 7 * one
    grouped = jnp.zeros((3, 8, 8)), jnp.array([1, 2, 3])
    assert count(lambda x: jax.lax.ragged_dot(x, *grouped), x) == one
    assert count(jax.grad(lambda w: jax.lax.ragged_dot(x, w, grouped[1]).sum()), grouped[0]) == 2 * one


@needs_eight
def test_the_report_compiles_the_steps_of_a_run_and_their_flops_add_up(tmp_path):
    # Catches a step that the run makes and the report does not, work done by several devices alike, a loop counted
    # once, and bytes of the training state that nobody counts while the rollout runs.
    plan = build.rl_plan(rl_config(tmp_path, **DENSE | MESH))
    layout = make_layout(plan.mesh)
    costs = {cost.name: cost for cost in aot.report(plan, layout)}
    assert list(costs) == ["rollout", "log-probs", "update"]
    assert [cost.runs for cost in costs.values()] == [1, 1, 2]
    for cost in costs.values():
        assert 0 < cost.flops == pytest.approx(cost.ideal_flops, rel=1e-6), cost.name
        assert cost.total == cost.peak + cost.beside and cost.peak >= cost.arguments > 0
    state = aot.lowerables(plan, layout)[2].arguments[0]
    whole, weights = aot.bytes_per_device(state), aot.bytes_per_device(state.params)
    assert (
        costs["rollout"].beside == whole - weights > 2 * weights > 0
    )  # Adam's moments: it reads the learner's weights
    with pytest.raises(UserError, match="knows no memory of the host: set ref_offload"):
        aot.lowerables(
            build.rl_plan(rl_config(tmp_path, **DENSE | MESH | {"objective.beta": 0.1, "ref_offload": True})), layout
        )
    assert all(kind in COLLECTIVES for cost in costs.values() for kind in cost.collectives)
    verdicts = checks(plan, layout, list(costs.values()), "v5e:2x2")
    assert [holds for holds, _ in verdicts] == [True] * 4, verdicts
    assert aot.table(list(costs.values()), "v5e:2x2").count("\n") == 4


def test_decoding_is_counted_once_however_many_loops_the_cache_grows_in(tmp_path):
    # Catches each of the loops taken for all of the completion.
    flops, alone = {}, Layout(make_mesh({}, jax.devices()[:1]))
    for length in (FIRST_WIDTH, 4 * FIRST_WIDTH):
        plan = build.rl_plan(rl_config(tmp_path, **DENSE | {"model.vocab_size": 16, "max_completion_length": length}))
        (step,) = [step for step in aot.lowerables(plan, alone) if step.name == "rollout"]
        flops[length] = aot.matmul_flops(jax.make_jaxpr(step.function)(*step.arguments).jaxpr, step.loops)
    assert len(cache_widths(4 * FIRST_WIDTH)) == 3
    assert 3.5 < flops[4 * FIRST_WIDTH] / flops[FIRST_WIDTH] < 10  # attention reads more columns; 22 with all for each


@needs_eight
def test_what_one_device_would_make_shares_prompts_among_as_many_rows_as_a_device_has(tmp_path):
    # Catches a duty of devices with single rows of a group to share its prompt, which only one device could.
    few = {"num_generations": 8, "micro_batch_size": 8}
    plan = build.rl_plan(rl_config(tmp_path, **DENSE | MESH | few))
    layout = make_layout(plan.mesh)
    assert rows_per_prompt_of(plan, layout) < 8 == rows_per_prompt_of(plan, ONE_DEVICE)
    for cost in aot.report(plan, layout)[1:]:
        assert cost.flops == pytest.approx(cost.ideal_flops, rel=1e-6), cost.name


@pytest.mark.slow
@needs_eight
def test_the_report_knows_all_four_models(tmp_path):
    # Catches a tree that nobody counts while another step runs, and a step of the run that the report leaves out.
    judge = reward_model_config(tmp_path, num_updates=1, **{"model.d_model": 8, "eval.every": 0})
    reward_model.train(build.reward_model_plan(judge), tmp_path / "judge")
    name = f"reward_model:{tmp_path / 'judge'}"
    changes = {"rewards": (name,), "critic.enable": True, "reward_kl_coef": 0.1, "objective.preset": "ppo"}
    plan = build.rl_plan(rl_config(tmp_path, **DENSE | MESH | changes))
    layout = make_layout(plan.mesh)
    costs = {cost.name: cost for cost in aot.report(plan, layout)}
    assert list(costs) == ["rollout", name, "log-probs", "reference", "values", "update", "critic"]
    assert [cost.runs for cost in costs.values()] == [1, 1, 1, 1, 1, 2, 2]
    for cost in costs.values():
        loose = cost.name == "critic"  # XLA makes a sum of the last layer's product with one column
        assert 0 < cost.flops == pytest.approx(cost.ideal_flops, rel=5e-3 if loose else 1e-6), cost.name
    steps = {step.name: step for step in aot.lowerables(plan, layout)}
    state, judged = steps["update"].arguments[0], aot.bytes_per_device(steps[name].arguments[0])
    whole, batch = aot.bytes_per_device(state) + judged, costs["update"].beside - judged
    assert costs["rollout"].beside == whole - aot.bytes_per_device(state.params)
    assert costs["critic"].beside == whole + batch - aot.bytes_per_device(state.critic)
    assert costs["reference"].beside == whole + batch - aot.bytes_per_device(state.ref_params)


@pytest.mark.slow
@needs_eight
@pytest.mark.parametrize(("mesh", "holds"), [({"mesh.expert": 2}, True), ({"mesh.expert": 1}, False)])
def test_experts_that_fsdp_gathers_on_every_device_are_noticed_and_those_along_their_axis_are_not(
    tmp_path, mesh, holds
):
    # Catches a look at the wrong arguments, or at none: along fsdp alone each layer's experts come together.
    changes = MESH | {"mesh.data": 1, "model.num_layers": 2, "model.moe_backend": "blocked"} | mesh
    plan = build.rl_plan(rl_config(tmp_path, **changes))
    layout = make_layout(plan.mesh)
    found = [(ok, text) for ok, text in checks(plan, layout, aot.report(plan, layout), "v5e:2x2") if "experts" in text]
    assert [ok for ok, _ in found] == [holds], found
    assert ("at most 50.0% of a layer's" if holds else "all-gather f32[4, 16, 8] of") in found[0][1]


@needs_eight
def test_a_rollout_in_another_layout_costs_a_move(tmp_path):
    # Catches the move of the parameters left out of the account.
    changes = {"mesh.data": 1, "mesh.expert": 2, "rollout_mesh_rules": "expert"}
    plan = build.rl_plan(rl_config(tmp_path, **MESH | changes))
    names = [step.name for step in aot.lowerables(plan, make_layout(plan.mesh))]
    assert names == ["reshard", "rollout", "log-probs", "update"]


def test_rows_of_grouped_matmuls_that_exist_at_balanced_load():
    # Catches a buffer for the worst case counted as work: 8 devices share 128 experts of which a token runs 8.
    def share(experts, per_token, parts):
        steps = SimpleNamespace(
            model=SimpleNamespace(spec=SimpleNamespace(num_experts=experts, experts_per_token=per_token))
        )
        return aot.ragged_rows(steps, SimpleNamespace(parts=lambda _: parts))

    assert (
        share(128, 8, 8) == 1 / 8 and share(128, 8, 64) == 8 / (64 * 2) and share(8, 2, 1) == 1 and share(0, 0, 8) == 1
    )


# ---------------------------------------------------------------------------------------------------- what must not be


def cost_with(*, collectives=(), arrays=(), flops=1.0, peak=1, too_large=""):
    program = (
        None if too_large else Program(flops, {}, tuple(collectives), tuple(arrays), 0, ("params['moe']['gate']",))
    )
    return aot.Cost("update", 4, 1.0, 1, 1, peak, 0, flops, 1.0, {}, program, too_large)


BIG = Array("f32", (7, 9), 252, "fusion", "big")
LOGITS = Array("f32", (8, 6, 32), 8 * 6 * 32 * 4, "dot", "logits")
GATE = frozenset({"params['moe']['gate']"})
GATHERED = Collective("all-gather", 9, 1, 2, "bf16[1,4,16,8]", "moe", (GATE,))


@pytest.mark.parametrize(
    ("cost", "complaint"),
    [
        (cost_with(peak=16 * aot.GIB, arrays=[BIG]), r"update: 16.0 GiB .* f32\[7, 9\] big"),
        (cost_with(too_large="Used 20.00G of 15.75G hbm"), "update: Used 20.00G of 15.75G hbm"),
        (cost_with(flops=1.2), r"\+20.0%"),
        (cost_with(collectives=[GATHERED]), "weights of all experts"),
        (cost_with(arrays=[LOGITS]), "float32 logits of whole rows"),
    ],
)
def test_what_must_not_be_is_named(tmp_path, cost, complaint):
    # Catches checks that cannot fail.
    plan = build.rl_plan(rl_config(tmp_path, **{"model.vocab_size": 32, "micro_batch_size": 8}))
    layout = Layout(make_mesh({}, jax.devices()[:1]))
    bad = [text for holds, text in checks(plan, layout, [cost], "v5e:2x2") if not holds]
    assert len(bad) == 1 and re.search(complaint, bad[0]), bad


def test_the_gradient_of_the_head_and_shards_of_experts_are_no_offence(tmp_path):
    # Catches an alarm at [D, V], and at the gather of the experts that one device holds.
    shard = Collective("all-gather", 9, 1, 2, "bf16[1,2,16,8]", "moe", (GATE,))
    fine = cost_with(collectives=[shard], arrays=[Array("f32", (16, 32), 2048, "dot", "gradient")])
    plan = build.rl_plan(rl_config(tmp_path, **{"model.vocab_size": 32, "micro_batch_size": 2}))
    assert all(holds for holds, _ in checks(plan, Layout(make_mesh({}, jax.devices()[:1])), [fine], "v5e:2x2"))


# ---------------------------------------------------------------------------- mistakes, and a real compiler


@pytest.mark.parametrize("topology", ["", "v5p", "h100:8", "v5p:4*4*4", "v9x:2x2"])
def test_a_topology_that_is_none_is_a_one_line_error(topology):
    # Catches a message from inside libtpu.
    with pytest.raises(UserError, match=r"--topology=.*write KIND:AxBxC") as error:
        aot.devices_of(topology)
    assert "\n" not in str(error.value)


def test_a_vocabulary_that_only_a_tokenizer_knows_is_asked_for(tmp_path):
    # Catches a report for a model of one token.
    config = rl_config(tmp_path)
    with pytest.raises(UserError, match=r"model\.vocab_size=0: no tokenizer is read here"):
        aot.lowerables(build.rl_plan(config), Layout(make_mesh({}, jax.devices()[:1])))


def report(*arguments):
    command = [
        sys.executable,
        "scripts/aot_report.py",
        "--config=configs/gspo_running_sum.py",
        "--config.model.vocab_size=128",
    ]
    command += arguments
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_without_libtpu_the_report_says_what_to_install():
    # Catches a traceback on a machine that was set up for training only.
    try:
        import libtpu  # noqa: F401

        pytest.skip("libtpu is installed")
    except ImportError:
        code, stdout, stderr = report("--topology=v5e:2x2")
    assert (
        code == 2
        and stdout == ""
        and stderr == "error: --topology: compiling for a TPU needs libtpu; pip install -e '.[aot]'\n"
    )


@pytest.mark.slow
def test_the_report_on_a_real_topology_ends_in_0_where_all_holds_and_in_1_where_it_does_not(tmp_path):
    # Catches a report that cannot say no, and one that no longer compiles.
    pytest.importorskip("libtpu")
    options = ["--topology=v5e:2x2", "--config.mesh.data=2", "--config.mesh.expert=2", f"--json={tmp_path / 'x.json'}"]
    options += ["--config.model.moe_backend=ragged", "--config.logp_chunk=4"]
    code, stdout, _ = report(*options)
    assert code == 0 and stdout.count("\nyes") == 4 and (tmp_path / "x.json").exists(), stdout
    code, stdout, _ = report(*options, "--config.logp_chunk=128")
    assert code == 1 and "NO   float32 logits of whole rows" in stdout, stdout
