"""Kill a small preparation before each of its file operations, and start it again.

What it leaves is compared. Run as ``python -m tests.data.crash_points SCENARIO DIRECTORY DOCUMENTS
SECOND_KILLS``: it prints, as JSON, the number of points and those after which a byte differs. A
process of its own, as it forks for each point and replaces what opens, writes, syncs, renames and
removes files.
"""

import builtins
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import tokenizers  # noqa: F401 (here, or each of the forked processes would import it)

from data import prepare
from pdn.data.config import StreamSource
from pdn.data.stream_prepare import resolve
from pdn.data.stream_tokeniser import STATUS
from pdn.data.stream_worker import Reader, Worker
from pdn.data.text import prepare_text
from pdn.wording import silent
from tests.data.corpus import STREAM, TEXT, documents, parse, tokenizer

OPERATIONS = ("replace", "fsync", "unlink", "mkdir", "open", "write", "pwrite", "ftruncate")
NEVER = -1


class Killer:
    """Counts the file operations of this process and kills it before number `at`."""

    def __init__(self, at: int):
        self.at, self.count = at, 0

    def operation(self) -> None:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        for name in OPERATIONS:
            setattr(
                os, name, self._counted(getattr(os, name) if name != "fsync" else lambda fd: None)
            )
        plain = builtins.open

        def opened(file, mode="r", *arguments, **keys):
            if mode != "wb":
                return plain(file, mode, *arguments, **keys)
            self.operation()
            return io.BufferedWriter(_Torn(str(file), mode, self.operation))

        builtins.open = opened

    def _counted(self, function: Callable) -> Callable:
        def counted(*arguments, **keys):
            self.operation()
            return function(*arguments, **keys)

        return counted


class _Torn(io.FileIO):
    """A file each of whose writes can also be killed half way."""

    def __init__(self, path: str, mode: str, operation: Callable[[], None]):
        super().__init__(path, mode)
        self._operation = operation

    def write(self, content) -> int:
        content = bytes(content)
        for part in (content[: len(content) // 2], content[len(content) // 2 :]):
            self._operation()
            super().write(part)
        return len(content)


def killed(work: Callable[[], None], at: int) -> bool:
    """Run `work` in a forked process that dies before operation `at`.

    Returns whether it did, or else ended well.
    """
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException), open(os.devnull, "w") as quiet:
            os.dup2(quiet.fileno(), 1)
            Killer(at).install()
            work()
            code = 0
        os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, (
        f"the run with a kill at operation {at} ended with status {status}"
    )
    return os.WIFSIGNALED(status)


def content(root: Path, ignored: frozenset[str]) -> dict[str, bytes]:
    files = {str(p.relative_to(root)): p for p in root.rglob("*") if p.is_file()}
    return {
        name: path.read_bytes()
        for name, path in files.items()
        if not ignored & set(Path(name).parts)
    }


def script(directory: Path, *options: str) -> Callable[[Path], Callable[[], None]]:
    prepare.console.quiet = True
    fixed = [
        "--path",
        str(directory / "text.jsonl"),
        "--shard-tokens",
        "700",
        "--processes",
        "1",
        *options,
    ]

    def at(out: Path) -> Callable[[], None]:
        def work() -> None:
            if prepare.main([*fixed, "--out", str(out)]) != 0:
                raise SystemExit(1)

        return work

    return at


def text(directory: Path) -> Callable[[Path], Callable[[], None]]:
    def at(out: Path) -> Callable[[], None]:
        config = parse(out, **{**TEXT, "path": str(directory / "text.jsonl"), "shard_tokens": 700})
        return lambda: prepare_text(config, out, silent) and None

    return at


def stream(directory: Path) -> Callable[[Path], Callable[[], None]]:
    """Return a tokeniser that evicts all but two shards behind its reader.

    At the end it writes all of them again.
    """
    keys = {
        "path": str(directory / "text.jsonl"),
        "tokenizer": str(directory / "tokenizer.json"),
        "shard_tokens": 700,
    }
    config = StreamSource.model_validate(
        {**STREAM, **keys, "block_shards": 1, "max_cache_bytes": 8 * 1400}
    )

    def at(out: Path) -> Callable[[], None]:
        def work() -> None:
            worker = Worker(resolve(config, out, silent), config)
            worker.shard_bytes *= 6  # room for one more of these leaves room for two
            for manifest in worker.work.run():
                worker._evict([Reader(len(manifest.shards), len(manifest.shards))])
            while worker._rebuild_missing([Reader(0, len(worker.manifest.shards))]):
                pass

        return work

    return at


SCENARIOS = {
    "split": lambda d: script(
        d, "--tokenizer", str(d / "tokenizer.json"), "--validation-fraction", "0.15"
    ),
    "validation": lambda d: script(
        d, "--tokenizer", str(d / "tokenizer.json"), "--validation", str(d / "held.jsonl")
    ),
    "trained": lambda d: script(d, "--vocab-size", "300", "--max-documents", "30"),
    "text": text,
    "stream": stream,
}
IGNORED = frozenset({"lock", "validation.lock", STATUS})


def main(scenario: str, directory: Path, number: int, second_kills: int) -> dict:
    """Kill the preparation of `number` documents at each of its operations.

    After each kill the next `second_kills` starts are killed too, at random operations.
    """
    # training leaves threads behind that a forked process would wait for
    assert not killed(
        lambda: (directory / "tokenizer.json").write_bytes(tokenizer().content), NEVER
    )
    for name, texts in (
        ("text", documents(number, seed=4)),
        ("held", documents(number, seed=4)[10:20]),
    ):
        (directory / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": t}) + "\n" for t in texts)
        )
    work, rng = SCENARIOS[scenario](directory), random.Random(scenario)
    assert not killed(work(directory / "whole"), NEVER)
    whole, differing, point = content(directory / "whole", IGNORED), {}, 0
    while killed(work(out := directory / f"killed-{point + 1}"), point + 1):
        point += 1
        for _ in range(second_kills):
            killed(work(out), rng.randint(1, max(point, 100)))
        assert not killed(work(out), NEVER)
        found = content(out, IGNORED)
        wrong = sorted(n for n in whole.keys() | found.keys() if whole.get(n) != found.get(n))
        if wrong:
            differing[point] = wrong
        else:
            shutil.rmtree(out)
    return {"points": point, "differing": differing}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))))
