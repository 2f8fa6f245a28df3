"""Frames of metrics and records: columns of one length that say what the files say."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from gspo.report import frames
from gspo.types import UserError
from tests.token_records import columns_of_rows, write_metrics, write_record


def test_metrics_are_columns_with_nan_where_a_line_has_none(tmp_path):
    # Catches values that slip into another line because one has none.
    frame = frames.metrics(write_metrics(tmp_path, rollouts=8))
    assert {len(column) for column in frame.values()} == {8} and "none" not in frame
    assert frame["step"].tolist() == list(range(8))
    assert np.flatnonzero(~np.isnan(frame["eval/pass@1"])).tolist() == [0, 4]


def test_rows_and_tokens_say_what_a_loop_over_the_record_says(tmp_path):
    # Catches tokens under the neighbouring row, a sum for a mean, experts compared in order.
    write_record(tmp_path, 3)
    c, at = columns_of_rows(3), 0
    rows, of_tokens = frames.rows_of(tmp_path, 3), frames.tokens_of(tmp_path, 3)
    assert {len(column) for column in of_tokens.values()} == {len(c["token"])}
    for i, length in enumerate(c["length"]):
        log_w = [float(c["logp"][n]) - float(c["old_logp"][n]) for n in range(at, at + length)]
        assert rows["log_s"][i] == pytest.approx(sum(log_w) / length)
        assert rows["advantage"][i] == pytest.approx(c["advantage"][at])
        np.testing.assert_allclose(of_tokens["log_w"][at : at + length], log_w)
        assert of_tokens["position"][at : at + length].tolist() == list(range(length))
        assert set(of_tokens["reward"][at : at + length]) == {c["reward"][i]}
        at += length
    want = [
        sum(set(old) != set(new) for old, new in zip(olds, news, strict=True))
        for olds, news in zip(c["old_routes"].tolist(), c["routes"].tolist(), strict=True)
    ]
    assert of_tokens["layers_changed"].tolist() == want and max(want) > 0


def test_the_figure_has_a_box_for_each_number_of_layers_and_refuses_dense_models(tmp_path):
    write_record(tmp_path, 0)
    frame = frames.tokens_of(tmp_path, 0)
    figure = frames.figure(frame)
    assert len(figure.axes[0].get_xticks()) == len(np.unique(frame["layers_changed"]))
    plt.close(figure)
    write_record(tmp_path, 1, routed=False)
    with pytest.raises(UserError, match="dense model"):
        frames.figure(frames.tokens_of(tmp_path, 1))


def test_a_rollout_that_is_not_on_record_is_named_with_those_that_are(tmp_path):
    write_record(tmp_path, 3)
    with pytest.raises(UserError, match="rollout 4 is not on record; there are 3"):
        frames.rows_of(tmp_path, 4)
    with pytest.raises(UserError, match=r"log\.tokens_every"):
        frames.tokens_of(tmp_path / "nowhere", 0)
