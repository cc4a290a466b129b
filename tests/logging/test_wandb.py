"""wandb cannot delay, fail or outlive a run."""

import io
import json
import logging
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdn.logging.config import LoggerConfig
from pdn.logging.loggers import open_logger
from pdn.logging.wandb import WandbLogger
from pdn.runs import faults
from pdn.runs.launcher import STOP_SIGNALS
from tests.small_runs import metrics, train

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
        telemetry = WandbLogger(tmp_path / "run", config={"lr": 0.1})
        telemetry.log(1, {"loss": 2.5})
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
    telemetry = WandbLogger(tmp_path)
    assert time.perf_counter() - started < 20
    before = time.thread_time()  # of this thread alone: the machine may be busy
    for step in range(1000):
        telemetry.log(step, {"loss": 1.0})
    assert (time.thread_time() - before) / 1000 < 1e-4
    child = telemetry._child
    time.sleep(2)
    started = time.perf_counter()
    with caplog.at_level(logging.WARNING):
        telemetry.close(timeout_s=1.0)
    assert time.perf_counter() - started < 20
    assert "wandb did not finish within 1 s" in caplog.text
    assert child.poll() is not None
    assert not [file for file in files(tmp_path) if CANARY.encode() in file.read_bytes()]


def test_a_server_that_takes_no_run_leaves_an_offline_record(tmp_path):
    pytest.importorskip("wandb")
    # Patch the child's own function with a timeout that a test can wait for.
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
    telemetry = WandbLogger(tmp_path)
    for step in range(100):
        telemetry.log(step, {})
    telemetry.close(timeout_s=20)
    assert capfd.readouterr().err.strip() == (
        "wandb is not installed: metrics go to metrics.jsonl only (pip install wandb, or "
        "logger=none)"
    )


def test_a_crash_of_the_child_in_mid_run_is_survived(tmp_path):
    pytest.importorskip("wandb")
    telemetry = WandbLogger(tmp_path)
    telemetry._child.kill()
    for step in range(2000):
        telemetry.log(step, {"text": "x" * 200})
    telemetry.close()


