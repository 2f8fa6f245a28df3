"""Recorded rollouts of runs under other objectives (experiments/lab.py).

Needs    runs with --config.log.tokens_every=N, and the checkpoint before each recorded rollout: checkpoint.every a
         divisor of N, checkpoint.keep_last large.
Cost     for each rollout, twice as many gradients per update as there are objectives.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.rollouts = ""  # workdir of a run; of several, separated by commas
    # Presets. Each has the settings of the run where the run is of that preset, else its paper's.
    config.objectives = ("grpo", "gspo", "gspo_token", "cispo", "gmpo", "sapo")
    # Clip ranges (below, above) of presets, over those; GSPO's suit sequences of 17 tokens (configs/paper_cpu.py).
    config.epsilons = ConfigDict({"gspo": (3e-3, 4e-3), "gspo_token": (3e-3, 4e-3)})
    config.updates = ()  # which updates of a rollout are measured, from 0; (): first, second, middle, last
    return config
