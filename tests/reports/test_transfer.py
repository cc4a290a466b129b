"""Grids of rates over widths: what is run, the best rate of a width, and how far it moves."""

import math
from pathlib import Path

import pytest
import yaml

from pdn.errors import ConfigError
from pdn.reports import document
from pdn.reports.evidence import write_records
from pdn.reports.transfer import RecordedTransfer, Transfer, parabola, rates_by_width, read_any

GRID = {
    "title": "a grid",
    "words": ["trainer.steps=2"],
    "models": {"gdn": ["model=gdn_tiny"], "kda": ["model=kda_tiny"]},
    "widths": [64, 256],
    "head_dim": 32,
    "base_width": 64,
    "plain": [256],
    "rates": [1e-3, 2e-3, 4e-3],
    "extend": 1,
    "seeds": [1, 2],
    "data_seed": 0,
}


def loss_at(rate: float, best: float) -> float:
    return 3 + 0.1 * math.log2(rate / best) ** 2


def records_of(best: dict[str, float], rates=(1e-3, 2e-3, 4e-3), seed: int = 1) -> list[dict]:
    """Make records whose losses lie on a parabola around the best rate of each arm."""
    return [
        {
            "arm": arm, "lr": rate, "seed": seed, "order": "same", "tokens": 8, "parameters": 1000,
            "trial": f"{arm}-lr{rate:g}-seed{seed}", "device": "none", "train_seconds": 60.0,
            "train_loss": [9.0] * 36 + [loss_at(rate, at)] * 4,
        }
        for arm, at in best.items()
        for rate in rates
    ]  # fmt: skip


@pytest.fixture
def study() -> Transfer:
    return Transfer.model_validate(GRID)


@pytest.fixture
def found(study) -> RecordedTransfer:
    best = {"gdn-d64": 2e-3, "kda-d64": 2e-3, "gdn-d256": 2.4e-3, "gdn-d256-plain": 0.8e-3}
    return RecordedTransfer("grid", study, records_of(best))


def test_middle_rates_with_the_rules_come_first_and_the_rest_after(study):
    trials = study.due([])
    assert [t.name for t in trials[:4]] == [
        f"{model}-d{width}-lr0.002-seed1" for width in (64, 256) for model in ("gdn", "kda")
    ]
    assert len(trials) == 3 * 6 and len({t.name for t in trials}) == 18
    assert all("plain" in t.name for t in trials[12:])
    widths = study.model_copy(update={"widths": [64, 128, 256], "plain": [256, 128]})
    arms = dict.fromkeys(widths.arm_of(t.name) for t in widths.due([]) if t.name[:3] == "gdn")
    assert list(arms) == ["gdn-d64", "gdn-d256", "gdn-d256-plain", "gdn-d128", "gdn-d128-plain"]
    words = dict(word.split("=", 1) for word in trials[2].words)
    assert (words["model.d_model"], words["model.num_heads"]) == ("256", "8")
    assert words["model.base_width"] == "64"
    assert "model.base_width=null" in trials[-1].words


def test_a_best_rate_at_an_edge_gets_one_rate_beyond_it(study):
    records = records_of({"gdn-d64": 9e-3, "gdn-d256": 1e-4})
    names = {t.name for t in study.due(records)} - {t.name for t in study.due([])}
    assert names == {"gdn-d64-lr0.008-seed1", "gdn-d256-lr0.0005-seed1"}
    records += records_of({"gdn-d64": 9e-3}, rates=(8e-3,))
    more = {t.name for t in study.due(records)} - {t.name for t in study.due([])}
    assert more == names  # one is what extend allows


def test_other_seeds_take_the_three_rates_around_the_best_one_of_the_first(study):
    records = records_of({"gdn-d64": 4e-3}) + records_of({"gdn-d64": 4e-3}, rates=(8e-3,))
    repeated = [t.name for t in study.due(records) if t.name.endswith("seed2")]
    assert repeated == [f"gdn-d64-lr{rate}-seed2" for rate in ("0.002", "0.004", "0.008")]


