"""What becomes of each command of a page: the text that is run, or why it is not run."""

import re

from tests.commands.pages import Command

# What a reader fills in, in this order.
PLACEHOLDERS = [
    (r"runs/<name>", "runs/tiny"),
    (r"exported/<name>", "exported/tiny"),
    (r"<folder>", "eval_data"),
    (r"<on the disk>", "tmp"),
    (r"<novels>|<directory of text, jsonl or parquet>", "novels"),
    (r"<variants>", "pgdn_tiny"),
    (r"<the same>", "pgdn_tiny"),
    (r"run=…", "run=runs/tiny"),
    (r"corpus=…", "corpus=corpus/sources.jsonl"),
    (r"out=…", "out=corpus/mine.jsonl"),
    (r"KEY_ID=… AWS_SECRET_ACCESS_KEY=…", "KEY_ID=a AWS_SECRET_ACCESS_KEY=b"),
    (r"lengths=…", "lengths=16"),
    (r"evaluate\.py …", "evaluate.py run=runs/tiny tasks=needle_1"),
    (r"torchrun …", "torchrun --nproc-per-node 2"),
    (r"train\.py …", "train.py name=tiny"),
    (r"((?:plot|report)\.py runs)/sweep", r"\1/swept"),  # of a sweep that has ended
    (r" \[key=value …\]| …$", ""),
    (r" \[([^\[\]… ]*)\]", r" \1"),
]
# Not run, with the reason. What they hand to our programs is looked at nevertheless.
NOT_RUN = [
    (r"^docker |^mkdir -p runs cache$", "Docker is not there; needs a GPU"),
    (r"^pip install|^python -m nltk", "downloads from outside"),
    (r"^hf download Rowan", "downloads from outside"),
    (r"^wandb sync|^aws s3", "sends to a server"),
    (r"=s3:|--path s3:", "reads a bucket"),
    (
        r"branch_from=|pgdn_340m_long|run=runs/extended|scripts/runs\.py|average\.py",
        "goes on from the launches before it",
    ),
    (r"data=mixture", "names shards of the reader's own"),
    (r"^\. \.venv/bin/activate$", "is there after make install, which is the test itself"),
    (r"<TAB>", "a key is pressed"),
    (r"PDN_FAULT=kill", "kills itself on purpose"),
    (r"^torchrun --max-restarts 3$", "a flag of torchrun, not a whole command"),
    (r"^python data/(?:prepare|show)\.py \(", "a synopsis of the options"),
    (r"corpus=NAME", "a synopsis of the options"),
    (r"-k mine$|test_mine|ops --models mine", "needs a kernel of the reader's own"),
    (r"ops --(?:warm|kernels)|--kernels 20|--first-token", "needs a GPU"),
    (
        r"peer:|ops --models gdn kda|parity\.py|run=control_14m",
        "needs a GPU and the peers' packages",
    ),
    (r"telemetry pgdn_340m|train pgdn_340m\+compile --profile", "needs a GPU"),
    (r"tries=20", "needs optuna, which is an extra"),
    (r"--sweep 65536", "needs a GPU: the sizes are what it is about"),
]
BASH_ALONE = [(r"install=bash", "the completion that Hydra prints is for bash")]


def filled_in(text: str) -> str:
    """Return a command as a reader would type it whose names are those of the tests."""
    for pattern, value in PLACEHOLDERS:
        text = re.sub(pattern, value, text)
    return text


def reason_not_to_run(command: Command) -> str | None:
    """Return why a command is not run, or None."""
    if command.shell != "bash":
        return f"for {command.shell}"
    return next((reason for pattern, reason in NOT_RUN if re.search(pattern, command.text)), None)


def shells(command: Command) -> list[str]:
    """Return the shells that a command is for."""
    if command.shell != "bash":
        return []
    alone = any(re.search(pattern, command.text) for pattern, _ in BASH_ALONE)
    return ["bash"] if alone else ["bash", "dash"]
