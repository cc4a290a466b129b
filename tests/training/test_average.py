"""Runs that keep a moving average of their weights: resumed, validated, loaded, on other ranks."""

import pytest
import torch

from pdn.checkpoint.read import load_weights
from pdn.errors import ConfigError
from pdn.hub.load import load_run
from pdn.training.trainer import Trainer
from tests.small_runs import losses, metrics, train, train_on_ranks

WORDS = (
    "optim.ema=0.9", "trainer.steps=12", "checkpoint.every=4", "checkpoint.keep_last=9",
    "eval=validation", "eval.every=4", "eval.max_samples=8",
)  # fmt: skip


class Crashes(Trainer):
    """Fails in its seventh step."""

    def train_step(self, batch):
        if self.step == 6:
            raise RuntimeError("the seventh step")
        return super().train_step(batch)


def average_of(run, weights: str = "ema") -> dict[str, torch.Tensor]:
    return load_run(run, weights=weights).model.state_dict()


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def validations(directory) -> dict[int, tuple]:
    """Return the losses on validation of the average and of the weights, by step."""
    keys = "ema/validation/loss", "validation/loss"
    return {
        record["step"]: tuple(record.get(key) for key in keys)
        for record in metrics(directory)
        if "validation/loss" in record
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the directory of a run that was left alone."""
    directory = tmp_path_factory.mktemp("whole")
    train(directory, "pgdn_tiny", *WORDS)
    return directory


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return the directory of the same run without an average."""
    directory = tmp_path_factory.mktemp("plain")
    train(directory, "pgdn_tiny", *WORDS, "optim.ema=null")
    return directory


def test_a_run_killed_between_checkpoints_has_the_average_and_values_of_one_left_alone(
    whole, tmp_path
):
    with pytest.raises(RuntimeError, match="the seventh step"):
        train(tmp_path, "pgdn_tiny", *WORDS, trainer_cls=Crashes)
    train(tmp_path, "pgdn_tiny", *WORDS)
    assert validations(tmp_path) == validations(whole)
    assert [step for step, (ema, _) in validations(whole).items() if ema] == [4, 8, 12]
    assert same(average_of(tmp_path / "run"), average_of(whole / "run"))
    assert not same(average_of(tmp_path / "run"), average_of(tmp_path / "run", "last"))


def test_the_average_changes_nothing_of_the_training_and_is_what_was_validated(
    whole, plain, tmp_path
):
    """Validate the loaded average as the weights of another run, at once."""
    assert losses(metrics(plain)) == losses(metrics(whole))
    for step, (ema, own) in validations(plain).items():
        assert ema is None and own == validations(whole)[step][1]

    class Averaged(Trainer):
        def evaluate(self, logged=()):
            load_weights(whole / "run" / "checkpoints" / "step-00000008", self.model, "ema")
            super().evaluate(logged)

    records = train(
        tmp_path, "pgdn_tiny", *WORDS, "optim.ema=null", "trainer.stop_at=1",
        trainer_cls=Averaged,
    )  # fmt: skip
    assert records[-1]["validation/loss"] == validations(whole)[8][0]
    with pytest.raises(ConfigError, match=r"holds no average of the weights.*weights=last"):
        load_run(plain / "run", weights="ema")


def test_the_average_goes_on_from_one_rank_to_two(whole, tmp_path):
    train(tmp_path, "pgdn_tiny", *WORDS, "trainer.stop_at=8")
    train_on_ranks(2, tmp_path, "pgdn_tiny", *WORDS, "parallel=fsdp")
    assert validations(tmp_path)[12] == pytest.approx(validations(whole)[12], abs=1e-5)
    one, two = average_of(whole / "run"), average_of(tmp_path / "run")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_branch_inherits_an_average_or_begins_one_that_its_parent_had_not(whole, plain, tmp_path):
    for parent, is_inherited in ((whole, True), (plain, False)):
        child = tmp_path / parent.name
        train(child, "pgdn_tiny", *WORDS, f"branch_from={parent / 'run'}@8")
        assert losses(metrics(child)) == losses(metrics(whole))[8:]
        assert (validations(child)[12] == validations(whole)[12]) == is_inherited
