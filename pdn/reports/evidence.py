"""Studies: declared sweeps over arms, learning rates and seeds, and the numbers of a study.

A study is a YAML file. Every arm first searches its own learning rate with seeds of its own, then
runs at its best rate with the seeds of the comparison, all on the same samples in the same order.
What the runs found is kept as compact records, one JSON line for each finished run, so that a
document's numbers can be recomputed without the runs.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator

from pdn.config import Strict
from pdn.errors import ConfigError
from pdn.models.config import ModelConfig
from pdn.reports.statistics import Interval, t_interval
from pdn.reports.trials import Trial, has_diverged, is_finished, last_ledger_hash
from pdn.runs.records import read_metrics
from pdn.runs.schema import recorded_config

_OF_A_STEP = {"tokens", "loss", "grad_norm", "step_seconds"}  # keys of metrics.jsonl
RECORDED = {"model": dict, "data.seq_len": int, "optim.lr": float, "seed": int}
"""What a record takes from a configuration."""
CURVE_POINTS = 40  # of the training loss that a record keeps
REDUNDANT = ("validation/perplexity", "validation/tokens")
RUNS = Path("runs")  # of trials that are not run, as when a study is checked
Words = list[str]
Seeds = Annotated[list[int], Field(min_length=1)]
Declared = TypeVar("Declared", bound=Strict)


class Branch(Strict):
    """Names the checkpoint that the runs of an arm go on from, each from that of its own seed."""

    arm: str
    step: int = Field(ge=1)


class Arm(Strict):
    """Describes one of the things compared."""

    words: Words  # of train.py
    rates_of: str | None = None  # an arm whose best learning rate this one takes over
    seeds: Seeds | None = None  # of the comparison; null: the study's
    branch: Branch | None = None  # whose learning rate it has too; null: runs of their own
    order: str = ""  # arms that give the same one have read the same samples in the same order


class Line(Strict):
    """Asks for a line over positions: the mean over an arm's seeds of ``<key>@<position>``."""

    arm: str
    key: str


