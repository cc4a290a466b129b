"""Whole runs: they learn, resume bit by bit, and give the same losses on any number of ranks."""

import json
import math
import os
import re
import shutil
import sys
import time

import pytest
import torch
import yaml

from pdn.checkpoint.manager import Checkpointer
from pdn.errors import ConfigError, DataError, PdnError, StorageError
from pdn.hub.load import load_run
from pdn.optim.schedules import lr_fraction
from pdn.runs.directory import RunDirectory
from pdn.training.fit import fit
from pdn.training.names import directory_of
from pdn.training.trainer import Trainer
from tests.presets import TINY
from tests.small_runs import STEPS, losses, metrics, run_config, train, train_on_ranks

# One of each kind; a variant by a gain or a preconditioner trains by the same code.
KINDS = "comba", "delta_product", "gdn", "hybrid", "mamba2", "pgdn", "pkda", "transformer"


@pytest.mark.parametrize(
    "preset",
    [
        name if name.removesuffix("_tiny") in KINDS else pytest.param(name, marks=pytest.mark.slow)
        for name in TINY
    ],
)
def test_a_run_learns_and_continues_bit_by_bit_where_it_was_stopped(preset, tmp_path):
    whole = losses(train(tmp_path / "whole", preset))
    assert len(whole) == STEPS
    assert sum(whole[-5:]) / 5 < whole[0] - 0.25
    first = losses(train(tmp_path / "parts", preset, "trainer.stop_at=10"))
    assert first == whole[:10]
    assert losses(train(tmp_path / "parts", preset)) == whole
    one, other = (
        load_run(tmp_path / name / "run").model.state_dict() for name in ("whole", "parts")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)
    ledgers = [
        (tmp_path / name / "run" / "ledger.jsonl").read_text() for name in ("whole", "parts")
    ]
    assert ledgers[0] == ledgers[1]


def test_a_run_recorded_before_there_were_groups_and_axes_is_continued(tmp_path, monkeypatch):
    """Continue it though its configuration lacks keys, and its checkpoint numbers its groups."""
    then = "pgdn_tiny", "optim.groups.embeddings.lr_scale=1.0"
    whole = losses(train(tmp_path / "whole", *then))
    with monkeypatch.context() as patched:
        old = [[{"weight_decay": 0.01, "lr": 1e-3}, {"weight_decay": 0.0, "lr": 1e-3}]]
        patched.setattr("pdn.checkpoint.state.named_hyperparameters", lambda *_: old)
        train(tmp_path / "old", *then, "trainer.stop_at=10")
    file = tmp_path / "old" / "run" / "config.yaml"
    recorded = yaml.safe_load(file.read_text())
    del recorded["optim"]["groups"], recorded["optim"]["decay"]
    recorded["parallel"] = {"kind": "auto", "replicas": 1}
    file.write_text(yaml.safe_dump(recorded))
    with pytest.raises(ConfigError, match=r"optim\.decay: recorded 'matrices', now 'all'"):
        train(tmp_path / "old", *then, "optim.decay=all")
    assert losses(train(tmp_path / "old", *then)) == whole


@pytest.mark.parametrize(
    ("preset", "parallel"), [("pgdn_tiny", "fsdp"), ("pgdn_tiny", "ddp"), ("hybrid_tiny", "fsdp")]
)
def test_two_ranks_give_the_losses_of_one(preset, parallel, tmp_path):
    one = losses(train(tmp_path / "one", preset))
    two = losses(train_on_ranks(2, tmp_path / "two", preset, f"parallel={parallel}"))
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) <= 1e-5
    ledgers = [(tmp_path / name / "run" / "ledger.jsonl").read_text() for name in ("one", "two")]
    assert ledgers[0] == ledgers[1]


@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_one_sharded_process_gives_the_losses_of_a_plain_one(parallel, tmp_path):
    plain = losses(train(tmp_path / "plain", "pgdn_tiny"))
    assert (
        losses(train_on_ranks(1, tmp_path / "sharded", "pgdn_tiny", f"parallel={parallel}"))
        == plain
    )


