"""Training curves of one or more runs, side by side.

    python scripts/plot_curves.py runs/gspo runs/grpo --out=curves.png
    python scripts/plot_curves.py GSPO=runs/gspo-0,runs/gspo-1 GRPO=runs/grpo-0,runs/grpo-1 --out=c.pdf --smooth=0.9

A run is a workdir, or label=workdir; workdirs under one label are seeds: their mean is drawn, with a band from the
lowest to the highest. A panel without data in any of the runs is left out.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gspo.report.plots import plot_curves, short_names
from gspo.types import UserError


def parse_run(argument: str) -> tuple[str | None, list[str]]:
    """ "label=dir,dir" or "dir" -> (label, dirs). A folder that exists under the whole name is taken as it is."""
    if Path(argument).exists():
        return None, [argument]
    label, equals, rest = argument.partition("=")
    dirs = [entry for entry in (rest if equals else argument).split(",") if entry]
    if equals and not (label and dirs):
        raise UserError(f"{argument!r} is not label=workdir[,workdir...]")
    return (label if equals else None), dirs


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[label=]workdir[,workdir...]")
    parser.add_argument("--out", default="curves.png", help="PNG, PDF or SVG, by its ending (default: %(default)s)")
    parser.add_argument("--smooth", type=float, default=0.8, help="weight of the past, 0 to 1 (default: %(default)s)")
    parser.add_argument("--title", help="above the panels")
    options = parser.parse_args(arguments)
    try:
        parsed = [parse_run(argument) for argument in options.runs]
        names = iter(short_names([dirs[0] for label, dirs in parsed if label is None]))
        labels = [name for label, dirs in parsed for name in [label or next(names)] * len(dirs)]
        workdirs = [workdir for _, dirs in parsed for workdir in dirs]
        print(plot_curves(workdirs, labels, options.out, smooth=options.smooth, title=options.title))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
