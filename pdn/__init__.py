"""Pretraining for preconditioned linear-recurrence language models.

Importing the package loads neither torch nor any of its parts; what is named here loads on first
use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pdn.verdicts import Certifier, set_certifier

if TYPE_CHECKING:
    from pdn import ops
    from pdn.checkpoint.read import read_checkpoint
    from pdn.cli.presets import build_mixer, build_model
    from pdn.hub.load import load_run
    from pdn.inference.generate import generate

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "build_mixer",
    "build_model",
    "generate",
    "load_run",
    "ops",
    "read_checkpoint",
]

_PLACES = {
    "build_mixer": "pdn.cli.presets",
    "build_model": "pdn.cli.presets",
    "generate": "pdn.inference.generate",
    "load_run": "pdn.hub.load",
    "read_checkpoint": "pdn.checkpoint.read",
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("pdn.ops")
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'pdn' has no attribute {name!r}")


def _load_certifier() -> Certifier:
    """Import the module that certifies: its functions are the certifier's methods."""
    certify: Any = importlib.import_module("pdn.certification.certify")
    return certify


set_certifier(_load_certifier)
