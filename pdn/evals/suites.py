"""Which tasks to evaluate: names to lm-eval tasks, local task files and tests of our own.

Suites of them stand in configs/eval/.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from pdn.config import Strict, config_root
from pdn.errors import ConfigError
from pdn.evals.probes import AnyProbe
from pdn.evals.results import Row
from pdn.wording import first_line

if TYPE_CHECKING:
    from lm_eval.api.task import Task

CONFIGS = config_root() / "eval"
DECLARATION = re.compile(r"^(?:task|group|tag): *[\"']?([\w.-]+)[\"']?(?: *#.*)?$", re.MULTILINE)
TAGS = re.compile(r"^tag:\n((?: *- *[\w.-]+\n)+)", re.MULTILINE)


class PaperColumn(Strict):
    """Says which of our results stands in a column of the paper.

    That is ``<task or average>/<metric>`` times ``scale``.
    """

    key: str
    scale: float


class Paper(Strict):
    columns: dict[str, PaperColumn]
    rows: dict[str, list[float]]


class Suite(Strict):
    """Names tasks to run together, and averages of them.

    averages: by name, the metric of each task that goes into it.
    """

    tasks: list[str] = Field(min_length=1)
    averages: dict[str, dict[str, str]]
    paper: Paper | None


@dataclass(frozen=True)
class Plan:
    """Says what to run. probes: our own tests by name; harness: names for lm-eval.

    local: of those, the task configs that lm-eval has not, or that change its own; their data files
        are absolute paths.
    data_dir: where copies of the hub's data sets are looked for, as ``<owner>/<name>``; None:
        nowhere.
    """

    suite: Suite | None
    probes: dict[str, AnyProbe]
    harness: list[str]
    local: dict[str, dict]
    data_dir: Path | None


class Loaded(NamedTuple):
    """Holds lm-eval's tasks of a plan by name, with their data.

    ``missing`` holds what is said of each task whose data are not to be had.
    """

    tasks: dict[str, Task]
    missing: dict[str, str]


def plan(*, suite: str | None, tasks: list[str], data_dir: str | None) -> Plan:
    """Resolve names, before anything costly is built.

    Args:
        suite: name of a file in configs/eval/suites, or None.
        tasks: more tasks: names of configs/eval/tasks, of lm-eval, or paths of YAML files in
            lm-eval's format.
        data_dir: folder with the data files that configs/eval/tasks name, or with copies of the
            hub's data sets as ``<owner>/<name>``; what it lacks of the latter, and everything if it
            is None, comes from the cache or the hub.

    Raises:
        ConfigError: an unknown name (the nearest are named), a missing data file, or lm-eval
            missing though a task needs it.
    """
    chosen = None if suite is None else load_suite(suite)
    wanted: list[str] = [*(chosen.tasks if chosen else []), *tasks]
    names = list(dict.fromkeys(wanted))
    if not names:
        raise ConfigError(
            "EVAL-TASKS", f"no task named; expected suite={'|'.join(suites())} or tasks=<names>"
        )
    if data_dir is not None and not Path(data_dir).expanduser().is_dir():
        raise ConfigError(
            "EVAL-DATA",
            f"data_dir={data_dir}: no such folder; expected one with the tasks' data files; check "
            "the path, or leave it out to take them from the hub",
        )
    folder = None if data_dir is None else Path(data_dir).expanduser().resolve()
    own = {path.stem: path for path in sorted((CONFIGS / "tasks").glob("*.yaml"))}
    probes, harness, local, stock = {}, [], {}, None
    for name in names:
        if name.endswith(".yaml"):
            path = Path(name).expanduser()
            content = _read_yaml(path)
            name = content.get("task", path.stem)
            local[name] = _with_absolute_files(content, path.resolve(), folder)
            harness.append(name)
            continue
        content = _read_yaml(own[name]) if name in own else {}
        if "kind" in content:
            probes[name] = _probe(own[name], content)
            continue
        stock = stock_tasks() if stock is None else stock
        if name in own and (
            name not in stock or (folder is not None and not _copied(stock[name], folder))
        ):
            local[name] = _with_absolute_files(content, own[name], folder, in_lm_eval=name in stock)
        elif name not in stock:
            raise _unknown(name, sorted({*own, *stock}))
        harness.append(name)
    return Plan(chosen, probes, harness, local, folder)


def _copied(task: Path, data_dir: Path) -> bool:
    """Return whether the data set of a stock task's file has a copy in ``data_dir``."""
    found = (
        re.search(r"^dataset_path: *(\S+)", task.read_text(encoding="utf-8"), re.MULTILINE)
        if task.is_file()
        else None
    )
    return found is not None and (data_dir / found[1]).is_dir()


