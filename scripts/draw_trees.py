"""Draws which of the four models each method holds, and what they take: trees of real plans, in float32, unbuilt.

    python scripts/draw_trees.py --model=qwen3-30b-a3b --out=trees

Leaves OUT.png, OUT.pdf and OUT.csv: for each method, bytes of policy, optimizer, reference, reward model, critic and
its optimizer, over all devices. --model: a name of configs/models.py. Nothing is allocated. PPO has its penalty in the
reward, where GRPO has it in the loss.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs import base, models
from gspo import build
from gspo.held import bytes_per_device, trees_of
from gspo.learning.critic import Critic
from gspo.learning.state import reward_model_start, state_on_mesh
from gspo.report import bands
from gspo.report.aot import Ids
from gspo.report.plots import COLORS
from gspo.steps import make_layout, make_model, make_steps, optimizer_of

ARMS = {
    "GRPO": {"objective.preset": "grpo"},
    "GRPO, beta > 0": {"objective.preset": "grpo", "objective.beta": 0.04},
    "GSPO": {"objective.preset": "gspo"},
    "PPO": {"objective.preset": "ppo", "critic.enable": True, "reward_kl_coef": 0.05},
}
TREES = ("policy", "optimizer", "reference", "reward model", "critic", "critic's optimizer")


def sized(config: Any, name: str, settings: dict[str, Any]) -> Any:
    config.model = models.model(name)
    config.update_from_flattened_dict(settings)
    return config


def held(name: str) -> dict[str, dict[str, int]]:
    """Method -> tree -> bytes over all devices."""
    found, layout = {}, make_layout(build.mesh_plan(base.rl()))
    for method, settings in ARMS.items():
        plan = build.rl_plan(sized(base.rl(), name, settings))
        found[method] = trees_of(make_steps(plan, layout, Ids()).abstract)
    dpo = build.dpo_plan(sized(base.dpo(), name, {}))
    reward = build.reward_model_plan(sized(base.reward_model(), name, {}))
    model, optimizer = make_model(dpo.model, Ids(), layout), optimizer_of(dpo.optimizer)[0]
    scored = trees_of(reward_model_start(layout, Critic(model.spec, layout), optimizer).abstract, reward.kind)
    found["PPO, reward model"] = found["PPO"] | {"reward model": scored["reward model"]}
    found["DPO"] = trees_of(state_on_mesh(layout, model, optimizer, with_ref=True).abstract)
    found["reward model itself"] = scored
    return {method: {tree: bytes_per_device(x) for tree, x in trees.items()} for method, trees in found.items()}


def draw(found: dict[str, dict[str, int]], name: str, out: Path) -> None:
    figure, (axes,) = bands.new_figure(1, 1, 6.4, 3.0)
    left, rows = dict.fromkeys(found, 0.0), []
    for i, tree in enumerate(TREES):
        sizes = [trees.get(tree, 0) / 2**30 for trees in found.values()]
        axes.barh(list(found), sizes, left=list(left.values()), color=COLORS[i], label=tree, edgecolor="white")
        left = {method: at + size for (method, at), size in zip(left.items(), sizes, strict=True)}
        rows += [{"method": m, "tree": tree, "GiB": f"{size:.6g}"} for m, size in zip(found, sizes, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel=f"GiB in float32, over all devices ({name})", xlim=(0, 1.45 * max(left.values())))
    bands.save(figure, [axes], rows, out)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="qwen3-30b-a3b", choices=sorted(models.MODELS), help="(default: %(default)s)"
    )
    parser.add_argument("--out", default="trees", help="the figure's path without an ending (default: %(default)s)")
    options = parser.parse_args(arguments)
    draw(held(options.model), options.model, Path(options.out))
    print(f"figure: {options.out}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
