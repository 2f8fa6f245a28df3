"""Runs that train adapters: what moves, what is saved, what others make of it."""

import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from gspo import build, rl, sft
from gspo.evaluate import evaluate_workdir
from gspo.model.adapters import LoRA, merged_params
from gspo.run import stored
from gspo.run.checkpoint import restore_adapters, restore_base, restore_params
from gspo.run.writers import read_jsonl
from gspo.steps import initial_state
from gspo.types import UserError
from tests.hf_folders import read_all
from tests.rl.runs import RESULTS, train_logged
from tests.tiny_runs import (  # noqa: F401 - a fixture
    assert_bit_equal,
    command,
    rl_config,
    sft_config,
    state_of,
    stateful_config,
)

ADAPTED = {
    "lora.rank": 2, "lora.alpha": 8.0, "objective.beta": 0.05, "optimizer.learning_rate": 0.05,
    "router_replay.mode": "R2", "micro_batch_size": 4, "num_rollouts": 2, "eval.every": 1,
    "scale_rewards": "reinforce++",
}  # fmt: skip


def lora_config(folder, **changes):
    return rl_config(folder, **ADAPTED | changes)


@pytest.fixture(scope="module")
def adapted(folder):
    """A run with a reference, replay and micro-batches: its workdir, and beside it adapted.log."""
    return train_logged(lora_config(folder), folder / "adapted")


def weights_of(folder, workdir):
    """abstract weights, restored base, restored adapters"""
    abstract = rl.prepare(build.rl_plan(lora_config(folder))).steps.abstract.weights
    return abstract, restore_base(workdir, abstract), restore_adapters(workdir, abstract)[2]


def test_updates_move_the_adapters_and_the_base_stays_as_it_was(folder, adapted):
    # Catches weights that drift under the adapters, an adapter that gets no gradient, and a base that is saved with
    # every checkpoint or with an optimizer.
    start = initial_state(
        build.rl_plan(lora_config(folder)), rl.prepare(build.rl_plan(lora_config(folder))).steps.start
    )
    _, base, adapters = weights_of(folder, adapted)
    assert_bit_equal(base, start.frozen)
    moved = jax.tree.map(lambda now, then: bool((now != then).any()), adapters, start.params)
    assert all(jax.tree.leaves(moved))
    names = stored.read_content(adapted)["arrays"].keys()
    assert {name.rpartition("/")[2] for name in names if name.startswith("params/")} == {"A", "B"}
    assert not any("embedding" in name or name.startswith("frozen") for name in names)


def test_the_reference_is_the_base_and_nothing_is_held_twice(folder):
    # Catches a reference or an optimizer of the size of the model, and a reference other than the base.
    plan = build.rl_plan(lora_config(folder))
    steps = rl.prepare(plan).steps
    state = initial_state(plan, steps.start)
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert size(state.ref_params) == size(state.params) < 0.5 * size(state.frozen)
    assert size(state.opt_state) == 2 * size(state.params) + 2  # two moments, two counts
    merged = merged_params(state.full(state.ref_params), steps.model.adapter_scale)
    assert_bit_equal(merged, state.frozen)


@pytest.mark.slow
def test_the_first_rollout_is_that_of_the_base_and_the_kl_begins_at_zero(folder, adapted, tmp_path):
    # Catches a sampler that reads other weights than the learner, and adapters that are not nothing at first.
    rl.train(build.rl_plan(lora_config(folder, num_rollouts=1, **{"lora.rank": 0})), tmp_path)
    ours, theirs = (read_jsonl(path / "samples.jsonl") for path in (adapted, tmp_path))
    assert [s for s in ours if s["step"] == 0] == [s for s in theirs if s["step"] == 0]
    first, later = read_jsonl(adapted / "metrics.jsonl")[:2]
    assert first["log_ratio/first_abs_max"] < 1e-5
    assert first["eval/pass@1"] == read_jsonl(tmp_path / "metrics.jsonl")[0]["eval/pass@1"]
    assert 0 < first["kl"] < later["kl"]


