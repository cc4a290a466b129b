"""Many runs through the command line, several at a time on one machine.

They keep within a budget of time; finished ones are skipped.
"""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pdn.errors import ConfigError, DataError, LockedError, StorageError
from pdn.reports.ending import ended_by_signals
from pdn.reports.stopping import EarlyStopping, forget
from pdn.runs.records import read_lines, read_object, recorded_exit_code
from pdn.store.local import storage_errors, write_durably
from pdn.wording import override

if TYPE_CHECKING:
    from pdn.training.config import RunConfig

TRAIN = (sys.executable, "-m", "pdn.cli.train")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
GRACE_S = 30.0  # seconds for a run that was asked to stop, to save and end
POLL_S = 0.2
LOOK_S = 1.0  # between two looks of the rule that stops trials early
ATTEMPTS = 2  # launches of one trial in one sweep, before it counts as failed
# What the next launch would meet again: a wrong configuration, bad data, and losses that are not
# finite from the same checkpoint on.
FINAL_CODES = (ConfigError.exit_code, DataError.exit_code)
DIVERGED = ("pdn[E-NONFINITE", "pdn[E-SPIKE]")


@dataclass(frozen=True)
class Trial:
    """Describes one run: its directory's name, and the words of ``train.py`` that define it."""

    name: str
    words: tuple[str, ...]


@dataclass
class Outcome:
    """Lists what became of a sweep's trials.

    Names of trials, failed ones and those stopped early with their reasons, and those the time did
    not reach.
    """

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    unfinished: list[str] = field(default_factory=list)
    stopped: dict[str, str] = field(default_factory=dict)


def is_finished(directory: Path) -> bool:
    """Say whether the run in ``directory`` has done all its steps."""
    try:
        return read_object(directory / "status.json").get("state") == "finished"
    except StorageError:
        return False


def last_ledger_hash(run: Path) -> str | None:
    """Read the rolling hash over all samples that a run consumed; None before its first step."""
    hashes = [line["hash"] for line in read_lines(run / "ledger.jsonl") if "hash" in line]
    return str(hashes[-1]) if hashes else None


def run_trials(
    ready: Callable[[set[str]], Sequence[Trial]],
    directory: Path,
    *,
    slots: int,
    seconds: float | None,
    command: Sequence[str] = TRAIN,
    on_finished: Callable[[Trial, Path], str | None] = lambda trial, run: None,
    say: Callable[[str], None] = print,
    devices: Sequence[str] = (),
    watch: Callable[[set[str], dict[str, str]], None] = lambda running, failed: None,
    stopping: EarlyStopping | None = None,
    groups: Callable[[], Collection[Collection[str]]] = list,
) -> Outcome:
    """Run trials until none is left or the time is up.

    Args:
        ready: given the names that are finished, the trials whose turn has come, most urgent first,
            finished ones included.
        directory: their runs go to ``directory/<name>``, their output to ``directory/<name>.log``.
        slots: trials at a time.
        seconds: of wall time; a trial is not started if the median duration says it would not end
            in time, and what runs at the end is asked to save and stop, so that the next sweep
            continues it. None: no limit.
        command: starts one run; the trial's words, ``output_dir`` and ``name`` are appended.
        on_finished: called once for each trial when it is finished, or found finished. Returns why
            it does not count, which makes it one that failed, or None.
        say: receives a line for each start and end.
        devices: of CUDA, shared out over the slots; none: every trial sees all.
        watch: called several times a second with the names that run, and the failed ones.
        stopping: stops trials early; they save, and are not launched again by the same rule.
        groups: returns the names of trials that are compared with each other for that.

    Raises:
        ConfigError: devices that cannot be shared out evenly.
    """
    if len(devices) % slots:
        raise ConfigError(
            "TRIAL", f"{len(devices)} devices for {slots} slots; expected as many for each slot"
        )
    sweep = _Sweep(
        directory,
        command,
        slots=slots,
        seconds=seconds,
        on_finished=on_finished,
        say=say,
        devices=devices,
        stopping=stopping,
    )
    with ended_by_signals():
        _drive(sweep, ready, watch, groups)
    sweep.take_finished(ready)
    finished = list(sweep.finished)
    left = [
        t.name
        for t in ready(set(finished))
        if t.name not in sweep.finished and t.name not in sweep.failed | sweep.stopped
    ]
    return Outcome(finished, sweep.failed, left, sweep.stopped)


def _drive(
    sweep: _Sweep,
    ready: Callable[[set[str]], Sequence[Trial]],
    watch: Callable[[set[str], dict[str, str]], None],
    groups: Callable[[], Collection[Collection[str]]],
) -> None:
    """Start trials and see them end, until none is left or the time is up; see ``run_trials``."""
    try:
        while True:
            sweep.reap()
            trials = sweep.take_finished(ready)
            sweep.pass_over(trials)
            waiting = sweep.start([trial for trial in trials if sweep.may_start(trial)])
            sweep.stop_early(groups)
            watch(set(sweep.running), sweep.failed)
            if not sweep.running and not (waiting and sweep.has_time()):
                break
            if sweep.remaining() <= 0:
                break
            time.sleep(POLL_S)
    finally:
        sweep.stop()
        watch(set(), sweep.failed)


