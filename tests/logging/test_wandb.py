"""wandb cannot delay, fail or outlive a run."""

import json
import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pdn.logging.wandb import Telemetry

CANARY = "canary" + "0123456789" * 3 + "abcd"


@pytest.fixture(autouse=True)
def no_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NETRC", raising=False)


def files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()]


def test_without_a_key_the_run_is_recorded_offline_under_one_id(tmp_path):
    pytest.importorskip("wandb")
    (tmp_path / "run").mkdir()
    for _ in range(2):
        telemetry = Telemetry(tmp_path / "run", kind="wandb", config={"lr": 0.1})
        telemetry.log({"step": 1, "loss": 2.5})
        telemetry.close(timeout_s=30)
    run_id = (tmp_path / "run" / "wandb-run-id").read_text()
    records = [file for file in files(tmp_path / "run") if file.suffix == ".wandb"]
    assert len(records) == 2
    assert all(file.name == f"run-{run_id}.wandb" and file.stat().st_size > 0 for file in records)


@pytest.fixture(params=["refusing", "silent"])
def dead_server(request):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if request.param == "silent":
            server.listen(16)
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
        else:
            yield "http://127.0.0.1:1"


def test_a_dead_server_costs_nothing_while_training_and_a_bounded_wait_at_the_end(
    tmp_path, monkeypatch, caplog, dead_server
):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    monkeypatch.setenv("WANDB_BASE_URL", dead_server)
    started = time.perf_counter()
    telemetry = Telemetry(tmp_path, kind="wandb")
    assert time.perf_counter() - started < 5
    before = time.thread_time()  # of this thread alone: the machine may be busy
    for step in range(1000):
        telemetry.log({"step": step, "loss": 1.0})
    assert (time.thread_time() - before) / 1000 < 1e-4
    child = telemetry._child
    time.sleep(2)
    started = time.perf_counter()
    with caplog.at_level(logging.WARNING):
        telemetry.close(timeout_s=1.0)
    assert time.perf_counter() - started < 5
    assert "wandb did not finish within 1 s" in caplog.text
    assert child.poll() is not None
    assert not [file for file in files(tmp_path) if CANARY.encode() in file.read_bytes()]


def test_a_server_that_takes_no_run_leaves_an_offline_record(tmp_path):
    pytest.importorskip("wandb")
    # The child's own function, with a timeout that a test can wait for.
    code = "import json, sys, pdn.logging.wandb as t; t._INIT_TIMEOUT_S = 1; t._serve()"
    arguments = {"project": "p", "name": "n", "id": "abcd", "dir": str(tmp_path), "config": None}
    lines = [arguments, {"step": 1, "loss": 1.0}, {"exit_code": 0}]
    done = subprocess.run(
        [sys.executable, "-c", code],
        input="".join(json.dumps(line) + "\n" for line in lines),
        env=os.environ | {"WANDB_API_KEY": CANARY, "WANDB_BASE_URL": "http://127.0.0.1:1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "wandb took no run" in done.stderr and "recording offline" in done.stderr
    assert [
        file for file in files(tmp_path) if "offline-run" in str(file) and file.suffix == ".wandb"
    ]


def test_without_wandb_one_line_says_so_and_training_goes_on(tmp_path, capfd, monkeypatch):
    (tmp_path / "wandb.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    telemetry = Telemetry(tmp_path, kind="wandb")
    for step in range(100):
        telemetry.log({"step": step})
    telemetry.close(timeout_s=20)
    assert capfd.readouterr().err.strip() == (
        "wandb is not installed: metrics go to metrics.jsonl only (pip install wandb, or "
        "logger=none)"
    )


def test_a_crash_of_the_child_in_mid_run_is_survived(tmp_path):
    pytest.importorskip("wandb")
    telemetry = Telemetry(tmp_path, kind="wandb")
    telemetry._child.kill()
    for step in range(2000):
        telemetry.log({"step": step, "text": "x" * 200})
    telemetry.close()


def test_more_records_than_the_queue_holds_are_dropped_and_counted(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("pdn.logging.wandb._QUEUE_RECORDS", 5)
    monkeypatch.setattr("pdn.logging.wandb.Telemetry._feed", lambda self: time.sleep(0.01))
    telemetry = Telemetry(tmp_path, kind="wandb")
    for step in range(20):
        telemetry.log({"step": step})
    with caplog.at_level(logging.WARNING):
        telemetry.close(timeout_s=0.2)
    assert "16 records were not sent" in caplog.text


def test_kind_none_starts_nothing_and_other_kinds_are_refused(tmp_path):
    telemetry = Telemetry(tmp_path, kind="none")
    telemetry.log({"step": 1})
    telemetry.close()
    assert files(tmp_path) == []
    with pytest.raises(ValueError, match="expected wandb or none"):
        Telemetry(tmp_path, kind="tensorboard")
