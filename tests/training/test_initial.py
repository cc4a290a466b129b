"""What ``init_from`` names is judged by more than its shapes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pdn.data.tokenizer import train as train_tokenizer
from pdn.errors import ConfigError
from pdn.hub import export
from pdn.hub.load import load_run
from pdn.models.language_model import LanguageModel
from pdn.training.initial import InitialWeights
from tests.children import PYTHON_PATH
from tests.data.local_hub import LocalHub
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


ROOT = Path(__file__).parents[2]
FILL = """
import json, sys
from pathlib import Path
import torch
from pdn.errors import PdnError
from pdn.hub.load import load_run
from pdn.training.initial import InitialWeights
donor = Path(sys.argv[1])
for source in sys.stdin:
    model, whole = load_run(donor).model, load_run(donor).model
    torch.nn.init.zeros_(model.embedding.weight)
    try:
        weights = InitialWeights(source.strip(), donor / "tokenizer.json", any_tokenizer=False)
        weights.require_fit(model)
        weights.load(model)
        pairs = zip(model.parameters(), whole.parameters(), strict=True)
        print(json.dumps("same" if all(torch.equal(a, b) for a, b in pairs) else "other"))
    except PdnError as error:
        print(json.dumps(f"{error.exit_code} {error}"))
    sys.stdout.flush()
"""


@pytest.mark.slow
def test_weights_on_the_hub_are_those_of_the_folder_and_judged_alike(donor, folder, tmp_path):
    hub = LocalHub(tmp_path / "served")
    pinned = "5" * 40
    hub.revisions.add(pinned)
    named = ("good", "gated", "gone", "other-words", "damaged", "pickled", "later")
    for name in named:
        for file in folder.iterdir():
            if not (name == "pickled" and file.suffix == ".safetensors"):
                hub.add("models", f"some/{name}", file.name, file.read_bytes())
    hub.gated.add("some/gated")
    hub.gone.add("some/gone")
    words = other_tokenizer(tmp_path).read_bytes()
    hub.add("models", "some/other-words", "tokenizer.json", words)
    cut = (folder / "model.safetensors").read_bytes()[:-9]
    hub.add("models", "some/damaged", "model.safetensors", cut)
    hub.add("models", "some/pickled", "pytorch_model.bin", b"x")
    expected = {
        "good": "same",
        f"good@{pinned}": "same",
        "good@absent": "78 pdn[E-HUB-ABSENT] some/good@absent: found neither",
        "gone": "78 pdn[E-HUB-ABSENT] some/gone: found neither a local folder nor one on the hub",
        "gated": "78 pdn[E-HUB-GATED] some/gated: gated; expected an account that may read it",
        "other-words": "78 pdn[E-INIT-TOKENIZER] init_from = some/other-words: its tokenizer",
        "damaged": "74 pdn[E-HUB-WEIGHTS]",
        "pickled": "78 pdn[E-HUB-WEIGHTS]",
    }
    env = hub.environment(tmp_path / "hf") | {"PYTHONPATH": PYTHON_PATH, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FILL, str(donor)]
    with subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:

        def answer(source: str) -> str:
            child.stdin.write(f"some/{source}\n")
            child.stdin.flush()
            return json.loads(child.stdout.readline())

        for source, said in expected.items():
            assert answer(source).startswith(said), source
        assert not any(path.endswith(".bin") for _, path in hub.requests if "resolve" in path)
        hub.close()
        found = answer("later")
        assert found.startswith("74 pdn[E-HUB-UNREACHABLE] some/later: no such local path")
        assert "expected its answer: check the network, or give a local folder" in found
        child.stdin.close()
