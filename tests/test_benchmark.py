"""scripts/benchmark.py and what compares it with other systems: every case runs, and says what it measured."""

import json
import runpy

import pytest

from gspo import objectives
from gspo.report import cases, speed
from gspo.types import UserError
from tests.tiny_runs import ROOT, command, kept_compiles  # noqa: F401 - a fixture, and what takes effect by its name

TINY = f"--config={ROOT}/configs/benchmark.py:tiny"
FAST = ("--small", "--repeats=2", "--config.mesh.data=1")


@pytest.fixture
def benchmark(command, tmp_path):  # noqa: F811
    """benchmark("step", *flags) -> the JSON that it has written."""

    def run(case, *arguments):
        out = tmp_path / f"{case}.json"
        code, told, error = command("benchmark", case, TINY, *FAST, *arguments, f"--json={out}", folder="scripts")
        assert code == 0, error
        result = json.loads(out.read_text())
        if case != "first":
            assert told == speed.table(result) + "\n"
        return result

    return run


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case == "replay"))
             for case in sorted(set(cases.CASES) - {"rollout", "step"})]
)  # fmt: skip
def test_every_case_runs_and_leaves_its_numbers(benchmark, case, monkeypatch):
    # Catches a case that only the README still knows.
    some = ("grpo", "gspo", "rspo")  # each is a program to compile
    monkeypatch.setattr(objectives, "OBJECTIVES", {name: objectives.OBJECTIVES[name] for name in some})
    result = benchmark(case)
    assert result["what"] == case and "json" not in result["command"] and result["command"].endswith(FAST[-1])
    assert all(0 < r["seconds"]["min"] <= r["seconds"]["median"] <= r["seconds"]["max"] for r in result["records"])
    assert result["machine"]["matmul_flops_per_s"] > 0 and result["environment"]["versions"]["jax"]
    if case == "replay":
        assert [r["name"].split("=")[1] for r in result["records"]] == ["disabled", "R2", "R3"]
        assert result["records"][0]["routes_bytes"] == 8 * 10 * 2
    if case == "update":
        (record,) = result["records"]
        assert record["program"]["temporary_bytes"] > 0 and record["logits_bytes"] == 4 * 4 * 10 * 34
        assert record["forward_backward"]["share_of_matmul"] > record["share_of_matmul"]


def test_a_step_is_the_sum_of_its_phases(benchmark):
    # Catches a phase that is counted twice, or left out.
    (record,) = benchmark("step", "--repeats=3")["records"]
    assert set(record["phases"]) == {"rollout", "reward", "old_logps", "update"}
    parts = sum(phase["seconds"]["min"] for phase in record["phases"].values())
    assert 0.5 * record["seconds"]["min"] < parts <= record["seconds"]["min"] * 1.01
    assert record["completions"] == {"mean": 6.0, "max": 6, "total": 48} and record["first_step_at"] > 1e9


def test_arms_are_values_of_a_field(benchmark):
    # Catches --vary that measures the same config twice.
    short, long = benchmark("rollout", "--vary=max_completion_length=3,9")["records"]
    assert (short["name"], short["decode_passes"]) == ("max_completion_length=3", 3)
    assert (long["completions"]["total"], long["decode_passes"]) == (8 * 9, 9)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "say what to measure"),
        (["faster"], "say what to measure"),
        (["step", "--vary=no_such_field=1,2"], "--vary=no_such_field=1,2: write FIELD"),
        (["step", "--vary=num_prompts=some"], "num_prompts='some' is no int"),
        (["moe", "--config.model.num_experts=0", "--config.model.d_ff=8"], "the model is dense"),
        (["table", "/no/such/folder"], "no .json file"),
    ],
)
def test_mistakes_are_one_line_with_exit_code_2(command, arguments, words):  # noqa: F811
    # Catches a traceback.
    config = [] if arguments[:1] == ["table"] else [TINY, "--config.mesh.data=1"]
    code, _, error = command("benchmark", *arguments[:1], *config, *arguments[1:], folder="scripts")
    assert code == 2 and words in error and error.count("\n") == 1, error


