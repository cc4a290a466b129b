"""A run from before a key of the model existed stays the run that it was."""

import copy
from pathlib import Path

import pytest
import yaml

from pdn.cli.compose import compose
from pdn.errors import ConfigError
from pdn.optim import optimizers
from pdn.runs.directory import RunDirectory
from pdn.training.config import RunConfig
from pdn.training.names import former_name
from tests.small_runs import losses, train

ONE_RATE = "optim.groups.embeddings.lr_scale=1.0"  # what all recipes had at first
FILE = Path(__file__).parents[1] / "fixtures" / "config_before_shapes.yaml"


def recorded() -> dict:
    """Return the old record in what defines a run, with the rest as it is composed today."""
    today, then = copy.deepcopy(compose([ONE_RATE]).values), yaml.safe_load(FILE.read_text())
    for section in ("data", "optim", "schedule", "trainer"):
        then[section] = today[section] | then[section]
    kept = ("model", "data", "optim", "schedule", "trainer", "seed", "init_from")
    return today | {section: then[section] for section in kept}


def test_a_configuration_without_the_later_keys_has_the_default_name_of_then():
    config = RunConfig.model_validate(recorded())
    assert former_name(config) == "hybrid_tiny-text-a542d673"
    whole = config.model_dump(mode="json")
    assert whole["model"]["mixers"]["pgdn"]["expand_v"] == 1.0  # shown, but no part of the name
    assert former_name(RunConfig.model_validate(whole)) == "hybrid_tiny-text-a542d673"


def test_a_later_key_at_another_value_is_another_run():
    config = recorded()
    config["model"]["residual_dtype"] = "fp32"
    assert former_name(RunConfig.model_validate(config)) != "hybrid_tiny-text-a542d673"


def directory(path: Path) -> RunDirectory:
    (path / "checkpoints").mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(recorded()))
    (path / "ledger.jsonl").write_text("{}\n")
    return RunDirectory(path, rank=0)


def launched(run: RunDirectory, values: dict) -> None:
    config = RunConfig.model_validate(values)
    run.take_config(
        config.model_dump(mode="json"),
        may_change=config.may_change(),
        completed=RunConfig.completed,
    )
    run.write_config()


def test_an_old_run_is_continued_and_its_record_then_shows_the_later_keys(tmp_path):
    run = directory(tmp_path / "run")
    launched(run, recorded())
    assert yaml.safe_load((run.path / "config.yaml").read_text())["model"]["init"] == "plain"


def test_an_old_run_is_not_continued_with_a_later_key_at_another_value(tmp_path):
    changed = recorded()
    changed["model"]["mixers"]["attention"]["window"] = 64
    with pytest.raises(ConfigError, match=r"attention\.window: recorded None, now 64"):
        launched(directory(tmp_path / "run"), changed)


def test_an_old_run_is_refused_by_the_word_that_continues_it_where_the_recipe_changed(tmp_path):
    run, today = directory(tmp_path / "run"), recorded()
    today["optim"]["groups"] = compose([]).values["optim"]["groups"]
    with pytest.raises(ConfigError, match=r"lr_scale: recorded 1\.0, now 4\.0") as refused:
        launched(run, today)
    assert f"undo the change with {ONE_RATE}, or give the run another name" in str(refused.value)
    today["optim"]["groups"] = compose([ONE_RATE]).values["optim"]["groups"]
    launched(run, today)


def test_a_later_key_goes_back_to_its_default_only_under_another_name(tmp_path):
    run, changed = directory(tmp_path / "run"), recorded()
    changed["model"]["residual_dtype"] = "fp32"
    (run.path / "config.yaml").write_text(yaml.safe_dump(changed))
    with pytest.raises(ConfigError, match="residual_dtype: recorded 'fp32', now 'auto'"):
        launched(run, recorded())


COMBA = {
    "kind": "comba", "solve": "online", "num_heads": 4, "head_dim": 64, "conv_size": 4,
    "norm_eps": 1e-6, "qk_l2norm": True, "decay": {"kind": "scalar"},
    "gain": {"kind": "beta", "range": 1.0}, "preconditioner": {"kind": "none"},
    "output_gate": {"kind": "sigmoid"},
}  # fmt: skip


def test_comba_from_before_it_had_two_forms_is_the_decayed_one():
    values = recorded()
    values["model"] |= {"name": "comba_tiny", "mixers": {"comba": COMBA}, "pattern": ["comba"]}
    config = RunConfig.model_validate(values)
    assert former_name(config) == "comba_tiny-text-7e6b2ebe"
    assert config.model.mixers["comba"].form == "decayed"
    assert config.model.mixers["comba"].output_gate.rank == "low"


def unscaled(model, config) -> dict[str, float]:
    return {name: 1.0 for name, _ in model.named_parameters()}


def test_a_run_whose_eps_an_earlier_version_did_not_scale_goes_on_with_it(
    tmp_path, monkeypatch, caplog
):
    words = ("pgdn_tiny", "model.base_width=16", "optim.eps=1e-3")
    with monkeypatch.context() as earlier:
        earlier.setattr(optimizers, "eps_factors", unscaled)
        whole = losses(train(tmp_path / "whole", *words, "trainer.stop_at=3"))
        train(tmp_path / "cut", *words, "trainer.stop_at=1")
    assert losses(train(tmp_path / "cut", *words, "trainer.stop_at=3")) == whole
    assert "did not scale with width" in caplog.text
    branch = f"branch_from={tmp_path}/cut/run@1"
    kept = losses(train(tmp_path / "branch", *words, "trainer.stop_at=3", branch))
    assert kept == whole[1:]
