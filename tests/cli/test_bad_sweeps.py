"""Sweeps: a bad one is refused before its first trial starts."""

import pytest

from pdn.cli.compose import Source
from pdn.cli.sweep import check_trials, expand
from pdn.errors import ConfigError, StorageError
from tests.cli.test_bad_config import SHIPPED


def test_a_bad_trial_is_refused_before_the_first_one_starts():
    with pytest.raises(ConfigError, match=r"found 'pgdn_tinny'.*did you mean pgdn_tiny"):
        check_trials(["model=gdn_tiny,pgdn_tinny", "seed=1"], SHIPPED)


def test_trials_that_would_share_a_directory_are_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"trials #0 .* and #1 .* would share .*: give each a name"
    ):
        check_trials(["parallel=auto,single", f"output_dir={tmp_path}"], SHIPPED)


def test_a_sweep_is_refused_where_its_runs_cannot_be_written(tmp_path):
    (tmp_path / "runs").write_text("in the way")
    with pytest.raises(StorageError, match="runs"):
        check_trials(["seed=1,2", f"output_dir={tmp_path}/runs"], SHIPPED)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("hydra.launcher._target_=os.system", "hydra.launcher._target_ .* names code"),
        ("+hydra.callbacks.x={_target_:os.system}", "hydra.callbacks.x .* names code"),
        ("hydra.searchpath=[file:///tmp]", "hydra.searchpath .* use --config-dir"),
    ],
)
def test_a_sweep_may_not_name_code(line, message):
    with pytest.raises(ConfigError, match=message):
        expand(["seed=1,2", line], SHIPPED)


def test_an_added_directory_may_not_hold_settings_of_hydra(tmp_path):
    (tmp_path / "hydra").mkdir()
    with pytest.raises(ConfigError, match="settings of Hydra, which name code"):
        expand(["seed=1,2"], Source(search=(tmp_path,)))


def test_the_trials_are_all_combinations_of_the_values():
    assert expand(["seed=1,2", "model=gdn_tiny,pgdn_tiny", "hydra/launcher=torchrun"], SHIPPED) == [
        ["seed=1", "model=gdn_tiny"],
        ["seed=1", "model=pgdn_tiny"],
        ["seed=2", "model=gdn_tiny"],
        ["seed=2", "model=pgdn_tiny"],
    ]


def test_a_glob_takes_the_files_of_a_group_that_fit():
    assert expand(["model=glob([gdn_t*,pgdn_t*])", "seed=1,2"], SHIPPED) == [
        ["model=gdn_tiny", "seed=1"],
        ["model=gdn_tiny", "seed=2"],
        ["model=pgdn_tiny", "seed=1"],
        ["model=pgdn_tiny", "seed=2"],
    ]


@pytest.mark.parametrize("line", ["model=glob(zz*)", "optim.lr=glob(*)", "seed=range(3,1)"])
def test_a_sweep_over_nothing_is_refused(line):
    key, _, values = line.partition("=")
    with pytest.raises(ConfigError) as caught:
        expand([line, "name=a,b"], SHIPPED)
    assert f"{key} (command line): found {values}, which no value fits" in str(caught.value)
