"""Walking nested configurations by dotted paths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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


def leaves(node: Any, path: str = "") -> Iterator[str]:
    """Yield dotted paths of all values that are no dicts."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    elif path:
        yield path
