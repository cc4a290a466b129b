"""A run continued with other ranks, other workers or other settings: the same run, or a refusal."""

import json
import shutil
import socket
import time

from tests.faults import rig
from tests.faults.conftest import amount


def finish(
    home, base, world_size: int, *more: str, stop_at: int | None = None, **environment: str
) -> rig.Launch:
    words = rig.overrides(home, base, *more, *([f"trainer.stop_at={stop_at}"] if stop_at else []))
    started = rig.launch(home, world_size, words, **environment)
    assert started.wait() == [0] * world_size, started.text()
    return started


@amount(1, 3)
def test_two_then_one_then_four_ranks_train_the_same_run(tmp_path, base, reference, table, trials):
    with table(
        "15",
        "ranks 2 → 1 → 4 at a constant global batch; fsdp, ddp, hsdp",
        "ledger complete, losses within 1e-5",
    ) as row:
        largest = 0.0
        for trial in range(trials):
            home, kinds = (
                tmp_path / str(trial),
                (("fsdp", "hsdp"), ("ddp", "fsdp"), ("hsdp", "ddp"))[trial],
            )
            one = "trainer.micro_batch_size=1"
            finish(home, base, 2, f"parallel={kinds[0]}", one, stop_at=8)
            finish(home, base, 1, one, stop_at=16)
            finish(home, base, 4, f"parallel={kinds[1]}", one)
            found, expected = rig.record(home), reference(1)
            assert found.ledger == expected.ledger
            for step, loss in expected.losses.items():
                largest = max(largest, abs(float.fromhex(loss) - float.fromhex(found.losses[step])))
            assert largest <= 1e-5
            row.trials += 1
        row.note = f"largest difference of losses {largest:.1e}"


@amount(None, 2)
def test_the_number_of_loader_workers_may_change(tmp_path, base, reference, table, trials):
    with table("16", "loader threads 0 → 2 → 4", "equal bits") as row:
        for trial in range(trials):
            home, world_size = tmp_path / str(trial), trial + 1
            for workers, stop_at in ((0, 7), (2, 15), (4, None)):
                finish(home, base, world_size, f"data.workers={workers}", stop_at=stop_at)
            assert rig.record(home) == reference(world_size)
            row.trials += 1


CHANGES = {
    "seed=1": ("seed: recorded 0, now 1", 78),
    "data.seq_len=16": ("data.seq_len: recorded 32, now 16", 78),
    "optim.lr=0.5": ("optim.lr: recorded", 78),
    "trainer.global_batch_size=8": ("trainer.global_batch_size: recorded 4, now 8", 78),
    "model.num_layers=1": ("model.num_layers: recorded 2, now 1", 78),
    "data.vocab_size=310": ("310", 78),
}


@amount(1, 6)
def test_a_run_is_not_continued_with_what_defines_it_changed(tmp_path, base, table, trials):
    with table(
        "17",
        "seed, sequence length, model, batch, tokenizer or data files changed",
        "78, old and new values named",
    ) as row:
        home = tmp_path / "run"
        finish(home, base, 1, stop_at=4)
        for change, (message, code) in list(CHANGES.items())[:trials]:
            started = rig.launch(home, 1, rig.overrides(home, base, change))
            assert started.wait() == [code], started.text()
            assert message in started.text(), started.text()
            row.trials += 1
        other = tmp_path / "other"
        shutil.copytree(base / "corpus", other / "corpus")
        with open(other / "corpus" / "corpus.jsonl", "a") as stream:
            stream.write(json.dumps({"text": "one document more " * 40}) + "\n")
        started = rig.launch(home, 1, rig.overrides(home, other))
        assert started.wait() == [78], started.text()
        row.trials += 1


@amount(1, 4)
def test_resuming_three_times_at_step_one_and_over_an_epoch_boundary_equals_one_go(
    tmp_path, base, reference, table, trials
):
    with table(
        "18",
        "stopped and resumed three times, at step 1, over an epoch boundary; a finished run "
        "launched again",
        "equal bits; untouched",
    ) as row:
        short = write_short_corpus(tmp_path / "short")
        for trial in range(trials):
            home, world_size, more = (
                tmp_path / str(trial),
                1 + trial // 2,
                (f"data.path={short}",) if trial % 2 else (),
            )
            for stop_at in (1, 11, 13, None):
                last = finish(home, base, world_size, *more, stop_at=stop_at)
            assert rig.record(home) == reference(world_size, *more)
            before = {
                file: file.stat().st_mtime_ns for file in (home / "run" / "checkpoints").rglob("*")
            }
            last = finish(home, base, world_size, *more)
            assert "nothing left to train" in last.text()
            assert before == {
                file: file.stat().st_mtime_ns for file in (home / "run" / "checkpoints").rglob("*")
            }
            row.trials += 1


def write_short_corpus(directory):
    """Write fewer samples than the run takes: it crosses epochs."""
    rig.write_corpus(directory)
    lines = (directory / "corpus.jsonl").read_text().splitlines(keepends=True)
    (directory / "corpus.jsonl").write_text("".join(lines[:16]))
    return directory


@amount(1, 4)
def test_a_dead_wandb_server_changes_nothing(tmp_path, base, reference, table, trials):
    with table(
        "19",
        "wandb refused, silent, with a wrong key, without one",
        "start ≤ 5 s later, equal bits, metrics.jsonl complete, canary secrets in no file",
    ) as row:
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen(16)
            urls = ["http://127.0.0.1:1", f"http://127.0.0.1:{silent.getsockname()[1]}"] * 2
            took = []
            for trial in range(trials):
                home = tmp_path / str(trial)
                key = "" if trial == 3 else "canary" + "7" * 34
                began = time.monotonic()
                canaries = {
                    "HF_TOKEN": "hf_canary" + "8" * 27,
                    "AWS_SECRET_ACCESS_KEY": "canary" + "9" * 34,
                    "WANDB_API_KEY": key,
                }
                started = rig.launch(
                    home,
                    1,
                    rig.overrides(home, base, "logger=wandb"),
                    WANDB_BASE_URL=urls[trial],
                    **canaries,
                )
                while not started.poll() and rig.computed_step(home) < 1:
                    time.sleep(0.01)
                took.append(time.monotonic() - began)
                assert started.wait() == [0], started.text()
                assert rig.record(home) == reference(1)
                secrets = [secret.encode() for secret in canaries.values() if secret]
                written = [file for file in home.rglob("*") if file.is_file()]
                assert not [
                    file for file in written for secret in secrets if secret in file.read_bytes()
                ]
                assert took[-1] < 5 + 10
                row.trials += 1
        row.note = f"first step after {max(took):.1f} s at the latest"
