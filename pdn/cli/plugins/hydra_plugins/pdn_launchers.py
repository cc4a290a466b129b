"""Launchers of sweeps.

Every trial is a process of its own: fresh random state, devices, signals and process group.
``basic`` and ``torchrun`` run the trials one after another on this machine, ``slurm`` submits each
as a job.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from pdn.cli.compose import Source, compose
from pdn.errors import ConfigError, PdnError, Preempted, StorageError
from pdn.runs.records import recorded_exit_code

# Hydra's own launcher of this name, the default one, would run all trials in one process.
ConfigStore.instance().store(
    group="hydra/launcher",
    name="basic",
    node={"_target_": "hydra_plugins.pdn_launchers.LocalLauncher", "nproc_per_node": None},
    provider="pdn",
)

PROGRAM = ("-m", "pdn.cli.train")
PREEMPTED = Preempted.exit_code


class SweepFailed(PdnError):
    """Tells that some trials failed; the exit code is that of the first of them."""

    def __init__(self, message: str, exit_code: int):
        super().__init__("SWEEP", message)
        self.exit_code = exit_code


class TrialLauncher(Launcher):
    """Makes the trials' commands and directories, which all launchers share."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        places = config.hydra.runtime.config_sources
        added = tuple(Path(place.path) for place in places if place.provider == "command-line")
        self.source = Source(added)

    def arguments(self, overrides: Sequence[str]) -> list[str]:
        """Return the command line of one trial after the launcher's own part."""
        flags = [part for path in self.source.search for part in ("--config-dir", str(path))]
        return [*PROGRAM, *flags, *overrides]

    def directory(self, overrides: Sequence[str]) -> Path:
        # They need torch, and Hydra imports this module on every start.
        from pdn.cli.parse import parse
        from pdn.training.names import directory_of

        return directory_of(parse(compose(overrides, self.source)))


class LocalLauncher(TrialLauncher):
    """Runs the trials one after another; a failing one does not stop the later ones.

    Args:
        nproc_per_node: processes of each trial, started by torchrun; null: one process without
            torchrun.
    """

    def __init__(self, nproc_per_node: int | None):
        if nproc_per_node is not None and (
            not isinstance(nproc_per_node, int) or nproc_per_node < 1
        ):
            raise ConfigError(
                "SWEEP",
                f"hydra.launcher.nproc_per_node = {nproc_per_node}; expected at least 1: set it to "
                "the number of GPUs",
            )
        self.nproc_per_node = nproc_per_node

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        runner, codes, lines = TrialProcess(), [], []
        common = set.intersection(*map(set, job_overrides))
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            name, directory = f"#{number}", self.directory(overrides)
            if runner.stopped:
                lines.append(f"{name}  {'not started':<15}  {directory}")
                continue
            own = [text for text in overrides if text not in common]
            print(
                f"{name} of {len(job_overrides)} trials: {' '.join(own or overrides)}", flush=True
            )
            started = time.time()
            code = recorded_exit_code(directory, started, runner.run(self.command(overrides)))
            if code == PREEMPTED:
                runner.stopped = True
            codes.append(code)
            outcome = {0: "done", PREEMPTED: "interrupted"}.get(code, f"exit {code}")
            lines.append(f"{name}  {outcome:<15}  {directory}")
        summary = "\n  ".join([f"{codes.count(0)} of {len(job_overrides)} trials done", *lines])
        failed = [code for code in codes if code != 0]
        if failed or runner.stopped:
            fix = "the same command continues: finished trials are skipped, interrupted ones resume"
            raise SweepFailed(f"{summary}\n  {fix}", PREEMPTED if runner.stopped else failed[0])
        print(summary, flush=True)
        return [_completed(overrides) for overrides in job_overrides]

    def command(self, overrides: Sequence[str]) -> list[str]:
        count = self.nproc_per_node
        torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {count}".split()
        return [sys.executable, *(torchrun if count else ()), *self.arguments(overrides)]


class TrialProcess:
    """Runs one command at a time.

    SIGTERM reaches the command; no further trial should start after it or after Ctrl-C.

    Attributes:
        stopped: whether the sweep was told to stop.
    """

    def __init__(self):
        self.stopped = False
        self._child: subprocess.Popen | None = None

    def run(self, command: Sequence[str]) -> int:
        """Return the command's exit code, once it has ended by itself."""
        previous = signal.signal(signal.SIGTERM, self._pass_on)
        try:
            with subprocess.Popen(command) as self._child:
                while True:
                    try:
                        return self._child.wait()
                    except KeyboardInterrupt:
                        # the terminal sent it to the trial too, which saves and ends
                        self.stopped = True
        finally:
            signal.signal(signal.SIGTERM, previous)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        if self._child is not None:
            self._child.send_signal(number)