def test_the_table_of_a_folder_fills_a_readme(benchmark, command, tmp_path):  # noqa: F811
    # Catches a README that has to be typed.
    benchmark("logprob")
    readme = tmp_path / "README.md"
    readme.write_text("<!-- speed: logprob -->\n<!-- end -->\n")
    assert command("benchmark", "table", tmp_path, f"--readme={readme}", folder="scripts") == (0, "", "")
    assert "commit" in readme.read_text() and command("benchmark", "table", tmp_path, folder="scripts")[0] == 0


@pytest.mark.slow
def test_a_second_process_finds_the_programs_of_the_first(benchmark):
    # Catches a cache that is not passed on: to the first step of a cold process, and of one after it.
    cold, second = benchmark("compile", "--repeats=1")["records"]
    assert cold["from_cache"] == 0 < second["from_cache"] and cold["programs"] == second["programs"] > 3
    assert 0 < cold["import_seconds"]["median"] < cold["seconds"]["median"]


# ---------------------------------------------------------------------------- beside other systems

PEERS = ROOT / "scripts" / "benchmark_peers"


@pytest.fixture
def compare():
    return runpy.run_path(str(PEERS / "compare.py"))


def test_the_peers_work_is_that_of_the_config():
    # Catches another size on one side only.
    work = runpy.run_path(str(PEERS / "work.py"))
    config = runpy.run_path(str(ROOT / "configs" / "benchmark.py"))["get_config"]
    for name in ("moe", "dense"):
        ours = config(name)
        assert (ours.num_prompts, ours.num_generations) == (work["PROMPTS"], work["GROUP"])
        assert (ours.max_prompt_length, ours.max_completion_length) == (work["PROMPT"], work["COMPLETION"])
        assert ours.updates_per_rollout == work["UPDATES"] and ours.old_logps == "learner"
        assert ours.optimizer.learning_rate == work["LEARNING_RATE"] and ours.optimizer.max_grad_norm == 1.0
        model = ours.model
        assert (model.d_model, model.num_layers, model.num_heads) == (work["WIDTH"], work["LAYERS"], work["HEADS"])
        assert (model.num_kv_heads, model.head_width) == (work["KV_HEADS"], work["HEAD_WIDTH"])
        assert (model.rope_theta, model.vocab_size) == (work["ROPE_THETA"], work["PAD"] + 1)
        sizes = (model.num_experts, model.experts_per_token, model.d_expert, model.d_ff)
        moe = (work["EXPERTS"], work["EXPERTS_PER_TOKEN"], work["D_EXPERT"], 0)
        assert sizes == (moe if name == "moe" else (0, 0, 0, work["D_FF"]))


def test_ours_is_compared_with_the_fastest_peer_of_its_model(compare):
    # Catches a ratio upside down, to the slowest peer, or to a peer's other model.
    def turn(seconds):
        return dict.fromkeys(compare["FIELDS"], seconds) | {"versions": {}}

    turns = {
        ("moe", "ours"): [turn(1.0), turn(2.0), turn(9.0)],
        ("moe", "trl"): [turn(3.0)],
        ("moe", "tunix"): [turn(6.0)],
    }
    turns |= {("dense", "ours"): [turn(1.0)], ("dense", "trl"): [turn(5.0)]}
    records = compare["summary"](turns)
    faster = {record["model"]: record.get("times_as_fast") for record in records if record["system"] == "ours"}
    assert faster["moe"]["step"] == 1.5 and faster["dense"]["first_cold"] == 5.0
    assert all("times_as_fast" not in record for record in records if record["system"] != "ours")
    assert "1.50" in speed.markdown(speed.peers_table(records)[1], speed.peers_table(records)[0])


@pytest.mark.slow
def test_ours_alone_runs_from_a_cold_process_and_a_second_one(compare, monkeypatch, tmp_path):
    # Catches a comparison that breaks at its last line, without the peers, which take minutes.
    made = compare["command_of"]

    def small(*arguments):
        return [*made(*arguments), *FAST[::2]]

    monkeypatch.setitem(compare["measured"].__globals__, "command_of", small)
    out = tmp_path / "peers.json"
    envs = f"--envs={tmp_path}/envs"
    assert compare["main"](["--repeat=1", "--cores=1", "--models=tiny", "--systems=ours", envs, f"--json={out}"]) == 0
    (record,) = json.loads(out.read_text())["records"]
    assert 0 < record["step"]["median"] < record["first_warm"]["median"] and record["first_cold"]["median"] > 0
    with pytest.raises(UserError, match="--cores=99"):
        compare["main"](["--cores=99", envs])
