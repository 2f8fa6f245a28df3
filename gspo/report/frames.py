"""Metrics and records of runs as data frames: dicts of NumPy columns of one length, which pandas takes as they stand.

    frame = frames.tokens_of("runs/gspo", rollout=10)
    pandas.DataFrame(frame).groupby("layers_changed").log_w.var()

    metrics    one line for each line of metrics.jsonl
    rows_of    one line for each completion of a recorded rollout
    tokens_of  one line for each token of it
    figure     log w of tokens by how many of their layers chose other experts

All raise UserError for a folder that holds no run, a rollout that is not on record, and a record that cannot be read.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from gspo.report import bands
from gspo.report.plots import COLORS, load
from gspo.run import tokens
from gspo.types import UserError

Frame = dict[str, np.ndarray]


def metrics(workdir: str | Path) -> Frame:
    """A column, float64, for each metric that is a number in some line; NaN in the lines that have none."""
    lines = load(workdir)
    number = lambda x: isinstance(x, int | float) and not isinstance(x, bool)  # noqa: E731
    names = dict.fromkeys(name for line in lines for name, value in line.items() if number(value))
    return {
        name: np.array([line[name] if number(line.get(name)) else np.nan for line in lines], np.float64)
        for name in names
    }


def rows_of(workdir: str | Path, rollout: int) -> Frame:
    """row, group, update, length, reward, truncated as in `gspo.run.tokens`; advantage of the first token; log_s, the
    mean of log w over the tokens that count, NaN without one."""
    record = _record(workdir, rollout)
    c, starts = record.columns, record.starts
    index_N = np.repeat(np.arange(len(c["row"])), c["length"])
    counted_N = c["mask"].astype(np.float64)
    log_w_N = np.where(c["mask"], c["logp"].astype(np.float64) - c["old_logp"], 0)
    count_R = np.bincount(index_N, counted_N, minlength=len(c["row"]))
    total_R = np.bincount(index_N, log_w_N, minlength=len(c["row"]))
    log_s_R = np.divide(total_R, count_R, out=np.full(len(count_R), np.nan), where=count_R > 0)
    advantage_R = np.full(len(c["row"]), np.nan)
    some_R = c["length"] > 0
    advantage_R[some_R] = c["advantage"][starts[:-1][some_R]]
    return {name: c[name] for name in tokens.ROWS} | {"advantage": advantage_R, "log_s": log_s_R}


def tokens_of(workdir: str | Path, rollout: int) -> Frame:
    """The columns of tokens that are vectors, with row, group, update, length, reward and truncated of their
    completion, and

    position        int32   in the completion, from 0
    log_w           float64 logp - old_logp: what the objective saw
    layers_changed  int32   layers whose routers chose another set of experts than the old policy's; not there for
                            dense models
    """
    c = _record(workdir, rollout).columns
    frame = {name: np.repeat(c[name], c["length"]) for name in tokens.ROWS}
    frame["position"] = np.concatenate([np.zeros(0, np.int32), *(np.arange(n, dtype=np.int32) for n in c["length"])])
    frame |= {name: c[name] for name in (*tokens.TOKENS, *tokens.OPTIONAL) if name in c and c[name].ndim == 1}
    frame["log_w"] = c["logp"].astype(np.float64) - c["old_logp"]
    if "routes" in c:
        changed_NL = tokens.experts_changed(c["old_routes"], c["routes"])
        frame["layers_changed"] = (changed_NL > 0).sum(-1).astype(np.int32)
    return frame


def figure(frame: Frame) -> Figure:
    """Log w of tokens against the layers whose experts changed: a box each, whiskers at 5% and 95%. frame: from
    `tokens_of`. Raises UserError for a dense model."""
    if "layers_changed" not in frame:
        raise UserError("frames.figure: the record is of a dense model, which chooses no experts; give another")
    drawn, (axes,) = bands.new_figure(1, 1, 4.4, 3)
    counted = frame["mask"].astype(bool)
    at = np.unique(frame["layers_changed"][counted])
    values = [frame["log_w"][counted & (frame["layers_changed"] == n)] for n in at]
    if len(at):
        axes.boxplot(values, positions=at, whis=(5, 95), sym="", medianprops={"color": COLORS[1]})
    axes.set(xlabel="Layers whose experts changed", ylabel="log w")
    return drawn


def _record(workdir: str | Path, rollout: int) -> tokens.Record:
    found = tokens.files(Path(workdir))
    if rollout not in found:
        have = f"there are {', '.join(map(str, found))}" if found else "train with --config.log.tokens_every=N"
        raise UserError(f"{workdir}: rollout {rollout} is not on record; {have}")
    return tokens.read(found[rollout])