class SlurmLauncher(TrialLauncher):
    """Writes a batch script for every trial and submits it.

    Jobs that Slurm stops in time save, and are queued again.

    Args:
        nproc_per_node: processes on a node.
        grace_seconds: how long before the limit a job is told to save.
        options: further lines for ``#SBATCH``, e.g. ``"--mem=200G"``.
        commands: shell lines before the launch.
        dry_run: write the scripts and submit nothing.
        time: limit, as ``"24:00:00"``.
        gpus_per_node: 0: ask for none.
        sbatch: other options by name, such as ``cpus_per_task``; one that is null is left out.
    """

    def __init__(
        self, *, nproc_per_node: int, grace_seconds: int, options: Sequence[str],
        commands: Sequence[str], dry_run: bool, time: str, gpus_per_node: int, **sbatch: object,
    ):  # fmt: skip
        if not isinstance(time, str):
            raise ConfigError(
                "SWEEP",
                f"hydra.launcher.time = {time}; expected text: quote it, e.g. \"'24:00:00'\"",
            )
        self.nproc_per_node, self.dry_run, self.commands = nproc_per_node, dry_run, list(commands)
        sbatch |= {"time": time, "gpus_per_node": gpus_per_node or None, "ntasks_per_node": 1}
        # to the steps, not to the script: torchrun passes it on to the ranks
        sbatch["signal"] = f"TERM@{grace_seconds}"
        given = {key.replace("_", "-"): value for key, value in sbatch.items() if value is not None}
        self.options = [f"--{key}={value}" for key, value in given.items()]
        self.options += ["--requeue", "--open-mode=append", *options]
        for line in self.options:
            if "\n" in line:
                raise ConfigError(
                    "SWEEP", f"hydra.launcher: found {line!r}; expected options without line breaks"
                )

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        if not self.dry_run and shutil.which("sbatch") is None:
            raise ConfigError(
                "SLURM",
                "hydra/launcher=slurm: found no sbatch on PATH; expected Slurm: launch on a login "
                "node, write the scripts only with hydra.launcher.dry_run=true, or choose "
                "hydra/launcher=torchrun",
            )
        failed = 0
        for overrides in job_overrides:
            directory = self.directory(overrides)
            script = directory.parent / "slurm" / f"{directory.name}.sbatch"
            try:
                script.parent.mkdir(parents=True, exist_ok=True)
                script.write_text(self.script(overrides, directory, script), encoding="utf-8")
            except OSError as error:
                raise StorageError(
                    "IO", f"{script}: {error.strerror}; choose another output_dir"
                ) from None
            if self.dry_run:
                print(f"written, not submitted: {script}")
                continue
            answer = subprocess.run(["sbatch", str(script)], capture_output=True, text=True)
            failed += answer.returncode != 0
            print(f"{script}: {(answer.stdout + answer.stderr).strip()}", flush=True)
        if failed:
            raise SweepFailed(
                f"sbatch refused {failed} of {len(job_overrides)} trials; see its messages above",
                78,
            )
        return [_completed(overrides) for overrides in job_overrides]

    def script(self, overrides: Sequence[str], directory: Path, script: Path) -> str:
        log = script.absolute().with_suffix(".%j.log")
        options = "\n".join(
            f"#SBATCH {option}"
            for option in [f"--job-name={directory.name}", f"--output={log}", *self.options]
        )
        status = shlex.quote(str(directory.absolute() / "status.json"))
        commands = "".join(f"{line}\n" for line in self.commands)
        return f"""#!/bin/bash
{options}

cd {shlex.quote(os.getcwd())} || exit 78
{commands}before=$(cat {status} 2>/dev/null)
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun {shlex.quote(sys.executable)} -m torch.distributed.run \\
    --nnodes "$SLURM_NNODES" --nproc-per-node {self.nproc_per_node} \\
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d \\
    --rdzv-endpoint "$head:$((20000 + SLURM_JOB_ID % 10000))" \\
    {" ".join(shlex.quote(argument) for argument in self.arguments(overrides))}
code=$?
# Stopped before the limit and saved: queue the same job again, which resumes. A launch that did not
# come so far has left the status of the one before.
if grep -qs '"state": "preempted"' {status} && [ "$(cat {status})" != "$before" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""


def _completed(overrides: Sequence[str]) -> JobReturn:
    return JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED)
