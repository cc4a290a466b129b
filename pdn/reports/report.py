"""Several runs as one HTML file that needs nothing else.

It shows curves over tokens, steps, time and FLOPs, evaluations, internals of the recurrences,
events, and what the runs differ in. The file holds the numbers as JSON, and ``report.js`` and
``report.css``, which draw them.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from pdn.errors import ConfigError
from pdn.models.config import ModelConfig
from pdn.reports.events import events
from pdn.reports.lineage import ancestry, same_order
from pdn.reports.maps import LARGEST, telemetry, thinned
from pdn.reports.plots import is_place, tokens_seen
from pdn.reports.trials import last_ledger_hash
from pdn.runs.records import read_metrics, read_object
from pdn.runs.schema import config_changes, recorded_config
from pdn.runs.summary import covered

FIRST = (
    "loss",
    "validation/loss",
    "validation/bits_per_byte",
    "tokens_per_second",
    "data_share",
    "grad_norm",
    "lr",
)
NOT_DRAWN = (
    "step",
    "tokens",
    "skipped",
    "step_seconds",
    "data_seconds",
    "checkpoint/step",
    "pace/slowest",
)
HOME = Path(__file__).parent
NAMED = 3  # runs, of more the title has the number alone
REPORTED = {
    "model.name": str,
    "data.seq_len": int,
    "trainer.global_batch_size": int,
    "trainer.steps": int,
    "seed": int,
}
"""What reports show of a configuration."""


def build(runs: dict[str, Path]) -> str:
    """Return the report's HTML.

    Args:
        runs: directories of runs, by the names to show.

    Raises:
        ConfigError: a directory without metrics or configuration.
    """
    names = {path.resolve(): name for name, path in runs.items()}
    found = [read_run(name, path, names) for name, path in runs.items()]
    configs = {name: recorded_config(path, REPORTED) for name, path in runs.items()}
    data = {
        "runs": found,
        "charts": charts(found),
        "results": results(found),
        "differences": differences(configs),
        "order": same_order(runs),
    }
    content = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    title = html.escape(", ".join(runs) if len(runs) <= NAMED else f"{len(runs)} runs")
    style, script = (
        (HOME / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js")
    )
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{title}</title><link rel="icon" href="data:,">\n<style>\n{style}</style>\n'
        f'<main id="report"></main>\n<script type="application/json" id="data">{content}</script>\n'
        f"<script>\n{script}</script>\n</html>\n"
    )


def read_run(name: str, path: Path, names: Mapping[Path, str]) -> dict:
    """Read what is drawn of one run.

    Args:
        name: as shown.
        path: its directory.
        names: of all runs of the report, by their resolved paths.

    Returns:
        Its curves by key, how its steps become tokens (``tokens`` a step, ``seen`` so far), hours
        and FLOPs, its maps, its events, and what stands in the summary.
    """
    records, config = read_metrics(path), recorded_config(path, REPORTED)
    tokens = config["trainer"]["global_batch_size"] * config["data"]["seq_len"]
    series: dict[str, tuple[list[int], list[float]]] = {}
    curves: dict[str, dict[float, float]] = {}
    measured: dict[str, int] = {}  # after which step each curve was, the last of which is shown
    for record in records:
        for key, value in (record | _derived(record)).items():
            # the maps show each head of telemetry
            if key in NOT_DRAWN or key.startswith("telemetry/") or _counts_tokens(key):
                continue
            if not isinstance(value, int | float) or not abs(value) < LARGEST:
                continue
            curve, at, x = key.rpartition("@")
            if at and is_place(key):
                if record["step"] != measured.get(curve):
                    curves[curve], measured[curve] = {}, record["step"]
                curves[curve][float(x)] = value
                continue
            steps, values = series.setdefault(key, ([], []))
            if steps and steps[-1] == record["step"]:  # evaluated again: the last counts
                del steps[-1], values[-1]
            steps.append(record["step"])
            values.append(value)
    return {
        "name": name,
        "tokens": tokens,
        "flops": _flops(config, tokens),
        "hours": thinned(*_hours(records)),
        "seen": thinned(*tokens_seen(records)),
        "series": {key: thinned(*points) for key, points in series.items()},
        "curves": {
            key: [sorted(points), [points[x] for x in sorted(points)]]
            for key, points in curves.items()
        },
        "maps": telemetry(path, records),
        "events": events(path, records, names),
        "about": _about(path, config, series, names),
    }


def _counts_tokens(key: str) -> bool:
    """Say whether a key is the number of tokens validated on, which stays the same."""
    return key.startswith("validation/") and key.endswith("/tokens")


def _derived(record: dict) -> dict[str, float]:
    step = record.get("step_seconds")
    return (
        {"data_share": record["data_seconds"] / step} if step and "data_seconds" in record else {}
    )


def _hours(records: Sequence[dict]) -> tuple[list[int], list[float]]:
    """Return the time spent in steps up to each of them.

    Those between two records take as long as the later.
    """
    timed = [record for record in records if "step_seconds" in record]
    steps, hours = [0], [0.0]
    counts = covered([record["step"] for record in timed])
    for record, count in zip(timed, counts, strict=True):
        steps.append(record["step"])
        hours.append(hours[-1] + record["step_seconds"] * count / 3600)
    return steps, hours


def _flops(config: dict, tokens: int) -> float | None:
    """Return the FLOPs of one step; None for a model that this version does not know."""
    try:
        model = ModelConfig.model_validate(config["model"])
    except ValidationError:
        return None
    return model.flops_per_token(config["data"]["seq_len"]) * tokens


def _about(path: Path, config: dict, series: dict, names: Mapping[Path, str]) -> list[list[str]]:
    """Name and value of what stands in the summary."""
    status = read_object(path / "status.json")
    losses = series.get("loss", ([], []))[1]
    validations = series.get("validation/loss", ([], []))[1]
    speeds = series.get("tokens_per_second", ([], []))[1]
    last = losses[-100:]
    fewer = f" (of {len(last)})" if len(last) < 100 else ""
    median = sorted(speeds)[len(speeds) // 2] if speeds else None
    rows = [
        *([("run", path.resolve().name)] if any("…" in name for name in names.values()) else []),
        ("model", config["model"]["name"]),
        ("state", f"{status.get('state', '–')} at step {status.get('step', '–')}"),
        ("steps", f"{config['trainer']['steps']:,}"),
        ("loss, last 100", f"{sum(last) / len(last):.4f}{fewer}" if last else "–"),
        ("validation, last", f"{validations[-1]:.4f}" if validations else "–"),
        ("validation, best", f"{min(validations):.4f}" if validations else "–"),
        ("tokens/s, median", f"{median:,.0f}" if median else "–"),
        ("seed", str(config["seed"])),
        ("weights from", " ← ".join(ancestry(path, config, names))),
        ("ledger", last_ledger_hash(path) or "–"),
    ]
    return [list(row) for row in rows]


def charts(found: Sequence[dict]) -> dict[str, list[str]]:
    """Return keys of the curves over training, of those over something else, and of the maps."""
    series = {key for run in found for key, (steps, _) in run["series"].items() if len(steps) > 1}
    series -= {key for key in series if key.endswith(("_stderr", "/failed"))}
    rest = sorted(
        series - set(FIRST), key=lambda key: (key.startswith(("checkpoint/", "evaluation/")), key)
    )
    curves = {key for run in found for key in run["curves"] if not key.endswith("_stderr")}
    maps = {key for run in found for key in run["maps"]}
    order = [key for key in FIRST if key in series] + rest
    return {"series": order, "curves": sorted(curves), "maps": sorted(maps)}


def results(found: Sequence[dict]) -> list[dict]:
    """Return the last value of every evaluation that is no curve, with standard error, by run."""
    keys = sorted(
        {
            key
            for run in found
            for key in run["series"]
            if key.startswith("evaluation/") and not key.endswith(("_stderr", "/failed"))
        }
    )
    return [
        {
            "key": key.removeprefix("evaluation/"),
            "values": [_last(run, key) for run in found],
            "errors": [_last(run, f"{key}_stderr") for run in found],
        }
        for key in keys
    ]


def _last(run: dict, key: str) -> float | None:
    return run["series"][key][1][-1] if key in run["series"] else None


def differences(configs: dict[str, dict]) -> list[list[str]]:
    """Return keys at which not all configurations are alike, with the value of each run.

    Where each has one mixer, these are compared with each other, as ``model.mixers.*``.
    """
    if all(len(config["model"].get("mixers", {})) == 1 for config in configs.values()):
        configs = {name: _with_mixer_starred(config) for name, config in configs.items()}
    first, *others = configs.values()
    keys = sorted({key for other in others for key, *_ in config_changes(first, other)} - {"name"})
    return [[key, *(_at(config, key) for config in configs.values())] for key in keys]


def _with_mixer_starred(config: dict) -> dict:
    (mixer,) = config["model"]["mixers"].values()
    return config | {"model": config["model"] | {"mixers": {"*": mixer}}}


def _at(config: dict, key: str) -> str:
    node: object = config
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return "–"
        node = node[part]
    return json.dumps(node, default=str)


def write(runs: dict[str, Path], out: Path) -> None:
    """Write the report. Raises ConfigError: see ``build``; or ``out`` cannot be written."""
    if out.suffix != ".html":
        raise ConfigError("REPORT", f"out={out}: expected a name that ends in .html")
    content = build(runs)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(content, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            "REPORT", f"out={out}: {error.strerror}; expected a place that can be written"
        ) from None
