"""The configurations that others have released, each a model of ours.

It has exactly as many parameters, and goes back out as the class that it came from.
``fixtures/released_configs.json`` holds the keys of each file that concern the model, where it is
from, and how many parameters flash-linear-attention 0.6.0 counts;
``fixtures/released_tensors.json`` the tensors of its classes at the small sizes of this file.
"""

import copy
import json
from pathlib import Path

import pytest
import torch

from pdn.errors import ConfigError
from pdn.hub import export, load_released
from pdn.hub.architectures import exported_shape, own_class, target_for, target_of
from pdn.hub.load import load_run
from pdn.hub.released import model_config_of
from pdn.inference.load import LoadedRun
from pdn.models.config import ModelConfig
from pdn.models.language_model import LanguageModel
from tests.presets import perturb

FIXTURES = Path(__file__).parents[1] / "fixtures"
RELEASED = json.loads((FIXTURES / "released_configs.json").read_text())
TENSORS = json.loads((FIXTURES / "released_tensors.json").read_text())
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 64,
    "norm_eps": 1e-6,
}
WIDE = TINY | {"head_dim": 16, "expand_v": 2.0}
SMALL = {  # of each class, with what the presets leave out
    "delta_net": TINY | {"use_gate": True, "expand_k": 0.5},
    "gated_deltanet": WIDE | {"num_v_heads": 4},
    "kda": WIDE | {"num_v_heads": 4},
    "precond_gated_deltanet": WIDE | {"num_v_heads": 4},
    "precond_kda": WIDE,
    "comba": WIDE | {"num_v_heads": 4},
    "gated_deltaproduct": WIDE | {"num_householder": 2, "use_forget_gate": True},
    "gla": TINY,
    "mesa_net": TINY | {"head_dim": 16, "use_output_gate": True},
    "linear_attn": TINY,
    "transformer": TINY | {"num_kv_heads": 1, "window_size": 9, "qk_norm": True},
    "mamba2": {"hidden_size": 64, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 64,
               "state_size": 16},
}  # fmt: skip


def small(model_type: str) -> dict:
    return {"model_type": model_type} | SMALL[model_type]


def model_of(config: ModelConfig) -> LanguageModel:
    model = LanguageModel(config)
    model.init_weights(seed=1)
    return perturb(model).eval()


def exported(model: LanguageModel, directory: Path) -> Path:
    directory.mkdir()
    export(LoadedRun(directory, model, None, eos_id=0, step=7, seq_len=64), directory / "out")
    return directory / "out"


def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (1, 12), generator=torch.Generator().manual_seed(0))


def label(entry: dict) -> str:
    return f"{entry['config']['model_type']}: {entry['source']}"


@pytest.mark.parametrize("entry", RELEASED["expressible"], ids=label)
def test_every_released_configuration_is_a_model_of_ours(entry):
    config = model_config_of(entry["config"])
    assert config.num_params() == entry["parameters"]
    kind = entry["config"]["model_type"]
    target = target_for(config, kind)
    assert target.model_type == kind
    for key, value in target.config.items():
        if key in entry["config"] and key not in ("expand_k", "expand_v", "intermediate_size"):
            assert entry["config"][key] == value or entry["config"][key] is None, key
    if target.library == "flash-linear-attention":
        back = model_config_of({"model_type": kind} | target.config)
        assert back.computation() == config.computation()


@pytest.mark.parametrize("entry", RELEASED["refused"], ids=label)
def test_a_switch_that_no_model_of_ours_has_is_refused_by_name(entry):
    with pytest.raises(ConfigError) as caught:
        model_config_of(entry["config"])
    assert entry["named"] in str(caught.value)


def test_a_key_that_nobody_knows_and_an_unknown_type_are_refused():
    with pytest.raises(ConfigError, match="use_magic = True"):
        model_config_of({"model_type": "kda", "use_magic": True})
    with pytest.raises(ConfigError, match="model_type = 'gsa'"):
        model_config_of({"model_type": "gsa"})


