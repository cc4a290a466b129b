"""Runs that carry recurrent states from step to step: kills, other numbers of ranks, refusals."""

import json

import pytest

from pdn.data import open_data
from pdn.runs import faults
from pdn.runs.ancestry import check
from pdn.training.fit import fit
from tests.data.corpus import documents, tokenizer
from tests.small_runs import losses, run_config, train, train_on_ranks

# Three steps of two windows each; 4 rows
CARRY = "data.carry_windows=6", "data.carry_horizon=2", "data.seq_len=16", "trainer.steps=7"
CARRY += "trainer.micro_batch_size=1", "schedule.warmup_steps=2"
ISOLATED = "data.document_isolation=true"


def states(directory, step: int) -> dict:
    """Return dtype and shape of the states in a checkpoint."""
    path = directory / "run" / "checkpoints" / f"step-{step:08d}"
    saved = json.loads((path / "manifest.json").read_text())["tensors"]
    return {name: entry for name, entry in saved.items() if name.startswith("carried.")}


def ledger(directory) -> str:
    return (directory / "run" / "ledger.jsonl").read_text()


def test_a_run_that_stopped_within_segments_goes_on_bit_by_bit(tmp_path):
    saves = "checkpoint.every=6", "checkpoint.keep_last=9"
    whole = train(tmp_path / "whole", "pgdn_tiny", *CARRY, ISOLATED, *saves)
    train(tmp_path / "parts", "pgdn_tiny", *CARRY, ISOLATED, *saves, "trainer.stop_at=2")
    parts = train(tmp_path / "parts", "pgdn_tiny", *CARRY, ISOLATED, *saves)
    assert losses(parts) == losses(whole) and len(losses(whole)) == 7
    assert ledger(tmp_path / "parts") == ledger(tmp_path / "whole")
    # after step 6 every row begins a segment, for which nothing has to be kept
    assert states(tmp_path / "parts", 2) and not states(tmp_path / "parts", 6)
    assert states(tmp_path / "parts", 2)["carried.0.recurrent.S"] == ["float32", [4, 2, 16, 16]]


def test_any_number_of_ranks_keeps_every_rows_state(tmp_path):
    whole = train(tmp_path / "one", "pgdn_tiny", *CARRY)
    stop = "trainer.stop_at=4"
    train_on_ranks(2, tmp_path / "many", "pgdn_tiny", *CARRY, stop)
    many = train_on_ranks(4, tmp_path / "many", "pgdn_tiny", *CARRY)
    assert losses(many) == pytest.approx(losses(whole), rel=0, abs=1e-5)
    assert ledger(tmp_path / "many") == ledger(tmp_path / "one")


def test_states_pass_from_step_to_step_as_they_do_within_one(tmp_path):
    """Three steps of two windows, at a learning rate of nothing, have the losses of one of six."""
    still = *CARRY, "optim.lr=1e-20", "schedule.warmup_steps=0", "trainer.z_loss=0.01"
    three = train(tmp_path / "three", "gdn_tiny", *still, "trainer.stop_at=3")
    wider = "data.carry_horizon=6", "trainer.global_batch_size=24", "trainer.stop_at=1"
    one = train(tmp_path / "one", "gdn_tiny", *still, *wider)
    for key in ("loss", "z_loss"):
        [expected] = [record[key] for record in one if key in record]
        found = [record[key] for record in three if key in record]
        assert sum(found) / len(found) == pytest.approx(
            expected, rel=0, abs=3e-6
        )  # six units in float32's last place


@pytest.mark.parametrize(
    ("preset", "options", "message"),
    [
        ("hybrid_tiny", [], r"data.carry_windows = 6 with model.mixers.attention"),
        ("pgdn_tiny", ["parallel.context=2"], "with parallel.context = 2"),
        ("pgdn_tiny", ["trainer.micro_batch_size=8"], "data.carry_horizon x trainer.micro"),
        ("pgdn_tiny", ["phases=[{until: 3, seq_len: 8}, {}]"], r"phases\[0\]: seq_len with"),
    ],
)
def test_what_cannot_carry_states_is_refused_with_the_reason(preset, options, message, tmp_path):
    with pytest.raises(Exception, match=message):
        run_config(tmp_path, preset, *CARRY, *options)


