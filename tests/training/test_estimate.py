"""What a run would take, against what docs/training.md has measured."""

from types import SimpleNamespace

import pytest

from pdn.cli.compose import compose
from pdn.cli.parse import parse
from pdn.errors import DataError
from pdn.training import estimate
from pdn.training.config import RunConfig
from pdn.training.estimate import MEASURED, memory_of, sized, speed_of
from pdn.training.fit import fit
from tests.small_runs import run_config

WORDS = "data=text", "eval=none", "logger=none", "data.seq_len=2048", "trainer.micro_batch_size=16"
GIB = 2**30


def name_of(row: estimate.Measured) -> str:
    return f"{row.mixer}-{row.gpu}-{row.gpus}-{row.layout}"


@pytest.fixture(scope="module")
def of():
    """Return a function that configures a 340M run; composing takes half a second each."""
    known: dict[str, RunConfig] = {}

    def run(name: str, batch: int, layout: str = "auto", **changes) -> RunConfig:
        if name not in known:
            known[name] = parse(compose([f"model={name}_340m", "model.vocab_size=32000", *WORDS]))
        config = known[name]
        axes = {"ddp": {"replicate": "all", "shard": 1}, "fsdp": {"shard": "all"}}
        trainer = {"global_batch_size": batch} | changes.pop("trainer", {})
        updates = {
            "parallel": config.parallel.model_copy(update=axes.get(layout, {})),
            "trainer": config.trainer.model_copy(update=trainer),
            "model": config.model.model_copy(update=changes.pop("model", {})),
        }
        return config.model_copy(update=updates | changes)

    return run


@pytest.mark.parametrize(
    ("name", "mib"), [("pgdn", 1649.3), ("gdn", 1561.3), ("transformer", 1106.3)]
)
def test_a_layer_keeps_what_the_compiler_was_seen_to_keep(name, mib, of):
    """Count as torch 2.13's partitioner does; 16 x 2048 tokens, without the casts of weights."""
    counted = of(name, 16).model.layer_activation_bytes(2) * 16 * 2048 / 2**20
    assert counted == pytest.approx(mib, rel=0.002)


@pytest.mark.parametrize("row", MEASURED, ids=name_of)
def test_the_memory_counted_from_shapes_is_near_what_was_measured(row, of):
    peak = memory_of(of(row.mixer, 16 * row.gpus, row.layout), row.gpus).peak
    assert peak / GIB == pytest.approx(row.peak_gib, rel=0.04)


@pytest.mark.parametrize("row", MEASURED, ids=name_of)
def test_a_measured_configuration_has_its_own_speed(row, of):
    speed = speed_of(of(row.mixer, 16 * row.gpus, row.layout), row.gpu, row.gpus)
    assert speed.tokens_per_second == pytest.approx(row.tokens_per_second, rel=1e-6)
    assert speed.note == "measured (docs/training.md)"


PIECES = {"trainer": {"piece_tokens": 32768}}
# Measured, and no constant: layers, sequences and tokens of each, GPUs, what else; GiB, tokens/s.
# Two gave one for the speed: what two GPUs that share 65,536 tokens reach of twice one alone.
HELD_OUT = [
    ("pgdn", 1, 32768, 1, {}, 44.7, 185_524),
    ("pgdn", 1, 65536, 1, {}, 83.7, 187_266),
    ("pgdn", 16, 2048, 1, {"ema": 0.999}, 45.8, 181_300),
    ("pgdn", 1, 131072, 1, PIECES, 46.1, 143_569),
    ("pgdn", 1, 65536, 2, {"layout": "ddp", "context": 2}, 46.1, 341_734),
    ("pgdn", 1, 65536, 2, {"layout": "fsdp", "context": 2}, 45.6, 345_842),
    ("pgdn", 1, 131072, 2, {"layout": "ddp", "context": 2}, 85.1, 357_956),
]


@pytest.mark.parametrize("held_out", HELD_OUT, ids=lambda row: "-".join(map(str, row[:4])))
def test_configurations_that_gave_no_constant_come_out_within_a_tenth(held_out, of):
    name, batch, length, gpus, more, gib, tokens_per_second = held_out
    config = of(name, batch, more.get("layout", "auto"), trainer=more.get("trainer", {}))
    context = {"context": more.get("context", 1)}
    config = config.model_copy(
        update={
            "data": config.data.model_copy(update={"seq_len": length}),
            "trainer": config.trainer.model_copy(update={"micro_batch_size": batch}),
            "parallel": config.parallel.model_copy(update=context),
            "optim": config.optim.model_copy(update={"ema": more.get("ema")}),
        }
    )
    assert memory_of(config, gpus).peak / GIB == pytest.approx(gib, rel=0.1)
    speed = speed_of(config, "H200", gpus)
    assert speed.tokens_per_second == pytest.approx(tokens_per_second, rel=0.1)
    assert speed.note.startswith("41.4% MFU, as pgdn_340m")
    assert ("3 of 4 pieces" in speed.note) == ("trainer" in more)
    assert ("of twice one, as at 1 x 65,536" in speed.note) == ("context" in more)


