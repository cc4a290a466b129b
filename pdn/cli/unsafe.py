"""What no text of a configuration may hold: resolvers that run code or read files, and secrets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from omegaconf.grammar_parser import parse as parse_grammar

from pdn.cli.messages import problem, show
from pdn.cli.paths import at, leaf_paths
from pdn.cli.yaml_source import Origins
from pdn.errors import ConfigError

RESOLVERS = ("oc.env", "oc.select", "hydra")  # none that reads files or runs code
# Names of environment variables: a word of theirs, or the end of one as in PGPASS
SECRET = re.compile(
    r"(^|_)(API)?(KEYS?|TOKENS?|SECRETS?|PASS|PASSWD|PASSPHRASE|CREDENTIALS?|CREDS?|AUTH|PAT)(_|$)"
    r"|(KEY|TOKEN|SECRET|PASS|PASSWD|PASSWORD|PASSPHRASE|PWD)S?$|PASSWORD|SECRET"
)
NO_SECRET = ("PWD", "OLDPWD")


def forbidden(raw: dict[str, Any], origins: Origins) -> Iterator[ConfigError]:
    """Yield a problem for each text of a configuration, as written, that is not allowed."""
    for path in leaf_paths(raw):
        item = f"{path} ({origins.of(path)})"
        for text in _texts(at(path, raw)):
            for name in re.findall(r"oc\.env:\s*(\w+)", text):
                if SECRET.search(name.upper()) and name not in NO_SECRET:
                    found = f"${{oc.env:{name}}}, which looks like a secret"
                    fix = "leave it in the environment, where the libraries that need it look"
                    expected = "none, as config.yaml would hold it"
                    yield problem("CONFIG-UNSAFE", item, found, expected, fix)
            for name in sorted(set(_resolvers(text)) - {*RESOLVERS}):
                found = f"the resolver {name} in {show(text)}"
                expected = f"one of {', '.join(RESOLVERS)}, or ${{another.key}}"
                yield problem("CONFIG-UNSAFE", item, found, expected, "write the value itself")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _resolvers(text: str) -> Iterator[str]:
    """Yield names of the resolvers that ``text`` would call, nested ones included."""
    if "${" not in text:
        return
    nodes: list[Any] = [parse_grammar(text)]
    while nodes:
        node = nodes.pop()
        if type(node).__name__ == "InterpolationResolverContext":
            yield node.resolverName().getText()
        nodes.extend(getattr(node, "children", None) or ())