@pytest.mark.parametrize("name", SMALL)
def test_every_tensor_of_the_released_class_has_its_name_and_shape(name):
    config = model_config_of(small(name))
    target = target_for(config, name)
    with torch.device("meta"):
        model = LanguageModel(config)
    ours = {
        target.names[key]: list(exported_shape(target.names[key], value))
        for key, value in model.named_parameters()
    }
    assert ours == TENSORS[name]


@pytest.mark.parametrize("name", SMALL)
def test_weights_go_out_as_the_released_class_and_come_back(name, tmp_path):
    model = model_of(model_config_of(small(name)))
    folder = exported(model, tmp_path / "run")
    recorded = json.loads((folder / "config.json").read_text())
    assert recorded["model_type"] == target_of(model.config)[0].model_type
    assert recorded["tie_word_embeddings"] is False
    back = load_run(folder).model
    if name != "mamba2":  # which goes out with the keys of transformers
        assert load_released(folder).config.computation() == model.config.computation()
    for (key, a), (_, b) in zip(model.named_parameters(), back.named_parameters(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here")
@pytest.mark.parametrize(
    "name",
    [
        "comba",
        "gated_deltanet",
        "gated_deltaproduct",
        "gla",
        "linear_attn",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("delta_net", "kda", "precond_gated_deltanet")
        ),
    ],
)
def test_the_released_class_computes_the_same_under_the_interpreter(name, tmp_path, untuned):
    from transformers import AutoModelForCausalLM

    model = model_of(model_config_of(small(name)))
    folder = exported(model, tmp_path / "run")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        exact = model.double()(tokens()).logits
        found = theirs(tokens()).logits
    assert type(theirs).__name__ == target_of(model.config)[0].architecture
    assert (found.double() - exact).norm() / exact.norm() <= 1e-5


def test_a_released_folder_is_loaded_without_naming_a_model(tmp_path):
    model = model_of(model_config_of(small("gated_deltanet")))
    folder = exported(model, tmp_path / "run")
    (folder / "pdn_config.json").unlink()
    assert torch.equal(load_released(folder)(tokens()).logits, model(tokens()).logits)


def test_our_own_class_keeps_an_untied_head(tmp_path):
    from transformers import AutoModelForCausalLM

    import pdn.hub.modeling  # noqa: F401

    config = model_config_of(small("gated_deltanet")).model_dump()
    config["mixers"]["gated_deltanet"]["output_gate"] = {"kind": "swish", "rank": "low"}
    model = model_of(ModelConfig.model_validate(config))
    folder = exported(model, tmp_path / "run")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(theirs(tokens()).logits, model(tokens()).logits)
    assert theirs.get_output_embeddings().weight.shape == (64, 64)


def test_a_folder_from_before_a_key_existed_still_fits(tmp_path):
    config = model_config_of(small("precond_kda"))
    dump = own_class(config).config["pdn"]
    older = copy.deepcopy(dump)
    del older["residual_dtype"], older["mixers"]["precond_kda"]["feature_map"]
    assert ModelConfig.model_validate(older).computation() == config.computation()


@pytest.mark.slow
def test_the_recorded_counts_and_tensors_are_those_of_the_installed_library(monkeypatch):
    pytest.importorskip("fla")
    import fla.layers.attn
    from transformers import AutoConfig, AutoModelForCausalLM

    monkeypatch.setattr(fla.layers.attn, "flash_attn_func", object())  # not called here

    def parameters(content: dict) -> dict:
        rest = {key: value for key, value in content.items() if key != "model_type"}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(content["model_type"], **rest)
            )
        model.tie_weights()
        return dict(model.named_parameters())

    for entry in RELEASED["expressible"]:
        found = sum(value.numel() for value in parameters(entry["config"]).values())
        assert found == entry["parameters"], label(entry)
    for name in SMALL:
        found = {key: list(value.shape) for key, value in parameters(small(name)).items()}
        assert found == TENSORS[name]