class _Sweep:
    """Keeps the state of one call of ``run_trials``."""

    def __init__(
        self,
        directory: Path,
        command: Sequence[str],
        *,
        slots: int,
        seconds: float | None,
        on_finished: Callable[[Trial, Path], str | None],
        say: Callable[[str], None],
        devices: Sequence[str],
        stopping: EarlyStopping | None,
    ):
        self.directory, self.command, self.slots = directory, list(command), slots
        self.devices, self.stopping = list(devices), stopping
        self.on_finished, self.say = on_finished, say
        self.began = time.monotonic()
        self.deadline = None if seconds is None else self.began + seconds
        self.running: dict[str, tuple[Trial, subprocess.Popen, float]] = {}
        self.finished: dict[str, Trial] = {}
        self.failed: dict[str, str] = {}
        self.stopped: dict[str, str] = {}  # early, with the reasons
        self.attempts: dict[str, int] = {}
        self.durations: list[float] = []
        self.slot_of: dict[str, int] = {}
        self._asked: dict[str, str] = {}  # to stop early, and still running
        self._looked = -math.inf  # for trials to stop early
        self._launched: dict[str, float] = {}  # time of the last launch
        self._output_from: dict[str, int] = {}  # where its output begins in the log, in bytes
        self._held: set[str] = set()  # by other processes, which has been said
        directory.mkdir(parents=True, exist_ok=True)

    def remaining(self) -> float:
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

    def has_time(self) -> bool:
        """Say whether a trial that starts now would end in time, as others did."""
        return self.remaining() > (statistics.median(self.durations) if self.durations else 0)

    def may_start(self, trial: Trial) -> bool:
        return (
            trial.name not in self.running
            and trial.name not in self.finished
            and trial.name not in self.failed
            and trial.name not in self.stopped
        )

    def pass_over(self, trials: Iterable[Trial]) -> None:
        """Leave out what the same rule stopped in an earlier sweep."""
        stopping = self.stopping
        for trial in trials if stopping is not None else ():
            assert stopping is not None
            reason = stopping.recorded(trial.name) if self.may_start(trial) else None
            if reason is not None:
                self.stopped[trial.name] = reason

    def stop_early(self, groups: Callable[[], Collection[Collection[str]]]) -> None:
        """Have trials save and end that the rule stops, at most every ``LOOK_S``."""
        if self.stopping is None or time.monotonic() - self._looked < LOOK_S:
            return
        self._looked = time.monotonic()
        running = [name for name in self.running if name not in self._asked]
        for name, reason in self.stopping.check(groups(), running).items():
            self._asked[name] = reason
            self.running[name][1].send_signal(signal.SIGTERM)

    def take_finished(self, ready: Callable[[set[str]], Sequence[Trial]]) -> Sequence[Trial]:
        """Return the trials whose turn has come, after handing on what is finished."""
        while True:
            trials = ready(set(self.finished))
            new = [t for t in trials if self.may_start(t) and is_finished(self.directory / t.name)]
            if not new:
                return trials
            for trial in new:
                self._require_same_words(trial)
                reason = self.on_finished(trial, self.directory / trial.name)
                if reason is None:
                    self.finished[trial.name] = trial
                else:
                    self._fail(trial.name, reason)

    def start(self, trials: Iterable[Trial]) -> bool:
        """Fill the free slots; return whether trials are left over."""
        trials = list(trials)
        while trials and len(self.running) < self.slots and self.has_time():
            trial = trials.pop(0)
            self._require_same_words(trial)
            words = [
                *self.command,
                *trial.words,
                override("output_dir", self.directory),
                f"name={trial.name}",
            ]
            forget(self.directory, trial.name)
            environment = self._environment(trial.name)
            self._launched[trial.name] = time.time()
            with open(self.directory / f"{trial.name}.log", "ab") as log:
                self._output_from[trial.name] = log.seek(0, os.SEEK_END)
                process = subprocess.Popen(
                    words, stdout=log, stderr=subprocess.STDOUT, env=environment
                )
            self.running[trial.name] = (trial, process, time.monotonic())
            self.attempts[trial.name] = self.attempts.get(trial.name, 0) + 1
            self.say(f"{self._clock()}  start     {trial.name}")
        return bool(trials)

    def _environment(self, name: str) -> dict[str, str]:
        """Give a trial that starts a free slot, and the devices of that."""
        taken = {self.slot_of[other] for other in self.running}
        slot = next(slot for slot in range(self.slots) if slot not in taken)
        self.slot_of[name] = slot
        share = len(self.devices) // self.slots
        if not share:
            return dict(os.environ)
        own = self.devices[slot * share : (slot + 1) * share]
        return os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(own)}

    def _require_same_words(self, trial: Trial) -> None:
        """Record what defines a trial, and refuse a run of its name by another definition."""
        file = self.directory / f"{trial.name}.words.json"
        with storage_errors(file):
            text = file.read_text(encoding="utf-8") if file.exists() else ""
            if not text:  # none, or of a launch that a full disk has ended before it ran
                write_durably(file, json.dumps(trial.words).encode())
                return
        try:
            recorded = json.loads(text)
        except ValueError:
            raise StorageError(
                "TRIAL", f"{file}: found no words of a trial; expected its list: remove the file"
            ) from None
        if recorded != list(trial.words):
            changed = " ".join(sorted(set(recorded) ^ set(trial.words)))
            raise ConfigError(
                "TRIAL",
                f"{self.directory / trial.name}: was made with other words, differing in: "
                f"{changed}; expected the same: give another directory with runs=, or remove it",
            )

    def reap(self) -> None:
        """Take note of the trials whose processes have ended."""
        for name, (_, process, began) in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            del self.running[name]
            asked, finished = self._asked.pop(name, None), is_finished(self.directory / name)
            if asked is not None and not finished:
                self.stopped[name] = asked
                self.say(f"{self._clock()}  stopped   {name}  early, {asked}")
            elif code == 0 and finished:
                seconds = time.monotonic() - began
                self.durations.append(seconds)
                self.say(f"{self._clock()}  finished  {name}  {seconds:.0f} s")
            else:
                self._retry(name, code)

    def _retry(self, name: str, code: int) -> None:
        """Leave a trial that has ended without a result to its next launch, or give it up."""
        if code == 1:  # torchrun's, whatever its ranks ended with
            code = recorded_exit_code(self.directory / name, self._launched[name], code)
        reason = f"exit code {code}: {self._last_line(name)}"
        if code == LockedError.exit_code:
            # By a trial that outlived a sweep that was killed: it is continued or found finished
            # when that one ends.
            self.attempts[name] -= 1
            if name not in self._held:
                self._held.add(name)
                self.say(f"{self._clock()}  waits     {name}  {reason}")
        elif self.attempts[name] >= ATTEMPTS or _is_final(code, reason):
            self._fail(name, reason)
        else:
            self.say(f"{self._clock()}  again     {name}  {reason}")

    def _fail(self, name: str, reason: str) -> None:
        self.failed[name] = reason
        self.say(f"{self._clock()}  failed    {name}  {reason}")

    def stop(self) -> None:
        """Ask what still runs to save and end; kill what does not in time."""
        for _, process, _ in self.running.values():
            process.send_signal(signal.SIGTERM)
        end = time.monotonic() + GRACE_S
        for _, process, _ in self.running.values():
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        names = list(self.running)
        self.running.clear()
        for name in names:  # when all have ended: nobody may be there to hear it
            self.say(f"{self._clock()}  stopped   {name}")

    def _clock(self) -> str:
        return f"{time.monotonic() - self.began:6.0f} s"

    def _last_line(self, name: str) -> str:
        """Return the reason that the last launch gave, or the last line of its output."""
        with open(self.directory / f"{name}.log", "rb") as log:
            log.seek(self._output_from[name])
            text = log.read().decode("utf-8", errors="replace")
        said = [line.strip() for line in text.split("\n") if line.strip()]
        # torchrun adds an error of its own after that of its ranks.
        ours = [line for line in said if "pdn[E-" in line]
        theirs = [line for line in said if "Error" in line]
        return (ours or theirs or said or ["no output"])[-1]


