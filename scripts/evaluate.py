#!/usr/bin/env python
"""Evaluate a trained model.

    python scripts/evaluate.py run=runs/<name> suite=paper [key=value …]
    python scripts/evaluate.py run=runs/<name> tasks=piqa,needle_1 [key=value …]
    torchrun --nproc-per-node 8 scripts/evaluate.py run=… suite=paper    ranks share the documents

run          directory of a run, one of its checkpoints (runs/<name>/checkpoints/step-00000100), or
             an exported folder
suite        a file of configs/eval/suites: commonsense, retrieval, ruler, paper, recall, local
tasks        a,b,…: names of configs/eval/tasks (needle_1, length, mqar, parity, …), of lm-eval, or
             paths of task YAMLs
data_dir     folder with the data files that configs/eval/tasks names; without it lm-eval's tasks
             come from the hub
limit        null; documents of each of lm-eval's tasks, the first ones
num_fewshot  null; examples before each of lm-eval's questions; null: the task's own number
log_samples  8; documents of each of lm-eval's tasks to keep with prompts and answers; null: all
lengths      null; a,b,…: tokens, for the tasks that make a curve over lengths
text         null; a text file to hide needles in
max_length   null; tokens that the model sees at once; null: the length it was trained at
batch_size   16; sequences of a forward pass on each device
path         chunkwise | recurrent: whole sequences at once, or token by token through the state
             (slow; the same results)
out          null; JSON file of the results; null: <run>/evaluations/step-<step>-<suite or tasks,
             conditions>.json
logger       none | wandb | tensorboard: also send results and samples to the run there
device       auto | cpu | cuda
"""

import pdn.cli.process  # (before torch: see there)

# isort: split
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

from pydantic import Field, TypeAdapter, ValidationError

from pdn.cli.options import Lengths, Names, Place, parse, refuse_unused, run_script
from pdn.config import Strict
from pdn.data import open_data
from pdn.data.config import DataConfig
from pdn.distributed.fsdp import World, join_world
from pdn.errors import ConfigError, LockedError
from pdn.evals.evaluation import OPTIONS, Outcome, options_of, run
from pdn.evals.in_loop import validation_batches
from pdn.evals.probes.base import Subject
from pdn.evals.results import record, tables, write_json, write_samples
from pdn.evals.scoring import Scorer
from pdn.evals.suites import Plan, plan
from pdn.evals.tables import print_tables
from pdn.hub.load import load_run
from pdn.inference.load import LoadedRun, in_one_line
from pdn.logging.config import LoggerConfig
from pdn.logging.loggers import open_logger
from pdn.runs.directory import RunDirectory
from pdn.runs.schema import recorded_config

RECORDED = (
    "suite", "tasks", "data_dir", "limit", "num_fewshot", "lengths", "text", "max_length",
    "batch_size", "path",
)  # fmt: skip
CONDITIONS = ("limit", "num_fewshot", "lengths", "text", "max_length", "data_dir")
MAX_LABEL = 100  # characters of a file's name


class Options(Strict):
    run: Place
    suite: str | None = None
    tasks: Names = ()
    data_dir: Place | None = None
    limit: int | None = Field(None, ge=1)
    num_fewshot: int | None = Field(None, ge=0)
    log_samples: int | None = Field(8, ge=0)
    lengths: Lengths | None = None
    text: Place | None = None
    max_length: int | None = Field(None, ge=2)
    batch_size: int = Field(16, ge=1)
    path: str = Field("chunkwise", pattern="^(chunkwise|recurrent)$")
    out: Place | None = None
    logger: str = Field("none", pattern="^(none|wandb|tensorboard)$")
    device: str = Field("auto", pattern="^(auto|cpu|cuda)$")


def main(arguments: list[str]) -> None:
    options = parse(Options, arguments)
    chosen = plan(suite=options.suite, tasks=list(options.tasks), data_dir=options.data_dir)
    idle = sorted((OPTIONS - options_of(chosen)) & options.model_fields_set)
    if idle:
        raise ConfigError(
            "EVAL-OPTIONS",
            f"{', '.join(idle)}: found for tasks that do not read it; expected tasks that do: "
            "leave it out",
        )
    world = join_world(options.device, timeout=3600)
    try:
        loaded = load_run(options.run, device=world.device)
        if options.logger != "none" and not (loaded.directory / "config.yaml").is_file():
            refuse_unused(options, ["logger"], f"{loaded.directory} is no run, which has a logger")
        outcome = run(
            chosen,
            subject_of(loaded, world, options),
            limit=options.limit,
            shots=options.num_fewshot,
            samples=options.log_samples,
            tell=print if world.is_main else None,
        )
        if world.is_main:
            if outcome.rows:
                report(outcome, chosen, loaded, options)
            outcome.check_complete()
    finally:
        world.close()


