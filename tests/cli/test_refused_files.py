"""What a file system refuses is told by name, wherever a program meets it.

As root nothing is refused: the refusals are put in the place of calls.
"""

import errno
import os
from pathlib import Path

import pytest

from data import prepare
from pdn.cli.launch import report
from pdn.errors import StorageError
from pdn.hub.load import load_run
from pdn.runs.ancestry import tree
from pdn.runs.directory import RunDirectory


def refuse(*arguments, **options):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "runs/theirs/config.json")


def test_a_refusal_that_nobody_expected_ends_in_a_message_and_74(monkeypatch, capsys):
    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(PermissionError) as met:
        load_run("runs/theirs")
    assert report(met.value, None) == 74
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.startswith(
        "pdn[E-IO] runs/theirs/config.json: Permission denied (EACCES); expected"
    )


@pytest.mark.parametrize("number, remedy", [("EMFILE", "ulimit -n"), ("ENAMETOOLONG", "shorter")])
def test_limits_are_told_with_their_remedies(number, remedy, capsys):
    assert report(OSError(getattr(errno, number), "no", "x"), None) == 74
    assert remedy in capsys.readouterr().err


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "no", "x"), OSError("no")])
def test_other_errors_keep_their_traceback(error, capsys):
    assert report(error, None) == 70
    assert type(error).__name__ in capsys.readouterr().err


def test_preparation_ends_in_a_message_too(monkeypatch, capsys):
    monkeypatch.setattr(prepare, "check", refuse)
    assert prepare.main(["--path", "x", "--out", "y"]) == 74
    assert "Traceback" not in capsys.readouterr().err


def test_a_directory_that_cannot_be_read_is_not_called_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StorageError, match="Permission denied"):
        tree(tmp_path)


def test_checkpoints_that_cannot_be_written_are_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "checkpoints")
    with pytest.raises(StorageError, match="checkpoints: Permission denied"):
        RunDirectory(tmp_path / "run", rank=0)
