"""TensorBoard's files hold what metrics.jsonl holds, and cannot end a run."""

import logging
import sys

import pytest

from pdn.logging.tensorboard import TensorBoardLogger


def scalars(folder, key: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), purge_orphaned_data=True)
    events.Reload()
    return {event.step: event.value for event in events.Scalars(key)}


def test_of_a_step_that_comes_again_the_later_value_counts(tmp_path):
    pytest.importorskip("tensorboard")
    logger = TensorBoardLogger(tmp_path)
    for step, loss in [(1, 4.0), (2, 3.0), (3, 9.0), (2, 2.5), (3, 2.0)]:
        logger.log(step, {"step": step, "loss": loss, "mfu": None, "note": "text"})
    logger.log_table(3, "results", ["task", "value"], [["piqa", 0.5]])
    logger.log_map(3, "telemetry/beta", [[0.1, 0.9], None])
    logger.close()
    again = TensorBoardLogger(tmp_path)
    again.log(3, {"loss": 1.5})
    again.close()
    assert scalars(tmp_path / "tensorboard", "loss") == {1: 4.0, 2: 2.5, 3: 1.5}


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
