"""Benchmarks of the program's own jitted functions, on random ids and random weights: median, least and most seconds,
tokens/s, and FLOP/s against a matrix product that is measured in the same turns.

    python scripts/benchmark.py step                   # a whole step: rollout, rewards, old log-probs, updates
    python scripts/benchmark.py rollout                # the sampler alone; bytes/s against a copy
    python scripts/benchmark.py logprob                # the learner's log-probs of given completions
    python scripts/benchmark.py update                 # the updates of a rollout; memory of their program
    python scripts/benchmark.py moe                    # one MoE layer by each backend, forward and backward
    python scripts/benchmark.py compile                # a cold process to the end of its first step, and a second one
    python scripts/benchmark.py objectives             # each loss alone, as a share of an update
    python scripts/benchmark.py replay                 # a step with routing replay and without
    python scripts/benchmark.py table FOLDER           # the tables of --json files; --readme=FILE fills them in there

--config=FILE: any config of experiments/rl.py; its prompts are replaced by random ids of max_prompt_length. Without it
configs/benchmark.py, whose variants are configs/benchmark.py:dense and others.
--vary=FIELD=a,b: one arm for each value of a field of the config, measured in turns.
"""

import ast
import functools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import flags

from gspo import build
from gspo.report import cases, measure, speed
from gspo.report.arms import laid_over
from gspo.report.workload import Work
from gspo.run import cli
from gspo.types import UserError

ROOT = Path(__file__).parent.parent
IMPORTED = time.time()  # all that a run needs: what comes later is no import
ALL = (*cases.CASES, "compile", "table", "first")


def configs(config: Any, vary: str) -> dict[str, Any]:
    """Name of the arm -> its config."""
    if not vary:
        return {"": config}
    field, _, values = vary.partition("=")
    if field not in build.leaf_fields(config) or not values:
        raise UserError(f"--vary={vary}: write FIELD=value,value with a field of the config, model.moe_backend=a,b say")
    return {f"{field}={value}": changed(config, field, value) for value in values.split(",")}


def changed(config: Any, field: str, text: str) -> Any:
    """The config with another value of one field, read as the values of its kind are."""
    *parents, leaf = field.split(".")
    section = config
    for name in parents:
        section = section[name]
    value, kind = text, type(section[leaf])
    if not isinstance(section[leaf], str):
        try:
            value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
        except (SyntaxError, ValueError):
            if section[leaf] is not None:
                raise UserError(f"--vary: {field}={text!r} is no {kind.__name__}") from None
    for name in reversed([*parents, leaf]):
        value = {name: value}
    return laid_over(config, value)


def measure_case(what: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    given = cli.FLAGS
    vary = given.vary or ("router_replay.mode=disabled,R2,R3" if what == "replay" else "")
    works = {name: Work(build.rl_plan(config)) for name, config in configs(given.config, vary).items()}
    return cases.CASES[what](works, given.repeats, given.small)


# ---------------------------------------------------------------------------------------------------- first steps


def first() -> dict[str, Any]:
    """The first step of this process: what `compile` starts twice."""
    with measure.compilations() as found:
        Work(build.rl_plan(cli.FLAGS.config)).step()
        ended = time.time()
    began = cli.FLAGS.started or IMPORTED
    return {"seconds": ended - began, "import_seconds": IMPORTED - began, **found}


def first_steps(arguments: list[str]) -> list[dict[str, Any]]:
    """Cold processes, each with an empty compilation cache, and after each of them a second process."""
    found: dict[str, list[dict[str, Any]]] = {"cold": [], "second": []}
    for _ in range(cli.FLAGS.repeats):
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache", "PYTHONPATH": str(ROOT)}
            for process in found.values():
                out = f"{folder}/first.json"
                command = [sys.executable, __file__, "first", *arguments, f"--json={out}", f"--started={time.time()}"]
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                if done.returncode:
                    raise UserError(f"compile: the process failed: {done.stderr.strip().splitlines()[-1:]}")
                process.append(json.loads(Path(out).read_text())["records"][0])
    records = []
    for name, runs in found.items():
        spreads = {f: measure.spread([run[f] for run in runs]) for f in ("seconds", "import_seconds")}
        counts = {f: measure.spread([run[f] for run in runs])["median"] for f in runs[0] if f not in spreads}
        records.append({"name": name, **spreads, **counts})
    return records


# ---------------------------------------------------------------------------------------------------- command line


def main(what: str, arguments: list[str]) -> None:
    given = cli.FLAGS
    told = [argument for argument in arguments if not argument.lstrip("-").startswith("json=")]
    result = {"what": what, "command": shlex.join(["python", "scripts/benchmark.py", what, *told])}
    if what == "first":
        result["records"] = [first()]
    elif what == "compile":
        result["records"] = first_steps([a for a in told if not a.lstrip("-").startswith("repeats=")])
    else:
        result["records"], result["machine"] = measure_case(what)
    result["environment"] = measure.environment()
    if given.json:
        Path(given.json).parent.mkdir(parents=True, exist_ok=True)
        Path(given.json).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["records"][0]) if what == "first" else speed.table(result))


def tables(arguments: list[str]) -> int:
    parser = cli.Parser(prog="benchmark.py table")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--readme", type=Path, help="fill the tables in there instead of printing them")
    options = parser.parse_args(arguments)
    results = speed.results_in(options.folder)
    if not results:
        raise UserError(f"{options.folder}: no .json file of a benchmark there")
    if options.readme:
        options.readme.write_text(speed.fill(options.readme.read_text(), results))
    else:
        print("\n".join(f"**{name}** {speed.table(result)}" for name, result in results.items()))
    return 0


def case_of(argv: list[str]) -> str:
    """Takes the name of the case out of the arguments, and puts the config in where there is none."""
    what = argv.pop(1) if len(argv) > 1 and not argv[1].startswith("-") else ""
    if not any(argument.lstrip("-").partition("=")[0] == "config" for argument in argv):
        argv.append(f"--config={ROOT / 'configs' / 'benchmark.py'}")
    return what


def no_case() -> None:
    raise UserError(f"say what to measure: python scripts/benchmark.py {'|'.join(ALL[:-1])}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["table"] and "--help" not in sys.argv:
        cli.run_script(lambda arguments: tables(arguments[1:]))
    cli.define_flags(workdir=False)
    flags.DEFINE_string("json", "", "File to write the measurement to.")
    flags.DEFINE_integer("repeats", 7, "Turns that count.", lower_bound=1)
    flags.DEFINE_string("vary", "", "FIELD=value,value: an arm for each value, measured in turns.")
    flags.DEFINE_bool("small", False, "A small matrix product and copy: for tests.")
    flags.DEFINE_float("started", 0.0, "first: when the process was started, Unix time.")
    flags.DEFINE_string("readme", "", "table: the file to fill the tables in.")
    given_arguments = sys.argv[2:]
    what = case_of(sys.argv)
    cli.run(functools.partial(main, what, given_arguments) if what in ALL else no_case, needs="num_rollouts")