def test_two_ranks_continue_bit_by_bit_where_they_were_stopped(tmp_path):
    whole = losses(train_on_ranks(2, tmp_path / "whole", "pgdn_tiny"))
    train_on_ranks(2, tmp_path / "parts", "pgdn_tiny", "trainer.stop_at=10")
    assert losses(train_on_ranks(2, tmp_path / "parts", "pgdn_tiny")) == whole
    one, other = (
        load_run(tmp_path / name / "run").model.state_dict() for name in ("whole", "parts")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_initial_weights_are_the_same_on_one_and_on_two_ranks(tmp_path):
    stop = "trainer.stop_at=1", "optim.lr=1e-30"
    train(tmp_path / "one", "pkda_tiny", *stop)
    train_on_ranks(2, tmp_path / "two", "pkda_tiny", *stop)
    one, two = (load_run(tmp_path / name / "run").model.state_dict() for name in ("one", "two"))
    for key in one:
        # what lr = 1e-30 may have moved
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-29)


@pytest.mark.parametrize("activation_checkpointing", ["full", "selective"])
def test_recomputing_activations_changes_nothing(activation_checkpointing, tmp_path):
    plain = losses(train(tmp_path / "plain", "pgdn_tiny"))
    again = losses(
        train(
            tmp_path / "again",
            "pgdn_tiny",
            f"parallel.activation_checkpointing={activation_checkpointing}",
        )
    )
    assert plain == again


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses(tmp_path):
    eager = losses(train(tmp_path / "eager", "pgdn_tiny", "trainer.stop_at=5"))
    compiled = losses(
        train(tmp_path / "compiled", "pgdn_tiny", "trainer.stop_at=5", "parallel.compile=true")
    )
    assert max(abs(a - b) for a, b in zip(eager, compiled, strict=True)) <= 1e-5


def test_gradient_accumulation_is_weighted_by_tokens_under_document_isolation(tmp_path):
    isolated = "data.document_isolation=true"
    large = losses(train(tmp_path / "large", "pgdn_tiny", isolated, "trainer.micro_batch_size=8"))
    small = losses(train(tmp_path / "small", "pgdn_tiny", isolated, "trainer.micro_batch_size=1"))
    assert max(abs(a - b) for a, b in zip(large, small, strict=True)) <= 1e-5


def test_the_z_loss_is_weighted_likewise_and_stands_beside_the_cross_entropy(tmp_path):
    words = "data.document_isolation=true", "trainer.stop_at=5"
    plain = train(tmp_path / "plain", "pgdn_tiny", *words)
    runs = {
        size: train(
            tmp_path / size, "pgdn_tiny", *words, f"trainer.micro_batch_size={size}",
            "trainer.z_loss=0.01",
        )
        for size in ("8", "4")
    }  # fmt: skip
    for whole, parts in zip(runs["8"], runs["4"], strict=True):
        for key in ("loss", "z_loss", "grad_norm"):
            assert abs(whole[key] - parts[key]) <= 1e-5
    assert plain[0].keys() == runs["4"][0].keys() - {"z_loss"}
    assert plain[0]["loss"] == runs["4"][0]["loss"]  # of the same weights
    assert losses(plain) != losses(runs["4"])
    # logits of initial weights are small: their logsumexp is the logarithm of the vocabulary
    assert abs(runs["4"][0]["z_loss"] - 0.01 * math.log(320) ** 2) < 0.01


def test_a_finished_run_is_left_untouched_by_another_launch(tmp_path, capsys):
    train(tmp_path, "pgdn_tiny")
    before = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoints").rglob("*")
    }
    train(tmp_path, "pgdn_tiny")
    assert "nothing left to train" in capsys.readouterr().out
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoints").rglob("*")
    }
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"


def test_a_run_says_what_it_was_and_how_it_went(tmp_path, capsys):
    evals = (
        "eval=validation",
        "eval.every=2",
        "eval.max_samples=4",
        "data.validation_fraction=0.2",
    )
    train(tmp_path, "pgdn_tiny", "trainer.stop_at=2", *evals)
    train(tmp_path, "pgdn_tiny", "trainer.stop_at=4", *evals)
    run, out = tmp_path / "run", capsys.readouterr().out
    log = (run / "run.log").read_text().splitlines()
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  .+", line) for line in log)
    assert sum("  model    pgdn_tiny" in line for line in log) == 2, log
    assert next(line[21:] for line in log if "stopped at" in line) == (
        "stopped at step 2: trainer.stop_at"
    )
    first, second = map(json.loads, (run / "history.jsonl").read_text().splitlines())
    assert (first["step"], second["step"]) == (0, 2)
    assert first["versions"]["torch"] == torch.__version__ and sys.orig_argv[0] in first["command"]
    for fragment in ("4 steps, 1,536 tokens", "tokens/s", "best", str(run)):
        assert fragment in out[out.rindex("done:") :]
    assert json.loads((run / "status.json").read_text())["checkpoint"] == 4


