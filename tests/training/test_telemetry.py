"""Telemetry changes no bit of a run, and names the head that goes wrong before the loss does."""

import itertools
import json
from collections.abc import Callable

import pytest
import torch

from pdn.inference.load import load_trained
from pdn.runs.directory import RunDirectory
from pdn.training.telemetry import Updates
from pdn.training.trainer import Trainer
from tests.small_runs import losses, metrics, train, train_on_ranks

EVERY = "trainer.telemetry_every=4"
TIMES = ("tokens_per_second", "step_seconds", "data_seconds", "checkpoint", "pace/", "telemetry/")
TIMES += ("gradient/", "update/", "alarm/")


def records(directory) -> list[dict]:
    file = directory / "run" / "telemetry.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def without_telemetry(found: list[dict]) -> list[dict]:
    kept = [{k: v for k, v in r.items() if not k.startswith(TIMES)} for r in found]
    return [record for record in kept if len(record) > 1]


def test_a_run_with_telemetry_is_bitwise_the_one_without(tmp_path):
    words = "hybrid_tiny", "trainer.stop_at=5"
    off = train(tmp_path / "off", *words)
    on = train(tmp_path / "on", *words, "trainer.telemetry_every=2")
    assert without_telemetry(on) == without_telemetry(off) and len(losses(on)) == 5
    one, other = (load_trained(tmp_path / name / "run").model for name in ("off", "on"))
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    ledgers = [(tmp_path / name / "run" / "ledger.jsonl").read_text() for name in ("off", "on")]
    assert ledgers[0] == ledgers[1]
    assert not (tmp_path / "off" / "run" / "telemetry.jsonl").exists()
    assert [record["step"] for record in records(tmp_path / "on")] == [2, 4]


def test_every_quantity_has_a_value_for_every_layer_and_head(tmp_path):
    train(tmp_path, "hybrid_tiny", EVERY, "trainer.stop_at=4", "data.document_isolation=true")
    (record,) = records(tmp_path)
    maps = record["maps"]
    assert {len(rows) for rows in maps.values()} == {4}
    attention = [row is not None for row in maps.pop("attention_entropy")]
    assert sum(attention) == 1
    for name, rows in maps.items():
        assert [row is None for row in rows] == attention, name
        assert all(len(row) == 2 and None not in row for row in rows if row), name
    assert {"half_life_p50", "beta", "B_spread", "saturated", "log_A_minus_mu"} <= maps.keys()
    assert {"write", "S_norm", "S_rank"} <= maps.keys()
    (logged,) = [r for r in metrics(tmp_path) if "gradient/matrices" in r]
    assert logged["telemetry/beta/min"] <= logged["telemetry/beta/median"]
    groups = {key.partition("/")[2] for key in logged if key.startswith("update/")}
    assert groups == {"embeddings", "matrices", "filters", "vectors"}
    assert all(0 < logged[f"update/{group}"] < 1 for group in groups)
    norm = next(r["grad_norm"] for r in metrics(tmp_path) if r["step"] == 4 and "grad_norm" in r)
    squares = sum(logged[f"gradient/{group}"] ** 2 for group in groups)
    assert squares**0.5 == pytest.approx(norm, rel=1e-5)


def test_updates_are_measured_by_group_and_leave_what_they_measure():
    weights = {"a": [torch.tensor([3.0, 4.0])], "b": [torch.ones(2, 2), torch.zeros(5)]}
    parameters = {name: [torch.nn.Parameter(w) for w in own] for name, own in weights.items()}
    parameters["a"][0].grad = torch.tensor([6.0, 8.0])
    parameters["b"][1].grad = torch.full((5,), 2.0)
    updates = Updates(parameters)
    with torch.no_grad():
        parameters["a"][0] -= 0.5 * parameters["a"][0]
        parameters["b"][0] += 1
    updates.finish()
    assert updates.read() == pytest.approx(
        {"gradient/a": 10, "update/a": 1, "gradient/b": 20**0.5, "update/b": 0.5}
    )
    assert parameters["b"][0].tolist() == [[2, 2], [2, 2]]


