"""What a run has to do without whose model is computed by another library, as a control."""

from __future__ import annotations

import json
from functools import reduce
from typing import Any

from pdn.hub.architectures import fla_target

# By key: the values that its class can do with. The residual stream between its layers is float32
# under autocast, and a run says what it does.
WANTED: dict[str, tuple[object, ...]] = {
    "model.residual_dtype": ("fp32",),
    "model.base_width": (None,),
    "model.base_depth": (None,),
    "data.document_isolation": (False,),
    "data.carry_windows": (None,),
    "parallel.context": (1,),
    "parallel.replicate": (1,),
    "parallel.shard": ("auto", 1),
    "parallel.activation_checkpointing": ("none",),
    "parallel.compile": ("auto", False),  # of blocks of ours: there is nothing to compile
    "parallel.cpu_offload": (False,),
    "ops.backend": ("auto",),  # of recurrences of ours
    "trainer.piece_tokens": (None,),
    "trainer.telemetry_every": (None,),  # which reads our mixers
    "trainer.z_loss": (0.0,),
    "eval.suite": (None,),  # tasks need states; scripts/evaluate.py reads the run with our code
    "eval.tasks": ([],),
}


def control_problem(config: Any) -> str | None:
    """Return why flash-linear-attention cannot compute this run's model; None if it can.

    None too if the run, a ``RunConfig``, does not ask for that.
    """
    if config.model.implementation == "own":
        return None
    target = fla_target(config.model)
    if isinstance(target, str):
        return (
            f"model.implementation = fla: no class of flash-linear-attention computes {target}; "
            "expected a model that one computes, or implementation=own"
        )
    for key, wanted in WANTED.items():
        found = _at(config, key, wanted[0])
        if found not in wanted:
            return (
                f"model.implementation = fla with {key} = {_word(found)}: its class does without; "
                f"expected {key} = {' or '.join(map(_word, wanted))}"
            )
    spread = [
        f"model.mixers.{name}.decay.spread"
        for name, mixer in config.model.mixers.items()
        if config.model.init == "released" and getattr(mixer.decay, "spread", False)
    ]
    if spread:
        return (
            f"model.implementation = fla with model.init = released and {spread[0]} = true: its "
            f"class draws the start, and does without; expected {spread[0]} = false, or "
            "model.init = plain"
        )
    return None


def _word(value: object) -> str:
    """Return a value as it is typed on the command line."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _at(config: Any, key: str, default: object) -> Any:
    """Return the value of a dotted key, or the default where this kind of section has it not."""
    return reduce(lambda part, name: getattr(part, name, default), key.split("."), config)
