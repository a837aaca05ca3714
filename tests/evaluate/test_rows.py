"""Files of rows: what is not one is left alone."""

from __future__ import annotations

import numpy as np
import pytest

from mixdq_ao.errors import MixDQError
from mixdq_ao.evaluate.rows import RowFile, read_rows

SUBJECT = {"metric": "fid", "features": "a"}


@pytest.mark.parametrize("text", ["a note without an end", "a note\nwith two lines", '{"format": "other-rows", "v'])
def test_a_file_that_is_no_row_file_is_left_alone(tmp_path, text):
    path = tmp_path / "fid.bin"
    path.write_text(text)
    with pytest.raises(MixDQError, match="no mixdq-rows file"), RowFile(path, SUBJECT):
        pass
    assert path.read_text() == text


def test_a_first_line_torn_anywhere_is_begun_again(tmp_path):
    path, rows = tmp_path / "fid.bin", np.ones((1, 3), "<f4")
    with RowFile(path, SUBJECT) as file:
        file.append([0], rows)
    whole = path.read_bytes()
    for cut in range(whole.index(b"\n") + 1):
        path.write_bytes(whole[:cut])
        with RowFile(path, SUBJECT) as file:
            assert not file.rows
            file.append([0], rows)
        assert path.read_bytes() == whole
    assert (read_rows([path], SUBJECT)[0] == 1).all()