class Study(Strict):
    """Compares arms with one baseline."""

    title: str
    words: Words  # of train.py, common to all arms
    metric: str  # key of metrics.jsonl; its value after the last step, lower is better
    baseline: str
    arms: Annotated[dict[str, Arm], Field(min_length=1)]
    # peak learning rates to search
    rates: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]
    search_seeds: Seeds  # of the search alone: the best of several rates looks better than it is
    seeds: Seeds  # of the comparison
    data_seed: int  # one order of the data for all of them, as far as their windows are alike
    # by panel and name; the others of a panel are compared with its first. null: no such picture
    positions: dict[str, dict[str, Line]] | None = None
    position_label: str = "tokens before it, up to"  # of the axes of that picture
    value_label: str = "nats a token"

    @model_validator(mode="after")
    def _arms_exist(self):
        others = [arm.rates_of for arm in self.arms.values() if arm.rates_of]
        others += [arm.branch.arm for arm in self.arms.values() if arm.branch]
        others += [line.arm for panel in (self.positions or {}).values() for line in panel.values()]
        for name in (self.baseline, *others):
            if name not in self.arms:
                raise ValueError(f"{name!r} is not one of arms: {', '.join(self.arms)}")
        for name, arm in self.arms.items():
            if arm.branch and (arm.rates_of or self.arms[arm.branch.arm].branch):
                raise ValueError(
                    f"arms.{name}: found a branch with rates_of, or of another branch; expected "
                    "one of an arm of its own, whose learning rate it has"
                )
        if set(self.seeds) & set(self.search_seeds):
            raise ValueError(
                f"search_seeds = {self.search_seeds} and seeds = {self.seeds} share some; "
                "expected different ones"
            )
        return self

    def searcher(self, arm: str) -> str:
        """Name the arm whose search gives the learning rate of ``arm``."""
        branch = self.arms[arm].branch
        return branch.arm if branch else self.arms[arm].rates_of or arm

    def trial(self, arm: str, rate: float, seed: int, runs: Path = RUNS) -> Trial:
        """Return one trial.

        Args:
            arm: its name.
            rate: peak learning rate.
            seed: of the initialisation.
            runs: the directory of all trials' runs, where a branch finds its parent.
        """
        words = [
            *self.words,
            *self.arms[arm].words,
            f"optim.lr={rate!r}",
            f"seed={seed}",
            f"data.seed={self.data_seed}",
        ]
        branch = self.arms[arm].branch
        if branch:
            words.append(f"branch_from={runs / _name(branch.arm, rate, seed)}@{branch.step}")
        return Trial(_name(arm, rate, seed), tuple(words))

    def parent(self, trial: Trial) -> str | None:
        """Name the trial that another one is a branch of; None if it is none."""
        arm, rest = _parts(trial.name)
        branch = self.arms[arm].branch
        return f"{branch.arm}{rest}" if branch else None

    def lacks_result(self, record: dict) -> str | None:
        """Say why a record has no result; None: it has one."""
        return unmeasured(record, self.metric)

    def arm_of(self, trial: str) -> str:
        """Name the arm that a trial's name begins with."""
        return _parts(trial)[0]

    def search_trials(self) -> list[Trial]:
        """List the trials of the search, rates in the outer loop."""
        searching = [name for name in self.arms if self.searcher(name) == name]
        arms = searching if len(self.rates) > 1 else []
        return [
            self.trial(arm, rate, seed)
            for seed in self.search_seeds
            for rate in self.rates
            for arm in arms
        ]

    def diverged(self, failed: Mapping[str, str]) -> list[dict]:
        """Return what stands in for the records of rates that diverged: an infinite result.

        Args:
            failed: reasons by name of trials.
        """
        places = itertools.product(self.arms, self.rates, self.search_seeds)
        evaluations = {self.metric: [[0, math.inf]]}
        return [
            {"arm": arm, "lr": rate, "seed": seed, "steps": 0, "evaluations": evaluations}
            for arm, rate, seed in places
            if has_diverged(failed.get(_name(arm, rate, seed), ""))
        ]

    def due(self, records: Sequence[dict], runs: Path = RUNS) -> list[Trial]:
        """List the search, and what is known of the comparison from the records.

        Args:
            records: of finished runs.
            runs: see ``trial``.
        """
        return self.search_trials() + self.trials(best_rates(self, records), runs)

    def trials(self, best: dict[str, float], runs: Path = RUNS) -> list[Trial]:
        """List the trials of arms with a best rate, seeds outermost so that pairs come first.

        Args:
            best: rate of each arm whose search is complete.
            runs: see ``trial``.
        """
        known = [arm for arm in self.arms if self.searcher(arm) in best]
        return [
            self.trial(arm, best[self.searcher(arm)], seed, runs)
            for seed in self.seeds
            for arm in known
            if seed in (self.arms[arm].seeds or self.seeds)
        ]

    def ready(
        self, trials: Sequence[Trial], recorded: Collection[str], runs: Path
    ) -> tuple[list[Trial], list[str]]:
        """Return which trials may run, and the names of branches that wait for their parents.

        Args:
            trials: of the study.
            recorded: names of those with a record, which are not run again, unless a branch needs
                one whose run is gone.
            runs: see ``trial``.
        """
        left = [trial for trial in trials if trial.name not in recorded]
        parents = {name for trial in left if (name := self.parent(trial)) is not None}
        trained = {name for name in parents if is_finished(runs / name)}
        waiting = {t.name for t in left if self.parent(t) in parents - trained}
        wanted = {t.name for t in left} - waiting | (parents - trained)
        return [t for t in trials if t.name in wanted], sorted(waiting)


def _name(arm: str, rate: float, seed: int) -> str:
    return f"{arm}-lr{rate:g}-seed{seed}"


def _parts(trial: str) -> tuple[str, str]:
    """Split a trial's name into its arm and the rest."""
    arm, separator, rest = trial.rpartition("-lr")
    return arm, separator + rest


def read_study(path: Path) -> Study:
    """Read the study that a YAML file declares.

    Raises:
        ConfigError: the file is missing, no YAML, or no study; the message names the key.
    """
    return read_declared(path, Study)


def read_declared(path: Path, kind: type[Declared]) -> Declared:
    """Read what a YAML file declares, a study or a grid of rates; raises as ``read_study``."""
    try:
        return kind.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(
            "STUDY", f"{path}: {error}; expected a study, such as docs/evidence/<name>.yaml"
        ) from None
    except ValidationError as error:
        parts = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError("STUDY", f"{path}: {parts}") from None


