"""Fixtures of the command line's tests."""

import sys

import pytest
from hydra.core.hydra_config import HydraConfig


@pytest.fixture
def as_a_plain_process(monkeypatch):
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "TORCHELASTIC_RUN_ID",
        "TRITON_INTERPRET",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # launch sets it; this puts it back
    yield
    HydraConfig.instance().cfg = None
