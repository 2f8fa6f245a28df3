"""Cold start on running sums: 300 updates on demonstrations that are wrong at each step with probability 0.12.

Task   12 random digits and "="; the answer is the 12 running sums modulo 10, as in "314=" -> "348".
Model  4 layers, width 64, 8 experts of which 2 run.
Cost   about a minute on 2 CPU cores.
Ends   at a pass@1 of about 0.88^12 = 0.2, as far as the demonstrator goes: right and wrong completions in most groups
of 8."""

from configs import base


def get_config():
    config = base.sft()
    config.num_updates = 300
    config.batch_size = 128
    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 20
    return config