def _with_absolute_files(
    content: dict, source: Path, data_dir: Path | None, *, in_lm_eval: bool = False
) -> dict:
    """Return a task's config with the data files looked up in ``data_dir``, or beside its YAML."""
    options = content.get("dataset_kwargs", {})
    files = {
        split: (data_dir or source.parent) / file
        for split, file in options.get("data_files", {}).items()
    }
    for file in files.values():
        if not file.is_file():
            raise ConfigError(
                "EVAL-DATA",
                f"{content.get('task', source.stem)}: no file {file}, which {source} names; "
                "expected it there: set data_dir= to its folder"
                + (", or leave data_dir out to take the data from the hub" if in_lm_eval else ""),
            )
    return content | {
        "dataset_kwargs": options
        | {"data_files": {split: str(file) for split, file in files.items()}}
    }


def averages(rows: list[Row], suite: Suite) -> list[Row]:
    """Return the suite's averages of which every task was evaluated, under the conditions of any.

    Their standard error is that of the documents of these tasks, not of other tasks.
    """
    by_name = {(row.task, row.metric): row for row in rows}
    found = []
    for name, members in suite.averages.items():
        chosen = [by_name[member] for member in members.items() if member in by_name]
        if len(chosen) < len(members):
            continue
        errors = [row.stderr for row in chosen if row.stderr is not None]
        spread = math.hypot(*errors) / len(errors) if len(errors) == len(chosen) else None
        parts = dict.fromkeys(part for row in chosen for part in row.condition.split(",") if part)
        mean = statistics.fmean(row.value for row in chosen)
        found.append(Row(name, "average", mean, spread, condition=",".join(parts)))
    return found


def suites() -> list[str]:
    return sorted(path.stem for path in (CONFIGS / "suites").glob("*.yaml"))


def load_suite(name: str) -> Suite:
    """Raises ConfigError: no such suite, or its file is not one."""
    if name not in suites():
        raise _unknown(name, suites(), what="suite")
    file = CONFIGS / "suites" / f"{name}.yaml"
    try:
        return Suite.model_validate(_read_yaml(file))
    except ValidationError as error:
        raise ConfigError("EVAL-SUITE", f"{file}: {error}") from None


@functools.cache
def stock_tasks() -> dict[str, Path]:
    """Return the names of lm-eval's tasks, groups and tags, and the file or folder of each.

    The files are read as text, which is quick.

    Raises:
        ConfigError: lm-eval is not installed.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.submodule_search_locations is None:
        raise ConfigError(
            "EVAL-PACKAGE",
            "lm-eval is not installed; expected it for its tasks: pip install 'pdn[evals]'",
        )
    found: dict[str, Path] = {}
    for file in sorted((Path(spec.submodule_search_locations[0]) / "tasks").rglob("*.yaml")):
        text = file.read_text(errors="replace", encoding="utf-8")
        names = DECLARATION.findall(text)
        for block in TAGS.findall(text):
            names += [line.strip(" -") for line in block.splitlines()]
        for name in names:
            found[name] = file if found.get(name) in (None, file) else file.parent
    return found


def _unknown(name: str, known: list[str], what: str = "task") -> ConfigError:
    near = difflib.get_close_matches(name, known, 3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"e.g. {', '.join(known[:5])}"
    return ConfigError(
        "EVAL-TASKS", f"{name!r}: no such {what}; expected one of {len(known)} names; {hint}"
    )


def _read_yaml(file: Path) -> dict:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(
            "EVAL-TASKS", f"{file}: {first_line(error)}; expected a task in YAML"
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(
            "EVAL-TASKS",
            f"{file}: holds a {type(content).__name__}; expected keys such as task: and "
            "dataset_path:",
        )
    return content


def _probe(file: Path, content: dict) -> AnyProbe:
    try:
        return TypeAdapter(AnyProbe).validate_python(content)
    except ValidationError as error:
        raise ConfigError("EVAL-TASKS", f"{file}: {error}") from None
