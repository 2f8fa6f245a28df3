"""Many runs side by side: order, cores, what is not made again, and how the whole stops."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from gspo import build, rl
from gspo.report import campaign
from gspo.report.campaign import DIVERGED, LOG, Run
from gspo.types import UserError
from tests import launchers, processes
from tests.tiny_runs import kept_compiles, rl_config, sft_config  # noqa: F401 - a fixture

ROOT = Path(__file__).parent.parent.parent


def runs_in(folder, seeds=(0, 1), arms=("first", "second")):
    """A cold start for each seed, and each arm from it."""
    found = []
    model = {"num_layers": 3, "moe_backend": None}
    begun = ConfigDict({"num_updates": 3, "model": model, "tokenizer": "bytes"})
    config = ConfigDict({"num_rollouts": 4, "model": dict.fromkeys(model), "tokenizer": "", "init_from": "cold"})
    for seed in seeds:
        cold = Run("cold start", seed, folder / "cold" / str(seed), begun, None)
        found.append(cold)
        for arm in arms:
            found.append(Run(arm, seed, folder / arm / str(seed), config, cold.folder))
    return found


def pretend(run, place, options):
    """In place of a run's process: what it would leave."""
    if run.cold and not (run.cold / "metrics.jsonl").exists():
        sys.exit(9)  # nothing to begin with
    if options.get("fail") == run.name:
        (run.folder / LOG).write_text("error: beta=-1: give a number of 0 or more\n")
        sys.exit(2)
    if options.get("wait") and run.cold:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        (run.folder / "waits").touch()
        time.sleep(60)
    for _ in range(1200 if not run.cold else 0):  # a cold start waits for so many rehearsals
        if len([*run.folder.parent.parent.glob("*.json")]) >= options.get("rehearsals", 0):
            break
        time.sleep(0.05)
    (run.folder / "metrics.jsonl").write_text(json.dumps({"step": run.length}) + "\n")
    (run.folder / "place").write_text(str(place))


def rehearse(run, place, options):
    """In place of a rehearsal: one that leaves a trace, not in the run's folder, and fails."""
    (run.folder.parent.parent / f"{run.name}.json").touch()
    sys.exit(9)


def work(runs, workers=2, ended=lambda run: None, **options):
    campaign._Crew([run for run in runs if not run.ended], workers, ended, options, pretend, rehearse).work()


def test_cold_starts_come_before_their_arms_and_nothing_is_made_twice(tmp_path, capsys):
    # Catches an arm that begins with weights that are not there yet, and a second call that trains everything again.
    runs, seen = runs_in(tmp_path, arms=("first",)), []  # each is a process that imports jax
    work(runs, ended=seen.append)
    assert sorted(run.name for run in seen) == sorted(run.name for run in runs)
    assert all(run.ended for run in runs)
    places = {int((run.folder / "place").read_text()) for run in runs}
    assert places <= os.sched_getaffinity(0)
    assert capsys.readouterr().out.count(": done  ETA ") == len(runs)
    work(runs, ended=lambda run: pytest.fail(f"{run.name} again"))


