"""A sweep as a job array of Slurm: a task for each trial, which queues itself again."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

from pdn.errors import Preempted

GRACE_S = 180  # before the limit of time, in which a trial saves


def script(words: Sequence[str], *, trials: int, slots: int) -> str:
    """Return a batch script whose tasks run one trial each.

    Partition, account, time and GPUs are left to the command line of ``sbatch``.

    Args:
        words: of the sweep, without ``array``.
        trials: how many it has.
        slots: tasks at a time.
    """
    command = shlex.join([sys.executable, "scripts/sweep.py", *words])
    return f"""#!/bin/bash
#SBATCH --job-name=sweep
#SBATCH --array=0-{trials - 1}%{slots}
#SBATCH --ntasks=1
#SBATCH --signal=TERM@{GRACE_S}
#SBATCH --requeue
#SBATCH --open-mode=append

cd {shlex.quote(os.getcwd())} || exit 78
srun {command} only="$SLURM_ARRAY_TASK_ID"
code=$?
# Stopped before the limit and saved: queue this task again, which resumes.
if [ "$code" = {Preempted.exit_code} ]; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
fi
exit "$code"
"""
