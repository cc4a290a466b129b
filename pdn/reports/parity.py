"""Whether two arms of a study train alike from the same weights, compared step by step."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pdn.errors import ConfigError
from pdn.reports.ending import ended_by_signals
from pdn.reports.evidence import Study
from pdn.reports.trials import TRAIN, last_ledger_hash
from pdn.runs.records import read_metrics
from pdn.wording import counted, override


@dataclass(frozen=True)
class Parity:
    """Holds the training losses of two runs, in nats a token.

    Attributes:
        base, other: names of the arms.
        losses: by step, the base's and the other's.
    """

    base: str
    other: str
    losses: dict[int, tuple[float, float]]

    def differences(self) -> dict[int, float]:
        """Return by step how far the other is from the base, as a share of the base's loss."""
        return {step: abs(b - a) / abs(a) for step, (a, b) in self.losses.items()}

    def worst(self) -> tuple[int, float]:
        """Return the step of the largest difference, and that difference; a NaN is the largest."""
        found = self.differences()
        step = max(found, key=lambda step: (found[step] != found[step], found[step]))
        return step, found[step]

    def holds(self, tolerance: float) -> bool:
        """Say whether no difference exceeds ``tolerance``, a share of the base's loss."""
        return self.worst()[1] <= tolerance

    def lines(self, tolerance: float) -> list[str]:
        """Return the table, a line a step, and the verdict."""
        width = max(len(self.base), len(self.other), 8)
        lines = [f"{'step':>5}  {self.base:>{width}}  {self.other:>{width}}  difference"]
        found = self.differences()
        for step, (a, b) in self.losses.items():
            lines.append(f"{step:>5}  {a:>{width}.4f}  {b:>{width}.4f}  {found[step]:>9.4%}")
        step, most = self.worst()
        verdict = "OK" if self.holds(tolerance) else "FAIL"
        said = f"{self.other} is at most {most:.4%} from {self.base}, at step {step}"
        return [*lines, f"{verdict}  {said}; {tolerance:.4%} allowed"]


def train_arms(
    study: Study, arms: Sequence[str], directory: Path, *, steps: int, extra: Sequence[str] = (),
    command: Sequence[str] = TRAIN,
) -> dict[str, Path]:  # fmt: skip
    """Train the first steps of arms all at once, and return their runs' directories.

    Each has the study's schedule, first learning rate and first seed, and begins anew; its output
    goes to ``directory/<arm>.log``.

    Args:
        study: that declares the arms.
        arms: their names.
        directory: of the runs.
        steps: to take.
        extra: words of train.py for all.
        command: starts one run.

    Raises:
        ConfigError: an arm that the study has not, or a run that failed.
    """
    unknown = [arm for arm in arms if arm not in study.arms]
    if unknown:
        raise ConfigError(
            "PARITY", f"{', '.join(unknown)}: found no such arm; expected {', '.join(study.arms)}"
        )
    directory.mkdir(parents=True, exist_ok=True)
    running: dict[str, subprocess.Popen] = {}
    with ended_by_signals(), contextlib.ExitStack() as stack:
        stack.callback(_stop, running)
        for arm in arms:
            words = [*study.trial(arm, study.rates[0], study.seeds[0]).words, *extra]
            words += [f"trainer.stop_at={steps}", "trainer.log_every=1", "resume=restart"]
            words += [override("output_dir", directory), f"name={arm}"]
            with open(directory / f"{arm}.log", "wb") as log:
                running[arm] = subprocess.Popen(
                    [*command, *words], stdout=log, stderr=subprocess.STDOUT
                )
        codes = {arm: process.wait() for arm, process in running.items()}
    failed = [f"{arm}: {_last_line(directory / f'{arm}.log')}" for arm in arms if codes[arm]]
    if failed:
        raise ConfigError(
            "PARITY",
            f"{'; '.join(failed)}; expected {counted(steps, 'step')} each: see {directory}/*.log",
        )
    return {arm: directory / arm for arm in arms}


def _stop(running: Mapping[str, subprocess.Popen]) -> None:
    for process in running.values():
        if process.poll() is None:
            process.terminate()
            process.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "no output")


def compare_losses(runs: Mapping[str, Path], base: str, other: str) -> Parity:
    """Read the losses of two runs that took the same samples.

    Raises:
        ConfigError: they took others, or not as many steps.
    """
    hashes = [last_ledger_hash(runs[arm]) for arm in (base, other)]
    if hashes[0] != hashes[1] or hashes[0] is None:
        raise ConfigError(
            "PARITY",
            f"{base} has the ledger hash {hashes[0]}, {other} has {hashes[1]}; expected the same "
            "samples in the same order: give both the same data, data.seed, batch and steps",
        )
    a, b = (
        {r["step"]: float(r["loss"]) for r in read_metrics(runs[arm]) if "loss" in r}
        for arm in (base, other)
    )
    if a.keys() != b.keys() or not a:
        raise ConfigError(
            "PARITY",
            f"{base} took {counted(len(a), 'step')}, {other} {len(b)}; expected as many",
        )
    return Parity(base, other, {step: (a[step], b[step]) for step in sorted(a)})
