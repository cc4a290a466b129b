#!/usr/bin/env python
"""Collect Python source files into one corpus.

    python scripts/collect_sources.py out=corpus/sources.jsonl

Beside the corpus <out>.manifest.json names packages, sizes and the hash of its content.

out             .jsonl or .jsonl.zst with a document a line, keys text and path
roots           null; directories with commas between: this Python's packages and library
min_bytes       500; shorter files are left out
max_bytes       100000; longer files, mostly tables and generated code, are left out
max_characters  null; of all documents, which are in a random but fixed order, as many as fit
"""

import bisect
import hashlib
import importlib.metadata
import itertools
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import zstandard

from pdn.cli.options import Place, Places, parse, run_script
from pdn.config import Strict
from pdn.errors import ConfigError
from pdn.wording import counted

SKIPPED = {"__pycache__", "test", "tests", "testing", "_vendor", "encodings"}
LEVEL = 19  # of zstd
SPACE = re.compile(r"\s+")


class Options(Strict):
    out: Place
    roots: Places | None = None
    min_bytes: int = 500
    max_bytes: int = 100_000
    max_characters: int | None = None


def main(arguments: list[str]) -> None:
    options = parse(Options, arguments)
    roots = [Path(root).expanduser() for root in options.roots or default_roots()]
    for root in roots:
        if not root.is_dir():
            raise ConfigError(
                "SOURCES", f"roots: {root}: no such directory; expected directories with .py files"
            )
    documents = distinct(roots, options.min_bytes, options.max_bytes)
    if options.max_characters is not None:
        ends = itertools.accumulate(len(text) for _, text in documents)
        documents = documents[: bisect.bisect_right(list(ends), options.max_characters)]
    if not documents:
        raise ConfigError(
            "SOURCES", f"roots: {', '.join(map(str, roots))}: no .py file of the sizes asked for"
        )
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"path": path, "text": text}) + "\n" for path, text in documents)
    content = "".join(lines).encode()
    out.write_bytes(zstandard.compress(content, LEVEL) if out.suffix == ".zst" else content)
    manifest = {
        "documents": len(documents),
        "characters": sum(len(text) for _, text in documents),
        "sha256": hashlib.sha256(content).hexdigest(),
        "packages": dict(sorted((d.name, d.version) for d in importlib.metadata.distributions())),
    }
    out.with_name(out.name + ".manifest.json").write_text(
        json.dumps(manifest, indent=1) + "\n", encoding="utf-8"
    )
    print(
        f"{out}: {counted(manifest['documents'], 'document')}, {manifest['characters']:,} "
        f"characters, sha256 {manifest['sha256'][:16]}"
    )


def default_roots() -> list[str]:
    """Return where this Python keeps its packages and its library, each place once."""
    paths = sysconfig.get_paths()
    return list(dict.fromkeys(paths[kind] for kind in ("purelib", "platlib", "stdlib")))


def distinct(roots: list[Path], min_bytes: int, max_bytes: int) -> list[tuple[str, str]]:
    """Return (path below its root, text) of every file, copies left out, in the order of a hash.

    Files that differ in white space alone count as copies; of copies the first path stays. The
    order by hash mixes the packages, whatever order the file system lists them in, so that a prefix
    of the corpus is a sample of it.

    Args:
        roots: directories to read.
        min_bytes, max_bytes: size of a file.
    """
    found: dict[bytes, tuple[str, str]] = {}
    for path, text in sorted(read(roots, min_bytes, max_bytes)):
        key = hashlib.sha256(SPACE.sub(" ", text).encode()).digest()
        found.setdefault(key, (path, text))
    return [found[key] for key in sorted(found)]


def read(roots: list[Path], min_bytes: int, max_bytes: int) -> Iterator[tuple[str, str]]:
    """Yield (path, text) of the .py files of the right size that are UTF-8.

    Those of a root inside another come once.

    Args:
        roots: directories to read.
        min_bytes, max_bytes: size of a file.
    """
    seen: set[Path] = set()
    for root in roots:
        for file in root.rglob("*.py"):
            parts = file.relative_to(root).parts
            if file in seen or SKIPPED & set(parts[:-1]):
                continue
            seen.add(file)
            try:
                if min_bytes <= file.stat().st_size <= max_bytes:
                    yield "/".join(parts), file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue


if __name__ == "__main__":
    run_script(main, usage=__doc__)
