"""Import: the same weights come back, and what does not fit is refused by name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pdn.errors import ConfigError, StorageError
from pdn.hub import export, import_weights, is_exported
from pdn.hub.load import load_run
from pdn.models.language_model import LanguageModel
from tests.hub.small import exported, run_of, tokens
from tests.presets import TINY, released_model
from tests.ranks import run_ranks
from tests.small_runs import train

# ---------------------------------------------------------------- and back


@pytest.mark.parametrize("name", TINY)
def test_export_and_import_give_the_same_weights(name, tmp_path):
    model, folder = exported(name, tmp_path)
    back = load_run(folder).model
    for (key, a), (_, b) in zip(model.named_parameters(), back.named_parameters(), strict=True):
        assert torch.equal(a, b), key
    x = tokens()
    assert torch.equal(
        model(x, labels=x.roll(-1, 1)).loss_sum, back(x, labels=x.roll(-1, 1)).loss_sum
    )


def test_a_model_without_decay_is_one_with_a_decay_of_exactly_nothing(tmp_path):
    model, folder = exported("pdn_tiny", tmp_path)
    decaying = released_model("pgdn_tiny")
    import_weights(str(folder), decaying)
    torch.testing.assert_close(model(tokens()).logits, decaying(tokens()).logits, rtol=0, atol=1e-5)


def test_bf16_exports_keep_the_delicate_parameters_in_float32(tmp_path):
    model, folder = exported("pgdn_tiny", tmp_path, dtype="bfloat16")
    found = load_file(folder / "model.safetensors")
    assert found["model.layers.0.attn.A_log"].dtype == torch.float32
    assert found["model.layers.0.attn_norm.weight"].dtype == torch.float32
    assert found["model.layers.0.attn.q_proj.weight"].dtype == torch.bfloat16
    assert torch.equal(
        load_run(folder).model.embedding.weight, model.embedding.weight.bfloat16().float()
    )


def test_weights_in_several_files_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr("pdn.hub.writer.MAX_SHARD", "50KB")
    model, folder = exported("gdn_tiny", tmp_path)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert torch.equal(load_run(folder).model.embedding.weight, model.embedding.weight)


def test_every_rank_of_a_sharded_model_gets_its_part(tmp_path):
    from torch.distributed.tensor import DTensor

    from pdn.distributed.config import ParallelConfig
    from pdn.distributed.fsdp import World, parallelise

    model, folder = exported("kda_tiny", tmp_path)
    config = ParallelConfig(
        replicate=1,
        shard="all",
        context=1,
        activation_checkpointing="none",
        compile=False,
        reshard_after_forward=True,
        cpu_offload=False,
    )

    def work(rank: int) -> list[bool]:
        with torch.device("meta"):
            sharded = LanguageModel(model.config)
        sharded = parallelise(sharded, config, World(rank, 2, torch.device("cpu")), seed=3)
        import_weights(str(folder), sharded)
        parameters = dict(model.named_parameters())
        return [
            isinstance(value, DTensor) and torch.equal(value.full_tensor(), parameters[key])
            for key, value in sharded.named_parameters()
        ]

    for equal in run_ranks(2, work, tmp_path):
        assert equal and all(equal)


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("gdn_tiny", (), "model_type"),
        ("pgdn_tiny", ("model.d_model=32",), "hidden_size"),
        ("pgdn_tiny", ("model.num_layers=3",), "num_hidden_layers"),
        ("pgdn_tiny", ("model.mixers.pgdn.preconditioner.bound=1.2",), "squash_x"),
        ("pdn_tiny", (), "without decay"),
    ],
)
def test_weights_of_another_architecture_are_refused_by_what_differs(name, change, named, tmp_path):
    _, folder = exported("pgdn_tiny", tmp_path)
    with pytest.raises(ConfigError, match=named):
        import_weights(str(folder), released_model(name, *change))


def edit(folder: Path, change) -> None:
    found = load_file(folder / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors")


def test_missing_unknown_misshapen_and_untied_tensors_are_named(tmp_path):
    model, folder = exported("pgdn_tiny", tmp_path)
    name = "model.layers.1.attn.o_norm.weight"
    kept = load_file(folder / "model.safetensors")
    changes = [
        (lambda t: t.pop(name), f"missing, e.g. {name}"),
        (lambda t: t.update({"model.extra": torch.ones(1)}), r"no counterpart, e.g. model\.extra"),
        (lambda t: t.update({name: torch.ones(7)}), r"found \(7,\)"),
        (
            lambda t: t.update(
                {"lm_head.weight": torch.ones_like(kept["model.embeddings.weight"])}
            ),
            "not tied",
        ),
    ]
    for change, message in changes:
        save_file(kept, folder / "model.safetensors")
        edit(folder, change)
        with pytest.raises(ConfigError, match=message):
            import_weights(str(folder), model)


def test_pickled_weights_are_never_opened(tmp_path):
    model, folder = exported("pgdn_tiny", tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin, whose loading can run code"):
        import_weights(str(folder), model)


def test_a_tokenizer_that_is_not_the_models_is_refused_and_a_damaged_one_named(tmp_path):
    _, folder = exported("pgdn_tiny", tmp_path)
    file = folder / "tokenizer.json"
    larger = json.loads(file.read_text())
    larger["model"]["vocab"]["zzz"] = 256
    file.write_text(json.dumps(larger))
    with pytest.raises(ConfigError, match="ids up to 256, but pgdn_tiny has a vocabulary of 256"):
        load_run(folder)
    file.write_text("{")
    with pytest.raises(StorageError, match=r"tokenizer\.json"):
        load_run(folder)


def test_damaged_files_are_named(tmp_path):
    model, folder = exported("pgdn_tiny", tmp_path)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(StorageError, match=r"model\.safetensors"):
        import_weights(str(folder), model)
    (folder / "config.json").write_text("{")
    with pytest.raises(StorageError, match=r"config\.json"):
        import_weights(str(folder), model)


def test_an_existing_folder_is_left_alone(tmp_path):
    exported("pgdn_tiny", tmp_path)
    with pytest.raises(ConfigError, match="exists already"):
        exported("pgdn_tiny", tmp_path)
    assert not list(tmp_path.glob("*.tmp"))


def test_what_lies_beside_an_exported_folder_is_never_deleted(tmp_path):
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "mine").write_text("of somebody else")
    export(run_of(released_model("gdn_tiny"), tmp_path / "run"), tmp_path / "out")
    assert (tmp_path / "out.tmp" / "mine").read_text() == "of somebody else"
    assert {path.name for path in tmp_path.glob("out*")} == {"out", "out.tmp"}


def test_a_full_disk_that_a_library_wraps_in_its_own_words_is_named(tmp_path, monkeypatch):
    """safetensors raises no OSError."""

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("pdn.hub.writer._write_weights", full)
    run = run_of(released_model("gdn_tiny"), tmp_path / "run")
    with pytest.raises(StorageError, match=r"out: .*No space left.*free space"):
        export(run, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_run_on_text_that_lost_its_tokenizer_is_not_exported_without_one(tmp_path):
    run = run_of(released_model("gdn_tiny"), tmp_path)
    lost = replace(run, tokenizer=None, fingerprint={"tokenizer": "0" * 64})
    with pytest.raises(ConfigError, match=r"tokenizer\.json: gone; expected the tokenizer"):
        export(lost, tmp_path / "out")


def test_runs_folders_and_hub_ids_are_told_apart(tmp_path, monkeypatch):
    _, folder = exported("pgdn_tiny", tmp_path)
    assert is_exported(str(folder)) and is_exported("owner/name@abc123")
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_exported("runs/mine") and not is_exported("/nowhere/at/all")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises((ConfigError, StorageError), match="owner/name"):
        import_weights("owner/name", released_model("pgdn_tiny"))


def test_training_on_from_an_exported_folder_starts_at_the_same_validation_loss(tmp_path):
    options = (
        "eval=validation",
        "eval.batch_size=4",
        "eval.max_samples=8",
        "data.validation_fraction=0.2",
    )
    first = train(
        tmp_path / "a", "pgdn_tiny", "trainer.steps=3", "schedule.warmup_steps=1", *options
    )
    run = load_run(tmp_path / "a" / "run")
    export(run, tmp_path / "exported")
    second = train(
        tmp_path / "b",
        "pgdn_tiny",
        "trainer.steps=1",
        "schedule.warmup_steps=0",
        f"init_from={tmp_path / 'exported'}",
        *options,
    )
    ended = [record["validation/loss"] for record in first if "validation/loss" in record][-1]
    began = next(record["validation/loss"] for record in second if "validation/loss" in record)
    assert began == pytest.approx(ended, abs=1e-6)
    assert (
        abs(
            next(record["validation/loss"] for record in first if "validation/loss" in record)
            - ended
        )
        > 1e-4
    )
