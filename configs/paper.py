"""What paper_cpu.py, paper_gpu.py and paper_pod.py share: methods, arms, and which arms stand in which figure.

An arm is a name, the cold start that it begins with, and what it lays over `base`. A figure is a list of arms and of
seeds; two figures may share arms, which then run once. So do two names of which one says what the other says.
"""

from ml_collections import ConfigDict

R2 = {"router_replay": {"mode": "R2"}}
R3 = {"router_replay": {"mode": "R3"}}


def joined(*changes: dict) -> dict:
    """Nested dicts laid over each other, the later ones on top."""
    out: dict = {}
    for change in changes:
        for name, value in change.items():
            both = isinstance(value, dict) and isinstance(out.get(name), dict)
            out[name] = joined(out[name], value) if both else value
    return out


def methods(grpo: tuple[float, float], gspo: tuple[float, float]) -> dict[str, dict]:
    """GRPO and GSPO with these clip ranges, (below, above) 1, each with and without routing replay."""
    token = {"objective": {"preset": "grpo", "epsilon": grpo[0], "epsilon_high": grpo[1]}}
    sequence = {"objective": {"preset": "gspo", "epsilon": gspo[0], "epsilon_high": gspo[1]}}
    return {"GRPO": token, "GRPO+R2": joined(token, R2), "GSPO": sequence, "GSPO+R2": joined(sequence, R2)}


def scaled(ranges: tuple[float, float], factor: float) -> tuple[float, float]:
    return ranges[0] * factor, ranges[1] * factor


class Paper:
    """Collects arms and figures; `config` is what experiments/paper.py takes."""

    def __init__(self, cold_start: ConfigDict, base: ConfigDict):
        self.config = ConfigDict()
        self.config.workers = 0  # runs side by side; 0: one for each core of a CPU, one on an accelerator
        self.config.cold_start, self.config.base = cold_start, base
        self.config.colds = ConfigDict()  # name of a cold start -> what it lays over `cold_start`; one for each seed
        self.config.arms = ConfigDict()  # name of an arm -> its cold start, and what it lays over `base`
        self.config.same = ConfigDict()  # another name of an arm -> the name under which it runs
        self.config.figures = ConfigDict()  # name of a figure -> its arms and its seeds

    def cold(self, name: str, **changes) -> str:
        """Returns the name of the cold start, or of an earlier one that is the same."""
        start, now = self.config.cold_start.to_dict(), joined(changes)
        for other, laid in self.config.colds.items():
            if joined(start, now) == joined(start, laid.to_dict()):
                return other
        self.config.colds[name] = ConfigDict(now)
        return name

    def arm(self, name: str, cold: str, *changes: dict, alone: bool = False) -> str:
        """Returns the name of the arm, or of an earlier one that is the same; alone: without looking for one, since its
        seeds are not to be mixed with those of others."""
        base, now = self.config.base.to_dict(), joined(*changes)
        for other, arm in self.config.arms.items():
            shared = not alone and not arm.get("alone", False) and arm.cold == cold
            if shared and joined(base, now) == joined(base, arm.changes.to_dict()):
                self.config.same[name] = other
                return other
        self.config.arms[name] = ConfigDict({"cold": cold, "changes": now, "alone": alone})
        return name

    def figure(self, name: str, seeds: tuple[int, ...], arms: list[str]) -> None:
        self.config.figures[name] = ConfigDict({"arms": tuple(arms), "seeds": tuple(seeds)})
