"""Records of tokens made without a run, for tests of what reads them."""

import json

import numpy as np

from gspo.objectives import settings
from gspo.run import tokens

HOSTILE = [
    "<img src=x onerror=\"document.title='ran'\">", "</script><script>document.title='ran'</script>",
    "-->]]>&amp;<!--", "null \x00 bell \x07 escape \x1b[31m", "\u202eright to left\u202c שלום مرحبا", "😀 𝒳 é ﷽",
    "half \ud83d a character", "{{data}} {{script}} ${state} `x`", "line\nline\ttab",
]  # fmt: skip
LAYERS, EXPERTS, CHOSEN, UPDATES = 3, 8, 2, 2


def about(rollout, tokenizer="bytes", **objective):
    return {
        "rollout": rollout, "updates": UPDATES, "num_generations": 2, "tokenizer": tokenizer, "eos_ids": [257],
        "objective": settings(None, **({"epsilon": 0.01, "epsilon_high": 0.02} | objective)),
        "layers": LAYERS, "experts": EXPERTS, "experts_per_token": CHOSEN,
    }  # fmt: skip


def columns_of_rows(seed, groups=3, texts=(), routed=True, prompts=None):
    """Columns of 2 rows for each of so many prompts. texts: those of the first completions; of the others random
    letters. prompts: their texts; None: made up by number alone."""
    rng = np.random.default_rng(seed)
    R = 2 * groups
    rows = [list(text.encode("utf-8", "replace")) + [257] for text in texts]
    rows += [[*rng.integers(97, 123, rng.integers(3, 9)), 257] for _ in range(R - len(rows))]
    asked = [list((prompts[q] if prompts else f"prompt {q}?").encode()) for q in range(groups)]
    length = np.array([len(row) for row in rows], np.int32)
    N = int(length.sum())
    old = -rng.exponential(size=N).astype(np.float32)
    columns = {
        "row": np.arange(R, dtype=np.int32),
        "group": np.arange(R, dtype=np.int32) // 2,
        "update": np.arange(R, dtype=np.int32) * UPDATES // R,
        "length": length,
        "reward": rng.integers(0, 2, R).astype(np.float32),
        "truncated": rng.integers(0, 2, R).astype(bool),
        "prompt_group": np.arange(groups, dtype=np.int32),
        "prompt_length": np.array([len(ids) for ids in asked], np.int32),
        "prompt_token": np.concatenate(asked).astype(np.int32),
        "token": np.concatenate(rows).astype(np.int32),
        "mask": np.ones(N, bool),
        "advantage": np.repeat(rng.normal(size=R), length).astype(np.float32),
        "old_logp": old,
        "logp": old + 0.05 * rng.normal(size=N).astype(np.float32),
        "after_logp": old + 0.1 * rng.normal(size=N).astype(np.float32),
        "entropy": rng.exponential(size=N).astype(np.float16),
    }
    if routed:
        old_routes = np.argsort(rng.random((N, LAYERS, EXPERTS)), axis=2)[:, :, :CHOSEN].astype(np.int8)
        moved = rng.random((N, LAYERS, 1)) < 0.2
        columns["old_routes"] = old_routes
        columns["routes"] = np.where(moved, (old_routes + 1) % EXPERTS, old_routes).astype(np.int8)
        columns["margin"] = rng.exponential(size=(N, LAYERS)).astype(np.float16)
    return columns


def write_record(folder, rollout, **options):
    """A record in a workdir; returns its file."""
    return tokens.write(folder, 0, about(rollout), columns_of_rows(rollout, **options))


def write_metrics(folder, rollouts=8, shift=0.0):
    """A metrics.jsonl with some of the curves that the page shows."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"step": i, "reward/mean": 0.3 + 0.05 * i + shift, "clip_ratio/tokens": 0.1 / (i + 1),
         "entropy": 1.0 - 0.01 * i, "grad_norm/max": 2.0 + i, "none": None}
        | ({"eval/pass@1": 0.4 + 0.1 * shift} if i % 4 == 0 else {})
        for i in range(rollouts)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
