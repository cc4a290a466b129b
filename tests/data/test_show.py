"""show.py prints what a run's ledger says it consumed."""

import json

import pytest

from data import show
from pdn.errors import ConfigError, DataError
from tests.small_runs import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    train(directory, "pgdn_tiny", "trainer.steps=3", "schedule.warmup_steps=1")
    return directory / "run"


def lines(run) -> list[dict]:
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]


def test_a_step_of_a_run_is_what_its_ledger_has(run, capsys):
    show.main([str(run), "--step", "2", "--sample", "5"])
    said = capsys.readouterr().out
    assert (
        "step 2: samples 8 to 15, as the ledger has them" in said
        and "--- sample 13: data sample 13, epoch 0, 48 tokens" in said
    )


def test_samples_that_a_rewind_skipped_are_not_shown(run, tmp_path, capsys):
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "config.yaml").write_text((run / "config.yaml").read_text())
    first, second, third = lines(run)
    kept = [
        first,
        {"step": 1, "skipped_first": 8, "skipped_end": 16},
        {**second, "first": 16, "end": 24},
    ]
    (copy / "ledger.jsonl").write_text("".join(json.dumps(k) + "\n" for k in kept))
    with pytest.raises(
        DataError, match=r"INSPECT-LEDGER.*not the data that the run was trained on"
    ):
        show.main([str(copy), "--step", "2"])
    show.main([str(copy), "--step", "1", "--sample", "0"])
    third = {**third, "hash": "0" * 32}
    (copy / "ledger.jsonl").write_text("".join(json.dumps(k) + "\n" for k in (first, third)))
    with pytest.raises(DataError, match=third["hash"]):
        show.main([str(copy), "--step", "3"])


@pytest.mark.parametrize("step", ["4", "1000"])
def test_a_step_that_was_not_made_is_refused(run, step):
    with pytest.raises(
        DataError, match=rf"INSPECT-STEP.*has no step {step}; expected one of the 3"
    ):
        show.main([str(run), "--step", step])


def test_what_is_no_run_and_no_data_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"INSPECT-RUN.*No such file.*give runs/<name>"):
        show.main([str(tmp_path), "--step", "1"])
    (tmp_path / "config.yaml").write_text("data: 3\n")
    with pytest.raises(DataError, match="INSPECT-RUN"):
        show.main([str(tmp_path), "--step", "1"])
    with pytest.raises(ConfigError, match="CONFIG-GROUP"):
        show.main(["data=none_such", "--step", "1"])


def test_generated_data_are_shown_as_numbers(capsys):
    sizes = [
        "trainer.global_batch_size=2",
        "trainer.micro_batch_size=2",
        "data.seq_len=16",
        "data.num_pairs=2",
        "data.vocab_size=40",
    ]
    show.main(["data=mqar", *sizes, "--step", "1"])
    assert capsys.readouterr().out.count("16 tokens, 2 labels") == 2
