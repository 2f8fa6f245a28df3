"""The paper's own comparison at its own size: Qwen3-30B-A3B on GSM8K, on 64 TPU v5p chips (or as many GPUs of 80 GB).

Model    that of configs/gspo_qwen3_30b_a3b.py, with its layout; weights by scripts/import_hf.py into
         runs/qwen3_30b_a3b, then a cold start on the training answers.
Arms     GRPO and GSPO at the paper's ranges, GRPO with routing replay: those of Fig. 1 to 3, and GSPO with replay.
Seeds    10, 11, 12, one run after the other.
Cost     not run. scripts/aot_report.py --config=configs/paper_pod.py:GRPO+R2 --topology=v5p:4x4x4 compiles an arm
         without a TPU and says what it takes: 17 of 95 GiB a chip, all checks hold (experiments/results/aot).
"""

from ml_collections import ConfigDict

from configs import gspo_qwen3_30b_a3b, sft_gsm8k
from configs.paper import Paper, methods

GRPO, GSPO = (0.2, 0.27), (3e-4, 4e-4)
SHARED = ("task", "tokenizer", "max_prompt_length", "max_completion_length", "model", "mesh", "mesh_rules")


def get_config(arm=""):
    """arm: the run of that arm alone, as aot_report.py takes it."""
    base, cold_start = gspo_qwen3_30b_a3b.get_config(), sft_gsm8k.get_config()
    for name in SHARED:
        value = base[name]
        cold_start[name] = ConfigDict(value.to_dict()) if isinstance(value, ConfigDict) else value
    cold_start.init_from, cold_start.micro_batch_size = base.init_from, base.micro_batch_size
    cold_start.batch_size = cold_start.micro_batch_size  # a row for each chip
    paper, arms = Paper(cold_start, base), methods(GRPO, GSPO)
    cold = paper.cold("gsm8k")
    paper.figure(
        "curves_b", (10, 11, 12), [paper.arm(f"B MoE {name}", cold, changes) for name, changes in arms.items()]
    )
    if not arm:
        return paper.config
    if arm not in arms:
        raise ValueError(f"no arm named {arm!r}; choose from {', '.join(arms)}")
    base.update(arms[arm])
    return base
