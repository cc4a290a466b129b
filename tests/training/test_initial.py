"""What ``init_from`` names is judged by more than its shapes."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pdn.data.tokenizer import train as train_tokenizer
from pdn.errors import ConfigError
from pdn.hub import export
from pdn.hub.load import load_run
from pdn.models.language_model import LanguageModel
from pdn.training.initial import InitialWeights
from tests.small_runs import train


@pytest.fixture(scope="module")
def donor(tmp_path_factory):
    """Train a run of one step."""
    place = tmp_path_factory.mktemp("donor")
    train(place, "pgdn_tiny", "trainer.stop_at=1")
    return place / "run"


@pytest.fixture
def folder(donor, tmp_path):
    """Return what the run exports."""
    export(load_run(donor), tmp_path / "exported")
    return tmp_path / "exported"


def tokenizer_of(donor):
    return donor / "tokenizer.json"


def other_tokenizer(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(
        train_tokenizer(["altogether different words, of equal number"] * 9, 320).content
    )
    return file


def filled(source, donor) -> LanguageModel:
    """Return the donor's model, emptied and filled from ``source``."""
    model = load_run(donor).model
    torch.nn.init.zeros_(model.embedding.weight)
    weights = InitialWeights(str(source), tokenizer_of(donor), any_tokenizer=False)
    weights.require_fit(model)
    weights.load(model)
    return model


def test_a_run_and_its_export_give_the_same_weights(donor, folder):
    one, other = filled(donor, donor), filled(folder, donor)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert one.embedding.weight.any()


@pytest.mark.parametrize("kind", ["run", "checkpoint", "exported"])
def test_weights_of_another_tokenizer_are_refused_unless_told(kind, donor, folder, tmp_path):
    source = {"run": donor, "checkpoint": donor / "checkpoints" / "step-00000001"}.get(kind, folder)
    for ours in (other_tokenizer(tmp_path), None):
        with pytest.raises(ConfigError, match=r"INIT-TOKENIZER.*init_tokenizer=any") as caught:
            InitialWeights(str(source), ours, any_tokenizer=False)
        assert caught.value.exit_code == 78
        InitialWeights(str(source), ours, any_tokenizer=True)


def test_a_folder_without_a_tokenizer_is_refused_unless_told(donor, folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"found no tokenizer\.json"):
        InitialWeights(str(folder), tokenizer_of(donor), any_tokenizer=False)
    InitialWeights(str(folder), tokenizer_of(donor), any_tokenizer=True)


def test_padding_and_truncation_do_not_make_another_tokenizer(donor, folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {
        "direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content, indent=3))
    filled(folder, donor)


VALUES = {
    "huge": (lambda x: x * 1e30, "holds values up to"),
    "tiny": (lambda x: x * 1e-30, "as good as zero"),
    "nan": (lambda x: x.index_fill(0, torch.tensor(0), float("nan")), "not finite"),
    "complex": (lambda x: x.to(torch.complex64), "is complex64; expected floating point"),
    "integer": (lambda x: x.to(torch.int32), "is int32; expected floating point"),
}


@pytest.mark.parametrize("kind", VALUES)
def test_values_that_no_training_left_are_refused_by_name(kind, donor, folder):
    change, message = VALUES[kind]
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name, value in tensors.items() if value.ndim == 2)
    save_file(tensors | {name: change(tensors[name])}, file)
    with pytest.raises(ConfigError, match=message):
        filled(folder, donor)


def test_a_tensor_in_two_files_is_refused(donor, folder):
    shutil.copy(folder / "model.safetensors", folder / "model-2.safetensors")
    with pytest.raises(ConfigError, match=r"is in model-2\.safetensors and in model\.safetensors"):
        filled(folder, donor)


def test_a_pipe_in_place_of_weights_is_not_waited_for(donor, folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(ConfigError, match="is not a regular file"):
        filled(folder, donor)