def test_more_records_than_the_queue_holds_are_dropped_and_counted(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("pdn.logging.wandb._QUEUE_RECORDS", 5)
    monkeypatch.setattr("pdn.logging.wandb.WandbLogger._feed", lambda self: time.sleep(0.01))
    telemetry = WandbLogger(tmp_path)
    for step in range(20):
        telemetry.log(step, {})
    with caplog.at_level(logging.WARNING):
        telemetry.close(timeout_s=0.2)
    assert "16 records were not sent" in caplog.text


def records(content: bytes) -> Iterator[bytes]:
    """Yield what an offline file holds.

    After 7 bytes come blocks of 32 KiB of chunks, each after a header of checksum, size and kind (1
    whole, 2 first, 3 middle, 4 last).
    """
    block, header = 32768, struct.Struct("<IHB")
    at, whole = 7, b""
    while at + header.size <= len(content):
        if block - at % block < header.size:  # too little room for a header is left empty
            at += block - at % block
            continue
        _, size, kind = header.unpack_from(content, at)
        at += header.size
        whole = (whole if kind in (3, 4) else b"") + content[at : at + size]
        at += size
        if kind in (1, 4):
            yield whole


def history(run: Path) -> list[dict]:
    """Return the rows of a run's offline records, in the order of its launches."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for content in records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append(
                    {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
                )
    return rows


def test_of_a_step_that_comes_again_the_later_values_count_over_rewinds_and_launches(tmp_path):
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    run.mkdir()
    kept: dict[int, float] = {}
    for launch in range(3):
        logger = WandbLogger(run)
        steps = [3 * launch + 1, 3 * launch + 2, 3 * launch + 3, 3 * launch + 2, 3 * launch + 3]
        for number, step in enumerate(steps):  # back by two, as after a loss spike
            kept[step] = launch + number / 10
            logger.log(step, {"loss": kept[step], "mfu": None})
        logger.close(timeout_s=60)
    rows = history(run)
    assert {row["step"]: row["loss"] for row in rows} == kept
    numbers = [row["_step"] for row in rows]
    assert numbers == sorted(set(numbers)) and len(numbers) == 15
    assert "mfu" not in rows[0]


@pytest.mark.slow
def test_a_run_resumed_three_times_and_rewound_once_reads_back_as_its_metrics(
    tmp_path, monkeypatch, capfd
):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("PDN_FAULT", "spike@19:0")
    faults._struck.clear()
    words = "trainer.spike_threshold=1", "checkpoint.every=8", "trainer.steps=24", "optim.lr=1e-3"
    words += "logger=wandb", "eval=validation", "eval.every=6", "data.validation_fraction=0.2"
    for stop in (5, 11, 22, 24):
        train(tmp_path, "pgdn_tiny", *words, f"trainer.stop_at={stop}")
    faults._struck.clear()
    assert "rewound to step 16" in capfd.readouterr().out
    kept, shown = {}, {}
    for record in metrics(tmp_path):
        for key, value in record.items():
            kept[record["step"], key] = value
    rows = history(tmp_path / "run")
    for row in rows:
        for key, value in row.items():
            if not key.startswith("_"):
                shown[row["step"], key] = value
    assert len(list((tmp_path / "run").glob("wandb/offline-run-*"))) == 4
    numbers = [row["_step"] for row in rows]
    assert numbers == sorted(set(numbers))
    wanted = {place: value for place, value in kept.items() if value is not None}
    # of steps that the rewind took back wandb has keys that the run's own record no longer has
    assert {place: shown.get(place) for place in wanted} == wanted
    assert {step for step, _ in shown} == {step for step, _ in wanted}


def test_group_entity_tags_commit_and_tables_reach_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    given = {}

    class Run:
        step = 0

        def __getattr__(self, name):
            return lambda *arguments, **keys: given.setdefault(name, []).append((arguments, keys))

    monkeypatch.setattr(wandb, "init", lambda **keys: given.update(init=keys) or Run())
    monkeypatch.setenv("WANDB_TAGS", "b,c")
    logger = WandbLogger.__new__(WandbLogger)
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: type("P", (), {"stdin": None})())
    monkeypatch.setattr(WandbLogger, "_feed", lambda self: None)
    logger.__init__(
        tmp_path, project="p", entity="team", group="sweep-1", tags=["a", "b"], commit="abc123"
    )
    logger.log(4, {"loss": 1.0})
    logger.log_table(4, "results", ["task", "value"], [["piqa", 0.5]])
    logger.log_map(4, "telemetry/beta", [[0.1, 0.9], None])
    logger._records.put({"exit_code": 3})
    lines = b"".join(json.dumps(record).encode() + b"\n" for record in logger._records.queue)
    (tmp_path / "wandb").mkdir()

    from pdn.logging import wandb as module

    monkeypatch.setattr(sys, "stdin", type("S", (), {"buffer": io.BytesIO(lines)})())
    monkeypatch.setattr(module.os, "_exit", lambda code: None)
    ignored = set()
    monkeypatch.setattr(module.signal, "signal", lambda number, _: ignored.add(number))
    monkeypatch.setattr(module.threading, "Timer", lambda *a, **k: type("T", (), {"start": int})())
    module._serve()
    init = given["init"]
    assert [init[key] for key in ("project", "entity", "group")] == ["p", "team", "sweep-1"]
    assert init["tags"] == ["a", "b", "c"] and init["settings"].git_commit == "abc123"
    assert init["settings"].x_stats_pid == os.getpid() and not init["settings"].x_disable_stats
    assert given["define_metric"][1] == (("*",), {"step_metric": "step"})
    first, table, heat = (arguments[0] for arguments, _ in given["log"])
    assert first == {"loss": 1.0, "step": 4}
    assert table["results"].columns == ["task", "value"] and table["step"] == 4
    assert heat["telemetry/beta"].image.size == (32, 32) and heat["step"] == 4
    assert given["finish"] == [((), {"exit_code": 3})]
    assert ignored == set(STOP_SIGNALS)


def test_logger_none_starts_nothing(tmp_path):
    config = LoggerConfig(kind="none", project="pdn", entity=None, group=None, tags=[])
    logger = open_logger(config, tmp_path, run_config=None, commit=None)
    logger.log(1, {"loss": 1.0})
    logger.log_table(1, "t", ["a"], [[1]])
    logger.log_map(1, "m", [[1.0]])
    logger.close()
    assert files(tmp_path) == []


def test_the_trials_of_a_sweep_are_one_group_the_same_at_the_next_launch(tmp_path, monkeypatch):
    from pdn.cli.compose import Source
    from pdn.cli.sweep import check_trials

    small = ["model=pgdn_tiny", "data=text", f"output_dir={tmp_path}"]
    groups = []
    for words in (["seed=1,2"], ["seed=1,2"], ["seed=1,2,3"]):
        monkeypatch.setenv("WANDB_RUN_GROUP", "")  # so that what was there comes back afterwards
        monkeypatch.delenv("WANDB_RUN_GROUP")
        check_trials([*small, *words], Source())
        groups.append(os.environ["WANDB_RUN_GROUP"])
    assert groups[0] == groups[1] != groups[2] and groups[0].startswith("sweep-")
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    check_trials([*small, "seed=1,2"], Source())
    assert os.environ["WANDB_RUN_GROUP"] == "mine"
