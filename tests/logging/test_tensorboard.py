"""TensorBoard's files hold what metrics.jsonl holds, and cannot end a run."""

import logging
import sys
from types import SimpleNamespace

import pytest

from pdn.logging.tensorboard import TensorBoardLogger


class StandIn:
    """Keeps to what TensorBoard does where a writer begins: it drops all from a step on."""

    events: list = []  # noqa: RUF012

    def __init__(self, folder, purge_step=None):
        kept = [event for event in self.events if purge_step is None or event[1] < purge_step]
        self.events[:] = kept

    def add_scalar(self, key, value, step):
        self.events.append((key, step, value))

    def add_text(self, *_): ...

    def add_image(self, *_, **__): ...

    def close(self): ...


@pytest.fixture(params=["tensorboard", "stand-in"])
def scalars(request, monkeypatch):
    if request.param == "stand-in":
        StandIn.events.clear()
        module = SimpleNamespace(SummaryWriter=StandIn)
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
        return lambda folder, key: {step: v for name, step, v in StandIn.events if name == key}
    pytest.importorskip("tensorboard")
    return in_files


def in_files(folder, key: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), purge_orphaned_data=True)
    events.Reload()
    return {event.step: event.value for event in events.Scalars(key)}


def test_of_a_step_that_comes_again_the_later_value_counts(tmp_path, scalars):
    logger = TensorBoardLogger(tmp_path)
    for step, loss in [(1, 4.0), (2, 3.0), (3, 9.0), (2, 2.5), (3, 2.0)]:
        if loss == 2.5:
            logger.rewind(1)
        logger.log(step, {"step": step, "loss": loss, "mfu": None, "note": "text"})
    logger.log_table(3, "results", ["task", "value"], [["piqa", 0.5]])
    logger.log_map(3, "telemetry/beta", [[0.1, 0.9], None])
    logger.close()
    again = TensorBoardLogger(tmp_path)  # of a launch that begins at the checkpoint of step 2
    again.rewind(2)
    again.log(2, {"validation": 0.5})
    again.log(3, {"loss": 1.5})
    again.close()
    assert scalars(tmp_path / "tensorboard", "loss") == {1: 4.0, 2: 2.5, 3: 1.5}
    assert scalars(tmp_path / "tensorboard", "validation") == {2: 0.5}


def test_what_comes_late_of_an_earlier_step_takes_nothing_away(tmp_path, scalars):
    logger = TensorBoardLogger(tmp_path)
    for step in range(1, 6):
        logger.log(step, {"loss": 1 / step})
    logger.log(3, {"checkpoint/write_seconds": 2.0})  # it has become durable
    logger.close()
    evaluation = TensorBoardLogger(tmp_path)  # another program evaluates an old checkpoint
    evaluation.log(2, {"task/acc": 0.25})
    evaluation.close()
    assert list(scalars(tmp_path / "tensorboard", "loss")) == [1, 2, 3, 4, 5]
    assert scalars(tmp_path / "tensorboard", "checkpoint/write_seconds") == {3: 2.0}
    assert scalars(tmp_path / "tensorboard", "task/acc") == {2: 0.25}


def test_without_tensorboard_one_line_says_so_and_training_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    logger = TensorBoardLogger(tmp_path)
    with caplog.at_level(logging.WARNING):
        for step in range(5):
            logger.log(step, {"loss": 1.0})
        logger.log_table(1, "t", ["a"], [[1]])
        logger.log_map(1, "m", [[1.0]])
        logger.close()
    assert len(caplog.records) == 1 and "tensorboard is not installed" in caplog.text