def _is_final(code: int, reason: str) -> bool:
    """Say whether another launch would end likewise."""
    return code in FINAL_CODES or has_diverged(reason)


def has_diverged(reason: str) -> bool:
    """Say whether a trial failed because its losses were not finite, or jumped again and again."""
    return any(error in reason for error in DIVERGED)


def require_whole(config: RunConfig) -> None:
    """Refuse a run that would end well without all its steps: it would never count as finished.

    Raises:
        ConfigError: a dry run, or one that ends early.
    """
    trainer = config.trainer
    if trainer.dry_run:
        raise ConfigError(
            "TRIAL",
            "trainer.dry_run = true: a dry run has no result; expected false: leave it out, or try "
            "it with train.py",
        )
    if trainer.stop_at is not None and trainer.stop_at < trainer.steps:
        raise ConfigError(
            "TRIAL",
            f"trainer.stop_at = {trainer.stop_at} of trainer.steps = {trainer.steps}: a trial that "
            f"ends early has no result; expected null: write trainer.steps={trainer.stop_at}, with "
            "a schedule of that length",
        )


def launcher(processes: int | None) -> tuple[str, ...]:
    """Return the words that start a trial: one process, or a torchrun job of ``processes``."""
    return TRAIN if processes is None else (*TORCHRUN, str(processes), *TRAIN[1:])


def device_name() -> str:
    """Name the machine that results are made on: its GPU, or the number of its processors."""
    import torch

    return (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {os.cpu_count()} cores"
    )
