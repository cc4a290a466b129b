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
from typing import Self

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
from pdn.reports.transfer import Transfer, read_any
from pdn.reports.trials import Trial, device_name, run_trials
from pdn.wording import counted, override

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
    extra = [*options.words, *([override("data.path", options.corpus)] if options.corpus else [])]
    study = study.model_copy(update={"words": [*study.words, *extra]})
    file = Path(options.records) if options.records else STUDIES / f"{name}.jsonl"
    began = time.monotonic()
    with Recorder(name, study, file, Path(options.runs) / name, options.keep) as recorder:
        outcome = run_trials(
            recorder.ready,
            recorder.runs,
            slots=options.slots,
            seconds=options.seconds,
            on_finished=recorder.record,
        )
    print(
        f"{counted(len(outcome.finished), 'trial')} finished, {len(outcome.failed)} failed, "
        f"{len(outcome.unfinished) + len(recorder.waiting)} left, "
        f"{time.monotonic() - began:.0f} s; records: {file}"
    )
    for trial, error in recorder.not_described():
        print(f"not described: {trial}: {error!r}", file=sys.stderr)
    for trial, reason in outcome.failed.items():
        print(f"failed: {trial}: {reason}", file=sys.stderr)


class Recorder:
    """Records the trials of a study as they finish, and says which come next.

    Args:
        name: of the study.
        study: with the words that all trials have.
        file: of its records.
        runs: directory of its trials.
        keep_checkpoints: whether those of finished trials stay.

    Attributes:
        waiting: branches whose parents have not finished.
    """

    def __init__(
        self, name: str, study: Study | Transfer, file: Path, runs: Path, keep_checkpoints: bool
    ):
        self.name, self.study, self.file, self.runs = name, study, file, runs
        self.waiting: list[str] = []
        self._keep_checkpoints = keep_checkpoints
        self._records = {(r["arm"], r["lr"], r["seed"]): r for r in read_records(file)}
        self._device = device_name()
        arms = study.arms.values() if isinstance(study, Study) else ()
        self._parents = {arm.branch.arm for arm in arms if arm.branch}
        # of lines over positions nobody reads the recurrences' internals, which take seconds a run
        self._describes = isinstance(study, Study) and study.positions is None
        self._announced: set[str] = set()
        self._writing = Lock()
        # In a thread beside the trials: it takes seconds, in which no trial would be started.
        self._thread = ThreadPoolExecutor(1)
        self._descriptions: dict[str, Future] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def ready(self, finished: set[str]) -> list[Trial]:
        """Return the trials that can be started, by what is recorded."""
        records = list(self._records.values())
        done = {record["trial"] for record in records}
        if not isinstance(self.study, Study):
            return [trial for trial in self.study.due(records) if trial.name not in done]
        for arm, rate in best_rates(self.study, records).items():
            if arm not in self._announced:
                self._announced.add(arm)
                print(f"best learning rate of {arm}: {rate:g}", flush=True)
        due = self.study.due(records, self.runs)
        trials, self.waiting = self.study.ready(due, done, self.runs)
        return trials

    def record(self, trial: Trial, run: Path) -> str | None:
        """Record a trial that has ended; return why it is no result, or None."""
        record = record_of(
            run,
            study=self.name,
            arm=self.study.arm_of(trial.name),
            device=self._device,
            trial=trial.name,
        )
        reason = self.study.lacks_result(record)
        if reason is None:
            self._keep(record)
            self._descriptions[trial.name] = self._thread.submit(self._describe, record, run)
        return reason

    def not_described(self) -> list[tuple[str, BaseException]]:
        """Return the trials whose recurrences could not be described, with the reason."""
        errors = {trial: future.exception() for trial, future in self._descriptions.items()}
        return [(trial, error) for trial, error in errors.items() if error is not None]

    def _keep(self, record: dict) -> None:
        with self._writing:
            self._records[record["arm"], record["lr"], record["seed"]] = record
            write_records(self.file, list(self._records.values()))

    def _describe(self, record: dict, run: Path) -> None:
        if self._describes:
            self._keep(record | describe(run))
        if not self._keep_checkpoints and record["arm"] not in self._parents:
            # but for a parent's, which branches begin at
            shutil.rmtree(run / "checkpoints", ignore_errors=True)


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
