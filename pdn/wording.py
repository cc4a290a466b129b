"""Words that messages of all packages share, and what takes them."""

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