def test_the_log_says_what_is_trained(folder, adapted):
    # Catches a run that trains another share than its user thinks.
    text = (folder / "adapted.log").read_text()
    trained = 16 * 2 + 2 * 16 + 2 * (16 * 2 + 2 * 8) + 16 * 2 + 2 * 16 + 4 * 3 * (16 * 2 + 2 * 8)
    assert "LoRA of rank 2, alpha 8, on attention/key, attention/out, attention/query, attention/value, " in text
    assert f"{trained:,} parameters are trained" in text


def test_a_run_that_goes_on_ends_bit_equal_to_one_that_was_never_stopped(folder, adapted, tmp_path):
    # Catches a resumed run on another base, on merged weights, or without its optimizer.
    copy = shutil.copytree(adapted, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints" / "2")
    rl.train(build.rl_plan(lora_config(folder)), copy)
    for name in RESULTS:
        assert (copy / name).read_bytes() == (adapted / name).read_bytes(), name
    assert_bit_equal(state_of(lora_config(folder), copy), state_of(lora_config(folder), adapted))


def test_another_scale_of_the_same_adapters_is_refused(folder, adapted):
    # Catches adapters of the same shapes that mean something else.
    with pytest.raises(UserError, match=r"^lora\.alpha=4\.0: the run in .* began with 8\.0"):
        rl.train(build.rl_plan(lora_config(folder, **{"lora.alpha": 4.0})), adapted, allow_changed_config=True)


def test_whoever_takes_the_weights_of_the_run_gets_them_merged(folder, adapted):
    # Catches an evaluation, an import or a run that starts from the base, or from adapters as if they were weights.
    abstract, base, adapters = weights_of(folder, adapted)
    step, params = restore_params(adapted, abstract)
    flat, factors = flatten_dict(base, sep="/"), flatten_dict(adapters, sep="/")
    for name, value in flatten_dict(params, sep="/").items():
        want = np.asarray(flat[name], np.float64)
        if f"{name}/A" in factors:
            want = want + 4 * np.matmul(*(np.asarray(factors[f"{name}/{factor}"], np.float64) for factor in "AB"))
        np.testing.assert_allclose(value, want, rtol=0, atol=1e-6, err_msg=name)
    plan = build.rl_plan(lora_config(folder), str(adapted))
    assert (step, evaluate_workdir(plan, str(adapted))[1]) == (2, {
        name: value for name, value in read_jsonl(adapted / "metrics.jsonl")[-1].items() if name.startswith("eval/")
    })  # fmt: skip
    again = build.rl_plan(lora_config(folder, init_from=str(adapted)))
    state = initial_state(again, rl.prepare(again).steps.start)
    assert_bit_equal(state.frozen, params)
    assert not any(leaf.any() for path, leaf in jax.tree.leaves_with_path(state.params) if path[-1].key == "B")


@pytest.mark.slow
def test_the_script_exports_the_run_merged_its_adapters_and_its_base(folder, adapted, tmp_path, command):  # noqa: F811
    # Catches a script that exports the base for the run, and a base that it cannot find.
    for name, arguments in {
        "merged": (adapted,), "base": (adapted / "base",), "adapter": (adapted, "--adapter", "--base=mine"),
    }.items():  # fmt: skip
        workdir, *more = arguments
        code, out, err = command(
            "export_hf", f"--checkpoint={workdir}", f"--out={tmp_path / name}", *more, folder="scripts"
        )
        assert (code, err) == (0, ""), out
    merged, base, adapter = (read_all(tmp_path / name) for name in ("merged", "base", "adapter"))
    module = "model.layers.0.self_attn.v_proj"
    down, up = (adapter[f"base_model.model.{module}.lora_{factor}.weight"] for factor in "AB")
    moved = merged[f"{module}.weight"] - base[f"{module}.weight"]
    np.testing.assert_allclose(moved, 4 * up @ down, rtol=0, atol=1e-6)
    assert np.abs(moved).max() > 1e-3
    code, _, err = command(
        "export_hf", f"--checkpoint={adapted / 'base'}", f"--out={tmp_path / 'no'}", "--adapter", folder="scripts"
    )
    assert code == 2 and "--adapter" in err and not (tmp_path / "no").exists()


@pytest.mark.slow
def test_fine_tuning_trains_adapters_too(folder, tmp_path):
    # Catches a loop that optimises the weights all the same.
    config = sft_config(folder, num_updates=8, **{"lora.rank": 4, "eval.every": 0, "optimizer.schedule": "constant"})
    sft.train(build.sft_plan(config), tmp_path)
    losses = [line["loss"] for line in read_jsonl(tmp_path / "metrics.jsonl")[:-1]]
    assert losses[-1] < 0.8 * losses[0]
    assert stored.adapters_at(tmp_path) == LoRA(4, 32.0, config.lora.targets)


@pytest.mark.parametrize(("changes", "message"), [
    ({"lora.rank": -1}, r"lora\.rank=-1"), ({"lora.alpha": -2.0}, r"lora\.alpha=-2\.0"),
    ({"lora.rank": 2, "lora.targets": "mlp/"}, r"lora\.targets: 'mlp/' is in the name of no matrix"),
    ({"lora.rank": 2, "objective.beta": 0.1, "sync_ref_model": True}, r"ref_model_mixup_alpha=0\.6: .*set it to 1"),
], ids=str)  # fmt: skip
def test_a_mistake_is_found_before_the_first_rollout(folder, changes, message):
    # Catches a field that is checked only once the run has begun.
    with pytest.raises(UserError, match=f"^{message}"):
        rl.prepare(build.rl_plan(rl_config(folder, **changes)))


@pytest.mark.slow
def test_all_that_a_run_can_carry_goes_on_with_adapters(folder, tmp_path):
    # Catches stale parameters, a reference that follows, a critic or a rounded sampler that take adapters for weights.
    config = stateful_config(folder, **{
        "lora.rank": 2, "ref_model_mixup_alpha": 1.0, "mismatch.params": "int8", "model.num_layers": 2,
        "model.scan_layers": True, "model.dtype": "bfloat16", "check_tolerance": float("inf"),
    })  # fmt: skip
    rl.train(build.rl_plan(config), tmp_path / "one")
    copy = shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(copy / "checkpoints" / "4")
    rl.train(build.rl_plan(config), copy)
    assert (copy / "metrics.jsonl").read_bytes() == (tmp_path / "one" / "metrics.jsonl").read_bytes()
    assert_bit_equal(state_of(config, copy), state_of(config, tmp_path / "one"))
    _, state = state_of(config, copy)
    assert state.stale_params[0].keys() == state.ref_params.keys() == {"blocks"}
    assert_bit_equal(state.ref_params, state.params)


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason="eight devices, real or virtual")
@pytest.mark.parametrize("changes", [
    {"mesh.fsdp": 2, "mesh.expert": 2, "mesh.tensor": 2, "mesh.data": 1},
    {"mesh.expert": 4, "mesh.data": 2, "expert_dispatch": "all_to_all", "model.scan_layers": True},
    {"mesh.fsdp": 2, "mesh.expert": 2, "mesh_rules": "expert_fsdp", "rollout_mesh_rules": "expert"},
], ids=str)  # fmt: skip
def test_a_mesh_trains_the_adapters_of_one_device(folder, tmp_path, changes):
    # Catches a product that is taken of a part of A and B, a gradient summed over one device's rows, and a base or
    # adapters that lie elsewhere after a resume.
    sizes = {"num_prompts": 8, "model.num_kv_heads": 2, "micro_batch_size": 0, "eval.num_prompts": 8}
    one = lora_config(folder, **sizes | {name: x for name, x in changes.items() if name.startswith("model.")})
    many = lora_config(folder, **sizes | changes)
    results = []
    for name, config in (("one", one), ("many", many)):
        rl.train(build.rl_plan(config), tmp_path / name)
        results.append(state_of(config, tmp_path / name)[1].params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-3), *results)
    shutil.rmtree(tmp_path / "many" / "checkpoints" / "2")
    rl.train(build.rl_plan(many), tmp_path / "many")
    assert_bit_equal(state_of(many, tmp_path / "many")[1].params, results[1])
