"""What `import pdn` offers: models, mixers and ops by name, runs and single tensors from disk."""

import subprocess
import sys

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

import pdn
from pdn.errors import ConfigError, StorageError
from pdn.models.language_model import LanguageModel
from tests.presets import CONFIGS, TINY, model_config
from tests.small_runs import train


def test_a_model_by_name_is_that_of_its_preset():
    model = pdn.build_model("pgdn_tiny", vocab_size=256, overrides=["model.num_layers=2"], seed=3)
    expected = LanguageModel(
        model_config("pgdn_tiny", "model.vocab_size=256", "model.num_layers=2")
    )
    expected.init_weights(seed=3)
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, x in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], x), name
    assert (
        pdn.build_model("gdn_tiny", vocab_size=64, dtype=torch.bfloat16).norm.weight.dtype
        == torch.bfloat16
    )


def test_a_wrong_name_or_no_vocabulary_is_refused_with_what_was_meant():
    with pytest.raises(ConfigError, match="pgdn_tiny"):
        pdn.build_model("pgdn_tinny", vocab_size=64)
    with pytest.raises(ConfigError, match="give vocab_size="):
        pdn.build_model("pgdn_tiny")
    with pytest.raises(ConfigError, match="pgdn"):
        pdn.build_mixer("pgdnn", d_model=32, num_heads=2, head_dim=16)


def test_building_leaves_the_hydra_of_the_program_alone():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        mine = compose("train", ["model=gdn_tiny"], return_hydra_config=True)
        HydraConfig.instance().set_config(mine)
        pdn.build_model("pgdn_tiny", vocab_size=64)
        assert HydraConfig.get().runtime.choices["model"] == "gdn_tiny"
        assert compose("train", ["model=kda_tiny"]).model.name == "kda_tiny"
    HydraConfig.instance().cfg = None
    pdn.build_model("pgdn_tiny", vocab_size=64)
    assert not GlobalHydra.instance().is_initialized()
    assert HydraConfig.instance().cfg is None


MIXERS = {path.stem for path in (CONFIGS / "mixer").glob("*.yaml")}


@pytest.mark.parametrize("name", sorted(MIXERS & {name.removesuffix("_tiny") for name in TINY}))
def test_a_mixer_serves_by_itself(name):
    mixer = pdn.build_mixer(name, d_model=32, num_heads=2, head_dim=16)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    y, state = mixer(x)
    assert y.shape == x.shape and y.isfinite().all() and state is None
    _, state = mixer(x[:, :4], state=mixer.init_state(2, x.device, x.dtype))
    last, _ = mixer(x[:, 4:], state=state)
    torch.testing.assert_close(last, y[:, 4:], rtol=1e-4, atol=1e-5)


def test_a_mixers_preset_takes_overrides():
    mixer = pdn.build_mixer(
        "pgdn", d_model=32, num_heads=2, head_dim=16, overrides=["preconditioner.bound=1.2"]
    )
    assert mixer.config.preconditioner.bound == 1.2
    with pytest.raises(ValueError, match="bond"):
        pdn.build_mixer("pgdn", d_model=32, num_heads=2, head_dim=16, overrides=["bond=1.2"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    train(directory, "pgdn_tiny", "trainer.steps=2", "schedule.warmup_steps=1")
    return directory / "run"


def test_single_tensors_and_moments_come_from_a_checkpoint(run):
    checkpoint, model = pdn.read_checkpoint(run), pdn.load_run(run).model
    weights = dict(model.named_parameters())
    assert set(checkpoint) == weights.keys() and checkpoint.step == 2
    for name, weight in weights.items():
        assert torch.equal(checkpoint[name], weight), name
        assert checkpoint.shape(name) == weight.shape
    moments = checkpoint.moments("blocks.0.mixer.q_proj.weight")
    assert moments.keys() >= {"exp_avg", "exp_avg_sq", "step"} and moments["step"] == 2
    assert moments["exp_avg"].shape == weights["blocks.0.mixer.q_proj.weight"].shape
    assert moments["exp_avg"].abs().sum() > 0
    with pytest.raises(KeyError, match=r"did you mean blocks.0.mixer.q_proj.weight"):
        checkpoint["blocks.0.mixer.q_proj"]


def test_weights_that_there_are_none_of_are_refused(run):
    with pytest.raises(ConfigError, match="weights = 'best': expected last or ema"):
        pdn.load_run(run, weights="best")


def test_a_damaged_checkpoint_is_refused_before_a_tensor_is_read(run, tmp_path):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (shard, *_) = copy.glob("checkpoints/*/*.distcp")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StorageError, match="sha256"):
        pdn.read_checkpoint(copy)


def test_the_first_import_is_light_and_every_name_is_there():
    script = (
        "import pdn, sys; assert not {'torch', 'hydra'} & set(sys.modules); [getattr(pdn, n) for n "
        "in pdn.__all__]"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
