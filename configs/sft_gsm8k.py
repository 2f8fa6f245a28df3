"""Cold start on the worked solutions of GSM8K's train split, at a size that 2 CPU cores can train.

Data   tfds gsm8k, prepared (TFDS_DATA_DIR, or config.task.options.data_dir); prompts "Question: ...\nAnswer:",
       solutions that end in "#### number". Examples longer than the frame are dropped, and the log says how many.
Tokens a byte-level BPE of 2,048 pieces, made by
       python scripts/train_tokenizer.py --task=tfds:gsm8k --vocab_size=2048 --out=runs/gsm8k_tokenizer
Model  reduced: 4 layers, width 128, 8 experts of which 2 run, 2.0M parameters (0.9M active). It learns the form of a
       solution, and hardly any arithmetic: expect a pass@1 of about 1%.
Cost   300 updates of 32 rows, about 7 minutes on 2 CPU cores.
"""

from configs import base


def gsm8k(config):
    """What cold start and reinforcement learning on GSM8K share."""
    config.task.name = "tfds:gsm8k"
    config.task.options = {"answer_format": "hash", "data_dir": ""}
    config.tokenizer = "runs/gsm8k_tokenizer"
    config.max_prompt_length = 96
    config.max_completion_length = 128
    config.overlong_prompts = "drop"
    config.model.update(
        d_model=128, num_heads=4, num_kv_heads=2, head_width=32, num_experts=8, d_expert=128, tie_embeddings=True
    )
    config.eval.update(num_prompts=128, num_generations_eval=4)
    return config


def get_config():
    config = gsm8k(base.sft())
    config.num_updates = 300
    config.batch_size = 32
    config.optimizer.update(learning_rate=3e-3, schedule="cosine", warmup_steps=20)
    return config
