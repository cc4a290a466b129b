"""Words that messages of all packages share, and what takes them."""

import re
from collections.abc import Callable

Tell = Callable[[str], None]  # takes a line for the user


def silent(line: str) -> None:
    """Take a line, and show it to nobody."""


def counted(number: int, noun: str) -> str:
    """Write a number and what it counts: "1 file", "2,000 files"."""
    return f"{number:,} {noun if number == 1 else _plural(noun)}"


def _plural(noun: str) -> str:
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch")) else "s")


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or the name of its kind if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def override(key: str, text: object) -> str:
    """Return a word of the command line that sets a key to a text.

    Quoted for Hydra where it would read something else, such as a number, or nothing.
    """
    value = str(text)
    if re.fullmatch(r"[\w.@+-]*/[\w./@+-]*", value, re.ASCII):
        return f"{key}={value}"
    # a backslash stands for itself but before a quote, the last one included
    escaped = re.sub(
        r'(\\*)("|$)', lambda found: found[1] * 2 + found[2].replace('"', r"\""), value
    )
    return f'{key}="{escaped}"'