# ------------------------------------------------------------ records


def record_of(run: Path, **extra) -> dict:
    """Make the compact record of a finished run.

    Args:
        run: its directory.
        extra: keys to add, such as ``arm``.

    Returns:
        Configuration in brief, ``order`` (the ledger's hash over all samples), every value of every
        validation key as [step, value] pairs, and about ``CURVE_POINTS`` means of the training
        loss.
    """
    config, metrics = recorded_config(run, RECORDED), read_metrics(run)
    steps = {r["step"]: r for r in metrics if r.keys() >= _OF_A_STEP}
    if not steps:
        raise ConfigError(
            "METRICS",
            f"{run / 'metrics.jsonl'}: no step with {', '.join(sorted(_OF_A_STEP))}; "
            "expected a run that has trained",
        )
    losses = [float(r["loss"]) for _, r in sorted(steps.items())]
    evaluations: dict[str, list] = {}
    for record in metrics:
        for key, value in record.items():
            if (
                key.startswith(("validation/", "evaluation/"))
                and isinstance(value, int | float)
                and key not in REDUNDANT
            ):
                evaluations.setdefault(key, []).append([record["step"], round(value, 6)])
    model = _model_of(run, config)
    last = steps[max(steps)]
    own = last["step"] - int((config.get("branch_from") or "@0").rpartition("@")[2])
    seconds = [r["step_seconds"] for r in steps.values()]  # of the steps that were logged
    return {
        **extra,
        "model": model.name,
        "parameters": model.num_params(),
        "flops_per_token": model.flops_per_token(config["data"]["seq_len"]),
        "lr": config["optim"]["lr"],
        "seed": config["seed"],
        "data_seed": config["data"].get("seed"),
        "steps": last["step"],
        "tokens": last["tokens"],
        "order": last_ledger_hash(run),
        "evaluations": evaluations,
        "train_loss": _thinned(losses),
        "grad_norm_median": _round(
            statistics.median(float(r["grad_norm"]) for r in steps.values())
        ),
        "skipped": sum(r.get("skipped", 0) for r in steps.values()),
        "train_seconds": round(statistics.fmean(seconds) * own, 1),
    }


def _model_of(run: Path, config: dict) -> ModelConfig:
    try:
        return ModelConfig.model_validate(config["model"])
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            "RUN-CONFIG",
            f"{run / 'config.yaml'}: model.{'.'.join(map(str, first['loc']))}: {first['msg']}; "
            "expected a model of this version",
        ) from None


def _thinned(losses: Sequence[float]) -> list[float]:
    """Return means of up to ``CURVE_POINTS`` equal parts."""
    parts = min(CURVE_POINTS, len(losses))
    ends = [round(i * len(losses) / parts) for i in range(parts + 1)]
    return [_round(statistics.fmean(losses[a:b])) for a, b in itertools.pairwise(ends)]


def _round(value: float) -> float:
    return float(f"{value:.5g}") if math.isfinite(value) else value