def test_the_status_follows_the_steps(tmp_path, monkeypatch):
    monkeypatch.setattr("pdn.runs.directory.STATUS_SECONDS", 0.0)
    directory = RunDirectory(tmp_path, rank=0)
    directory.set_status("running", 0)
    for step in (1, 2):
        directory.log({"step": step, "loss": 1.0})
        assert directory.status()["step"] == step
    directory.log({"step": 2, "checkpoint/step": 2})
    directory.log({"step": 3, "loss": 1.0})
    assert directory.status()["checkpoint"] == 2
    directory.close()


LOST = {
    "removed": lambda run: shutil.rmtree(run / "checkpoints"),
    "renamed": lambda run: (run / "checkpoints").rename(run / "old"),
    "unmarked": lambda run: [file.unlink() for file in run.glob("checkpoints/*/COMMITTED")],
    "removed while it ran": lambda run: (
        shutil.rmtree(run / "checkpoints"),
        (run / "status.json").write_text('{"state": "running", "step": 7}'),
    ),
}


@pytest.mark.parametrize("loss", LOST)
def test_a_run_whose_checkpoints_are_gone_is_refused_and_restarts_only_when_told(
    loss, tmp_path, capsys
):
    train(tmp_path, "pgdn_tiny", "trainer.stop_at=4", "checkpoint.every=2")
    run = tmp_path / "run"
    LOST[loss](run)
    before = {file.name: file.read_bytes() for file in run.glob("*.jsonl")}
    with pytest.raises(StorageError, match=r"CKPT-GONE.*name=.*resume=restart") as caught:
        train(tmp_path, "pgdn_tiny")
    assert caught.value.exit_code == 74
    assert {file.name: file.read_bytes() for file in run.glob("*.jsonl")} == before
    train(tmp_path, "pgdn_tiny", "trainer.stop_at=2", "resume=restart", "seed=5")
    aside = run / "before-restart-1"
    assert {file.name: file.read_bytes() for file in aside.glob("*.jsonl")} == before
    assert f"is in {aside}" in capsys.readouterr().out
    assert len(losses(train(tmp_path, "pgdn_tiny", "trainer.stop_at=4", "seed=5"))) == 4


def test_a_relaunch_by_a_scheduler_continues_what_restart_began(tmp_path, monkeypatch):
    train(tmp_path, "pgdn_tiny", "trainer.stop_at=2", "resume=restart")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    train(tmp_path, "pgdn_tiny", "trainer.stop_at=4", "resume=restart")
    assert not (tmp_path / "run" / "before-restart-1").exists()
    assert len(losses(metrics(tmp_path))) == 4


def test_a_launch_that_failed_before_its_first_step_may_be_corrected(tmp_path, monkeypatch):
    train(tmp_path / "donor", "pgdn_tiny", "trainer.stop_at=1")
    donor, validating = (
        f"init_from={tmp_path / 'donor' / 'run'}",
        ("eval=validation", "eval.max_samples=16", "data.validation_fraction=0.2"),
    )

    def full(*_) -> None:
        raise StorageError("DISK-FULL", "no space for a checkpoint")

    for words, fault, error in [
        (("data.path=nowhere",), None, "E-DATA-MISSING"),
        (("init_from=nowhere",), None, "E-CKPT-ABSENT"),
        ((donor, "model.d_model=32"), None, "E-CKPT-SHAPE"),
        ((donor,), "pdn.checkpoint.manager.Checkpointer.preflight", "E-DISK-FULL"),
        # after the initial weights were evaluated
        (("seed=1", *validating), "pdn.training.trainer.Trainer._next_batch", "E-DISK-FULL"),
    ]:
        with monkeypatch.context() as patched, pytest.raises((PdnError, DataError), match=error):
            if fault is not None:
                patched.setattr(fault, full)
            train(tmp_path, "pgdn_tiny", *words, "resume=never")
    [before] = metrics(tmp_path)
    after, *_ = train(
        tmp_path, "pgdn_tiny", "seed=2", *validating, donor, "resume=never", "trainer.stop_at=2"
    )
    assert (
        before["step"] == after["step"] == 0
        and before["validation/loss"] != after["validation/loss"]
    )
    for words, error in (
        (("seed=3",), "E-RUN-CONFIG-CHANGED"),
        (("seed=2", "resume=never"), "E-RESUME"),
    ):
        with pytest.raises(ConfigError, match=error):
            train(tmp_path, "pgdn_tiny", *validating, donor, *words)


