"""Tasks in a training run: at their interval, on any number of ranks, and checked before the model
is built.
"""

import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from pdn.errors import ConfigError
from pdn.evals import suites
from pdn.evals.probes import state_tracking
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
    """Two lengths, and of the validation text what fills the longer one."""
    read = suites._read_yaml
    short = {"length": {"multiples": [1, 4]}}
    monkeypatch.setattr(
        suites,
        "_read_yaml",
        lambda file: (content := read(file)) | short.get(content.get("kind"), {}),
    )
    monkeypatch.setattr("pdn.evals.probes.length.LengthProbe._available", lambda self, subject: 192)


def scores(records: list[dict]) -> dict[int, dict[str, float]]:
    """By step, what the tasks gave."""
    found: dict[int, dict[str, float]] = {}
    for record in records:
        chosen = {key: value for key, value in record.items() if key.startswith("evaluation/")}
        if chosen:
            found[record["step"]] = chosen
    return found


def test_tasks_run_at_their_interval_and_after_the_last_step_alike_on_two_ranks(tmp_path):
    tasks = ("eval.tasks=[length]", "eval.tasks_every=2")
    one = scores(train(tmp_path / "one", "hybrid_tiny", *OPTIONS, *tasks))
    assert list(one) == [2, 3]
    lengths = [48 * multiple for multiple in (1, 4)]
    assert set(one[3]) == {
        f"evaluation/length/{name}@{n}"
        for name in ("loss", "perplexity", "tail_loss")
        for n in lengths
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


def test_an_interval_without_tasks_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="tasks_every = 2 without suite and tasks"):
        run_config(tmp_path, "pgdn_tiny", "eval.tasks_every=2")


def test_a_task_may_take_longer_than_a_step(tmp_path, monkeypatch):
    made = state_tracking.words

    def slow(*arguments):
        time.sleep(0.2)
        return made(*arguments)

    monkeypatch.setattr(
        suites, "_read_yaml", lambda file: READ(file) | (TINY_S3 if file.stem == "s3" else {})
    )
    monkeypatch.setattr(state_tracking, "words", slow)  # 20 times
    options = (*OPTIONS, "eval.tasks=[s3]", "trainer.stall_timeout=2")
    assert list(scores(train_on_ranks(1, tmp_path, "pgdn_tiny", *options, start="fork"))) == [3]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("step", [2, 3])  # the interval, and after the last step
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
