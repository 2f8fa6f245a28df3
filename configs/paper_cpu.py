"""The GSPO paper's comparisons on models that a CPU can train: running sums of 16 digits, 4 layers, 16 updates per
rollout (experiments/paper.py).

Setting A   16 experts of which 2 run, learning rate 7e-4: a step that is too large for every model, dense ones too.
Setting B   64 experts of which 8 run, learning rate 3e-4, routers at 20 times that: routing moves, the rest does not.
Dense       the twin of both: as many active parameters, no routers, at the learning rate of its setting.
Rollout     32 prompts x 8 completions of 17 tokens, 16 updates each, 50 rollouts; constant rate after 20 updates.
Clip        GRPO 0.2 / 0.27 (the paper's); GSPO 3e-3 / 4e-3, ten times the paper's, whose sequences are a hundred times
            longer.
Seeds       10 .. 19 are reported; 0 .. 9 were the search's, 100 and 101 are those of the sweep.
Cost        952 runs of 77 s in the mean on one core, half as much again for cold starts and compilation.
"""

from ml_collections import ConfigDict

from configs import base as fields
from configs.paper import R2, R3, Paper, joined, methods, scaled

DIGITS = 16
SEEDS = tuple(range(10, 20))  # of the curves
FEWER = SEEDS[:5]  # of what stands beside them
GRID = SEEDS[:3]  # of grids
SWEPT = (100, 101)  # of the sweep, which chooses each method's own rate and range

GRPO, GSPO = (0.2, 0.27), (3e-3, 4e-3)
RATES = {"A": 7e-4, "B": 3e-4}
SWEEP_RATES = ("5e-5", "1e-4", "2e-4", "3e-4", "6e-4", "12e-4")
SWEEP_CLIPS = (-2, -1, 0, 1, 2)  # powers of 2 that the ranges are multiplied by
# Where each ends highest in the sweep (training reward of the last 5 rollouts, mean of both seeds): rate, and the power
# of 2 that its clip range is multiplied by.
BEST = {
    "B MoE GRPO": ("1e-4", 2),
    "B MoE GSPO": ("1e-4", 1),
    "dense GRPO": ("2e-4", 2),
    "dense GSPO": ("2e-4", 2),
}
DOSES = (0, 1, 3, 10, 20, 50)  # learning rate of the routers over that of the rest
STALENESS = (1, 2, 4, 8, 16)  # updates per rollout
OTHERS = ("gspo_token", "dapo", "dr_grpo", "cispo", "gmpo", "sapo", "luspo", "rspo", "minirl")

LENGTHS = {8: 0.15, 16: 0.08, 32: 0.04, 64: 0.02}  # digits -> the demonstrator's error: cold starts are alike
# A sampler that differs: the experts of a noisy router, and weights of 8 bits.
MISMATCH = {"old_logps": "learner", "mismatch": {"params": "int8", "router_noise": 0.5}}

COARSE = dict(num_experts=16, experts_per_token=2, d_expert=64)
FINE = dict(num_experts=64, experts_per_token=8, d_expert=16)
DENSE = dict(num_experts=0, experts_per_token=0, d_expert=0, d_ff=128)


def rate(value: float) -> dict:
    return {"optimizer": {"learning_rate": value}}


def lr_scale(text: str) -> dict:
    return {"optimizer": {"lr_scale": text}}


def ranged(power: int) -> dict[str, dict]:
    """The methods with their ranges times this power of 2."""
    return methods(scaled(GRPO, 2.0**power), scaled(GSPO, 2.0**power))


def digits(number: int) -> dict:
    options = {"num_digits": number, "error_rate": LENGTHS[number]}
    return {"task": {"options": options}, "max_prompt_length": number + 1, "max_completion_length": number + 1}


def task(config: ConfigDict) -> ConfigDict:
    config.update(digits(DIGITS))
    return config


def cold_start() -> ConfigDict:
    config = task(fields.sft())
    config.num_updates, config.batch_size = 300, 128
    config.optimizer.update(learning_rate=3e-3, schedule="cosine", warmup_steps=20)
    config.checkpoint.update(every=0, keep_best=False)
    return config


def rl() -> ConfigDict:
    config = task(fields.rl())
    config.num_rollouts, config.num_prompts, config.updates_per_rollout = 50, 32, 16
    config.optimizer.warmup_steps = 20
    config.eval.update(every=10, num_prompts=128)
    config.checkpoint.update(every=10, keep_last=1, keep_best=False)
    config.log.num_samples = 0
    # Fine experts nearly tie, and a token of a prompt that takes another one by rounding moves the rows of its group:
    # measured, 5 of 4,345 tokens by 1e-3 to 3e-3. Numbers do not depend on it.
    config.check_tolerance = 0.1
    return config


def setting(name: str) -> dict:
    """What makes a MoE of this setting learn as it does."""
    return rate(RATES["A"]) if name == "A" else joined(rate(RATES["B"]), lr_scale("router=20"))