def shorten_memory(mixer) -> None:
    mixer.decay.rates.A_log[0] += 0.9


def saturate(mixer) -> None:
    mixer.preconditioner.center.mu[0] += 20


def enlarge_state(mixer) -> None:
    mixer.v_conv.weight[:16] *= 2  # of the first head; what reads it makes up for it
    mixer.o_proj.weight[:, :16] /= 2


class Injured(Trainer):
    """Makes head 0 of layer 1 a little worse with every step from the seventh on."""

    injure: Callable

    def train_step(self, batch):
        if self.step >= 6:
            with torch.no_grad():
                type(self).injure(self.model.blocks[1].mixer)
        return super().train_step(batch)


FAST = "trainer.telemetry_every=2", "optim.lr=1e-4", "trainer.stop_at=12"


@pytest.fixture(scope="module")
def well(tmp_path_factory) -> list[float]:
    """Train a run of which no head is named; return its losses."""
    found = train(tmp_path_factory.mktemp("well"), "pgdn_tiny", *FAST)
    assert not [key for record in found for key in record if key.startswith("alarm/")]
    return losses(found)


@pytest.mark.parametrize(
    ("injure", "kind", "said"),
    [
        (shorten_memory, "decay", "the decay collapsed"),
        (saturate, "preconditioner", "B saturates"),
        (enlarge_state, "state", "the state S blew up"),
    ],
)
def test_a_head_that_goes_wrong_is_named_before_the_loss_moves(
    well, injure, kind, said, tmp_path, capsys
):
    trainer = type("Injured", (Injured,), {"injure": staticmethod(injure)})
    ill = train(tmp_path, "pgdn_tiny", *FAST, trainer_cls=trainer)
    alarms = [record for record in ill if any(key.startswith("alarm") for key in record)]
    assert [set(alarm) for alarm in alarms] == [{"step", f"alarm/{kind}"}]
    step, text = alarms[0]["step"], alarms[0][f"alarm/{kind}"]
    assert text.startswith(f"layer 1, head 0: {said}") and 6 < step < 12
    assert f"step {step}  alarm: layer 1, head 0" in capsys.readouterr().out
    # a tenth of what the loss of one step differs from that of the next
    noise = max(abs(a - b) for a, b in itertools.pairwise(well))
    moved = [abs(a - b) for a, b in zip(well[:step], losses(ill)[:step], strict=True)]
    assert max(moved) < noise / 10


def test_a_run_that_goes_back_drops_the_telemetry_of_later_steps(tmp_path):
    directory = RunDirectory(tmp_path / "run", rank=0)
    for step in (4, 8, 12):
        directory.log_telemetry({"step": step, "maps": {}})
    directory.continue_from(8, 64)
    directory.log_telemetry({"step": 12, "maps": {"beta": [[0.5]]}})
    found = directory.telemetry()
    directory.close()
    assert [record["step"] for record in found] == [4, 8, 12]
    assert found[-1]["maps"] and found == records(tmp_path)


@pytest.mark.slow
def test_two_ranks_of_shards_measure_what_one_measures(tmp_path):
    words = EVERY, "trainer.stop_at=4", "parallel=fsdp"
    one = train_on_ranks(1, tmp_path / "one", "pgdn_tiny", *words)
    two = train_on_ranks(2, tmp_path / "two", "pgdn_tiny", *words)
    assert len(records(tmp_path / "two")) == 1
    found = [next(r for r in run if "gradient/matrices" in r) for run in (one, two)]
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        assert found[1][key] == pytest.approx(value, rel=2e-3, abs=1e-6), key


def test_a_mixer_that_cannot_be_described_ends_nothing(tmp_path, monkeypatch, capsys):
    from pdn.logging import recurrences

    def broken(S):
        raise RuntimeError("no such state")

    monkeypatch.setattr(recurrences, "sizes", broken)
    found = train(tmp_path, "pgdn_tiny", EVERY, "trainer.stop_at=4")
    assert len(losses(found)) == 4
    assert "layer 0 is not in the telemetry: RuntimeError: no such state" in capsys.readouterr().out
