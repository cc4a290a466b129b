"""Train a language model.

    python train.py model=pgdn_tiny data=text trainer.steps=200
    torchrun --nproc-per-node 8 train.py model=pgdn_1b data=slimpajama
    python train.py -m model=gdn_tiny,pgdn_tiny seed=1,2

Launching the same command again continues the run. ``python train.py --help`` lists the groups and
every key. Exit codes: 0 done; 65 data; 70 numeric or internal; 73 run directory in use; 74 storage;
75 stopped and saved; 78 configuration.
"""

from pdn.cli.train import run

if __name__ == "__main__":
    run()
