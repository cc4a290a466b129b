"""Pictures of runs from metrics.jsonl: which panels, which points.

And what a damaged or empty file is answered with.
"""

import json
import math

import pytest

from pdn.errors import ConfigError
from pdn.reports.plots import curve, draw, panels, save, series
from pdn.runs.records import read_metrics

RECORDS = [
    *({"step": s, "tokens": 100 * s, "loss": 5 / s, "tokens_per_second": 9.0} for s in range(1, 5)),
    {
        "step": 2,
        "validation/loss": 3.0,
        "validation/loss_by_position@64": 2.5,
        "validation/loss_by_position@16": 4.0,
    },
    {
        "step": 4,
        "validation/loss": 2.0,
        "validation/loss_by_position@16": 3.0,
        "validation/loss_by_position@64": 1.5,
    },
    {
        "step": 4,
        "evaluation/piqa/acc": 0.5,
        "evaluation/wikitext/word_perplexity": 90.0,
        "evaluation/needle_1/accuracy@512": 1.0,
    },
]
LARGE = {"a": 1234567.8, "b": 1234998.6, "c": 2.51111}


def test_every_kind_of_record_gets_its_panel():
    assert panels({"a": RECORDS}) == [
        ("series", "loss"),
        ("series", "validation/loss"),
        ("series", "tokens_per_second"),
        ("curve", "evaluation/needle_1/accuracy"),
        ("curve", "validation/loss_by_position"),
        ("series", "evaluation/wikitext/word_perplexity"),
        ("shares", ""),
    ]


def test_evaluations_stand_at_the_tokens_of_their_step():
    assert series(RECORDS, "validation/loss") == ([200, 400], [3.0, 2.0])
    assert series(RECORDS, "loss")[0] == [100, 200, 300, 400]


def test_of_two_evaluations_of_one_step_the_last_counts():
    assert series([*RECORDS, {"step": 4, "validation/loss": 1.0}], "validation/loss") == (
        [200, 400],
        [3.0, 1.0],
    )


def test_a_curve_is_the_last_one_in_order_of_x():
    assert curve(RECORDS, "validation/loss_by_position") == ([16, 64], [3.0, 1.5])


def test_a_single_value_of_each_run_is_a_point_with_its_number():
    figure = draw(
        {
            "a": RECORDS,
            "b": [RECORDS[-1] | {"evaluation/wikitext/word_perplexity": 80.0}],
            "c": RECORDS[:4],
        }
    )
    panel = {axes.get_title(): axes for axes in figure.axes}
    assert [text.get_text() for text in panel["wikitext/word_perplexity"].texts] == ["90", "80"]
    assert [text.get_text() for text in panel["needle_1/accuracy@512"].texts] == ["1", "1"]


def test_large_values_are_told_apart_by_their_numbers():
    runs = {name: [{"step": 1, "evaluation/w/perplexity": y}] for name, y in LARGE.items()}
    (panel,) = draw(runs).axes
    assert [text.get_text() for text in panel.texts] == ["1,234,568", "1,234,999", "2.5111"]
    assert panel.xaxis.get_major_formatter().get_useOffset() is False


def test_a_curve_over_places_may_begin_at_0():
    (panel,) = draw({"a": [{"step": 1, "evaluation/x/acc@0": 0.5, "evaluation/x/acc@8": 1}]}).axes
    assert panel.get_xscale() == "linear" and panel.lines[0].get_xdata().tolist() == [0, 8]


def test_losses_that_are_not_finite_leave_a_gap_and_no_line_through_it():
    losses = [2.0 if step < 40 else math.inf for step in range(80)]
    records = [{"step": s + 1, "tokens": s + 1, "loss": loss} for s, loss in enumerate(losses)]
    (panel,) = draw({"a": records}).axes
    smooth = panel.lines[-1].get_ydata()
    assert [math.isfinite(y) for y in smooth] == [math.isfinite(y) for y in losses]


def test_long_names_of_tasks_leave_the_other_panels_their_width():
    def width(task: str) -> float:
        figure = draw({"a": [*RECORDS, {"step": 4, f"evaluation/{task}/acc": 0.5}]})
        figure.draw_without_rendering()
        return figure.axes[0].get_window_extent().width

    assert width("x" * 60) > 0.95 * width("x")


def test_standard_errors_and_counts_of_failures_have_no_panels_of_their_own():
    record = {
        "step": 4,
        "evaluation/piqa/acc": 0.5,
        "evaluation/piqa/acc_stderr": 0.1,
        "evaluation/needle/accuracy@512": 1.0,
        "evaluation/needle/accuracy_stderr@512": 0.0,
        "evaluation/failed": 1,
    }
    assert panels({"a": [record]}) == [("curve", "evaluation/needle/accuracy"), ("shares", "")]


def overlapping(figure) -> list[tuple[str, str]]:
    """Return pairs of texts of a figure that cover each other."""
    figure.canvas.draw()
    texts = [text for axes in figure.axes for text in [axes.title, *axes.texts]]
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [
                tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high
            ]
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    return [
        (a, b) for i, (a, one) in enumerate(boxes) for b, other in boxes[:i] if one.overlaps(other)
    ]


def test_no_label_covers_another_however_many_tasks_and_runs_there_are():
    tasks = {
        f"evaluation/{task}[limit=200,shots=5]/{metric}": 0.5
        for task in ("piqa", "hellaswag", "arc_challenge", "lambada_openai", "squad_completion")
        for metric in ("acc", "acc_norm", "exact_match_flexible-extract")
    }
    lengths = {f"evaluation/needle/accuracy@{n}": 0.5 for n in (512, 520, 1024, 1500, 2048, 8192)}
    last = {"step": 4, "evaluation/wikitext/word_perplexity": 31.5} | tasks | lengths
    runs = {f"pgdn-340m-slimpajama-lr4e-4-s{seed}-70b9": [*RECORDS[:-1], last] for seed in range(9)}
    assert not overlapping(draw(runs))
    assert not overlapping(draw({"a": [last]}))


@pytest.mark.parametrize("suffix", ["png", "html", "svg"])
def test_runs_are_drawn_into_one_file(suffix, tmp_path):
    out = tmp_path / "deep" / f"runs.{suffix}"
    save(draw({"a": RECORDS, "b": RECORDS[:4]}), out)
    assert out.stat().st_size > 5000
    if suffix == "html":
        assert "<svg" in out.read_text()


def test_the_cut_last_line_of_a_killed_run_is_passed_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        "\n".join(map(json.dumps, RECORDS)) + '\n{"step": 5, "lo'
    )
    assert read_metrics(tmp_path) == RECORDS
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ConfigError, match="line 2: no JSON record"):
        read_metrics(tmp_path)


def test_what_cannot_be_drawn_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: No such file"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="no records yet"):
        read_metrics(tmp_path)
    with pytest.raises(ConfigError, match="nothing to draw"):
        draw({"a": [{"step": 1}]})
    with pytest.raises(ConfigError, match=r"ends in \.png"):
        save(draw({"a": RECORDS}), tmp_path / "runs.gif")