def test_a_run_that_no_constant_was_taken_from_has_the_speed_that_was_seen(of):
    """Predict train.py on two H100 with a vocabulary of 4,096, 330K to 341K tokens a second."""
    config = of("pgdn", 32, "fsdp", model={"vocab_size": 4096})
    speed = speed_of(config, "H100", 2)
    assert 330e3 < speed.tokens_per_second < 341e3
    assert speed.note == "36.8% MFU, as pgdn_340m"


def test_two_gpus_of_another_kind_were_foretold_within_a_tenth_from_their_one(of, monkeypatch):
    """Predict two H200 as before they were measured: from one, and the scaling of two H100."""
    monkeypatch.setattr(
        estimate,
        "_share_of_two",
        lambda gpu, layout, real=estimate._share_of_two: real("H100", layout),
    )
    for row in MEASURED:
        if (row.gpu, row.gpus) == ("H200", 2):
            speed = speed_of(of("pgdn", 32, row.layout), "H200", 2).tokens_per_second
            assert speed == pytest.approx(row.tokens_per_second, rel=0.1)


def test_what_was_not_measured_is_said_and_no_hours_are_made_up_for_it(of):
    for config, what in (
        (
            of("pkda", 16),
            "layers of pkda (decay diagonal, not scalar; output_gate sigmoid, not none)",
        ),
        (of("pgdn", 16, trainer={"precision": "fp32"}), "float32"),
    ):
        assert speed_of(config, "H200", 1).tokens_per_second is None
        assert sized(config, 1, "H200")[-1] == f"speed      on H200: not measured: {what}"
    for context, gpu, what in ((4, "H200", "parallel.context above 2"), (2, "H100", "on H100")):
        split = of("pgdn", 16).parallel.model_copy(update={"context": context})
        assert speed_of(of("pgdn", 16, parallel=split), gpu, context).note.endswith(what)
    assert "transformer on one H100" in speed_of(of("transformer", 16), "H100", 1).note
    rows = {gpus: speed_of(of("pgdn", 256), "H100", gpus) for gpus in estimate.GPUS}
    assert rows[8].note == "scaling not measured: that of 2 H100, fsdp, 88%"
    assert "that of 2 H200, fsdp, 97%" in speed_of(of("pgdn", 256), "H200", 8).note
    assert "waits for the host" in rows[64].note
    assert rows[64].tokens_per_second == pytest.approx(rows[256].tokens_per_second)
    assert rows[512].note.endswith("256 does not divide into 512 shares")


def test_nothing_that_was_measured_of_ours_is_said_of_another_implementation(of):
    theirs = {"implementation": "fla", "residual_dtype": "fp32"}
    lines = sized(of("gdn", 16, model=theirs), 1, "H200")
    assert lines[-1] == "speed      on H200: not measured: model.implementation=fla"
    assert "activations not counted, logits not counted" in lines[3]


def test_gradients_count_where_micro_batches_add_them_up(of):
    once, often = (memory_of(of("pgdn", batch), 1) for batch in (16, 64))
    assert often.peak - once.peak == once.gradients == 4 * 342_184_896
    assert memory_of(of("delta_product", 16), 1).peak is None
    assert "activations not counted" in sized(of("delta_product", 16), 1, "H200")[3]


def test_a_dry_run_says_that_the_data_would_be_read_too_often(tmp_path, capsys):
    class Data(SimpleNamespace):
        def ahead(self, plan):
            return self

        def check_epochs(self, stop_sample):
            raise DataError("DATA-EPOCHS", f"data: {stop_sample} samples: too often")

    data = Data(vocab_size=320, describe=lambda samples: "data: text", close=lambda: None)
    config = run_config(tmp_path, "pgdn_tiny", "trainer.dry_run=true")
    fit(config, open_data=lambda *given, **keys: data)
    assert capsys.readouterr().out.endswith("refused    data: 160 samples: too often\n")


@pytest.mark.parametrize(("name", "kept"), [("pgdn", 8 * 13.1e6), ("transformer", 28 * 3.22e9)])
def test_pieces_keep_the_activations_of_one_and_what_each_starts_from(name, kept, of):
    """Eight pieces of 32,768 tokens: a state each, or the keys and values of all before."""
    whole = memory_of(of(name, 16), 1)
    data = of(name, 16).data.model_copy(update={"seq_len": 8 * 32768})
    cut = {"micro_batch_size": 1, "piece_tokens": 32768}
    found = memory_of(of(name, 1, trainer=cut, data=data), 1)
    assert found.activations - whole.activations == pytest.approx(kept, rel=0.01)
    assert found.head == whole.head
