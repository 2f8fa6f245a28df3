"""One HTML file that shows runs token by token: curves, completions, ratios, clips, experts, other objectives.

    python scripts/view.py runs/gspo runs/grpo --out=view.html
    python scripts/view.py runs/gspo --serve

A run is a workdir. Its tokens are those that it has recorded: --config.log.tokens_every=N writes one rollout of N
(gspo/run/tokens.py says what). The file needs no network and opens from disk. --serve shows a run that still writes,
on this machine alone, until Ctrl-C.
"""

import argparse
from pathlib import Path

from gspo.report.view.pack import packed
from gspo.report.view.page import page
from gspo.report.view.serve import make_server
from gspo.run import cli, disk
from gspo.types import UserError


def main(arguments: list[str]) -> int:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="workdir")
    parser.add_argument("--out", type=Path, default="view.html", help="file to write (default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=100_000, help="most tokens that it holds of all runs (default: %(default)s)"
    )
    parser.add_argument("--serve", action="store_true", help="show runs that go on, at an address of this machine")
    parser.add_argument("--port", type=int, default=0, help="of --serve; 0: any that is free (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.tokens < 1:
        raise UserError(f"--tokens={options.tokens}: must be positive")
    if options.serve:
        return serve(options)
    text = page(packed(options.runs, options.tokens))
    try:
        disk.write_whole(options.out, text.encode())
    except OSError as error:
        raise UserError(f"--out={options.out} cannot be written: {error.strerror}") from None
    print(f"{options.out}: {disk.readable(len(text))}")
    return 0


def serve(options: argparse.Namespace) -> int:
    packed(options.runs, options.tokens)  # a mistake is said here, and not in the browser
    with make_server(options.runs, options.tokens, options.port) as server:
        print(f"http://{server.server_address[0]}:{server.server_address[1]}/ until Ctrl-C", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


if __name__ == "__main__":
    cli.run_script(main)
