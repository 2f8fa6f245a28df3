"""Records of tokens on disk: whole or not at all, joined from several processes, and what is no record said in one
line."""

import json

import numpy as np
import pytest

from gspo.run import tokens
from gspo.types import UserError
from tests.token_records import about, columns_of_rows, write_record


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name, column in want.items():
        assert got[name].dtype == column.dtype, name
        np.testing.assert_array_equal(got[name], column, err_msg=name)


def test_what_is_written_is_read_and_equal_columns_give_equal_bytes(tmp_path):
    # Catches a dtype that changes on the way, and a date in the file, for which a resumed run would differ.
    first = write_record(tmp_path, 4)
    content = first.read_bytes()
    record = tokens.read([first])
    assert_equal(record.columns, columns_of_rows(4))
    assert record.about["rollout"] == 4 and record.about["objective"] == about(4)["objective"]
    assert write_record(tmp_path, 4) == first and first.read_bytes() == content


def test_the_rows_of_several_processes_are_one_rollout_in_its_order_each_row_once(tmp_path):
    # Catches tokens of one row under another, rows that lie on two processes counted twice, prompts lost.
    whole = columns_of_rows(0, groups=4)
    record = tokens.Record(about(0), whole)
    R = len(whole["row"])
    for process, rows in enumerate((np.array([4, 5, 6, 7]), np.array([0, 1, 2, 3, 4, 5]))):
        assert R == 8
        tokens.write(tmp_path, process, about(0), tokens.taken(record, rows).columns)
    found = tokens.files(tmp_path)
    assert [path.name for path in found[0]] == ["000000.0.npz", "000000.1.npz"]
    assert_equal(tokens.read(found[0]).columns, whole)


def test_records_from_a_rollout_on_are_forgotten_and_other_files_are_left(tmp_path):
    # Catches a resumed run that keeps records of updates that were never made, and one that clears a folder.
    for rollout in (0, 5, 10):
        write_record(tmp_path, rollout)
    (tmp_path / "tokens" / "mine.npz").write_bytes(b"")
    tokens.forget(tmp_path, 5)
    assert sorted(path.name for path in (tmp_path / "tokens").iterdir()) == ["000000.0.npz", "mine.npz"]
    tokens.forget(tmp_path / "nowhere", 0)


def test_what_is_no_whole_record_is_one_line_that_names_the_file(tmp_path):
    # Catches a traceback of zipfile, and half a record shown as a whole one.
    path = write_record(tmp_path, 0)
    content = path.read_bytes()

    def complaint():
        with pytest.raises(UserError) as raised:
            tokens.read([path])
        text = str(raised.value)
        assert text.startswith(str(path)) and "\n" not in text
        return text

    for cut in (0, 10, len(content) // 2, len(content) - 30):
        path.write_bytes(content[:cut])
        assert "not a whole record of tokens" in complaint()
    middle = bytearray(content)
    middle[len(content) // 2] ^= 0xFF
    path.write_bytes(middle)
    assert "not a whole record of tokens" in complaint()
    np.savez(path, about=np.array(json.dumps({"format": "another"})))
    assert "another format" in complaint()
    np.savez(path, x=np.zeros(3))
    assert "not a whole record of tokens" in complaint()
    np.savez(path, about=np.array([{"pickled": 1}], dtype=object))
    assert "not a whole record of tokens" in complaint()
    later = json.dumps({"format": tokens.FORMAT, "version": tokens.VERSION + 1})
    np.savez(path, about=np.array(later))
    assert "its schema is 2, this version reads up to 1" in complaint()


@pytest.mark.parametrize("name", ["logp", "reward", "prompt_token", "routes"])
def test_a_column_of_another_length_is_refused(tmp_path, name):
    # Catches columns that would be shifted against each other from some row on.
    columns = columns_of_rows(0)
    columns[name] = columns[name][:-1]
    path = tokens.write(tmp_path, 0, about(0), columns)
    with pytest.raises(UserError, match=name):
        tokens.read([path])


def test_parts_of_two_rollouts_are_not_joined(tmp_path):
    # Catches a file copied from another run that is taken for the second process's.
    one, other = write_record(tmp_path / "a", 0), write_record(tmp_path / "b", 5)
    with pytest.raises(UserError, match=r"no part of the rollout that 000000\.0\.npz is of"):
        tokens.read([one, other])