def read_records(path: Path) -> list[dict]:
    """Read the records of a .jsonl file; of a run recorded twice the last."""
    if not path.exists():
        return []
    records = [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    return list({(r["arm"], r["lr"], r["seed"]): r for r in records}.values())


def write_records(path: Path, records: Sequence[dict]) -> None:
    """Write records sorted by arm, rate and seed, a line each."""
    ordered = sorted(records, key=lambda r: (r["arm"], r["lr"], r["seed"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text("".join(json.dumps(record) + "\n" for record in ordered), encoding="utf-8")
    draft.replace(path)


def unmeasured(record: dict, metric: str) -> str | None:
    """Say why a record has no result: ``metric`` was not measured after its last step; else None.

    An evaluation that failed in the run would otherwise leave an earlier value, or none, to be
    compared with what others came to.
    """
    values = record["evaluations"].get(metric, [])
    if values and values[-1][0] == record["steps"]:
        return None
    last = f"last at step {values[-1][0]}" if values else "at no step"
    failed = [key for key in record["evaluations"] if key.endswith("/failed")]
    why = f" ({', '.join(failed)}: evaluations failed, its log says why)" if failed else ""
    return (
        f"{metric} was not measured after step {record['steps']}, {last}{why}; expected a run that "
        "evaluates after its last step: remove its directory and run it again"
    )


def result(record: dict, metric: str) -> float:
    """Return the value of a key after the last step.

    It is infinite, which loses every comparison, if the value is not finite.

    Raises:
        ConfigError: it was not measured there.
    """
    reason = unmeasured(record, metric)
    if reason is not None:
        raise ConfigError("RESULT", f"{record['arm']}, seed {record['seed']}: {reason}")
    value = record["evaluations"][metric][-1][1]
    return value if math.isfinite(value) else math.inf


# ------------------------------------------------------------ numbers


def search_table(study: Study, records: Sequence[dict]) -> dict[str, dict[float, float]]:
    """Return, for each arm that searches, the mean result of every finished rate.

    A rate is finished when all search seeds have finished it.
    """
    found: dict[str, dict[float, list[float]]] = {}
    for record in records:
        if record["seed"] in study.search_seeds and record["arm"] in study.arms:
            found.setdefault(record["arm"], {}).setdefault(record["lr"], []).append(
                result(record, study.metric)
            )
    whole = len(study.search_seeds)
    return {
        arm: {
            rate: statistics.fmean(values)
            for rate, values in sorted(rates.items())
            if len(values) == whole
        }
        for arm, rates in found.items()
    }


def best_rates(study: Study, records: Sequence[dict]) -> dict[str, float]:
    """Return the best rate of each arm whose search is complete.

    With a single rate there is nothing to search.
    """
    if len(study.rates) == 1:
        return {arm: study.rates[0] for arm in study.arms}
    table = search_table(study, records)
    return {
        arm: min(found, key=found.__getitem__)
        for arm, found in table.items()
        if set(found) == set(study.rates)
    }


def final_results(
    study: Study,
    records: Sequence[dict],
    metric: str | None = None,
    arms: Collection[str] | None = None,
) -> dict[str, dict[int, float]]:
    """Return the results of the comparison by arm and seed, each arm at its best rate.

    Args:
        study: that the records are of.
        records: of its finished runs.
        metric: key of the result; None: the study's.
        arms: those to return; None: all.

    Raises:
        ConfigError: two runs of arms of one order did not see the same samples in the same order,
            or not all runs trained on the same number of tokens.
    """
    best = best_rates(study, records)
    chosen = [
        record
        for record in records
        if record["seed"] in study.seeds
        and record["arm"] in study.arms
        and record["lr"] == best.get(study.searcher(record["arm"]))
    ]
    for order in {arm.order for arm in study.arms.values()}:
        require_same_order([r for r in chosen if study.arms[r["arm"]].order == order])
    require_same_tokens(chosen)
    found: dict[str, dict[int, float]] = {}
    for record in chosen:
        if arms is None or record["arm"] in arms:
            value = result(record, metric or study.metric)
            found.setdefault(record["arm"], {})[record["seed"]] = value
    return {arm: dict(sorted(found[arm].items())) for arm in study.arms if arm in found}


def require_same_order(records: Sequence[dict]) -> None:
    """Raise ConfigError unless all runs consumed the same samples in the same order.

    Their ledgers tell.
    """
    orders: dict[str, str] = {}
    for record in records:
        orders.setdefault(str(record["order"]), f"{record['arm']}, seed {record['seed']}")
    if len(orders) > 1:
        (a, first), (b, second), *_ = orders.items()
        raise ConfigError(
            "ORDER",
            f"{first} has the ledger hash {a}, {second} has {b}; expected the same samples in the "
            "same order: give all runs the same data, data.seed, batch and steps",
        )


def require_same_tokens(records: Sequence[dict]) -> None:
    """Raise ConfigError unless all runs trained on the same number of tokens."""
    found = {record["tokens"]: f"{record['arm']}, seed {record['seed']}" for record in records}
    if len(found) > 1:
        said = ", ".join(f"{name}: {tokens:,}" for tokens, name in sorted(found.items()))
        raise ConfigError(
            "TOKENS", f"runs trained on different numbers of tokens: {said}; expected the same"
        )


def paired(base: dict[int, float], other: dict[int, float]) -> Interval | None:
    """Compute the interval of other minus base over their common seeds, None below two."""
    seeds = sorted(base.keys() & other.keys())
    differences = [other[seed] - base[seed] for seed in seeds]
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return None
    return t_interval(differences)
