"""The output of a run stays guarded while it runs."""

import io
import sys

from pdn.runs.output import GuardedStream, guarded_output


def test_a_run_that_failed_before_and_is_collected_now_does_not_unguard_the_next_one(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    failed = guarded_output()
    failed.__enter__()
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()  # as a notebook or pytest puts them back
    with guarded_output():
        failed.__exit__(None, None, None)
        assert isinstance(sys.stdout, GuardedStream) and isinstance(sys.stderr, GuardedStream)
    assert not isinstance(sys.stdout, GuardedStream)
    assert not isinstance(sys.stderr, GuardedStream)
