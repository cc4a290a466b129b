"""The model card of an exported folder.

What it is, how to load it, how it was trained, what it scores.
"""

from __future__ import annotations

import logging
from pathlib import Path

import yaml

from pdn.errors import PdnError, StorageError
from pdn.hub.architectures import Target
from pdn.inference.load import LoadedRun
from pdn.runs.records import read_metrics, read_object
from pdn.runs.schema import recorded_config
from pdn.wording import counted

log = logging.getLogger(__name__)

PAPER = (
    "Preconditioned DeltaNet: Curvature-aware Sequence Modeling for Linear Recurrences (arXiv "
    "2604.21100)"
)
LOADING = {
    "transformers": "",
    "flash-linear-attention": (
        "import fla  # flash-linear-attention >= 0.6.0 registers the class; its kernels need a "
        "GPU\n"
    ),
    "pdn": "import pdn.hub.modeling  # registers the class\n",
}


NEEDED = {
    "trainer.global_batch_size": int,
    "trainer.steps": int,
    "data.seq_len": int,
    "data.kind": str,
    "optim.kind": str,
    "schedule.kind": str,
}
"""What the card shows of a configuration."""


def write_card(
    folder: Path, run: LoadedRun, target: Target, why_own: str | None, has_curves: bool
) -> None:
    """Write README.md.

    Args:
        folder: of the exported model.
        run: that was exported.
        target: the class that loads it.
        why_own: why that is our own class, if it is.
        has_curves: show the figure curves.png.
    """
    config = run.model.config
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pdn", target.model_type],
    }
    parts = [f"---\n{yaml.safe_dump(front, sort_keys=False)}---", f"# {config.name}", _what(run)]
    if why_own is not None:
        parts.append(
            f"No released library has a class for this model ({why_own}); `pdn` itself loads it."
        )
    parts += ["## Use", _use(target), "## Training", _training(run)]
    records = _records(run.directory)
    if has_curves:
        parts.append("![losses, throughput and evaluations](curves.png)")
    scores = _scores(run, records)
    if scores:
        parts += ["## Evaluation", scores]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _records(directory: Path) -> list[dict]:
    try:
        return read_metrics(directory)
    except PdnError:  # an exported folder has no metrics; of damaged ones the curves tell
        return []


def _what(run: LoadedRun) -> str:
    config = run.model.config
    kinds = ", ".join(f"{name}" for name in config.pattern)
    mlp = f"SwiGLU of {config.intermediate_size}" if config.intermediate_size else "no MLP"
    return (
        f"A causal language model of {config.num_params():,} parameters, trained with `pdn`, after "
        f"*{PAPER}*: {counted(config.num_layers, 'layer')} of {kinds}, width {config.d_model}, "
        f"{mlp}, vocabulary {config.vocab_size:,}, input and output embeddings "
        f"{'tied' if config.tie_embeddings else 'apart'}."
    )


def _use(target: Target) -> str:
    return (
        f"```python\n{LOADING[target.library]}from transformers import AutoModelForCausalLM, "
        "AutoTokenizer\n\nmodel = AutoModelForCausalLM.from_pretrained(folder)\ntokenizer = "
        "AutoTokenizer.from_pretrained(folder)\n```\n\nDocuments were separated by the EOS token; "
        "nothing precedes a document's first token but the EOS of the one before. Continue the "
        "training with `python train.py init_from=<folder>` and the same `model=`."
    )


def _training(run: LoadedRun) -> str:
    file = run.directory / "config.yaml"
    if not file.is_file():
        return f"{counted(run.step, 'step')} on sequences of {run.seq_len} tokens."
    config = recorded_config(run.directory, NEEDED)
    trainer, optim, data = config["trainer"], config["optim"], config["data"]
    tokens = run.step * trainer["global_batch_size"] * data["seq_len"]
    source = data.get("dataset") or (
        Path(str(data["path"])).name if data.get("path") else data["kind"]
    )
    rows = [
        ("steps", f"{run.step:,} of {trainer['steps']:,}"),
        ("tokens", f"{tokens:,}"),
        ("data", source),
        ("sequence length", data["seq_len"]),
        ("batch", f"{trainer['global_batch_size']} sequences"),
        (
            "optimiser",
            f"{optim['kind']}, peak lr {optim.get('lr')}, weight decay {optim.get('weight_decay')}",
        ),
        ("schedule", config["schedule"]["kind"]),
    ]
    if run.weights == "ema":
        rows.append(("weights", f"their moving average, decay {optim.get('ema')}"))
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)


def _scores(run: LoadedRun, records: list[dict]) -> str:
    """Return the last validation, and the results that scripts/evaluate.py left for this step."""
    rows = []
    prefix = "validation" if run.weights == "last" else f"{run.weights}/validation"
    for record in reversed(records):
        if record["step"] <= run.step and f"{prefix}/loss" in record:
            keys = ("loss", "perplexity", "bits_per_byte")
            rows += [
                ("validation", "", key, f"{float(record[f'{prefix}/{key}']):.4g}", "")
                for key in keys
                if record.get(f"{prefix}/{key}") is not None
            ]
            break
    files = (run.directory / "evaluations").glob(f"step-{run.step:08d}*.json")
    for file in sorted(files) if run.weights == "last" else ():  # they are of the last weights
        try:
            rows += [_result(row) for row in read_object(file)["results"]]
        except (KeyError, TypeError, ValueError, AttributeError, StorageError):
            log.warning("%s: damaged; the model card has no results of it", file)
    if not rows:
        return ""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    header = ["| task | condition | metric | value | n |", "|---|---|---|---|---|"]
    return "\n".join([*header, *lines])


def _result(row: dict) -> tuple[str, ...]:
    value = f"{row['value']:.4g}"
    value += f" ± {row['stderr']:.2g}" if row.get("stderr") is not None else ""
    n = "" if row.get("n") is None else f"{row['n']:,}"
    return row["task"], row.get("condition", ""), row["metric"], value, n