def get_config():
    paper = Paper(cold_start(), rl())
    coarse, fine = paper.cold("coarse", model=COARSE), paper.cold("fine", model=FINE)
    dense = paper.cold("dense", model=DENSE)
    both = methods(GRPO, GSPO)

    # ------------------------------------------------------------------ Fig. 1 to 3, and the interaction: A and B
    for name, cold in (("A", coarse), ("B", fine)):
        arms = [paper.arm(f"{name} MoE {method}", cold, setting(name), both[method]) for method in both]
        plain = rate(RATES[name])
        arms += [paper.arm(f"{name} dense {method}", dense, plain, both[method]) for method in ("GRPO", "GSPO")]
        paper.figure(f"curves_{name.lower()}", SEEDS, arms)

    # ------------------------------------------------------------------ learning rate x clip range, alike for both
    def swept(model: str, cold: str, more: dict) -> list[str]:
        arms = []
        for text in SWEEP_RATES:
            for power in SWEEP_CLIPS:
                at = ranged(power)
                arms += [
                    paper.arm(f"{model} {m} lr {text} clip 2^{power}", cold, rate(float(text)), more, at[m], alone=True)
                    for m in ("GRPO", "GSPO")
                ]
        return arms

    paper.figure("sweep_moe", SWEPT, swept("B MoE", fine, lr_scale("router=20")))
    paper.figure("sweep_dense", SWEPT, swept("dense", dense, {}))

    # ------------------------------------------------------------------ Fig. 1 again, each method at its own best
    def tuned(name: str, replay: str = "") -> str:
        (model, method), (text, power) = name.rsplit(" ", 1), BEST[name]
        cold, more = (dense, {}) if model == "dense" else (fine, lr_scale("router=20"))
        at = ranged(power)[method + replay]
        return paper.arm(f"best {model.removeprefix('B ')} {method}{replay}", cold, rate(float(text)), more, at)

    paper.figure("best", SEEDS, [*map(tuned, BEST), tuned("B MoE GRPO", "+R2")])

    # ------------------------------------------------------------------ clip ranges
    arms = []
    for power in (-2, 2):
        at = ranged(power)
        arms += [paper.arm(f"B MoE {m} clip 2^{power}", fine, setting("B"), at[m]) for m in ("GRPO", "GSPO")]
    paper.figure("clips", FEWER, arms)

    # ------------------------------------------------------------------ dose and response, with its placebo
    arms, rspo = [], {"objective": {"preset": "rspo"}}
    for dose in DOSES:
        at = joined(rate(RATES["B"]), lr_scale(f"router={dose}" if dose != 1 else ""))
        arms += [paper.arm(f"router x{dose} {method}", fine, at, both[method]) for method in both]
        arms.append(paper.arm(f"router x{dose} RSPO", fine, at, rspo))
    for dose in DOSES:
        at = joined(rate(RATES["B"]), lr_scale(f"attention/query$={dose}" if dose != 1 else ""))
        for model, cold in (("MoE", fine), ("dense", dense)):
            arms += [paper.arm(f"query x{dose} {model} {m}", cold, at, both[m]) for m in ("GRPO", "GSPO")]
    paper.figure("dose", FEWER, arms)

    # ------------------------------------------------------------------ depth; other objectives; staleness
    arms = []
    for layers in (2, 8):
        deep = paper.cold(f"fine {layers} layers", model=FINE | {"num_layers": layers})
        arms += [paper.arm(f"{layers} layers {m}", deep, setting("B"), both[m]) for m in ("GRPO", "GSPO")]
    paper.figure("depth", FEWER, arms)

    ranges = {"gspo_token": dict(epsilon=GSPO[0], epsilon_high=GSPO[1])}  # the others': their papers'
    arms = [
        paper.arm(f"B MoE {preset}", fine, setting("B"), {"objective": {"preset": preset, **ranges.get(preset, {})}})
        for preset in OTHERS
    ]
    paper.figure("objectives", FEWER, arms)

    replays = {f"{m}{r}": joined(both[m], x) for m in ("GRPO", "GSPO") for r, x in (("", {}), ("+R2", R2), ("+R3", R3))}
    exact, other = [], []
    for updates in STALENESS:
        at = joined(setting("B"), {"updates_per_rollout": updates})
        exact += [paper.arm(f"{updates} updates {method}", fine, at, both[method]) for method in both]
        for method, changes in replays.items():
            other.append(paper.arm(f"{updates} updates mismatch {method}", fine, at, MISMATCH, changes))
    paper.figure("staleness", GRID, exact)
    paper.figure("mismatch", GRID, other)

    arms = []
    taken = {
        "sampler": joined(MISMATCH, {"old_logps": "sampler", "check_tolerance": float("inf")}),
        "learner": MISMATCH,
    }
    for whose, changes in taken.items():
        arms += [paper.arm(f"old by {whose} {m}", fine, setting("B"), changes, both[m]) for m in ("GRPO", "GSPO")]
    paper.figure("old_logps", FEWER, arms)

    # ------------------------------------------------------------------ a collapse, from its checkpoint before
    kept = {"checkpoint": {"keep_last": 10}}
    narrow = methods(scaled(GRPO, 0.5), GSPO)["GRPO"]
    arms = [paper.arm("B MoE GRPO kept", fine, setting("B"), both["GRPO"], kept)]
    for name, changes in {**both, "GRPO narrow": narrow}.items():
        arms.append(paper.arm(f"again {name}", "B MoE GRPO kept@20", setting("B"), changes))
    paper.figure("again", FEWER, arms)

    # ------------------------------------------------------------------ length, and why the ratio is normalised by it
    arms = []
    for number in LENGTHS:
        cold = paper.cold(f"fine {number} digits", model=FINE, **digits(number))
        at = methods(GRPO, scaled(GSPO, (DIGITS / number) ** 0.5))
        at["sum"] = {"objective": {"preset": "grpo", "importance_sampling_level": "sequence_sum"}}
        for method in ("GRPO", "GSPO", "sum"):
            arms.append(paper.arm(f"{number} digits {method}", cold, setting("B"), digits(number), at[method]))
    paper.figure("length", FEWER, arms)
    return paper.config
