"""Metric files that a resumed run continues byte by byte; optional loggers; the display."""

import io
import json
import logging
import sys
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from gspo.run.progress import Progress, Timer, duration
from gspo.run.writers import MetricsWriter, read_jsonl
from gspo.types import UserError


def lines_of(path):
    return path.read_text().splitlines()


def test_a_line_holds_the_step_and_the_values_exactly(tmp_path):
    # Catches: rounding, float32 through str(), numpy scalars that JSON refuses, per-layer values lost.
    with MetricsWriter(tmp_path) as writer:
        writer.write(
            3, {"a": jnp.float32(0.1), "b": jnp.bfloat16(1.5), "c": np.int64(7), "d": jnp.arange(2), "e": True}
        )
        writer.write_timings(3, {"rollout": 1.25})
        writer.write_samples(
            3, [{"prompt": "1+1=", "completion": "2\n\u2028\udce4\x00", "reward": 1.0}, {"completion": "b"}]
        )
    (line,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert line == {"step": 3, "a": float(np.float32(0.1)), "b": 1.5, "c": 7, "d": [0, 1], "e": True}
    assert read_jsonl(tmp_path / "timings.jsonl") == [{"step": 3, "rollout": 1.25}]
    assert [sample["completion"] for sample in read_jsonl(tmp_path / "samples.jsonl")] == ["2\n\u2028\udce4\x00", "b"]


def test_not_a_number_and_infinity_stay_valid_json(tmp_path):
    # Catches: the bare word NaN, which Python writes and no other reader takes.
    def refuse(word):
        raise AssertionError(word)

    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"loss": float("nan"), "norm": jnp.inf, "many": jnp.array([1.0, -jnp.inf])})
    (line,) = lines_of(tmp_path / "metrics.jsonl")
    assert json.loads(line, parse_constant=refuse) == {"step": 0, "loss": None, "norm": None, "many": [1.0, None]}


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    # Catches: lines lost in a buffer when the process is killed.
    writer = MetricsWriter(tmp_path)
    writer.write(0, {"a": 1})
    assert lines_of(tmp_path / "metrics.jsonl") == ['{"step": 0, "a": 1}']
    writer.close()


def write_run(writer, steps):
    for step in steps:
        writer.write(step, {"reward/mean": step / 7})
        writer.write_samples(step, [{"completion": "x" * step}] * 2)
        writer.write_timings(step, {"rollout": time.perf_counter()})


def test_a_killed_and_resumed_run_has_the_same_bytes_as_one_never_killed(tmp_path):
    # Catches: lines after the checkpoint kept twice; a half-written last line glued to the next one.
    with MetricsWriter(tmp_path / "whole") as writer:
        write_run(writer, range(6))
    writer = MetricsWriter(tmp_path / "killed")
    write_run(writer, range(3))
    offset = json.loads(json.dumps(writer.offset()))  # as it comes back from the meta of a checkpoint
    write_run(writer, range(3, 5))
    with open(tmp_path / "killed" / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 5, "rew')
    with MetricsWriter(tmp_path / "killed") as resumed:
        resumed.truncate(offset)
        write_run(resumed, range(3, 6))
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [line["step"] for line in read_jsonl(tmp_path / "killed" / "timings.jsonl")] == list(range(6))


def test_a_run_killed_before_its_first_checkpoint_starts_its_files_again(tmp_path):
    # Catches: rollout 0 twice in the file.
    for _ in range(2):
        with MetricsWriter(tmp_path) as writer:
            writer.truncate(None)
            write_run(writer, range(2))
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1]


