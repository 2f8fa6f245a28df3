"""The main comparison of configs/paper_cpu.py on one GPU: a MoE of 41M parameters, completions of a hundred tokens.

Model    12 layers of width 256, 32 experts of which 4 run, bfloat16; its dense twin has as many active parameters.
Task     running sums of 100 digits, demonstrator's error 0.0125: cold start at a pass@1 of about 0.28.
Rollout  64 prompts x 8 completions of 101 tokens, 16 updates each, 60 rollouts.
Setting  B: learning rate 3e-4, routers at 20 times that. Old log-probs by the learner, since bfloat16 rounds.
Clip     GRPO 0.2 / 0.27; GSPO 1.2e-3 / 1.6e-3, the CPU's range over the root of the length.
Seeds    10, 11, 12.
Cost     not measured: no GPU was at hand. configs/paper_gpu.py:small is the same with 2 layers of width 32 and 2
         rollouts, for a CPU: 3 minutes on 2 cores.
"""

from configs import base as fields
from configs.paper import Paper, joined, methods

DIGITS = 100
SIZES = dict(num_layers=12, d_model=256, num_heads=8, num_kv_heads=4, head_width=32, dtype="bfloat16")
MOE = dict(num_experts=32, experts_per_token=4, d_expert=128)
DENSE = dict(num_experts=0, experts_per_token=0, d_expert=0, d_ff=512)
SMALL = dict(num_layers=2, d_model=32, num_heads=2, num_kv_heads=1, head_width=16)
GRPO, GSPO = (0.2, 0.27), (1.2e-3, 1.6e-3)


def common(config, small: bool):
    config.task.options.update(num_digits=DIGITS, error_rate=0.0125)
    config.max_prompt_length = config.max_completion_length = DIGITS + 1
    config.checkpoint.update(keep_last=1, keep_best=False)
    config.model.update(SMALL if small else {"dtype": SIZES["dtype"]})
    return config


def get_config(size=""):
    if size not in ("", "small"):
        raise ValueError(f"no size named {size!r}; leave it out, or write small")
    small = size == "small"
    sft, rl = common(fields.sft(), small), common(fields.rl(), small)
    sft.num_updates, sft.batch_size = (2, 16) if small else (1000, 256)
    sft.optimizer.update(learning_rate=1e-3, schedule="cosine", warmup_steps=1 if small else 50)
    rl.num_rollouts, rl.num_prompts, rl.updates_per_rollout = (2, 4, 4) if small else (60, 64, 16)
    rl.old_logps = "learner"
    rl.optimizer.update(learning_rate=3e-4, warmup_steps=20)
    rl.eval.update(every=0 if small else 10, num_prompts=rl.num_prompts if small else 128)

    paper, both = Paper(sft, rl), methods(GRPO, GSPO)
    sizes = SMALL if small else SIZES
    moe = paper.cold("MoE", model={**sizes, **MOE})
    dense = paper.cold("dense", model={**sizes, **DENSE})
    routers = {"optimizer": {"lr_scale": "router=20"}}
    arms = [paper.arm(f"B MoE {method}", moe, routers, both[method]) for method in both]
    arms += [paper.arm(f"B dense {method}", dense, joined(both[method])) for method in ("GRPO", "GSPO")]
    paper.figure("curves_b", (10,) if small else (10, 11, 12), arms)
    return paper.config
