#!/usr/bin/env python
"""Write texts that hide a sentence and ask for it, for models to learn the form of needle_1 from.

    python scripts/make_needles.py out=corpus/needles/needles.jsonl

They are of the form of the task, and none of those that it asks. A directory with other text and
them is a corpus.

out        .jsonl with a text a line
texts      20000
value      number; or uuid, as in needle_3
sentences  60; of noise in a text, at most: some 400 tokens
"""

import json
from pathlib import Path

from pydantic import Field

from pdn.cli.options import Place, parse, run_script
from pdn.config import Strict
from pdn.errors import ConfigError
from pdn.evals.probes.needle import Value, training_text
from pdn.store.local import storage_errors, write_durably
from pdn.wording import counted


class Options(Strict):
    out: Place
    texts: int = Field(20_000, ge=1)
    value: Value = "number"
    sentences: int = Field(60, ge=1)


def main(arguments: list[str]) -> None:
    options = parse(Options, arguments)
    out = Path(options.out)
    if out.suffix != ".jsonl":
        raise ConfigError("NEEDLES", f"out={out}: found {out.suffix!r}; expected .jsonl")
    texts = (training_text(i, options.value, options.sentences) for i in range(options.texts))
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_durably(out, content)
    print(f"{out}: {counted(options.texts, 'text')}, {len(content):,} bytes")


if __name__ == "__main__":
    run_script(main, usage=__doc__)
