"""The same RL step with this project, TRL and Tunix, in turns on the same cores.

    python scripts/benchmark_peers/compare.py --repeat=5 --cores=2 --json=runs/peers.json

Sets up the environments of the peers where they are missing (a few GiB, once), under --envs. Each turn starts two
processes of each system: a cold one, with an empty compilation cache, that makes one step; and a second one, that finds
the first one's cache and whose steps are measured. Nothing else should run meanwhile. Tunix wants Python 3.12 or later:
without one it is left out, and said so.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gspo.report import measure, speed
from gspo.run import cli
from gspo.types import UserError

HERE = Path(__file__).parent
PROJECT = HERE.parent.parent
FIELDS = ("step", "rollout", "old_logps", "update", "first_cold", "first_warm")
TUNABLES = "arena_max=1:hugetlb=1:mmap_threshold=4294967296:trim_threshold=17179869184"
PYTHON_OF = {"trl": (3, 11), "tunix": (3, 12)}  # the least that each wants

# ---------------------------------------------------------------------------------------------------- environments


def version_of(python: str) -> tuple[int, ...]:
    """(3, 12, 1) of an interpreter that runs; () of one that does not."""
    try:
        told = subprocess.run(
            [python, "-c", "import sys; print(*sys.version_info[:3])"], capture_output=True, text=True
        )
    except OSError:
        return ()
    return tuple(map(int, told.stdout.split())) if told.returncode == 0 else ()


def python_for(system: str) -> str | None:
    """An interpreter that is new enough: this one, one on the path, one of pyenv's."""
    names = [sys.executable, *(shutil.which(f"python3.{minor}") or "" for minor in (12, 13, 14))]
    names += map(str, sorted(Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser().glob("versions/*/bin/python")))
    return next((name for name in names if name and version_of(name) >= PYTHON_OF[system]), None)


def environment_of(system: str, envs: Path) -> str | None:
    """The interpreter of a peer's own virtual environment, which is made where it is missing; None, with a word, where
    no Python is new enough. Raises UserError where pip fails."""
    requirements = HERE / f"{system}.txt"
    stamp, python = envs / system / ".installed", envs / system / "bin" / "python"
    wanted = hashlib.sha256(requirements.read_bytes()).hexdigest()
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return str(python)
    base = python_for(system)
    if base is None:
        least = ".".join(map(str, PYTHON_OF[system]))
        print(f"{system} is left out: it wants Python {least} or later, and none was found", flush=True)
        return None
    print(f"setting up {python.parent.parent} with {base}", flush=True)
    if not python.exists():
        subprocess.run([base, "-m", "venv", envs / system], check=True)
    done = subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", requirements])
    if done.returncode:
        raise UserError(f"--envs: pip could not install {requirements.name}; see its words above")
    stamp.write_text(wanted)
    return str(python)


# ---------------------------------------------------------------------------------------------------- one process


def command_of(system: str, python: str, model: str, first: bool, cores: int, out: Path) -> list[str]:
    if system == "ours":
        case = ["first", f"--started={time.time()}"] if first else ["step", "--repeats=7"]
        config = f"--config={PROJECT / 'configs' / 'benchmark.py'}:{model}"
        return [python, str(PROJECT / "scripts" / "benchmark.py"), *case, config, f"--json={out}"]
    steps = ["--steps=0", "--warmup=1"] if first else ["--steps=7", "--warmup=2"]
    return [python, str(HERE / f"{system}_step.py"), f"--model={model}", *steps, f"--threads={cores}", f"--json={out}"]


