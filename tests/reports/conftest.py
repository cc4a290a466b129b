"""A stand-in for train.py, so that sweeps are tested in seconds."""

import json
import sys
from pathlib import Path

import pytest

from pdn.cli.compose import compose
from pdn.reports import trials


@pytest.fixture(scope="session")
def command(tmp_path_factory) -> list[str]:
    """Return the words that start a stand-in run."""
    file = tmp_path_factory.mktemp("model") / "model.json"
    file.write_text(json.dumps(compose(["model=gdn_tiny", "model.vocab_size=256"]).values["model"]))
    return [sys.executable, str(Path(__file__).with_name("trainer_stub.py")), f"model_json={file}"]


@pytest.fixture(scope="session", autouse=True)
def look_often():
    """Have sweeps see at once that a stand-in has ended: they run dozens, of a quarter second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "POLL_S", 0.02)
        yield
