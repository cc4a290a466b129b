"""Docstrings say what a thing does: they begin with a verb."""

import ast
from functools import cache

from tests.test_architecture import ROOT, SOURCES

KINDS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# In the plain form. A verb that is not here counts as none until it is added.
VERBS = """
abort act add allocate answer append apply ask attend average begin bound bring build call carry
cast certify change check checkpoint choose clear close collect combine compare compile compose
compute configure continue convert convolve copy count create cut decide decode decompress delete
derive describe differentiate digest do draw drop embed encode end estimate evaluate exchange fill
find finish follow forget form fuse generate give go guard hand hash have hide hold import
initialise join judge keep lack launch lay learn leave let limit list load log look make map mark
measure mix move multiply name note open order overwrite pair parse permute place plan plot point
predict print profile project prove publish put queue quote raise read recompute record reduce
refuse register release remember remove repeat replace report reshape resolve return rotate round
run sample save say scale scan score see select send set show solve sort split start step stop
store stream sum take tell time tokenise train translate try turn type update use validate verify
wait want watch work wrap write yield
"""
# Of all functions and classes. The kernels have most of the others, which begin with a formula.
LARGEST_SHARE_WITHOUT = 0.07


def begins_with_a_verb(text: str) -> bool:
    """Return whether the first word is a verb, as in ``Return x`` or ``Returns x``."""
    word = text.split()[0].rstrip(",;:").lower()
    forms = {word}
    if word.endswith("s"):
        forms |= {word[:-1], word[:-2], f"{word[:-3]}y"}
    return not forms.isdisjoint(VERBS.split())


@cache
def without_a_verb() -> tuple[dict[str, type], int]:
    """Return what has a docstring that begins otherwise, and how many docstrings there are."""
    found, count = {}, 0
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, KINDS) and (text := ast.get_docstring(node)):
                count += 1
                if not begins_with_a_verb(text):
                    found[f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"] = type(node)
    return found, count


def test_docstrings_of_classes_begin_with_a_verb():
    found, _ = without_a_verb()
    assert not [place for place, kind in found.items() if kind is ast.ClassDef]


def test_few_docstrings_begin_without_a_verb():
    found, count = without_a_verb()
    assert len(found) < LARGEST_SHARE_WITHOUT * count, "\n".join(found)


def test_a_noun_is_told_from_a_verb():
    assert all(map(begins_with_a_verb, ["Return x.", "Carries on.", "Mixes", "Do, then", "Goes"]))
    assert not any(map(begins_with_a_verb, ["The sum.", "What x is.", "``x`` [B, T]", "Bytes of"]))