def run(command: list[str], cores: int, variables: dict[str, str]) -> float:
    """Runs a process on the last `cores` of the cores that this one may use. Returns when it was started."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(own)[-cores:])  # a child has that of the thread which starts it
    started = time.time()
    try:
        done = subprocess.run(
            command, env=os.environ | variables, cwd=tempfile.gettempdir(), capture_output=True, text=True
        )
    finally:
        os.sched_setaffinity(0, own)
    if done.returncode:
        raise UserError(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
    return started


def measured(system: str, python: str, model: str, cores: int, malloc: bool) -> dict[str, float]:
    """Seconds of FIELDS, from a cold process and a second one."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        variables = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        if system == "ours":
            variables["PYTHONPATH"] = str(PROJECT)  # this checkout, whatever is installed
        else:  # ours sets its own; without these a cache keeps only what took long to compile
            variables |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
            variables |= {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
        if malloc:
            variables["GLIBC_TUNABLES"] = ":".join(f"glibc.malloc.{one}" for one in TUNABLES.split(":"))
        for first in (True, False):
            out = Path(folder) / f"{first}.json"
            started = run(command_of(system, python, model, first, cores, out), cores, variables)
            told = json.loads(out.read_text())
            if system == "ours":
                told = ours(told)
            if first:
                found["first_cold"] = told["seconds"] if "seconds" in told else told["first_step_at"] - started
            else:
                found["first_warm"] = told["first_step_at"] - started
                found |= {name: told[name] for name in FIELDS if name in told}
                found["versions"] = told.get("versions", {})
    return found


def ours(result: dict[str, Any]) -> dict[str, Any]:
    """A result of scripts/benchmark.py as the peers' scripts write theirs."""
    record = result["records"][0]
    if result["what"] == "first":
        return record
    phases = {phase: record["phases"][phase]["seconds"]["median"] for phase in ("rollout", "old_logps", "update")}
    return phases | {"step": record["seconds"]["median"], "first_step_at": record["first_step_at"]}


# ---------------------------------------------------------------------------------------------------- all of them


def summary(turns: dict[tuple[str, str], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Records of `speed.peers_table`: the spread over the turns of each (model, system). Ours says how many times as
    fast as the fastest peer it is, by the medians, in each field."""
    records = []
    for (model, system), runs in turns.items():
        record = {"model": model, "system": system, "versions": runs[0]["versions"]}
        records.append(record | {name: measure.spread([run[name] for run in runs]) for name in FIELDS})
    for record in records:
        peers = [r for r in records if r["model"] == record["model"] and r["system"] != "ours"]
        if record["system"] == "ours" and peers:
            record["times_as_fast"] = {
                name: min(peer[name]["median"] for peer in peers) / record[name]["median"] for name in FIELDS
            }
    return records


def main(arguments: list[str]) -> int:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5, help="turns")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--models", default="moe,dense")
    parser.add_argument("--systems", default="ours,trl,tunix")
    parser.add_argument("--envs", type=Path, default=Path("~/.cache/gspo/peers"), help="folder of their environments")
    parser.add_argument("--malloc", action="store_true", help="glibc settings that keep freed memory, for all systems")
    parser.add_argument("--setup-only", action="store_true", help="make the environments and stop")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    options = parser.parse_args(arguments)
    cores = len(os.sched_getaffinity(0))
    if not 1 <= options.cores <= cores:
        raise UserError(f"--cores={options.cores}: this process may use 1..{cores}")
    envs, pythons = options.envs.expanduser().absolute(), {"ours": sys.executable}
    envs.mkdir(parents=True, exist_ok=True)
    pythons |= {system: environment_of(system, envs) for system in options.systems.split(",") if system != "ours"}
    if options.setup_only:
        return 0
    turns: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for turn in range(options.repeat):
        for model in options.models.split(","):
            for system in options.systems.split(","):
                if not pythons[system]:
                    continue
                found = measured(system, pythons[system], model, options.cores, options.malloc)
                turns.setdefault((model, system), []).append(found)
                shown = ", ".join(f"{name} {found[name]:.3f}" for name in FIELDS)
                print(f"turn {turn}, {model}, {system}: {shown}", flush=True)
    write(options, summary(turns), arguments)
    return 0


def write(options: Any, records: list[dict[str, Any]], arguments: list[str]) -> None:
    told = [a for a in arguments if not a.startswith(("--json", "--envs"))]
    command = shlex.join(["python", "scripts/benchmark_peers/compare.py", *told])
    environment = measure.environment() | {"cores": options.cores}
    for record in records:
        environment["versions"] |= {f"{record['system']}'s {name}": v for name, v in record["versions"].items()}
    if options.malloc:
        environment["variables"]["GLIBC_TUNABLES"] = TUNABLES
    result = {"what": "peers", "command": command, "records": records, "environment": environment}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(speed.table(result))


if __name__ == "__main__":
    cli.run_script(main)
