"""Walking nested configurations by dotted paths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pdn.config import leaves

ABSENT = object()


def at(path: str, node: Any, default: Any = None) -> Any:
    """Return the value at a dotted path of nested dicts and lists; ``default`` where none is."""
    for part in path.split(".") if path else []:
        if isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        else:
            return default
    return node


def leaf_paths(node: Any, path: str = "") -> Iterator[str]:
    """Yield dotted paths of all values that are no dicts."""
    return (found for found, _ in leaves(node, path) if found)
