"""Train a language model.

    python train.py model=pgdn_tiny data=text trainer.steps=200
    torchrun --nproc-per-node 8 train.py model=pgdn_1b data=slimpajama
    python train.py -m model=gdn_tiny,pgdn_tiny seed=1,2

Launching the same command again continues the run. ``python train.py --help`` lists the groups and every key.
Exit codes: 0 done; 65 data; 70 numeric or internal; 73 run directory in use; 74 storage; 75 stopped and saved; 78 configuration.
"""

import os
import sys

# On a shared machine threads that spin while they wait starve each other: 39 tokens/s against 430 on two busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from pdn._hydra.launch import main


def train(config) -> None:
    # Imported here, so that a mistake on the command line or Ctrl-C is answered before torch has loaded.
    from data import open_data
    from pdn.trainer import fit

    fit(config, open_data=open_data)


if __name__ == "__main__":
    code = main(sys.argv[1:], train)
    if code and os.environ.get("WORLD_SIZE", "1") != "1":
        # Python's own end would take the process group apart, and wait for peers that wait for this rank.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
