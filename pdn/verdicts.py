"""Which kernels may run on this machine: ``pdn.ops`` asks here, whoever certifies them answers.

The ops know nothing of certification. ``pdn/__init__.py`` connects the two, so that the first call
of a kernel is certified however the ops were imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Certifier(Protocol):
    """Answers whether a kernel computes the right numbers; see ``pdn.certification.certify``."""

    def triton_is_usable(self, *configuration: Any) -> bool: ...

    def convolution_is_usable(self, *configuration: Any) -> bool: ...

    def decoding_is_usable(self, *configuration: Any) -> bool: ...

    def kernel_is_usable(self, *configuration: Any) -> bool: ...

    def certify_together(self, call: Callable[[], object], device: Any) -> None: ...


_load: Callable[[], Certifier] | None = None


def set_certifier(load: Callable[[], Certifier]) -> None:
    """Have ``load`` bring the certifier when the first kernel asks."""
    global _load
    _load = load


def certifier() -> Certifier:
    """Return the certifier.

    Raises:
        RuntimeError: nobody has set one.
    """
    if _load is None:
        raise RuntimeError(
            "no certifier: expected one by pdn.verdicts.set_certifier, as `import pdn` does"
        )
    return _load()
