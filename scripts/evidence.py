#!/usr/bin/env python
"""Run declared studies, and write docs/evidence.md from what they found.

    python scripts/evidence.py run=code_14m corpus=corpus/sources.jsonl slots=8   run, or go on
    python scripts/evidence.py                    write the document, its plots
    python scripts/evidence.py check=true         recompute its numbers

run      a study, docs/evidence/<name>.yaml; finished trials are skipped, interrupted ones go on
corpus   null; data.path of the trials: a file or directory of text
words    null; further words of train.py for all trials, separated by commas
runs     runs/evidence; the trials' directories are <runs>/<study>/<trial>
records  null; where finished trials are recorded: docs/evidence/<study>.jsonl
slots    1; trials at a time
seconds  null; wall time after which nothing is started, and what runs is saved and stopped
keep     true; whether the checkpoints of finished trials stay
"""

import shutil
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from pydantic import Field

from pdn.cli.options import Names, Place, parse, refuse_unused, run_script
from pdn.config import Strict
from pdn.errors import ConfigError
from pdn.reports import document
from pdn.reports.evidence import (
    Study,
    best_rates,
    read_records,
    record_of,
    write_records,
)
from pdn.reports.transfer import read_any
from pdn.reports.trials import Trial, device_name, run_trials
from pdn.wording import counted

DOCS = Path(__file__).resolve().parents[1] / "docs"
STUDIES = DOCS / "evidence"
PROBE_ROWS = 4  # validation samples on which the recurrences' internals are described


class Options(Strict):
    run: str | None = None
    corpus: Place | None = None
    words: Names = ()
    runs: Place = "runs/evidence"
    records: Place | None = None
    slots: int = Field(1, ge=1)
    seconds: float | None = None
    keep: bool = True
    check: bool = False


def main(arguments: list[str]) -> None:
    options = parse(Options, arguments)
    if options.run is None:
        ours = ("corpus", "words", "runs", "records", "slots", "seconds", "keep")
        refuse_unused(options, ours, "no study is run: give run=<name>")
    else:
        refuse_unused(options, ["check"], "run= runs a study")
    if options.run is not None:
        run_study(options.run, options)
    elif options.check:
        stale = document.stale_files(DOCS)
        if stale:
            raise ConfigError(
                "EVIDENCE",
                f"{', '.join(stale)}: not what the records give; write it again: python "
                "scripts/evidence.py",
            )
        print("every number of docs/evidence.md follows from docs/evidence/*.jsonl")
    else:
        print("\n".join(document.write(DOCS)))


def run_study(name: str, options: Options) -> None:
    """Run the trials of a study that are not finished, and record each as it finishes."""
    study = read_any(STUDIES / f"{name}.yaml")
    extra = [*options.words, *([f"data.path={options.corpus}"] if options.corpus else [])]
    study = study.model_copy(update={"words": [*study.words, *extra]})
    file = Path(options.records) if options.records else STUDIES / f"{name}.jsonl"
    records = {(r["arm"], r["lr"], r["seed"]): r for r in read_records(file)}
    device = device_name()

    runs = Path(options.runs) / name
    arms = study.arms.values() if isinstance(study, Study) else ()
    parents = {arm.branch.arm for arm in arms if arm.branch}
    # of lines over positions nobody reads the recurrences' internals, which take seconds a run
    described = isinstance(study, Study) and study.positions is None

    def ready(finished: set[str]) -> list[Trial]:
        found = list(records.values())
        for arm, rate in best_rates(study, found).items() if isinstance(study, Study) else ():
            if arm not in announced:
                announced.add(arm)
                print(f"best learning rate of {arm}: {rate:g}", flush=True)
        done = {record["trial"] for record in found}
        if not isinstance(study, Study):
            return [trial for trial in study.due(found) if trial.name not in done]
        trials, waiting[:] = study.ready(study.due(found, runs), done, runs)
        return trials

    def on_finished(trial: Trial, run: Path) -> str | None:
        record = record_of(
            run, study=name, arm=study.arm_of(trial.name), device=device, trial=trial.name
        )
        reason = study.lacks_result(record)
        if reason is None:
            keep(record)
            descriptions[trial.name] = describer.submit(after, record, run)
        return reason

    def keep(record: dict) -> None:
        with writing:
            records[record["arm"], record["lr"], record["seed"]] = record
            write_records(file, list(records.values()))

    def after(record: dict, run: Path) -> None:
        if described:
            keep(record | describe(run))
        if not options.keep and record["arm"] not in parents:  # whose branches begin there
            shutil.rmtree(run / "checkpoints", ignore_errors=True)

    announced: set[str] = set()
    waiting: list[str] = []  # branches, for their parents
    descriptions: dict[str, Future] = {}
    writing = Lock()
    began = time.monotonic()
    # In a thread beside the trials: it takes seconds, in which no trial would be started.
    with ThreadPoolExecutor(1) as describer:
        outcome = run_trials(
            ready,
            runs,
            slots=options.slots,
            seconds=options.seconds,
            on_finished=on_finished,
        )
    print(
        f"{counted(len(outcome.finished), 'trial')} finished, {len(outcome.failed)} failed, "
        f"{len(outcome.unfinished) + len(waiting)} left, {time.monotonic() - began:.0f} s; "
        f"records: {file}"
    )
    for trial, future in descriptions.items():
        if future.exception() is not None:
            print(f"not described: {trial}: {future.exception()!r}", file=sys.stderr)
    for trial, reason in outcome.failed.items():
        print(f"failed: {trial}: {reason}", file=sys.stderr)


def describe(run: Path) -> dict[str, list[dict[str, float]]]:
    """Describe what the recurrences of a run do on the first samples of its validation set.

    Returns ``internals`` of the trained model, and ``internals_at_start`` of the one that its seed
    initialises.
    """
    import torch
    from pydantic import TypeAdapter

    from pdn.data import open_data
    from pdn.data.config import DataConfig
    from pdn.hub.fla_model import language_model
    from pdn.hub.load import load_run
    from pdn.reports.internals import internals
    from pdn.runs.schema import recorded_config

    recorded = recorded_config(run, {})
    config = TypeAdapter(DataConfig).validate_python(recorded["data"])
    data = open_data(config, global_batch_size=1, seed=0)
    try:
        batch = next(iter(data.validation(batch_size=PROBE_ROWS, max_samples=PROBE_ROWS)))
    finally:
        data.close()
    tokens = torch.as_tensor(batch["tokens"])
    model = load_run(run).model
    found = {"internals": internals(model, tokens)}
    start = language_model(model.config)  # whose class may have drawn its weights
    start.init_weights(recorded["seed"])
    model.load_state_dict(start.state_dict())
    found["internals_at_start"] = internals(model, tokens)
    return found


if __name__ == "__main__":
    run_script(main, usage=__doc__, bare=True)
