"""Tasks in a training run: at their interval, on any number of ranks.

They are checked before the model is built.
"""

import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import scripts.evaluate
from pdn.distributed.world import World
from pdn.errors import ConfigError, DataError, StorageError
from pdn.evals import suites
from pdn.evals.evaluation import attempt
from pdn.evals.probes import state_tracking
from pdn.evals.validation import evaluate
from pdn.hub.load import load_run
from pdn.logging.loggers import Silent
from pdn.runs.records import read_metrics
from pdn.runs.sequences import read_sequences
from tests.evals.subjects import multiple_choice
from tests.presets import small_model
from tests.ranks import run_ranks
from tests.small_runs import run_config, train, train_on_ranks

READ = suites._read_yaml
TINY_S3 = dict(steps=20, batch_size=4, train_length=8, lengths=[8], examples=4)
OPTIONS = (
    "trainer.steps=3",
    "schedule.warmup_steps=1",
    "data.validation_fraction=0.2",
    "eval.batch_size=4",
)


@pytest.fixture(autouse=True)
def little_text(monkeypatch):
    """Take two lengths, and of the validation text what fills the longer one."""
    read = suites._read_yaml
    short = {
        "length": {"multiples": [1, 4]},
        "positions": {"length": 96, "reset": 48, "first_end": 48, "max_tokens": 1920},
    }
    monkeypatch.setattr(
        suites,
        "_read_yaml",
        lambda file: (content := read(file)) | short.get(content.get("kind"), {}),
    )
    monkeypatch.setattr("pdn.evals.probes.length.LengthProbe._available", lambda self, subject: 192)


def scores(records: list[dict]) -> dict[int, dict[str, float]]:
    """Return, by step, what the tasks gave."""
    found: dict[int, dict[str, float]] = {}
    for record in records:
        chosen = {key: value for key, value in record.items() if key.startswith("evaluation/")}
        if chosen:
            found[record["step"]] = chosen
    return found


@pytest.mark.slow
def test_tasks_run_at_their_interval_and_after_the_last_step_alike_on_two_ranks(tmp_path):
    tasks = ("eval.tasks=[length,positions]", "eval.tasks_every=2")
    one = scores(train(tmp_path / "one", "hybrid_tiny", *OPTIONS, *tasks))
    assert list(one) == [2, 3]
    lengths = [48 * multiple for multiple in (1, 4)]
    assert set(one[3]) == {
        f"evaluation/length/{name}@{n}"
        for name in ("loss", "perplexity", "tail_loss", "position_loss")
        for n in lengths
    } | {
        f"evaluation/positions/{name}{at}"
        for name in ("loss", "reset_loss")
        for at in ("", "@48", "@96")
    }
    assert one[2] != one[3]
    two = scores(
        train_on_ranks(
            2, tmp_path / "two", "hybrid_tiny", *OPTIONS, *tasks, "parallel=fsdp", start="fork"
        )
    )
    assert list(two) == [2, 3]
    for key, value in one[3].items():
        assert two[3][key] == pytest.approx(value, rel=1e-5), key


def test_evaluating_tasks_leaves_the_training_as_it_was(tmp_path):
    plain = train(tmp_path / "plain", "pgdn_tiny", *OPTIONS)
    evaluated = train(
        tmp_path / "evaluated", "pgdn_tiny", *OPTIONS, "eval.tasks=[length]", "eval.tasks_every=2"
    )
    assert [r["loss"] for r in plain if "loss" in r] == [
        r["loss"] for r in evaluated if "loss" in r
    ]


