"""Which runs are compiled ahead of time for which slices of TPUs, by experiments/aot.py.

Fit      Qwen3-30B-A3B with 64 prompts x 8 completions x (512 + 2,048) tokens, 4 updates per rollout, on 64 v5p chips
         and on the smallest slices of v5e and v6e that hold it (v5e with 8 updates of 64 rows: 4 of 128 need 15.73 of
         its 15.75 GiB, which is too close to call; and its compiler knows no ragged all-to-all); Qwen3-235B-A22B with
         128 prompts on 128 v5p chips.
Scaling  Qwen3-30B-A3B on 16, 64 and 256 v5p chips, one prompt and its 8 completions per chip.
Cost     about 20 minutes on 2 CPU cores, and 6 GB of memory. Needs libtpu, and no TPU.
"""

from ml_collections import ConfigDict

from configs import gspo_qwen3_30b_a3b, gspo_qwen3_235b_a22b


def get_config():
    config = ConfigDict()
    config.runs = ConfigDict(
        {"qwen3_30b_a3b": gspo_qwen3_30b_a3b.get_config(), "qwen3_235b_a22b": gspo_qwen3_235b_a22b.get_config()}
    )
    # Name -> the run, the slice, and what is laid over the run's config.
    config.slices = ConfigDict(
        {
            "v5p_64": {"run": "qwen3_30b_a3b", "topology": "v5p:4x4x4", "changes": {}},
            "v5e_64": {
                "run": "qwen3_30b_a3b",
                "topology": "v5e:8x8",
                "changes": {"mesh": {"expert": 4}, "updates_per_rollout": 8, "rollout_expert_dispatch": "all_gather"},
            },
            "v6e_32": {
                "run": "qwen3_30b_a3b",
                "topology": "v6e:4x8",
                "changes": {"mesh": {"expert": 4}, "micro_batch_size": 32},
            },
            "large_v5p_128": {"run": "qwen3_235b_a22b", "topology": "v5p:4x4x8", "changes": {}},
            "v5p_16": {
                "run": "qwen3_30b_a3b",
                "topology": "v5p:2x2x4",
                "changes": {"num_prompts": 16, "micro_batch_size": 16},
            },
            "v5p_256": {
                "run": "qwen3_30b_a3b",
                "topology": "v5p:4x8x8",
                "changes": {"num_prompts": 256, "micro_batch_size": 256, "mesh": {"data": 2}},
            },
        }
    )
    config.fit = ("v5p_64", "v5e_64", "v6e_32", "large_v5p_128")
    config.scaling = ("v5p_16", "v5p_64", "v5p_256")
    return config
