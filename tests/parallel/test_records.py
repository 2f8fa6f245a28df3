"""Records of tokens of a run in several processes: each writes its rows, together they are those of one process."""

import numpy as np
import pytest

from gspo.run import tokens
from tests.parallel.runs import CONFIG, DIVIDED, launch
from tests.tiny_runs import kept_compiles  # noqa: F401 - a fixture


@pytest.mark.slow
def test_each_process_records_its_rows_and_together_they_are_the_rollout(tmp_path):
    # Catches rows of one process under the rewards of the other, rows that are missing, files written over each other.
    divided = DIVIDED | {"num_rollouts": 2, "log.tokens_every": 1, "eval.every": 0}
    (tmp_path / "config.py").write_text(CONFIG.format(folder=str(tmp_path), divided=divided))
    for name, processes, devices in (("two", 2, 2), ("one", 1, 4)):
        code, stdout, stderr = launch(tmp_path, name, processes=processes, devices=devices)
        assert code == 0 and "bytes a token" in stdout, stderr
    two, one = (tokens.files(tmp_path / name) for name in ("two", "one"))
    assert list(two) == list(one) == [0, 1] and [len(paths) for paths in two.values()] == [2, 2]
    assert all(len(tokens.read([path]).columns["row"]) == 8 for path in two[0])
    for rollout in (0, 1):
        got, want = (tokens.read(found[rollout]).columns for found in (two, one))
        assert got.keys() == want.keys()
        for name, column in want.items():
            if np.issubdtype(column.dtype, np.floating):
                np.testing.assert_allclose(got[name], column, rtol=2e-3, atol=2e-4, err_msg=name)
            else:
                np.testing.assert_array_equal(got[name], column, err_msg=name)
