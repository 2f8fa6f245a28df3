"""The road with a reward model, a critic and a reference, over several processes: what one process makes of it."""

import numpy as np
import pytest

from gspo.run.writers import read_jsonl
from tests.parallel.runs import assert_same_metrics, launch

TRAINING = """
from tests.tiny_runs import reward_model_config


def get_config():
    return reward_model_config({folder!r}, **{{"num_updates": 4, "mesh.data": 4, "eval.every": 2}})
"""
PPO = """
from tests.tiny_runs import rl_config


def get_config():
    return rl_config({folder!r}, **{{
        "mesh.data": 2, "mesh.fsdp": 2, "num_rollouts": 3, "objective.preset": "ppo", "critic.enable": True,
        "critic.init_from": {judge!r}, "critic.warmup_rollouts": 1, "critic.learning_rate": 1e-3,
        "rewards": ("numeric_answer", "reward_model:" + {judge!r}), "reward_kl_coef": 0.1,
        "optimizer.learning_rate": 0.01, "eval.num_prompts": 8, "model.moe_backend": "blocked",
    }})
"""


def both_ways(folder, text, script, name):
    """The metrics of the run in two processes of two devices, and in one of four."""
    (folder / "config.py").write_text(text)
    for processes, devices in ((2, 2), (1, 4)):
        code, _, stderr = launch(folder, f"{name}-{processes}", processes=processes, devices=devices, script=script)
        assert code == 0, stderr
    return [read_jsonl(folder / f"{name}-{processes}" / "metrics.jsonl") for processes in (2, 1)]


@pytest.mark.slow
def test_two_processes_train_the_reward_model_and_the_four_models_that_one_process_trains(tmp_path):
    # Catches pairs that are cut between processes, scores of other rows, a critic or a reference that each process has
    # to itself, and a reward model that only one of them has read.
    judged = both_ways(tmp_path, TRAINING.format(folder=str(tmp_path)), "experiments/reward_model.py", "judge")
    assert len(judged[1]) > 1
    assert_same_metrics(*judged, atol=5e-5)
    text = PPO.format(folder=str(tmp_path), judge=str(tmp_path / "judge-1"))
    two, one = both_ways(tmp_path, text, "experiments/rl.py", "ppo")
    assert len(one) > 1
    assert_same_metrics(two, one, atol=5e-5)
    assert all(np.isfinite(line["critic/loss"]) and f"rewards/reward_model:{tmp_path}/judge-1" in line
               for line in two[:3])  # fmt: skip
