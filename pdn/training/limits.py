"""What no number of a configuration may exceed, and why; and which texts are local paths.

A number beyond its limit is a slip: it would overflow, take years, or abort in an allocation that
names nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from pdn.store import s3 as store

_STEPS = (10**9, "a billion steps of 10 ms take four months")
_SEQUENCES = (1 << 20, "a million sequences are more than any run has trained on in one step")
_IN_A_PASS = (1 << 16, "a device does not hold more sequences at once")
_HEADS = (1 << 12, "no model has more")
_HEAD_DIM = (1 << 14, "a state of head_dim x head_dim numbers a head would not fit anywhere")
_EPS = (1.0, "it is added to a mean square near 1")
_SECONDS = (7 * 86400.0, "nobody waits longer than a week")
_COUNT = (10**12, "more documents or tokens than there are")
_BYTES = (1 << 60, "more than a disk holds")
_DECAY = (10.0, "one step would take away more than a tenth of every weight at lr = 0.01")

# By the last part of a key's path. A key whose own type has an upper bound need not be here.
LIMITS: dict[str, tuple[float, str]] = {
    "steps": _STEPS,
    "stop_at": _STEPS,
    "every": _STEPS,
    "until": _STEPS,
    "keep_every": _STEPS,
    "tasks_every": _STEPS,
    "log_every": _STEPS,
    "divergence_check_every": _STEPS,
    "telemetry_every": _STEPS,
    "seconds": _SECONDS,
    "tokens": (1e18, "no corpus has so many"),
    "warmup_steps": _STEPS,
    "decay_steps": _STEPS,
    "keep_last": (10**6, "no disk holds a million checkpoints"),
    "global_batch_size": _SEQUENCES,
    "micro_batch_size": _IN_A_PASS,
    "batch_size": _IN_A_PASS,
    "unit_tokens": (1 << 36, "a unit is a small part of a source"),
    "pool_units": (1 << 30, "a pool is a small part of a source"),
    "carry_windows": (1 << 20, "no document is a million windows long"),
    "carry_horizon": (1 << 16, "a step would have as many windows of each row"),
    "seq_len": (1 << 24, "16 million tokens are longer than any model was trained on"),
    "piece_tokens": (1 << 24, "16 million tokens are longer than any model was trained on"),
    "window": (1 << 24, "16 million tokens are longer than any model was trained on"),
    "vocab_size": (1 << 24, "the largest vocabularies have about a million entries"),
    "d_model": (1 << 16, "no model is wider"),
    "base_width": (1 << 16, "no model is wider"),
    "base_depth": (1 << 12, "no model is deeper"),
    "intermediate_size": (1 << 20, "no model is wider"),
    "num_layers": (1 << 12, "no model is deeper"),
    "num_heads": _HEADS,
    "num_kv_heads": _HEADS,
    "num_value_heads": _HEADS,
    "num_groups": _HEADS,
    "head_dim": _HEAD_DIM,
    "state_size": _HEAD_DIM,
    "rank": _HEAD_DIM,
    "expand_v": (64.0, "no model's values are that much wider than its keys"),
    "conv_size": (256, "convolutions of the mixers span a few tokens"),
    "iterations": (1000, "conjugate gradients end after as many steps as keys have channels"),
    "num_householder": (64, "each is one more pass over the sequence"),
    "norm_eps": _EPS,
    "qk_norm_eps": _EPS,
    "eps": _EPS,
    "normaliser": (1e6, "gates would be constant"),
    "mu_init": (100.0, "a sigmoid of it is constant"),
    "rope_base": (1e12, "angles would be equal in float32"),
    "lr": (10.0, "an update moves every weight by about so much"),
    "lr_scale": (1e6, "the learning rate would be beyond any use"),
    "embedding_lr_scale": (1e6, "the learning rate would be beyond any use"),
    "weight_decay": _DECAY,
    "grad_clip": (1e9, "a larger one never clips"),
    "z_loss": (1.0, "it would outweigh the cross entropy; 1e-4 is usual"),
    "spike_threshold": (100.0, "no loss in nats rises so far"),
    "stall_timeout": _SECONDS,
    "timeout_seconds": _SECONDS,
    "retry_seconds": _SECONDS,
    "stall_seconds": _SECONDS,
    "replicas": (1 << 20, "there are no more devices"),
    "replicate": (1 << 20, "there are no more devices"),
    "shard": (1 << 20, "there are no more devices"),
    "context": (1 << 20, "there are no more devices"),
    "processes": (1024, "no machine runs more of them at a time"),
    "prefetch_steps": (1 << 16, "each holds a batch in memory"),
    "max_epochs": (1e9, "no text is repeated so often"),
    "weight": (1e12, "a share of a mixture beside which the others vanish"),
    "power_a": (1e3, "all pairs would be next to each other"),
    "num_pairs": (1 << 20, "no model recalls more"),
    "isolation_min_tokens": (1 << 24, "longer than any sequence"),
    "block_shards": (1 << 16, "each is a file that is open"),
    "shard_tokens": (1 << 36, "a shard is read as one file"),
    "max_bytes": _BYTES,
    "max_cache_bytes": _BYTES,
    "validation_documents": _COUNT,
    "train_examples": _COUNT,
    "validation_examples": _COUNT,
    "max_samples": _COUNT,
    "limit": _COUNT,
}
SMALLEST = -1e12  # of numbers without a lower bound of their own

PLACES = (
    "output_dir",
    "init_from",
    "branch_from",
    "path",
    "validation",
    "cache_dir",
    "data_dir",
    "tokenizer",
)
REMOTE = ("path", "validation")  # below data: these may also lie in a bucket
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")


def excesses(values: dict) -> Iterator[str]:
    """Yield a message for every number that is out of its limit.

    Args:
        values: a configuration as plain containers.
    """
    for path, value in _scalars(values):
        limit, reason = LIMITS.get(path.rpartition(".")[2], (1e300, "it is no use"))
        if isinstance(value, int | float) and not isinstance(value, bool) and value > limit:
            most = f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"
            yield f"{path} = {_short(value)}; expected at most {most}, since {reason}"


def _short(number: float) -> str:
    try:
        text = str(number)
    except ValueError:  # thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 30 else f"{text[:27]}..."


def misplaced(values: dict) -> Iterator[str]:
    """Yield a message for every path that would name another place than it was meant to.

    Such as the address of a bucket, a directory ``s3:`` below the working directory.
    """
    for path, value in _scalars(values):
        key = path.rpartition(".")[2]
        if key in PLACES and isinstance(value, str):
            if path.startswith("data.") and key in REMOTE and value.startswith(store.SCHEME):
                message = store.problem_of_url(value)
            else:
                message = no_place(value.rpartition("@")[0] if key == "branch_from" else value)
        elif key == "dataset" and isinstance(value, str):
            message = _no_dataset(value)
        else:
            continue
        if message:
            yield f"{path} = {value}: {message}"


def no_place(path: str) -> str | None:
    """Return why ``path`` is no local path as it was meant; None if it may be one."""
    if not path.strip():
        return "found nothing; expected a path: is a variable unset?"
    if path != path.strip() or any(ord(letter) < 32 for letter in path):
        return (
            f"found {path!r}, with white space at an end or a control character; expected a path "
            "without"
        )
    if path.startswith("$"):
        return (
            "found a variable that nothing has replaced; expected a path: write ${oc.env:NAME}, or "
            "let the shell replace it"
        )
    if os.path.expanduser(path).startswith("~"):
        return (
            f"found {path.partition('/')[0]}, a home directory that there is not; expected a path: "
            "write ./~… for a file of that name"
        )
    match = SCHEME.match(path)
    if match is None or len(match[1]) == 1:
        return None
    hints = {
        "s3": " (a run's copy elsewhere: replica=; text and shards: data.path=)",
        "hf": " (a hub id is owner/name)",
    }
    return (
        f"found the scheme {match[1]}, which is not supported; expected a local path: mount it, "
        f"or copy it here first{hints.get(match[1].lower(), '')}"
    )


def _no_dataset(name: str) -> str | None:
    if not name.strip() or SCHEME.match(name.strip()) or name.startswith(("~", "$")):
        return (
            "expected the id of a dataset on the hub, owner/name; give files as data.path, with "
            "data.dataset=null"
        )
    return None


def _scalars(node: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield the dotted path and the value of everything in nested dicts and lists."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _scalars(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _scalars(value, path)
    else:
        yield path, node
