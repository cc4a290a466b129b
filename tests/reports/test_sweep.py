"""A grid of runs: killed in the middle it goes on, and its table says where each trial stands."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pdn.cli.options import parse
from pdn.errors import ConfigError
from pdn.reports.sweep import best_rates, grid_of, rows, write_csv
from pdn.reports.trials import Trial, run_trials
from scripts import sweep
from tests.children import PYTHON_PATH

ROOT = Path(__file__).parents[2]
WORDS = ["model=gdn_tiny,pgdn_tiny", "optim.lr=1e-3,2e-3", "seed=1,2", "trainer.steps=4"]


def finish(directory: Path, name: str, loss: float) -> None:
    run = directory / name
    run.mkdir(parents=True)
    (run / "status.json").write_text(json.dumps({"state": "finished", "step": 4}))
    lines = [{"step": 4, "loss": 5.0}, {"step": 4, "validation/loss": loss}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_grid_is_the_product_of_its_values_and_brackets_part_none():
    grid = grid_of([*WORDS, "eval.tasks=[a,b]", "trainer.log_every={steps:1}"])
    assert list(grid.trials)[:2] == ["gdn_tiny-lr1e_3-seed1", "gdn_tiny-lr1e_3-seed2"]
    assert len(grid.trials) == 8
    trial = grid.as_trials()[-1]
    assert trial.name == "pgdn_tiny-lr2e_3-seed2"
    assert trial.words[:3] == ("trainer.steps=4", "eval.tasks=[a,b]", "trainer.log_every={steps:1}")
    assert trial.words[3:] == ("model=pgdn_tiny", "optim.lr=2e-3", "seed=2")
    assert list(grid_of([*WORDS, "model=kda_tiny", "seed=1"]).trials) == ["lr1e_3", "lr2e_3"]
    for wrong in (["seed=1,1"], ["seed"]):
        with pytest.raises(ConfigError):
            grid_of(wrong)


def test_the_table_says_where_each_trial_stands_and_each_model_has_a_rate_of_its_own(tmp_path):
    grid = grid_of(WORDS)
    losses = {"gdn_tiny": {"1e_3": 3.0, "2e_3": 3.2}, "pgdn_tiny": {"1e_3": 3.1, "2e_3": 2.9}}
    for model, by_rate in losses.items():
        for rate, loss in by_rate.items():
            for seed in (1, 2):
                finish(tmp_path, f"{model}-lr{rate}-seed{seed}", loss + 0.01 * seed)
    whole = rows(grid, tmp_path, "validation/loss")
    found = {
        best.arm: (best.rate, best.at_edge) for best in best_rates(whole, grid, "validation/loss")
    }
    assert found == {"gdn_tiny": (1e-3, True), "pgdn_tiny": (2e-3, True)}
    for name, status in {
        "pgdn_tiny-lr2e_3-seed1": {"state": "preempted"},
        "pgdn_tiny-lr2e_3-seed2": {"state": "failed", "reason": "pdn[E-X] why"},
    }.items():
        (tmp_path / name / "status.json").write_text(json.dumps(status))
    table = rows(
        grid, tmp_path, "validation/loss", running=["gdn_tiny-lr1e_3-seed1"],
        failed={"gdn_tiny-lr1e_3-seed2": "exit code 70"},
    )  # fmt: skip
    write_csv(table, tmp_path / "sweep.csv")
    with open(tmp_path / "sweep.csv", newline="") as file:
        read = {row["trial"]: (row["state"], row["reason"]) for row in csv.DictReader(file)}
    assert read["gdn_tiny-lr1e_3-seed1"] == ("running", "")
    assert read["gdn_tiny-lr1e_3-seed2"] == ("failed", "exit code 70")
    assert read["pgdn_tiny-lr2e_3-seed1"] == ("interrupted", "")
    assert read["pgdn_tiny-lr2e_3-seed2"] == ("failed", "pdn[E-X] why")
    # a rate that lacks a seed does not count
    assert [b.rate for b in best_rates(table, grid, "validation/loss")] == [2e-3, 1e-3]


def test_the_trials_under_way_have_devices_of_their_own(tmp_path):
    show = "import os, sys; print('sees', os.environ['CUDA_VISIBLE_DEVICES']); sys.exit(78)"
    trials = [Trial(name, ()) for name in "ab"]
    outcome = run_trials(
        lambda finished: trials, tmp_path, slots=2, seconds=None, say=lambda line: None,
        command=[sys.executable, "-c", show], devices=["4", "5", "6", "7"],
    )  # fmt: skip
    assert outcome.failed == {"a": "exit code 78: sees 4,5", "b": "exit code 78: sees 6,7"}
    with pytest.raises(ConfigError, match="3 devices for 2 slots"):
        run_trials(lambda f: [], tmp_path, slots=2, seconds=None, devices=["0", "1", "2"])


def test_the_tasks_of_an_array_run_one_trial_each_and_the_table_is_made_by_itself(
    tmp_path, command
):
    words = ["model=gdn_tiny,pgdn_tiny", "optim.lr=2e-3", "seed=1", f"runs={tmp_path}/runs"]
    sweep.main([*words, "slots=3", f"array={tmp_path}/job.sbatch"])
    text = (tmp_path / "job.sbatch").read_text()
    assert "#SBATCH --array=0-1%3" in text and f'runs={tmp_path}/runs only="$SLURM_ARRAY' in text
    assert subprocess.run(["bash", "-n", tmp_path / "job.sbatch"]).returncode == 0
    assert not (tmp_path / "runs").exists()
    options = parse(sweep.Options, [f"runs={tmp_path}/runs", "only=1"])
    grid = grid_of(words[:3])
    sweep.run(grid, options, tuple(command))
    assert not (tmp_path / "runs" / "sweep.csv").exists()
    sweep.run(grid, options.model_copy(update={"only": ("none",)}), tuple(command))
    with open(tmp_path / "runs" / "sweep.csv", newline="") as file:
        states = {row["trial"]: row["state"] for row in csv.DictReader(file)}
    assert states == {"gdn_tiny": "waiting", "pgdn_tiny": "finished"}
    with pytest.raises(ConfigError, match="found 7; expected numbers of a grid's trials, 0 to 1"):
        sweep.main([*words, "only=7"])


@pytest.mark.slow
def test_a_sweep_killed_in_the_middle_goes_on_where_it_was(tmp_path):
    words = [
        *WORDS, "data=text", "data.max_bytes=100000", "data.vocab_size=300", "data.seq_len=32",
        "trainer.global_batch_size=2", "trainer.micro_batch_size=2", "schedule.warmup_steps=1",
        "model.num_layers=1", "logger=none", "eval.every=4", "eval.batch_size=2", "slots=2",
        "eval.max_samples=2", f"data.cache_dir={tmp_path}/cache", f"runs={tmp_path}/runs",
    ]  # fmt: skip
    command = [sys.executable, "scripts/sweep.py", *words]
    environment = os.environ | {"PYTHONPATH": PYTHON_PATH}
    log = tmp_path / "log"

    def states() -> dict[str, str]:
        file = tmp_path / "runs" / "sweep.csv"
        if not file.exists():
            return {}
        with open(file, newline="") as table:
            return {row["trial"]: row["state"] for row in csv.DictReader(table)}

    with open(log, "wb") as out:
        first = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
    deadline = time.monotonic() + 400
    while list(states().values()).count("finished") < 2:
        assert first.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = [name for name, state in states().items() if state == "finished"]
    assert 2 <= len(done) < 8
    histories = {name: tmp_path / "runs" / name / "history.jsonl" for name in done}
    before = {name: file.read_text() for name, file in histories.items()}
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert set(states().values()) == {"finished"} and len(states()) == 8
    assert {name: file.read_text() for name, file in histories.items()} == before
    assert "best learning rate of gdn_tiny" in again.stdout
    assert (tmp_path / "runs" / "rates.png").stat().st_size > 1000
