"""How far a model of preferences may be believed: how often it was right on held-out pairs, by how sure it was."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gspo.report.plots import COLORS, STYLE, plt
from gspo.report.tables import markdown

COLUMNS = ("confidence", "pairs", "mean confidence", "share right")


def write_calibration(line: Mapping[str, Any], folder: str | Path) -> None:
    """calibration.md and calibration.png of an evaluation (`gspo.pairs.agreement`) in a folder."""
    folder, bins = Path(folder), _bins(line)
    rows = [(f"{low:.2f} to {high:.2f}", str(count), f"{stated:.3f}", f"{found:.3f}")
            for low, high, count, stated, found in bins if count]  # fmt: skip
    total = sum(count for _, _, count, _, _ in bins)
    accuracy, *interval = (line[f"eval/accuracy{end}"] for end in ("", "_low", "_high"))
    text = (
        f"Held-out pair accuracy {accuracy:.3f}, 95% interval [{interval[0]:.3f}, {interval[1]:.3f}], {total} pairs; "
        f"expected calibration error {line['eval/ece']:.3f}.\n\n"
    )
    (folder / "calibration.md").write_text(text + markdown(rows, COLUMNS))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(3.6, 3.2), layout="constrained")
        axes.plot([0.5, 1], [0.5, 1], color="#777777", linewidth=0.8, label="as sure as right")
        seen = [(stated, found, count) for _, _, count, stated, found in bins if count]
        stated, found, counts = zip(*seen, strict=True)
        sizes = [10 + 120 * count / total for count in counts]
        axes.plot(stated, found, color=COLORS[0], linewidth=1.2)
        axes.scatter(stated, found, sizes, color=COLORS[0], zorder=3, clip_on=False, label="held-out pairs, by number")
        axes.set_xlabel("Confidence in its own preference")
        axes.set_ylabel("Share of pairs in which it was right")
        axes.legend(frameon=False, loc="upper left", fontsize=8)
        figure.savefig(folder / "calibration.png")
        plt.close(figure)


def _bins(line: Mapping[str, Any]) -> list[tuple[float, float, int, float, float]]:
    """(from, to, pairs, mean confidence, share right) of each bin."""
    counts, stated, found = (line[f"eval/calibration_{name}"] for name in ("count", "confidence", "accuracy"))
    width = 0.5 / len(counts)
    return [(0.5 + i * width, 0.5 + (i + 1) * width, *bin) for i, bin in
            enumerate(zip(counts, stated, found, strict=True))]  # fmt: skip