def test_a_wrong_task_stops_the_run_before_it_begins(tmp_path):
    with pytest.raises(ConfigError, match=r"lenght.*did you mean length"):
        train(tmp_path, "pgdn_tiny", *OPTIONS, "eval.tasks=[lenght]")
    with pytest.raises(ConfigError, match=r"needle: haystack = text.*scripts/evaluate\.py only"):
        train(tmp_path, "pgdn_tiny", *OPTIONS, "eval.tasks=[needle_2]")
    fixtures = Path(__file__).parent.parent / "fixtures" / "eval"
    with pytest.raises(ConfigError, match="max_length = 48: the task generates 48 tokens"):
        train(
            tmp_path,
            "pgdn_tiny",
            *OPTIONS,
            "eval.tasks=[squad_answers]",
            f"eval.data_dir={fixtures}",
        )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_text_too_short_for_its_task_stops_the_run_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.undo()
    (tmp_path / "short.txt").write_text("a few words " * 20)
    with pytest.raises(
        ConfigError, match=r"length: found \d+ tokens of validation text .*; expected at least 768"
    ):
        train(
            tmp_path,
            "pgdn_tiny",
            *OPTIONS,
            "eval.tasks=[length]",
            f"data.validation={tmp_path}/short.txt",
        )
    with pytest.raises(
        ConfigError,
        match=r"needle: found a length of 64 tokens, and the question alone takes \d+; expected",
    ):
        monkeypatch.setattr(suites, "_read_yaml", with_short_needles(suites._read_yaml))
        train(tmp_path, "pgdn_tiny", *OPTIONS, "eval.tasks=[needle_1]")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def with_short_needles(read):
    return lambda file: read(file) | ({"lengths": [512, 64]} if file.stem == "needle_1" else {})


def broken_task(folder: Path) -> str:
    """Write a task whose second document has an empty answer; return its path."""
    documents = [{"q": "The king", "choices": [first, " ship"], "gold": 0} for first in (" a", "")]
    return multiple_choice(folder, documents)


def test_a_failing_task_is_reported_with_its_document_and_training_goes_on(tmp_path, capsys):
    tasks = (f"eval.tasks=[length,{broken_task(tmp_path)}]", "eval.tasks_every=2")
    records = train(tmp_path, "pgdn_tiny", *OPTIONS, *tasks)
    found = scores(records)
    assert list(found) == [2, 3] and all(found[s]["evaluation/failed"] == 1 for s in found)
    assert "evaluation/length/loss@48" in found[2]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3]
    said = capsys.readouterr().out
    assert "choices: document 1: the answer '' has no tokens" in said
    assert "training goes on (eval.on_error=continue)" in said
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    train(tmp_path, "pgdn_tiny", *OPTIONS, *tasks)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_loggers_get_tables_of_results_and_of_written_text(tmp_path, monkeypatch):
    seen = []

    class Listener(Silent):
        def log_table(self, step, name, columns, rows):
            seen.append((step, name, columns, rows))

    monkeypatch.setattr("pdn.training.trainer.open_logger", lambda *a, **k: Listener())
    records = train(tmp_path, "pgdn_tiny", *OPTIONS, "eval.tasks=[continuations]")
    (_, name, columns, rows), (step, samples, asked, texts) = seen
    assert (step, name, samples) == (3, "evaluation/results", "evaluation/samples")
    assert rows[0][:2] == ["continuations", "tokens"] and columns[0] == "task"
    assert [row[asked.index("asked")] for row in texts][:2] == ["", "The"]
    assert len({row[asked.index("answered")] for row in texts}) == 5
    assert set(scores(records)[3]) == {
        "evaluation/continuations/tokens",
        "evaluation/continuations/tokens_stderr",
    }


def test_a_failing_task_stops_the_training_where_that_is_asked_for(tmp_path):
    tasks = (f"eval.tasks=[{broken_task(tmp_path)}]", "eval.tasks_every=2", "eval.on_error=stop")
    with pytest.raises(DataError, match=r"choices: document 1.*\(eval\.on_error=stop\)"):
        train(tmp_path, "pgdn_tiny", *OPTIONS, *tasks)
    assert list(scores(read_metrics(tmp_path / "run"))) == [2]
    assert (
        tmp_path / "run" / "checkpoints" / "step-00000002"
    ).is_dir()  # its writing was under way


def test_a_validation_that_fails_on_one_rank_fails_on_all_and_training_goes_on(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("PDN_FAULT", "raise-eval@2:1")
    records = train_on_ranks(
        2, tmp_path, "pgdn_tiny", *OPTIONS, "eval.every=1", "parallel=fsdp", start="fork"
    )
    losses = {r["step"]: r.get("validation/loss") for r in records if "validation/loss" in r}
    assert list(losses) == [1, 3]
    assert [r["step"] for r in records if "validation/failed" in r] == [2]
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3]
    # the losses of the last one's sequences, of both ranks
    sequences = read_sequences(tmp_path / "run", 3, "validation")
    sums = [sum(column) for column in zip(*sequences.values(), strict=True)]
    assert sums[0] / sums[1] == pytest.approx(losses[3], abs=1e-5) and len(sequences) > 8
    assert read_sequences(tmp_path / "run", 2, "validation") is None


