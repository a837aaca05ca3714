"""Other packages' notices are hidden; ours and their errors are not."""

from __future__ import annotations

import logging
import warnings

from mixdq_ao.app.quiet import silence


def test_only_known_notices_are_dropped(caplog, monkeypatch):
    monkeypatch.delenv("DIFFUSERS_VERBOSITY", raising=False)
    silence()
    logging.getLogger("torchao").warning("Failed to load _C.so")
    logging.getLogger("torchao").warning("something else")
    logging.getLogger("mixdq_ao").warning("Failed to load a plan")
    assert [r.getMessage() for r in caplog.records] == ["something else", "Failed to load a plan"]


def test_our_warnings_stay():
    with warnings.catch_warnings(record=True) as seen:
        silence()
        warnings.warn_explicit("theirs", FutureWarning, "x.py", 1, module="diffusers.utils")
        warnings.warn_explicit("ours", FutureWarning, "y.py", 1, module="mixdq_ao.plan")
    assert [str(w.message) for w in seen] == ["ours"]
