"""The road to a learned reward from end to end, as small as it can be: every stage leaves what the next one takes."""

import json

import pytest

from gspo.report import campaign, tables
from tests.test_experiments import InThisProcess, cells
from tests.tiny_runs import command, kept_compiles  # noqa: F401 - fixtures

CONFIG_FILE = """
from configs import rlhf_tiny

SIZES = dict(num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, head_width=8, num_experts=4, d_expert=8)


def get_config():
    config = rlhf_tiny.get_config()
    for part in (config.sft, config.labels, config.reward_model, config.rl):
        part.task.options = {"num_digits": 3, "modulus": 3, "error_rate": 0.3}
        part.max_prompt_length, part.max_completion_length = 4, 6
        part.model.update(moe_backend="dense", **SIZES)
        part.mesh.data = 1
    config.sft.update(num_updates=40, batch_size=32)
    config.sft.eval.num_prompts = 8
    config.labels.update(num_prompts=64, num_eval_prompts=32, prompts_at_a_time=32)
    config.reward_model.update(num_updates=24, batch_size=8)
    config.reward_model.eval.num_prompts = 8
    config.rl.update(num_rollouts=2, num_prompts=2, num_generations=2, updates_per_rollout=1)
    config.rl.eval.num_prompts = 2
    for arm in set(config.arms) - {"PPO + KL", "GSPO"}:
        del config.arms[arm]
    return config
"""


@pytest.mark.slow
def test_the_road_ends_in_its_table_and_goes_on_without_training_anew(tmp_path, command, monkeypatch):  # noqa: F811
    # Catches a stage that begins with other weights than those of the one before it, a true reward that is trained on,
    # rewards on different scales in one gap.
    monkeypatch.setattr(campaign, "_Crew", InThisProcess)
    (tmp_path / "config.py").write_text(CONFIG_FILE)
    arguments = ("rlhf", f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}")
    code, _, stderr = command(*arguments)
    assert code == 0, stderr
    folder, table = tmp_path / "run" / "0", (tmp_path / "run" / "table.md").read_text()
    assert "Held-out pair accuracy" in table and (tmp_path / "run" / "rlhf.png").exists()
    made = json.loads((folder / "preferences" / "labels.json").read_text())["train"]
    (tmp_path / "only.md").write_text(table.partition("\n\n")[2])
    for arm, name in (("GSPO", "gspo"), ("PPO + KL", "ppo_+_kl")):
        lines = [line for line in tables.lines_of(folder / name, "metrics.jsonl") if "loss" in line]
        for line in lines:
            assert line["reward/mean"] == pytest.approx(line[f"rewards/reward_model:{folder / 'rm'}"], abs=1e-5)
        model, truth = (sum(line[f"rewards/{key}"] for line in lines) / len(lines)
                        for key in (f"reward_model:{folder / 'rm'}", "matching_characters"))  # fmt: skip
        truth = (truth - made["mean"]) / made["std"]
        found = cells(tmp_path / "only.md")[arm]
        assert found["model's reward"] == f"{model:+.2f}" and found["true reward"] == f"{truth:+.2f}"
        assert float(found["gap"]) == pytest.approx(model - truth, abs=0.011)
    before = (folder / "gspo" / "metrics.jsonl").stat().st_mtime_ns
    assert command(*arguments)[0] == 0 and (folder / "gspo" / "metrics.jsonl").stat().st_mtime_ns == before
