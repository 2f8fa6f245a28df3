"""What every script needs: flags for a config and a workdir, and user mistakes as one line with exit code 2."""

import argparse
import ast
import contextlib
import difflib
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from absl import flags, logging

from gspo import build
from gspo.parallel import distributed
from gspo.run import disk, machine
from gspo.types import UserError

FLAGS = flags.FLAGS


def define_flags(workdir: bool = True) -> None:
    """--config=FILE with --config.a.b=value overrides; --workdir, --allow_changed_config and those of a run of many
    processes."""
    build.define_config_flag("Config file; override a field with --config.a.b=value.")
    if not workdir:
        return
    flags.DEFINE_string("workdir", None, "Folder for checkpoints and metrics; a run found there is resumed.")
    flags.DEFINE_bool("allow_changed_config", False, "Go on in a workdir that was made with another config.")
    flags.DEFINE_bool("distributed", False, "One of many processes, described by SLURM, Open MPI, GKE or Cloud TPU.")
    flags.DEFINE_string("coordinator", "", "One of many processes, described by flags: HOST:PORT of process 0.")
    flags.DEFINE_integer("num_processes", 0, "How many processes there are (with --coordinator).")
    flags.DEFINE_integer("process_id", -1, "Which of them this is, from 0 (with --coordinator).")


def run(main: Callable[[], int | None], *, needs: str) -> None:
    """Parses the flags, joins the other processes, calls main(), exits. A UserError or a mistake in the flags: one line
    on stderr, exit code 2. The loss of another process: one line, exit code 1.

    needs: a field by which a config for this script is known.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.set_verbosity(logging.WARNING)
    if {"--help", "-h"} & set(sys.argv):
        own = FLAGS.module_help(sys.argv[0]) if sys.argv[0] in FLAGS.flags_by_module_dict() else ""
        print(f"{sys.modules['__main__'].__doc__}\n{FLAGS.module_help(__name__)}{own}")
        sys.exit(0)
    try:
        _parse(sys.argv)
        if needs not in FLAGS.config:
            raise UserError(f"--config: it has no field {needs!r}, so it was made for another script")
        if "workdir" in FLAGS:
            distributed.initialize(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id, FLAGS.distributed)
        machine.keep_heap()
        machine.share_cores(build.rows_to_divide(FLAGS.config))
        note = machine.keep_programs()
        if note:
            print(note, file=sys.stderr)
        with _only_first_errors():
            code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        distributed.leave_if_many(2)
        code = 2
    except Exception as error:
        if disk.is_full(error):
            print(
                f"error: the disk is full: {_first_line(error)}; make room, and start again",
                file=sys.stderr,
                flush=True,
            )
            distributed.leave_if_many(2)
            sys.exit(2)
        if not jax.distributed.is_initialized():
            raise
        if distributed.lost_a_process(error):
            print(f"error: {distributed.LOST}", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
        distributed.leave_if_many(1)
    sys.exit(code or 0)


@contextlib.contextmanager
def _only_first_errors() -> Iterator[None]:
    """Where one write of a checkpoint has failed, those that come to an end after it find their event loop closed, and
    Python prints a traceback of each. The first one's error is raised, and is the one that says what is wrong."""
    before = sys.unraisablehook

    def hook(told: Any) -> None:
        if not (isinstance(told.exc_value, RuntimeError) and str(told.exc_value) == "Event loop is closed"):
            before(told)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


class Parser(argparse.ArgumentParser):
    """argparse for scripts without a config, whose mistakes are UserErrors too."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def run_script(main: Callable[[list[str]], int]) -> None:
    """Calls main(arguments) of a script that parses them by `Parser`, and exits. A UserError: one line on stderr, exit
    code 2."""
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _parse(argv: list[str]) -> None:
    """absl's own parsing, with each of its failures as a UserError."""
    config = _config_as_written(argv)
    argv[:] = _with_own_options(_joined(argv), config)  # in place: ml_collections looks at sys.argv
    try:
        rest = FLAGS(argv)[1:]
    except (AttributeError, KeyError):
        raise UserError(_unknown_field(argv, build.leaf_fields(config))) from None
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(_first_line(error).removeprefix("flag ")) from None
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; fields are set as --config.a.b=value")
    if "workdir" in FLAGS and not FLAGS.workdir:
        raise UserError("--workdir is missing; pass --workdir=runs/NAME")