def test_a_document_that_cannot_be_read_on_one_rank_ends_the_validation_on_all(tmp_path):
    model = small_model("pgdn_tiny").float()

    def batches(rank: int):
        for number in range(3):
            if (rank, number) == (1, 1):
                raise DataError("SHARD", "shard 7, byte 12: damaged")
            yield {key: torch.ones(1, 8, dtype=torch.int64) for key in ("tokens", "labels")}

    def work(rank: int) -> str:
        failed: dict[str, str] = {}
        world = World(rank, 2, torch.device("cpu"))
        attempt(lambda: evaluate(model, batches(rank), world, bf16=False), "validation", failed)
        return failed["validation"]

    assert run_ranks(2, work, tmp_path) == ["validation: shard 7, byte 12: damaged"] * 2


def test_a_continued_run_does_without_the_tasks_whose_data_have_gone(tmp_path, monkeypatch):
    missing = StorageError("EVAL-DATA", "length: its data cannot be had")
    train(tmp_path, "pgdn_tiny", *OPTIONS, "trainer.stop_at=1")

    def gone(*arguments):
        raise missing

    monkeypatch.setattr("pdn.evals.in_loop.prepare", gone)
    with pytest.raises(StorageError, match="cannot be had"):
        train(tmp_path / "new", "pgdn_tiny", *OPTIONS, "eval.tasks=[length]")
    with pytest.raises(StorageError, match="cannot be had"):
        train(tmp_path, "pgdn_tiny", *OPTIONS, "eval.tasks=[length]", "eval.on_error=stop")
    records = train(tmp_path, "pgdn_tiny", *OPTIONS, "eval.tasks=[length]")
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3]


def test_a_task_knows_the_seed_of_the_run_in_it_and_after_it(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        state_tracking.StateTrackingProbe, "run", lambda self, who: seen.append(who.seed) or {}
    )
    train(tmp_path, "gdn_tiny", *OPTIONS, "eval.tasks=[s3]", "trainer.steps=1", "seed=5")
    assert seen == [5]
    assert scripts.evaluate.seed_of(load_run(tmp_path / "run")) == 5


def test_an_interval_without_tasks_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="tasks_every = 2 without suite and tasks"):
        run_config(tmp_path, "pgdn_tiny", "eval.tasks_every=2")


@pytest.mark.slow  # as many seconds as it takes to be sure on a busy machine
def test_a_task_may_take_longer_than_a_step(tmp_path, monkeypatch):
    made = state_tracking.words

    def slow(*arguments):
        time.sleep(1)
        return made(*arguments)

    monkeypatch.setattr(
        suites, "_read_yaml", lambda file: READ(file) | (TINY_S3 if file.stem == "s3" else {})
    )
    monkeypatch.setattr(state_tracking, "words", slow)  # 20 times
    options = (*OPTIONS, "eval.tasks=[s3]", "trainer.stall_timeout=15")
    assert list(scores(train_on_ranks(1, tmp_path, "pgdn_tiny", *options, start="fork"))) == [3]


@pytest.mark.parametrize(  # a step of the interval, and the last one
    ("step", "ranks"),
    [(3, 1), (2, 2), *(pytest.param(*other, marks=pytest.mark.slow) for other in [(2, 1), (3, 2)])],
)
def test_a_stop_in_a_task_is_heard_and_the_next_launch_evaluates(
    step, ranks, tmp_path, monkeypatch
):
    tasks = (*OPTIONS, "eval.tasks=[s3]", "eval.tasks_every=2")
    made = state_tracking.words

    def interrupted(*arguments):
        if (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").exists() and not (
            tmp_path / "asked"
        ).exists():
            (tmp_path / "asked").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return made(*arguments)

    monkeypatch.setattr(
        suites, "_read_yaml", lambda file: READ(file) | (TINY_S3 if file.stem == "s3" else {})
    )
    monkeypatch.setattr(state_tracking, "words", interrupted)
    launch = partial(train_on_ranks, ranks, start="fork")
    assert step not in scores(launch(tmp_path, "pgdn_tiny", *tasks, codes=[75] * ranks))
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("preempted", step, 75)
    records = launch(tmp_path, "pgdn_tiny", *tasks)
    assert list(scores(records)) == [2, 3]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3]
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    launch(tmp_path, "pgdn_tiny", *tasks)  # nothing is left
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