def subject_of(loaded: LoadedRun, world: World, options: Options) -> Subject:
    scorer = Scorer(
        loaded.model,
        world,
        max_length=options.max_length or loaded.seq_len,
        batch_size=options.batch_size,
        bf16=world.device.type == "cuda",
        path=options.path,
    )
    return Subject(
        scorer=scorer,
        config=loaded.model.config,
        tokenizer=loaded.tokenizer,
        eos_id=loaded.eos_id,
        seq_len=loaded.seq_len,
        lengths=options.lengths,
        text=None if options.text is None else Path(options.text),
        validation=validation_of(loaded, world),
        seed=seed_of(loaded),
    )


def seed_of(loaded: LoadedRun) -> int:
    """Return the run's seed; 0 for an exported folder, which does not know it."""
    if not (loaded.directory / "config.yaml").is_file():
        return 0
    return recorded_config(loaded.directory, {"seed": int})["seed"]


def validation_of(
    loaded: LoadedRun, world: World
) -> Callable[[dict, int, int | None], Iterator[dict]] | None:
    """Return the validation batches of the run's own data, with keys of its config changed.

    None for an exported folder.
    """
    file = loaded.directory / "config.yaml"
    if not file.is_file():
        return None
    recorded = recorded_config(loaded.directory, {"data": dict, "seed": int})

    def batches(changes: dict, batch_size: int, max_samples: int | None) -> Iterator[dict]:
        try:
            config = TypeAdapter(DataConfig).validate_python(recorded["data"])
        except ValidationError as error:
            raise ConfigError(
                "RUN-CONFIG", f"{file}: data: not as this version has it: {in_one_line(error)}"
            ) from None
        seed = recorded["seed"] if config.seed is None else config.seed
        opened = functools.partial(open_data, recorded=loaded.fingerprint)
        return validation_batches(opened, config, seed, world)(changes, batch_size, max_samples)

    return batches


def file_name(step: int, options: Options) -> str:
    """Return a readable name, a different one for every set of conditions.

    So no results overwrite another's.
    """
    words = [options.suite] if options.suite else []
    words += [Path(task).stem for task in options.tasks]
    label = "+".join(words)
    given = {key: getattr(options, key) for key in CONDITIONS}
    given = {key: value for key, value in given.items() if value is not None}
    for key in ("limit", "num_fewshot", "max_length"):
        label += f"-{key}={given[key]}" if key in given else ""
    rest = [given.get(key) for key in ("lengths", "text", "data_dir")]
    paths = [task for task in options.tasks if task.endswith(".yaml")]
    if any(rest) or paths or len(label) > MAX_LABEL:
        whole = json.dumps([words, paths, given], sort_keys=True).encode()
        label = f"{label[:MAX_LABEL]}-{hashlib.sha256(whole).hexdigest()[:8]}"
    path = "" if options.path == "chunkwise" else f"-{options.path}"
    return f"step-{step:08d}-{label}{path}.json"


def report(outcome: Outcome, chosen: Plan, loaded: LoadedRun, options: Options) -> None:
    """Report to the terminal, to JSON, and to the run's own metrics, which scripts/plot.py draws.

    Args:
        outcome: of the evaluation.
        chosen: the plan.
        loaded: the run.
        options: of the command line.
    """
    rows, name = outcome.rows, loaded.directory.resolve().name
    print_tables(rows, chosen.suite, title=f"{name}, step {loaded.step}", name=name)
    default = loaded.directory / "evaluations" / file_name(loaded.step, options)
    about = {"run": name, "step": loaded.step, "model": loaded.model.config.name}
    about |= {"options": {key: getattr(options, key) for key in RECORDED}}
    about |= {"versions": {"pdn": pdn.__version__, "torch": version("torch")}}
    about |= {"tasks": outcome.about, "failed": outcome.failed, "missing": outcome.missing}
    out = Path(options.out) if options.out else default
    write_json(out, rows, about)
    print(out)
    if outcome.samples:
        print(write_samples(out, outcome.samples))
    if not (loaded.directory / "config.yaml").is_file():
        return  # an exported folder has no metrics
    entry = {"step": loaded.step} | record(rows)
    try:
        directory = RunDirectory(loaded.directory, rank=0)
    except LockedError:
        print(f"{loaded.directory} is in training: the results are in {out} only")
        return
    directory.log(entry)
    directory.close()
    send(outcome, entry, loaded, options)


def send(outcome: Outcome, entry: dict, loaded: LoadedRun, options: Options) -> None:
    """Send values, and tables of results and samples, to the run's own page at its logger.

    Args:
        outcome: of the evaluation.
        entry: the values, as in metrics.jsonl.
        loaded: the run.
        options: of the command line.
    """
    recorded = recorded_config(loaded.directory, {"logger": dict})["logger"]
    defaults = {"project": "pdn", "entity": None, "group": None, "tags": []}
    config = LoggerConfig(**(defaults | recorded | {"kind": options.logger}))
    logger = open_logger(config, loaded.directory, run_config=None, commit=None)
    logger.log(loaded.step, entry)
    for table in tables(outcome.rows, outcome.samples):
        logger.log_table(loaded.step, *table)
    logger.close(timeout_s=30.0)


if __name__ == "__main__":
    run_script(main, usage=__doc__)
