"""lm-eval's tasks with their data.

Data come from local files, copies of the hub's data sets, the Hugging Face cache, or the hub.
Importing this module imports lm_eval, which takes seconds.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets
import datasets.config
import huggingface_hub
import yaml
from lm_eval.api.registry import register_metric
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager

from pdn.data.failures import SILENCE, is_passing, unanswered
from pdn.distributed.collectives import gather_or_raise
from pdn.errors import ConfigError
from pdn.evals.suites import Loaded, Plan, stock_tasks


@register_metric(
    metric="contains", higher_is_better=True, output_type="generate_until", aggregation="mean"
)
def contains(references: list[str], predictions: list[str]) -> float:
    """Return whether the continuation holds the answer, case aside, as 1 or 0.

    That is what squad_completion, fda and swde count; for task YAMLs.
    """
    return float(references[0].strip().lower() in predictions[0].lower())


def load_tasks(
    plan: Plan,
    metadata: dict,
    shots: int | None = None,
    tell: Callable[[str], None] | None = None,
) -> Loaded:
    """Load tasks; collective: a task whose data one rank cannot load is missing on all.

    Args:
        metadata: what RULER's generators need: the tokenizer's folder and the lengths.
        shots: examples before each question; None: the task's own number.
        tell: called with a line if the hub cannot be reached.

    Raises:
        ConfigError: a package is missing.
    """
    for library in ("lm_eval", "huggingface_hub"):
        # they warn of every task that includes another, and of every retry
        logging.getLogger(library).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    loaded: dict[str, dict[str, Task]] = {}

    def load() -> dict[str, str]:
        missing = {}
        with (
            _task_manager(plan.harness, plan.local, metadata) as manager,
            _data_sets(plan.data_dir, tell) as asked,
            _examples_only_if_shown(shots),
        ):
            for name in plan.harness:
                asked.clear()
                try:
                    loaded[name] = manager.load([name])["tasks"]
                except ImportError as error:
                    raise ConfigError(
                        "EVAL-PACKAGE", f"{name}: {error}; expected it: pip install 'pdn[evals]'"
                    ) from None
                except Exception as error:  # from the hub, a file, a template or a task's own code
                    missing[name] = f"{name}: {_what_is_missing(plan, name, asked, error)}"
        return missing

    missing: dict[str, str] = {}
    for found in gather_or_raise(load):
        missing |= found
    return Loaded(
        {
            key: task
            for name, found in loaded.items()
            if name not in missing
            for key, task in found.items()
        },
        missing,
    )


@contextlib.contextmanager
def _task_manager(
    names: Sequence[str], local: dict[str, dict], metadata: dict
) -> Iterator[TaskManager]:
    """Yield a task manager that knows ``names`` alone: to read all of lm-eval's tasks takes long.

    Args:
        local: configs by name. One that lm-eval has too changes the stock task's keys that it
            names.
    """
    stock = stock_tasks()
    with tempfile.TemporaryDirectory() as scratch:
        places = []
        for name in names:
            if name in local:
                content = ({"include": str(stock[name])} if name in stock else {}) | local[name]
                Path(scratch, f"{name}.yaml").write_text(
                    yaml.safe_dump(content, sort_keys=False), encoding="utf-8"
                )
            else:
                places.append(stock[name].parent if stock[name].is_file() else stock[name])
        yield TaskManager(
            include_path=[*dict.fromkeys(places), scratch],
            include_defaults=False,
            metadata=metadata,
        )


@contextlib.contextmanager
def _examples_only_if_shown(shots: int | None) -> Iterator[None]:
    """Let a task that shows no examples lack the split that they would come from."""
    find = ConfigurableTask.fewshot_docs

    def fewshot_docs(self):
        try:
            return find(self)
        except KeyError:
            if (self.config.num_fewshot or 0) if shots is None else shots:
                raise
            return None

    ConfigurableTask.fewshot_docs = fewshot_docs
    try:
        yield
    finally:
        ConfigurableTask.fewshot_docs = find


class _Asked(list):
    """Names of the hub's data sets that tasks asked for, those of tasks' own code among them.

    ``unreachable`` says why the hub did not answer, if it did not.
    """

    unreachable: str | None = None


@contextlib.contextmanager
def _data_sets(folder: Path | None, tell: Callable[[str], None] | None = None) -> Iterator[_Asked]:
    """Make tasks find the hub's data sets in ``folder/<owner>/<name>`` first, then in the cache.

    A hub that does not answer is asked only once: its client would try for half a minute.
    """
    load, asked = datasets.load_dataset, _Asked()
    switches = [(datasets.config, "HF_HUB_OFFLINE"), (huggingface_hub.constants, "HF_HUB_OFFLINE")]
    before = [getattr(module, name) for module, name in switches]
    known = False

    def load_dataset(path: str, *args, **kwargs):
        nonlocal known
        if "/" not in path:  # json, parquet
            return load(path, *args, **kwargs)
        asked.append(path)
        if folder is not None and (folder / path).is_dir():
            return load(str(folder / path), *args, **kwargs)
        if not known:
            asked.unreachable, known = _why_unreachable(path), True
            if asked.unreachable is not None:
                for module, name in switches:
                    setattr(module, name, True)
                if tell is not None:
                    tell(f"the hub {asked.unreachable}: only what is cached is used")
        return load(path, *args, **kwargs)

    datasets.load_dataset = load_dataset
    try:
        yield asked
    finally:
        datasets.load_dataset = load
        for (module, name), value in zip(switches, before, strict=True):
            setattr(module, name, value)


def _why_unreachable(name: str) -> str | None:
    """Return how the hub fails to answer a question about a data set; None if it answers.

    A busy one is left alone, too: its client would try each data set for half a minute.
    """
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=SILENCE)
    except Exception as error:
        if is_passing(error):
            return unanswered(error)
    return None


def _what_is_missing(plan: Plan, name: str, asked: _Asked, error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    reason = f"({type(error).__name__}: {lines[0][:160]})"
    if "punkt_tab" in str(error):
        return "nltk's punkt_tab is not here; expected it: python -m nltk.downloader punkt_tab"
    if asked:
        folder = plan.data_dir or "<data_dir>"
        if asked.unreachable is not None and isinstance(error, ConnectionError):
            reason = f"(the hub {asked.unreachable})"
        return (
            f"its data set {asked[-1]} cannot be loaded {reason}; expected it in the Hugging Face "
            f"cache, on the hub, or in data_dir=: hf download {asked[-1]} --repo-type dataset "
            f"--local-dir {folder}/{asked[-1]}"
        )
    if name in plan.local:
        files = ", ".join(plan.local[name].get("dataset_kwargs", {}).get("data_files", {}).values())
        return (
            f"{files} cannot be loaded {reason}; expected JSON lines, .gz or not, of the task's "
            "form"
        )
    return f"its data cannot be made {reason}; expected other lengths=, or a tokenizer of text"