def test_a_file_shorter_than_the_checkpoint_knew_is_reported_and_continued(tmp_path, caplog):
    # Catches: a file padded with zero bytes up to the offset, or a crash on resume.
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"st')
    with MetricsWriter(tmp_path) as writer:
        writer.truncate({"metrics.jsonl": 1000})
        writer.write(4, {})
    assert lines_of(tmp_path / "metrics.jsonl") == ['{"step": 0}', '{"step": 4}']
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_reading_leaves_out_a_last_line_that_was_cut_short_and_nothing_else(tmp_path):
    # Catches: a plot that fails while the run writes; a broken middle line skipped in silence.
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step"')
    assert read_jsonl(path) == [{"step": 0}, {"step": 1}]
    path.write_text('{"step": 0}\n{"step": 1')  # would parse with a brace: still not complete
    assert read_jsonl(path) == [{"step": 0}]
    path.write_text('{"step": 0}\nbroken\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        read_jsonl(path)


@pytest.mark.parametrize(("option", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_logger_that_is_not_installed_names_the_command_that_installs_it(tmp_path, monkeypatch, option, package):
    # Catches: a run that goes on without the log that was asked for.
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        MetricsWriter(tmp_path, **{option: True})
    MetricsWriter(tmp_path).close()


def test_loggers_get_the_scalars_and_a_resumed_run_goes_on_in_the_same_place(tmp_path, monkeypatch):
    # Catches: strings and lists sent as scalars, events after the checkpoint left in TensorBoard, a second W&B run on
    # resume.
    events, opened, logged, started = [], [], [], []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            opened.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            events.append((name, value, step))

        def close(self):
            pass

    run = types.SimpleNamespace(log=lambda values, step: logged.append((values, step)), finish=lambda: None)
    wandb = types.SimpleNamespace(init=lambda **options: started.append(options) or run)
    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for step in (0, 5):
        with MetricsWriter(tmp_path, tensorboard=True, wandb=True, project="p", name="n", config={"seed": 0}) as writer:
            writer.write(step, {"a": jnp.float32(0.5), "word": "x", "layers": [1, 2], "bad": float("nan")})
            writer.write_timings(step, {"rollout": 2.0})
    assert opened == [(str(tmp_path / "tensorboard"), 0), (str(tmp_path / "tensorboard"), 5)]
    assert events == [("a", 0.5, 0), ("time/rollout", 2.0, 0), ("a", 0.5, 5), ("time/rollout", 2.0, 5)]
    assert logged[:2] == [({"a": 0.5}, 0), ({"time/rollout": 2.0}, 0)]
    assert started[0]["id"] == started[1]["id"] and started[0]["config"] == {"seed": 0}
    assert (started[0]["project"], started[0]["name"]) == ("p", "n")
    with MetricsWriter(tmp_path, wandb=True) as writer:
        writer.write(6, {"a": 1.0})
    assert (started[-1]["project"], started[-1]["name"]) == ("gspo", tmp_path.name)


def test_the_timer_adds_up_phases_and_starts_again_when_taken():
    # Catches: a phase entered twice counted once; a phase that raised not counted.
    timer = Timer()
    for _ in range(2):
        with pytest.raises(KeyError), timer("rollout"):
            time.sleep(0.01)
            raise KeyError
    with timer("update"):
        pass
    taken = timer.take()
    assert list(taken) == ["rollout", "update"] and 0.02 <= taken["rollout"] < 1 > taken["update"]
    assert timer.take() == {}


def test_durations_read_as_clock_times():
    # Catches: 60 seconds in the last place, days lost.
    assert [duration(s) for s in (0, 59.7, 75.2, 3700, 100_000)] == ["0:00", "1:00", "1:15", "1:01:40", "27:46:40"]


def test_without_a_terminal_the_display_is_one_plain_line_per_rollout():
    # Catches: escape codes and redrawn bars in a CI log; a stale evaluation repeated on every line.
    out = io.StringIO()
    with Progress(4, start=2, title="gspo", console=Console(file=out)) as progress:
        progress.update(
            2, {"reward/mean": 0.5, "clip_ratio/tokens": 0.1234, "eval/pass@1": 0.75, "tokens_per_second": 12345.6}
        )
        progress.update(3, {"reward/mean": jnp.float32(0.625), "unknown": 1.0}, sample="[red]hello[/red]")
    first, second = out.getvalue().splitlines()
    assert first.startswith("gspo 3/4  reward 0.500  pass@1 0.750  clipped 12.34%  tokens/s 12,346  ETA 0:0")
    assert second == "gspo 4/4  reward 0.625  ETA 0:00"


def test_on_a_terminal_the_display_shows_bar_values_and_sample_as_text():
    # Catches: model output read as markup or as control codes; values of earlier rollouts forgotten.
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None, _environ={"TERM": "xterm"})
    with Progress(2, console=console) as progress:
        progress.update(0, {"reward/mean": 0.5, "eval/pass@1": 0.75})
        progress.update(1, {"reward/mean": 0.6}, sample="[red]3+4\n\x1b[2J[/nope]")
    shown = out.getvalue()
    assert "2/2" in shown and "0.600" in shown and shown.rstrip().count("0.750") >= 1
    assert r"[red]3+4\n\x1b[2J[/nope]" in shown and "\x1b[2J" not in shown
    last = shown[shown.rindex("reward") :]
    assert "0.750" in last
