"""The load of experts by layer, at the first and the last update of runs, as a table.

    python scripts/expert_load.py runs/smollm2-moe-sft runs/gspo-moe

Read from metrics.jsonl: the busiest expert's load over the mean, 1 where all do the same, and in brackets the
coefficient of variation over the experts. A first update that begins with an upcycled model shows what its fresh
routers do.
"""

import argparse

from gspo.report import tables
from gspo.report.plots import load, short_names
from gspo.run import cli


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="workdir")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    runs = parse(argv).runs
    lines = dict(zip(short_names(runs), map(load, runs), strict=True))
    print(tables.markdown(*tables.load_by_layer(lines)), end="")
    return 0


if __name__ == "__main__":
    cli.run_script(main)
