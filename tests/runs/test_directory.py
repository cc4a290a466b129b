"""One writer a run directory, records that survive, and messages that name what is wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from pdn.errors import ConfigError, LockedError, StorageError
from pdn.runs import directory as run_directory
from pdn.runs import output, schema
from pdn.runs.directory import RunDirectory
from pdn.runs.records import JsonLines
from pdn.store import local

ROOT = Path(__file__).parents[2]
HOLDER = "import sys, time; from pathlib import Path; from pdn.runs.directory import RunDirectory\n"


def record(directory: RunDirectory, config: dict, **rules) -> None:
    directory.take_config(config, **rules)
    directory.write_config()


def start_holder(
    path: Path, then: str = "print('locked', flush=True); time.sleep(60)"
) -> subprocess.Popen:
    code = f"{HOLDER}d = RunDirectory(Path({str(path)!r}), rank=0)\n{then}"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def test_a_second_process_is_refused_and_told_who_holds_the_directory(tmp_path):
    holder = start_holder(tmp_path)
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(LockedError, match=rf"PID {holder.pid} on ") as caught:
            RunDirectory(tmp_path, rank=0)
        assert caught.value.exit_code == 73
    finally:
        holder.kill()
        holder.wait()


def test_a_killed_holder_frees_the_directory_though_its_forked_child_lives_on(tmp_path):
    then = (
        "import os\npid = os.fork()\nif pid == 0: time.sleep(60)\nprint(pid, flush=True); "
        "time.sleep(60)"
    )
    holder = start_holder(tmp_path, then)
    child = int(holder.stdout.readline())
    try:
        holder.kill()
        holder.wait()
        RunDirectory(tmp_path, rank=0).close()
    finally:
        os.kill(child, signal.SIGKILL)


def test_of_eight_simultaneous_launches_exactly_one_wins(tmp_path):
    then = "print('won', flush=True); sys.stdin.read()"
    code = (
        f"{HOLDER}from pdn.errors import PdnError\ntry: d = RunDirectory(Path({str(tmp_path)!r}), "
        "rank=0)\n"
    )
    code += f"except PdnError as e: print('lost', e.exit_code, flush=True); sys.exit()\n{then}"
    command = [sys.executable, "-c", code]
    racers = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        for _ in range(8)
    ]
    verdicts = sorted(racer.stdout.readline().strip() for racer in racers)
    for racer in racers:
        racer.communicate("")
    assert verdicts == ["lost 73"] * 7 + ["won"]


def test_other_ranks_neither_lock_nor_write(tmp_path):
    directory = RunDirectory(tmp_path / "run", rank=1)
    directory.log({"step": 1})
    directory.set_status("running", 1)
    directory.commit(1, 0, 4, "00")
    directory.continue_from(0, 0)
    assert not (tmp_path / "run").exists()


def test_a_directory_that_no_run_was_begun_in_is_removed_if_this_launch_made_it(
    tmp_path, monkeypatch
):
    def refused(path: Path) -> bool:
        directory = RunDirectory(path, rank=0)
        directory.set_status("failed", 0, 65, "no such column")
        directory.remove_unbegun()
        directory.close()
        return not path.exists()

    assert refused(tmp_path / "new")
    (tmp_path / "old").mkdir()
    assert not refused(tmp_path / "old")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    assert not refused(tmp_path / "under-torchrun")


def test_status_is_replaced_as_a_whole_and_unknown_states_are_refused(tmp_path):
    directory = RunDirectory(tmp_path, rank=0)
    directory.set_status("running", 0)
    directory.set_status("preempted", 7, 75, "SIGTERM")
    status = directory.status()
    assert (status["state"], status["step"], status["exit_code"], status["reason"]) == (
        "preempted",
        7,
        75,
        "SIGTERM",
    )
    assert not list(tmp_path.glob("*.tmp"))
    with pytest.raises(ValueError, match="'gone': expected one of running"):
        directory.set_status("gone", 7)


def test_a_reader_never_sees_half_a_status(tmp_path):
    holder = start_holder(
        tmp_path, "i = 0\nwhile True: i += 1; d.set_status('running', i, reason='x' * 20000)"
    )
    try:
        deadline = time.monotonic() + 60.0
        seen = set()
        while len(seen) < 200 and time.monotonic() < deadline:
            file = tmp_path / "status.json"
            if file.exists():
                seen.add(json.loads(file.read_bytes())["step"])
        assert len(seen) > 3
    finally:
        holder.kill()
        holder.wait()


def test_records_after_the_resumed_step_and_a_torn_line_are_dropped(tmp_path):
    directory = RunDirectory(tmp_path, rank=0)
    for step in range(1, 6):
        directory.log({"step": step, "loss": 1 / step})
        directory.commit(step, 4 * step - 4, 4 * step, f"{step:02x}")
    directory.close()
    for name in ("metrics.jsonl", "ledger.jsonl"):
        with open(tmp_path / name, "a") as stream:
            stream.write('{"step": 6, "lo')
    directory = RunDirectory(tmp_path, rank=0)
    directory.continue_from(3, 12)
    directory.log({"step": 4, "loss": 0.1})
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert metrics == [{"step": s, "loss": 1 / s} for s in (1, 2, 3)] + [{"step": 4, "loss": 0.1}]
    ledger = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert ledger == [
        {"step": s, "first": 4 * s - 4, "end": 4 * s, "hash": f"{s:02x}"} for s in (1, 2, 3)
    ]


def test_samples_that_were_passed_over_are_noted_once(tmp_path, caplog):
    directory = RunDirectory(tmp_path, rank=0)
    for step in (1, 2, 3):
        directory.commit(step, 4 * step - 4, 4 * step, "")
    for _ in range(2):  # also if the launch that skipped them was killed before it could say so
        directory.continue_from(2, 20)
    ledger = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [line["end"] for line in ledger[:2]] == [4, 8]
    assert ledger[2:] == [{"step": 2, "skipped_first": 8, "skipped_end": 20}]
    directory.continue_from(3, 24)
    assert "ledger.jsonl: ends at step 2 of 3; lines were lost" in caplog.text


def test_what_was_logged_at_a_step_is_known(tmp_path):
    directory = RunDirectory(tmp_path, rank=0)
    assert directory.logged(2) == set()
    for step in (1, 2):
        directory.log({"step": step, "loss": 0.5})
    directory.log({"step": 2, "validation/loss": 0.4})
    assert directory.logged(2) == {"step", "loss", "validation/loss"}
    assert RunDirectory(tmp_path / "other", rank=1).logged(2) == set()


def test_a_torn_line_alone_is_dropped_at_any_cut(tmp_path):
    whole = b"".join(json.dumps({"step": step, "loss": 0.5}).encode() + b"\n" for step in (1, 2, 3))
    for cut in range(len(whole) + 1):
        (tmp_path / "m.jsonl").write_bytes(whole[:cut])
        JsonLines(tmp_path / "m.jsonl").truncate(3)
        assert (tmp_path / "m.jsonl").read_bytes() == whole[: whole.rfind(b"\n", 0, cut) + 1]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"st#p": 2}\n{"step": 3}\n')
    with pytest.raises(StorageError, match=r"m\.jsonl:2: not a JSON record"):
        JsonLines(tmp_path / "m.jsonl").truncate(3)


def test_a_damaged_line_after_the_resumed_step_is_dropped_with_the_others(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(b'{"step": 1}\n{"step": 4}\n\0\0\0\n{"step": 2}\n')
    assert JsonLines(tmp_path / "m.jsonl").truncate(3) == {"step": 1}
    assert (tmp_path / "m.jsonl").read_bytes() == b'{"step": 1}\n'


def test_an_evaluation_of_an_old_checkpoint_outlives_a_return_to_a_later_one(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    for step in (20, 40, 60, 20):
        lines.append({"step": step})
    lines.truncate(40)
    lines.append({"step": 41})
    assert [record["step"] for _, record in lines.records()] == [20, 40, 20, 41]


def test_floats_survive_exactly_and_non_finite_ones_stay_readable(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    values = [0.1, 1e-45, 3.4028234663852886e38, float("nan"), float("-inf")]
    lines.append({"step": 1} | {f"v{i}": value for i, value in enumerate(values)})
    found = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=pytest.fail)
    assert [float(found[f"v{i}"]).hex() for i in range(5)] == [value.hex() for value in values]


def test_a_record_without_a_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected an integer 'step'"):
        JsonLines(tmp_path / "m.jsonl").append({"loss": 1.0})


def test_a_removed_run_directory_is_noticed_by_the_next_record(tmp_path):
    directory = RunDirectory(tmp_path / "run", rank=0)
    directory.log({"step": 1})
    for file in (tmp_path / "run").iterdir():
        if file.is_file():
            file.unlink()
    with pytest.raises(
        StorageError, match=r"metrics\.jsonl: removed while the run was writing"
    ) as caught:
        directory.log({"step": 2})
    assert caught.value.exit_code == 74


def test_too_little_space_is_refused_with_needed_and_free_named(tmp_path, monkeypatch):
    monkeypatch.setattr(local.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_500_000))
    with pytest.raises(StorageError, match=r"needs 16\.8 MB, free 1\.5 MB"):
        RunDirectory(tmp_path, rank=0)


def test_a_path_that_cannot_be_a_directory_is_a_storage_error(tmp_path):
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(StorageError, match=r"run.*(ENOTDIR|EEXIST)"):
        RunDirectory(tmp_path / "run", rank=0)
    with pytest.raises(StorageError, match=r"/proc/nowhere"):
        RunDirectory(Path("/proc/nowhere/run"), rank=0)


def test_a_file_system_without_directories_is_named_as_such():
    with pytest.raises(
        StorageError,
        match=r"^pdn\[E-IO\] /proc/runs.*: no directory can be made here \(ENOENT\).*output_dir$",
    ):
        RunDirectory(Path("/proc/runs/x"), rank=0)


def test_the_configuration_of_a_run_cannot_change_except_where_allowed(tmp_path):
    directory = RunDirectory(tmp_path, rank=0)
    config = {
        "seed": 1,
        "trainer": {"steps": 10, "stop_at": 5, "betas": (0.9, 0.95)},
        "logger": {"kind": "none"},
    }
    allowed = {"trainer.stop_at", "logger"}
    record(directory, config, may_change=allowed)
    directory.commit(1, 0, 4, "00")
    record(directory, config, may_change=allowed)
    later = {
        "seed": 1,
        "trainer": {"steps": 10, "stop_at": None, "betas": (0.9, 0.95)},
        "logger": {"kind": "wandb", "name": "x"},
    }
    record(directory, later, may_change=allowed)
    with pytest.raises(
        ConfigError, match=r"seed: recorded 1, now 2; trainer\.steps: recorded 10, now 20"
    ) as caught:
        record(
            directory,
            {**later, "seed": 2, "trainer": {**later["trainer"], "steps": 20}},
            may_change=allowed,
        )
    assert caught.value.exit_code == 78
    with pytest.raises(ConfigError, match=r"trainer\.stop_at_: recorded '\(absent\)', now 3"):
        record(
            directory, {**later, "trainer": {**later["trainer"], "stop_at_": 3}}, may_change=allowed
        )


def test_a_key_that_another_took_the_place_of_is_no_change():
    recorded = {"schema": 2, "trainer": {"steps": 3, "profile_after": None}}
    assert schema.upgraded(recorded, "here") == {"trainer": {"steps": 3}}


@pytest.mark.parametrize(
    "progress", ["a step", "a torn line", "a checkpoint", "a draft of a checkpoint"]
)
def test_the_configuration_may_change_until_there_is_progress(progress, tmp_path):
    directory = RunDirectory(tmp_path, rank=0)
    record(directory, {"seed": 1})
    directory.log({"step": 0, "validation/loss": 5.5})
    for name in (run_directory.TOKENIZER, run_directory.WANDB_RUN_ID):
        (tmp_path / name).write_text("of seed 1")
    record(directory, {"seed": 1})
    # a launch of the same configuration need not repeat it
    assert directory.logged(0) == {"step", "validation/loss"}
    record(directory, {"seed": 2})
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"schema": 2, "seed": 2}
    assert directory.logged(0) == set()
    assert (
        not (tmp_path / run_directory.TOKENIZER).exists()
        and not (tmp_path / run_directory.WANDB_RUN_ID).exists()
    )
    match progress:
        case "a step":
            directory.commit(1, 0, 4, "00")
        case "a torn line":
            (tmp_path / "ledger.jsonl").write_text('{"st')
        case "a checkpoint":
            (directory.checkpoints / "step-00000004").mkdir()
        case "a draft of a checkpoint":
            (directory.checkpoints / "step-00000004.1f.tmp").mkdir()
    with pytest.raises(ConfigError, match=r"RUN-CONFIG-CHANGED.*seed: recorded 2, now 3"):
        record(directory, {"seed": 3})


def test_nothing_waits_at_a_pipe_in_the_place_of_a_file_that_it_writes(tmp_path):
    for name in ("status.json.tmp", "history.jsonl", "run.log"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(OSError, match="not a regular file"):
        local.write_durably(tmp_path / "status.json", b"{}")
    with pytest.raises(StorageError, match=r"history\.jsonl: not a regular file.*move it away"):
        JsonLines(tmp_path / "history.jsonl").append({"step": 0})
    output.open_log(tmp_path / "run.log")  # a convenience: the run goes on without it
    output.close_log()
