"""The config of a run that was made, from its config.json: --config=configs/from_run.py:RUN.
experiments/evaluate.py takes it by itself, so that --workdir=RUN is enough."""

import json
from pathlib import Path

from ml_collections import ConfigDict

from configs import base


def get_config(workdir: str) -> ConfigDict:
    content = json.loads((Path(workdir) / "config.json").read_text())
    kinds = {"num_rollouts": base.rl, "center_rewards_coefficient": base.reward_model, "label_smoothing": base.dpo}
    config = next((make for field, make in kinds.items() if field in content), base.sft)()
    config.task.options = ConfigDict(_with_tuples(content["task"].pop("options")))
    config.update(_with_tuples(content))
    config.init_from = workdir  # whose model and tokenizer are those that were saved with its weights
    return config


def _with_tuples(content: dict) -> dict:
    """JSON has lists where a config has tuples."""
    return {
        name: _with_tuples(value) if isinstance(value, dict) else tuple(value) if isinstance(value, list) else value
        for name, value in content.items()
    }