def _config_as_written(argv: list[str]) -> Any:
    """The config without overrides. Its file is a program, which may fail in any way: UserError with the line."""
    values = [arg.partition("=")[2] if "=" in arg else after for arg, after in zip(argv, [*argv[1:], ""], strict=True)
              if arg.lstrip("-").partition("=")[0] == "config"]  # fmt: skip
    path, _, argument = values[-1].partition(":") if values else ("", "", "")
    if not path:
        raise UserError("--config is missing; pass --config=configs/NAME.py")
    if not os.path.isfile(path):
        raise UserError(f"--config={path}: there is no such file")
    try:
        config = runpy.run_path(path)["get_config"](*[argument] * bool(argument))
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f", line {lines[-1]}" if lines else ""
        raise UserError(f"--config={path}{where}: {type(error).__name__}: {_first_line(error)}") from None
    if not build.is_config(config):
        raise UserError(f"--config={path}: get_config() returned {type(config).__name__} instead of a ConfigDict")
    return config


def _joined(argv: list[str]) -> list[str]:
    """The arguments with --config.a.b VALUE as --config.a.b=VALUE."""
    joined: list[str] = []
    for arg in argv:
        last = joined[-1] if joined else ""
        if last.lstrip("-").startswith("config.") and "=" not in last and not arg.startswith("--"):
            joined[-1] = f"{last}={arg}"
        else:
            joined.append(arg)
    return joined


def _with_own_options(argv: list[str], config: Any) -> list[str]:
    """The arguments, where they name a task of another kind than the config file's: its options are not those of that
    task, which has the ones that are given, and else its defaults."""
    name, option = "config.task.name", "config.task.options."
    given = [arg.lstrip("-").partition("=") for arg in argv]
    named = [value for flag, _, value in given if flag == name]
    written = config.get("task", {}).get("name", "")
    if (
        not named
        or named[-1].partition(":")[0] == written.partition(":")[0]
        or any(flag == option.rstrip(".") for flag, *_ in given)
    ):
        return argv
    options = {flag.removeprefix(option): _literal(value) for flag, _, value in given if flag.startswith(option)}
    rest = [arg for arg, (flag, *_) in zip(argv, given, strict=True) if not flag.startswith(option)]
    return [*rest, f"--{option.rstrip('.')}={options!r}"]


def _literal(text: str) -> Any:
    """A value as it is written in Python, or as absl reads a bool, else the text itself."""
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        return text


def _first_line(error: Exception) -> str:
    """At most 200 characters of it. A KeyError shows its text by repr, with its line ends as \\n."""
    return next((line.strip() for line in str(error).replace("\\n", "\n").splitlines() if line.strip()), "")[:200]


def _unknown_field(argv: list[str], known: list[str]) -> str:
    """Message for the first override that names no leaf of the config, with the nearest name."""
    for arg in argv:
        field = arg.lstrip("-").partition("=")[0].removeprefix("config.")
        if not arg.lstrip("-").startswith("config.") or field in known:
            continue
        same_leaf = [name for name in known if name.split(".")[-1] == field.split(".")[-1]]
        near = same_leaf or difflib.get_close_matches(field, known, n=1, cutoff=0.5)
        return f"config.{field}: no such field" + (f"; did you mean config.{near[0]}?" if near else "")
    return "a field of --config.a.b=value could not be read"


class StopSignal:
    """Context in which SIGTERM and Ctrl-C ask the loop to stop at its next safe place, instead of ending the process.

    A second Ctrl-C ends it at once.
    """

    requested = False
    _number = signal.SIGTERM  # of a process that stops because another one was told to

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