def test_a_dry_run_says_what_the_states_cost(tmp_path, capsys):
    config = run_config(tmp_path, "pgdn_tiny", *CARRY, "trainer.dry_run=true")
    model = config.model.model_copy(update={"vocab_size": 320})  # or the data would be read for it
    fit(config.model_copy(update={"model": model}), open_data=open_data)
    said = capsys.readouterr().out
    assert "carried    4 rows of 6 windows, gradient through 2 windows" in said


@pytest.mark.slow
def test_a_branch_that_changes_nothing_takes_the_states_along(tmp_path):
    whole = train(tmp_path / "whole", "pgdn_tiny", *CARRY)
    train(tmp_path / "trunk", "pgdn_tiny", *CARRY, "trainer.stop_at=4")
    branch = train(tmp_path, "pgdn_tiny", *CARRY, f"branch_from={tmp_path}/trunk/run@4")
    assert losses(branch) == losses(whole)[4:]


@pytest.mark.slow
def test_a_branch_may_begin_to_carry_states_and_stop(tmp_path):
    plain = *CARRY, "data.unit_tokens=96", "data.carry_windows=null", "data.carry_horizon=null"
    train(tmp_path / "trunk", "pgdn_tiny", *plain, "trainer.stop_at=3")
    train(tmp_path / "carries", "pgdn_tiny", *CARRY, f"branch_from={tmp_path}/trunk/run@3",
          "trainer.stop_at=5")  # fmt: skip
    train(tmp_path / "stops", "pgdn_tiny", *plain, f"branch_from={tmp_path}/carries/run@5",
          "trainer.stop_at=6")  # fmt: skip
    assert "none twice within an epoch" in check(tmp_path / "stops" / "run")[0]


@pytest.mark.slow
def test_a_loss_spike_within_segments_goes_on_with_new_ones(tmp_path, monkeypatch):
    """Rewound from step 20 to 17, of which the checkpoint had states; none fits what follows."""
    saves = "trainer.steps=26", "checkpoint.every=17", "checkpoint.keep_last=9"
    words = *CARRY, ISOLATED, *saves, "trainer.spike_threshold=1"
    monkeypatch.setenv("PDN_FAULT", "spike@20:0")
    whole = train(tmp_path / "whole", "pgdn_tiny", *words)
    monkeypatch.setattr(faults, "_struck", set())
    train(tmp_path / "parts", "pgdn_tiny", *words, "trainer.stop_at=22")
    monkeypatch.setenv("PDN_FAULT", "")
    parts = train(tmp_path / "parts", "pgdn_tiny", *words)
    assert losses(parts) == losses(whole)
    assert not states(tmp_path / "whole", 17)
    lines = [json.loads(line) for line in ledger(tmp_path / "whole").splitlines()]
    assert [line for line in lines if "skipped_first" in line] == [
        {"step": 17, "skipped_first": 136, "skipped_end": 168}
    ]
    assert ledger(tmp_path / "parts") == ledger(tmp_path / "whole")
    assert "none twice within an epoch" in check(tmp_path / "whole" / "run")[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["phases", "stream"])
def test_a_stream_and_phases_of_the_rate_carry_states_too(kind, tmp_path):
    words = CARRY
    if kind == "phases":
        words += ("phases=[{until: 2, lr_scale: 0.5}, {until: 5, lr_scale: 2.0}]",)
    else:
        text, file = tmp_path / "text", tmp_path / "tokenizer.json"
        text.mkdir()
        lines = [json.dumps({"text": text}) for text in documents(400)]
        (text / "a.jsonl").write_text("\n".join(lines) + "\n")
        file.write_bytes(tokenizer().content)
        words += ("data=stream_local", f"data.path={text}", f"data.tokenizer={file}",
                  "data.shard_tokens=512", "data.block_shards=2", "data.max_epochs=100",
                  "data.validation_documents=20", "data.processes=1")  # fmt: skip
    whole = train(tmp_path / "whole", "pgdn_tiny", *words, ISOLATED)
    train(tmp_path / "parts", "pgdn_tiny", *words, ISOLATED, "trainer.stop_at=2")
    parts = train(tmp_path / "parts", "pgdn_tiny", *words, ISOLATED)
    assert losses(parts) == losses(whole) and len(losses(whole)) == 7
    assert ledger(tmp_path / "parts") == ledger(tmp_path / "whole")
    assert "none twice within an epoch" in check(tmp_path / "whole" / "run")[0]