@contextlib.contextmanager
def programs_in(folder):
    """Compiled programs are kept in this folder; None: nowhere."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


def started(runs, workers, monkeypatch):
    """(name, whether it is a rehearsal, config) of what is started before anything has ended."""

    def start(crew, run, child, rehearses=False):
        crew.going[len(crew.going)] = campaign._Job(None, run, crew.places.pop(0), rehearses)

    monkeypatch.setattr(campaign._Crew, "_start", start)
    crew = campaign._Crew(runs, workers, lambda run: None, {})
    while crew.places and crew._start_next():
        pass
    return [(job.run.name, job.rehearses, job.run.config.to_dict()) for job in crew.going.values()]


def test_a_core_that_could_only_wait_compiles_for_each_arm_once(tmp_path, monkeypatch):
    # Catches a second core that idles while the cold start runs; and a rehearsal that needs the weights that are not
    # there yet, or has another model than the run will have.
    runs = runs_in(tmp_path)
    colds = [(run.name, False, run.config.to_dict()) for run in runs if not run.cold]
    wanted = {"num_rollouts": 4, "model": {"num_layers": 3, "moe_backend": None}, "tokenizer": "bytes", "init_from": ""}
    rehearsals = [("first, seed 0", True, wanted), ("second, seed 0", True, wanted)]
    assert started(runs, 9, monkeypatch) == colds + rehearsals
    assert not (tmp_path / "first").exists()


def test_nothing_is_rehearsed_where_programs_are_not_kept_or_no_core_is_free(tmp_path, monkeypatch):
    # Catches a minute of compiling that nobody finds, and one in the cold start's way.
    runs = runs_in(tmp_path, seeds=(0,))
    assert [name for name, *_ in started(runs, 1, monkeypatch)] == ["cold start, seed 0"]
    with programs_in(None):
        assert [name for name, *_ in started(runs_in(tmp_path, seeds=(0,)), 9, monkeypatch)] == ["cold start, seed 0"]


def test_a_rehearsal_ends_before_its_run_and_fails_nobody(tmp_path):
    # Catches a rehearsal taken for the run, and one whose failure stops the whole.
    runs, seen = runs_in(tmp_path, seeds=(0,), arms=("first",)), []
    work(runs, ended=seen.append, rehearsals=1)
    assert [run.name for run in seen] == [run.name for run in runs]
    assert (tmp_path / "first, seed 0.json").exists()


def test_a_run_finds_the_programs_that_were_rehearsed(tmp_path):
    # Catches a rehearsal of other programs than the run's, whose arrays come from a checkpoint.
    begun = sft_config(tmp_path, num_updates=1, **{"eval.every": 0, "model.num_layers": 1})
    start = Run("cold start", 0, tmp_path / "cold", begun, None)
    config = rl_config(tmp_path, num_rollouts=1, init_from=str(start.folder), **{"log.tokens_every": 1})
    run = Run("arm", 0, tmp_path / "arm", config, start.folder)
    campaign.train_one(start)
    events = []
    listener = lambda event, **_: events.append(event.rpartition("/")[2])  # noqa: E731
    jax.monitoring.register_event_listener(listener)
    try:
        with programs_in(str(tmp_path / "compiled")):  # other tests compile the same
            rl.rehearse(build.rl_plan(campaign.from_nothing(run, start).config))
            compiled = events.count("cache_misses")
            events.clear()
            campaign.train_one(run)
    finally:
        jax.monitoring.unregister_event_listener(listener)
    assert events.count("cache_hits") >= compiled - 1 >= 5  # to sample, compare, cut, update ..., not to make weights


@pytest.mark.slow
def test_one_run_that_fails_stops_the_whole_with_its_last_line(tmp_path):
    # Catches a mistake that every arm repeats for a night, and a failure that nobody hears of.
    runs = runs_in(tmp_path)
    with pytest.raises(UserError, match=r"first, seed 0 failed: beta=-1: give a number of 0 or more \(.*log.txt\)"):
        work(runs, workers=1, fail="first, seed 0")
    assert not runs[-1].ended


def test_a_stop_stops_all_of_them_and_says_how_to_go_on(tmp_path, capsys):
    # Catches runs that live on when the whole was stopped.
    runs = runs_in(tmp_path, seeds=(0,))

    def stop():
        while not all((run.folder / "waits").exists() for run in runs[1:]):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(SystemExit) as left:
        work(runs, wait=True)
    assert left.value.code == 128 + signal.SIGTERM
    assert "1 of 3 runs ended; start the same command again to go on" in capsys.readouterr().err
    assert [run.ended for run in runs] == [True, False, False]


def outlive(run, place, options):
    """A process that would work on for ever."""
    campaign._settle(run.folder / LOG, place)
    (run.folder / "pid").write_text(str(os.getpid()))
    time.sleep(600)


def crew_of_one(folder):
    campaign._Crew(runs_in(folder, seeds=(0,), arms=())[:1], 1, print, {}, child=outlive).work()


def test_processes_end_with_the_one_that_was_killed(tmp_path):
    code = f"import pathlib, tests.report.test_campaign as t; t.crew_of_one(pathlib.Path({str(tmp_path)!r}))"
    pid = tmp_path / "cold" / "0" / "pid"
    with processes.started([sys.executable, "-c", code], cwd=ROOT) as parent:
        launchers.wait_for(lambda: pid.exists() and pid.read_text(), seconds=60)
        assert launchers.runs(pid.read_text())
        parent.kill()
        parent.wait()
        launchers.wait_for(lambda: not launchers.runs(pid.read_text()), seconds=60)


def test_a_run_whose_loss_is_no_number_has_ended_and_says_why(tmp_path):
    # Catches a diverged run that stops all others, and one that is started again for ever.
    config = rl_config(tmp_path, **{"optimizer.learning_rate": 1e30, "optimizer.max_grad_norm": None})
    run = Run("wild", 0, tmp_path / "wild", config, tmp_path / "none")
    campaign.train_one(run)
    assert "loss or gradient is not finite" in (run.folder / DIVERGED).read_text()
    assert run.ended
    assert run.done < run.length


CONFIG = """
from ml_collections import ConfigDict
from configs.paper import Paper
from tests.tiny_runs import rl_config, sft_config

SMALL = {{"num_rollouts": 2, "num_prompts": 2, "num_generations": 2, "eval.num_prompts": 2, "eval.every": 0}}


def get_config():
    sft = sft_config({folder!r}, num_updates=1, **{{"eval.every": 0, "eval.num_prompts": 2}})
    paper = Paper(sft, rl_config({folder!r}, **SMALL))
    cold = paper.cold("tiny")
    changes = {{name: {{"objective": {{"preset": name.lower()}}}} for name in ("GRPO", "GSPO")}}
    arms = [paper.arm(f"B MoE {{name}}", cold, change) for name, change in changes.items()]
    paper.figure("curves_b", (10, 11), arms)
    paper.config.workers = 2
    return paper.config
"""


@pytest.mark.slow
def test_the_paper_runs_from_end_to_end_and_a_run_made_again_leaves_the_same_bytes(tmp_path):
    # Catches a driver that fails after hours, in its figures; and curves that depend on what runs beside them.
    (tmp_path / "config.py").write_text(CONFIG.format(folder=str(tmp_path)))

    def paper(workdir, *more):
        command = [sys.executable, "experiments/paper.py", f"--config={tmp_path / 'config.py'}", f"--workdir={workdir}"]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([*command, *more], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    told = paper(tmp_path / "a")
    assert "6/6" in told
    results = tmp_path / "a" / "results"
    assert {path.name for path in (results / "curves").iterdir()} == {"b_moe_grpo.csv", "b_moe_gspo.csv"}
    assert (results / "fig1_b.png").stat().st_size > 10_000
    assert "done" not in paper(tmp_path / "a")
    paper(tmp_path / "b", "--arms=B MoE GSPO", "--seeds=11", "--config.workers=1")
    whole, alone = ((tmp_path / w / "results/curves/b_moe_gspo.csv").read_text() for w in "ab")
    of_seed_11 = [line for line in whole.splitlines() if not line.startswith("10,")]
    assert alone.splitlines() == of_seed_11
