"""What every script needs: flags for a config and a workdir, and user mistakes as one line with exit code 2."""

import difflib
import os
import signal
import sys
from collections.abc import Callable

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from gspo.types import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    """--config=FILE with --config.a.b=value overrides, --workdir and --allow_changed_config."""
    config_flags.DEFINE_config_file("config", None, "Config file; override a field with --config.a.b=value.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Folder for checkpoints and metrics; a run found there is resumed.")
    flags.DEFINE_bool("allow_changed_config", False, "Go on in a workdir that was made with another config.")


def run(main: Callable[[], int | None]) -> None:
    """Parses the flags, calls main(), exits. A UserError or a mistake in the flags: one line on stderr, exit code 2."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.set_verbosity(logging.WARNING)
    try:
        _parse(sys.argv)
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code or 0)


def leaf_fields(config: ConfigDict, prefix: str = "") -> list[str]:
    """Dotted names of all leaves of a config."""
    names = []
    for key, value in config.items():
        names += leaf_fields(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else [prefix + key]
    return names


def _parse(argv: list[str]) -> None:
    """absl's own parsing, with each of its failures as a UserError."""
    config_file = [arg for arg in argv if arg.startswith(("--config=", "-config="))]
    if not config_file:
        raise UserError("--config is missing; pass --config=configs/NAME.py")
    try:
        rest = FLAGS(argv)[1:]
    except (AttributeError, KeyError):
        raise UserError(_unknown_field(argv, config_file[-1])) from None
    except (flags.Error, OSError, TypeError, ValueError, SyntaxError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        detail = lines[-1] if "Configuration is not available" in lines[0] else lines[0]
        raise UserError(detail.removeprefix("flag ")) from None
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; fields are set as --config.a.b=value")
    if "workdir" in FLAGS and not FLAGS.workdir:
        raise UserError("--workdir is missing; pass --workdir=runs/NAME")


def _unknown_field(argv: list[str], config_file: str) -> str:
    """Message for the first override that names no leaf of the config, with the nearest name."""
    fresh = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", None, flag_values=fresh)
    fresh([argv[0], config_file])
    known = leaf_fields(holder.value)
    for arg in argv:
        field = arg.lstrip("-").partition("=")[0].removeprefix("config.")
        if not arg.lstrip("-").startswith("config.") or field in known:
            continue
        same_leaf = [name for name in known if name.split(".")[-1] == field.split(".")[-1]]
        near = same_leaf or difflib.get_close_matches(field, known, n=1, cutoff=0.5)
        return f"config.{field}: no such field" + (f"; did you mean config.{near[0]}?" if near else "")
    return f"{config_file}: an attribute is missing in the config file"


class StopSignal:
    """Context in which SIGTERM and Ctrl-C ask the loop to stop at its next safe place, instead of ending the process.

    A second Ctrl-C ends it at once.
    """

    requested = False

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested, self._number = True, number

    def leave(self, message: str) -> SystemExit:
        """The exception to raise once all is saved: exit code 128 + signal, as shells have it."""
        print(f"stopped by {signal.Signals(self._number).name}: {message}", file=sys.stderr)
        return SystemExit(128 + self._number)