def test_the_vertex_of_a_parabola_is_found_and_an_edge_is_said():
    rates = (1e-3, 2e-3, 4e-3)
    best = parabola({rate: loss_at(rate, 2.3e-3) for rate in rates})
    assert (best.rate, best.loss, best.tried) == (
        pytest.approx(2.3e-3), pytest.approx(3.0), 2e-3,
    )  # fmt: skip
    edges = [parabola({rate: loss_at(rate, at) for rate in rates}) for at in (1e-4, 1.0)]
    assert [(b.rate, b.edge) for b in edges] == [(1e-3, -1), (4e-3, 1)]
    diverged = parabola({1e-3: 3.1, 2e-3: 3.0, 4e-3: math.inf})
    assert (diverged.rate, diverged.edge) == (2e-3, 0)
    assert parabola({1e-3: math.inf}) is None


def test_the_shift_is_in_octaves_and_the_price_in_nats(found):
    assert found.shift("gdn", 256, rules=True) == [pytest.approx(math.log2(1.2))]
    assert found.shift("gdn", 256, rules=False) == []  # 0.8e-3 lies beyond what was tried
    assert found.price("gdn", 256, rules=True) == 0
    expected = loss_at(2e-3, 0.8e-3) - loss_at(1e-3, 0.8e-3)
    assert found.price("gdn", 256, rules=False) == pytest.approx(expected)


def test_the_rules_may_be_taken_from_the_wide_model(study):
    down = study.model_copy(update={"base_width": 256, "plain": []})
    names = {down.arm_of(t.name) for t in down.due([])}
    assert names == {f"{model}-d{width}" for model in ("gdn", "kda") for width in (64, 256)}
    found = RecordedTransfer("down", down, records_of({"gdn-d64": 2e-3, "gdn-d256": 1.5e-3}))
    assert found.shift("gdn", 256, rules=True) == [pytest.approx(math.log2(0.75))]
    assert "| off |" not in rates_by_width(found)


def test_the_page_says_rates_shifts_and_prices(found, tmp_path):
    folder = tmp_path / "evidence"
    folder.mkdir()
    (folder / "grid.yaml").write_text(yaml.safe_dump(GRID, sort_keys=False))
    write_records(folder / "grid.jsonl", found.records)
    template = folder / "evidence.md.in"
    template.write_text(
        "{{ shift grid on }}\n{{ shift grid off }}\n{{ price grid on }}\n"
        "{{ rates_by_width grid }}\n{{ picture grid }}\n{{ cost grid }}"
    )
    lines = document.render(tmp_path).splitlines()
    assert lines[:3] == [
        "+0.26 octaves (one model; 1 of 2 models)",
        "not run",
        "0.000 nats (0.000 to 0.000)",
    ]
    assert "| gdn | on | 0.002 | 0.0024 | +0.26 | 3.000 | 3.000 | 0.000 |" in lines
    assert any(line.startswith("| gdn | off | 0.002 | ≤ 0.001 | – |") for line in lines)
    assert lines[-1].startswith("12 runs of 0.0M tokens")
    template.write_text("{{ table grid }}")
    with pytest.raises(ConfigError, match="expected a study with arms"):
        document.render(tmp_path)


def test_runs_in_another_order_have_no_curves(found):
    found.records[0]["order"] = "other"
    with pytest.raises(ConfigError, match="same samples in the same order"):
        _ = found.curves


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"widths": [256, 64]}, "expected ascending"),
        ({"base_width": 128}, "base_width = 128: expected one of"),
        ({"head_dim": 48}, "width 64: expected multiples of head_dim"),
        ({"plain": [64]}, "width 64: expected multiples of head_dim = 32, and of plain"),
    ],
)
def test_a_wrong_grid_is_refused_by_its_key(change, said, tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(GRID | change, sort_keys=False))
    with pytest.raises(ConfigError, match=said):
        read_any(file)


def test_a_grid_has_a_picture(found, tmp_path):
    pytest.importorskip("matplotlib")
    from pdn.reports.plots import save
    from pdn.reports.transfer import draw

    save(draw(found), Path(tmp_path) / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 10_000