def test_validation_is_logged_at_the_start_at_its_interval_and_at_the_end(tmp_path):
    options = (
        "eval=validation",
        "eval.every=15",
        "eval.batch_size=4",
        "eval.max_samples=32",
        "data.validation_fraction=0.2",
    )
    records = train(tmp_path, "pgdn_tiny", *options)
    found = {
        record["step"]: record["validation/loss"]
        for record in records
        if "validation/loss" in record
    }
    assert list(found) == [0, 15, 20]
    assert found[20] < found[0]


@pytest.mark.parametrize("kind", ["constant", "cosine", "wsd"])
def test_the_schedule_warms_up_and_ends_at_its_final_fraction(kind, tmp_path):
    schedule = run_config(
        tmp_path, "pgdn_tiny", f"schedule={kind}", *["schedule.decay_steps=5"] * (kind == "wsd")
    ).schedule
    rates = [lr_fraction(schedule, step, STEPS) for step in range(STEPS)]
    assert rates[9] == pytest.approx(1.0)
    assert rates[:10] == sorted(rates[:10])
    assert rates[-1] == pytest.approx(schedule.final_lr_fraction)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_runs_of_several_seeds_share_an_order_when_the_data_have_a_seed_of_their_own(tmp_path):
    def ledger(name: str, *overrides: str) -> tuple[str, float]:
        records = train(tmp_path / name, "pgdn_tiny", "trainer.stop_at=2", *overrides)
        line = (tmp_path / name / "run" / "ledger.jsonl").read_text().splitlines()[-1]
        return json.loads(line)["hash"], losses(records)[0]

    first, loss = ledger("first", "seed=1", "data.seed=7")
    second, other_loss = ledger("second", "seed=2", "data.seed=7")
    by_run_seed, _ = ledger("run-seed", "seed=7")
    assert first == second == by_run_seed
    assert loss != other_loss
    assert ledger("other", "seed=2")[0] != first


class WhileOthersWrite(Trainer):
    """Trains while a shard that the run has read gets the time of a write."""

    def train_step(self, batch):
        for shard in self.data.tokenizer_path.parent.glob("*.bin"):
            os.utime(shard)
        return super().train_step(batch)


def test_no_checkpoint_is_written_of_a_run_whose_shards_changed(tmp_path, monkeypatch):
    monkeypatch.setattr("pdn.data.reader.RECHECK_SECONDS", 1e9)
    words = f"data.cache_dir={tmp_path / 'cache'}", "data.max_bytes=60000", "trainer.stop_at=2"
    with pytest.raises(DataError, match=r"E-SHARD-CHANGED\].*shard-00000\.bin: changed"):
        train(tmp_path, "gdn_tiny", *words, trainer_cls=WhileOthersWrite)
    assert list((tmp_path / "run" / "checkpoints").glob("step-*")) == []


def test_a_failing_run_leaves_only_when_the_checkpoint_under_way_is_written(tmp_path, monkeypatch):
    write = Checkpointer._write_shards

    def slowly(self, *arguments):
        time.sleep(1)
        return write(self, *arguments)

    monkeypatch.setattr(Checkpointer, "_write_shards", slowly)
    monkeypatch.setenv("PDN_FAULT", "raise-data@3:0")
    with pytest.raises(Exception, match="injected at data"):
        train(tmp_path, "pgdn_tiny", "checkpoint.every=2", "checkpoint.asynchronous=true")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_program_that_trains_without_the_device_of_its_kernels_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = run_config(tmp_path, "gdn_tiny", "ops.backend=triton")
    with pytest.raises(ConfigError, match=r"found no CUDA device to run its kernels on"):
        fit(config, open_data=lambda *_: pytest.fail("opened data"))
    assert not directory_of(config).exists()
