"""Mutated command lines and run directories.

Each gets an answer by name, or the run as it would have been.
"""

import contextlib
import json
import math
import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from pdn.cli.compose import compose
from pdn.cli.launch import quote_home
from pdn.cli.parse import parse
from pdn.cli.paths import at, leaf_paths
from pdn.errors import PdnError, StorageError
from pdn.hub.load import load_run
from pdn.reports.evidence import record_of
from pdn.reports.plots import panels
from pdn.reports.report import build
from pdn.runs.records import read_metrics
from pdn.store.local import remove_tree
from tests.faults import rig
from tests.faults.conftest import amount

SEED = 49
VALUES = (
    "null", "true", "-1", "0", "1", "3.7", "1e400", "-1e400", "nan", "1e308", "1e-320", "010",
    "12:30:45", "9223372036854775807", "99999999999999999999", "''", "' '", "abc", "[]", "[1]",
    "[a,b]", "[[1]]", "{}", "{a:1}", "{a:{b:c}}", "s3://bucket/x", "../..", "/", "~", "~/x",
    "/dev/null",
    "${seed}", "${nope}", "${oc.env:HOME}", "${oc.env:MY_TOKEN}", "${", "a=b", "a,b", "1,2", "???",
    "ä", "\udc80", "\x00", "\n", "a b", "'", '"', "\\", "*", "%", "#", "!!python/none", "&a",
    "_target_",
    "x" * 10_000, "9" * 5_000, "range(3)", "glob(*)", "pgdn_tiny", "text", "auto", "step:3",
    "step:-1",
)  # fmt: skip
PREFIXES = ("", "", "", "", "+", "++", "~", "-", "--", "@")
HARMLESS = (
    "status.json", "history.jsonl", "run.log", "run.lock", "wandb-run-id", "tokenizer.json",
    "metrics.jsonl",
)  # fmt: skip
"""What no run is computed from: it is written anew, or only read by people."""
CONTINUED = ("trainer.stop_at=8", "checkpoint.every=2")


class Hang(BaseException):
    pass


@contextlib.contextmanager
def answered_within(seconds: float):
    def fail(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ------------------------------------------------------------ command lines


def random_words(rng: random.Random, keys: list[str], groups: list[str]) -> list[str]:
    words = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        key = rng.choice(keys if rng.random() < 0.7 else groups)
        if rng.random() < 0.1:
            place = rng.randrange(len(key) + 1)
            key = key[:place] + rng.choice("._x/@=[]~ ") + key[place:]
        words.append(f"{rng.choice(PREFIXES)}{key}={rng.choice(VALUES)}")
    if rng.random() < 0.05:
        words.append(rng.choice(VALUES))
    return words


def means(value: object, text: str) -> bool:
    """Return whether a value that was accepted is what was written."""
    if isinstance(value, bool) or value is None:
        return text in ("true", "null")
    if isinstance(value, int | float):
        with contextlib.suppress(ValueError):
            return math.isclose(float(text), value)
        return text.startswith("$")
    return isinstance(value, str | list | dict)


@amount(60, 1106)
def test_a_random_command_line_is_refused_by_name_or_means_what_it_says(table, trials):
    with table(
        "32",
        "random overrides: keys, groups, prefixes, values of every kind",
        "one message and 78, or the value that was written; no traceback, no hang",
        SEED,
    ) as row:
        rng, accepted = random.Random(SEED), 0
        values = compose(["data=text", "model=hybrid_tiny"]).values
        keys = sorted(leaf_paths(values))
        groups = [key for key, value in values.items() if isinstance(value, dict)]
        groups += ["experiment", "mixer", "eval/suites", "model/size", "hydra", "hydra/launcher"]
        for _ in range(trials):
            words = random_words(rng, keys, groups)
            try:
                with answered_within(120):
                    config = parse(compose([quote_home(word) for word in words]), 1)
            except PdnError as error:
                assert error.exit_code in (74, 78) and len(error.args[0]) > 10, words
                assert len(str(error)) < 30_000, words
            except (Exception, Hang) as error:
                raise AssertionError(f"{words}: {type(error).__name__}: {error}") from error
            else:
                accepted += 1
                dump = config.model_dump(mode="json")
                last = {word.lstrip("+~").partition("=")[0]: word for word in words}
                for key, word in last.items():
                    if key in keys and not word.startswith("~"):
                        assert means(at(key, dump), word.partition("=")[2]), words
            row.trials += 1
        row.note = f"{accepted} accepted"


# ------------------------------------------------------------ run directories


def mutate(rng: random.Random, run: Path) -> tuple[Path, str]:
    """Change one entry of a run directory; which, and how."""
    entries = sorted(path for path in run.rglob("*") if not path.is_symlink())
    target = rng.choice(entries)
    kinds = ["gone", "directory", "nowhere", "pipe", "moved"]
    if target.is_file():
        kinds += ["flipped", "cut", "emptied", "garbage", "line gone", "line doubled", "value"] * 2
    kind = rng.choice(kinds)
    content = target.read_bytes() if target.is_file() else b""
    if kind in ("gone", "directory", "nowhere", "pipe"):
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        if kind == "directory":
            target.mkdir()
        elif kind == "nowhere":
            target.symlink_to(run / "nowhere")
        elif kind == "pipe":
            os.mkfifo(target)
    elif kind == "moved":
        target.rename(target.with_name(f"{target.name}.moved"))
    else:
        target.write_bytes(changed(rng, kind, content))
    return target.relative_to(run), kind


def changed(rng: random.Random, kind: str, content: bytes) -> bytes:
    lines = content.splitlines(keepends=True) or [b""]
    place = rng.randrange(len(content) + 1)
    number = rng.randrange(len(lines))
    match kind:
        case "flipped" if content:
            place = min(place, len(content) - 1)
            flipped = content[place] ^ (1 << rng.randrange(8))
            return content[:place] + bytes([flipped]) + content[place + 1 :]
        case "cut":
            return content[: min(place, max(0, len(content) - 1))]
        case "garbage":
            return rng.randbytes(rng.choice((1, 30, 3000)))
        case "line gone":
            return b"".join(lines[:number] + lines[number + 1 :])
        case "line doubled":
            return b"".join([*lines[:number], lines[number], *lines[number:]])
        case "value":
            value = rng.choice((b"null", b"-1", b"[]", b"{}", b'"x"', b"1e999", b"[" * 5000))
            return lines[0][:place] + value + b"".join(lines[1:])
    return b""


@pytest.fixture(scope="module")
def stopped(base):
    """Return a run of 12 steps that stopped after 6, with checkpoints of 2, 4 and 6."""
    home = base / "to-be-mutated"
    words = rig.overrides(home, base, "trainer.stop_at=6", "checkpoint.every=2")
    assert rig.launch(home, 1, words).wait() == [0]
    return home


def test_a_run_is_not_read_with_another_tokenizer_than_it_was_trained_with(stopped, tmp_path):
    shutil.copytree(stopped / "run", tmp_path / "run")
    file = tmp_path / "run" / "tokenizer.json"
    content = json.loads(file.read_text())
    first, second, *_ = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)[-2:]
    content["model"]["vocab"][first], content["model"]["vocab"][second] = (
        content["model"]["vocab"][second],
        content["model"]["vocab"][first],
    )
    file.write_text(json.dumps(content))
    with pytest.raises(StorageError, match=r"tokenizer\.json: SHA-256 .*was trained with"):
        load_run(tmp_path / "run")


def untraced(launch: rig.Launch) -> str | None:
    """Return what ended a launch without an answer by name, if anything did."""
    text = launch.text()
    return text if "Traceback" in text or "pdn[E-" not in text else None


@amount(12, 500)
def test_a_mutated_run_directory_is_refused_by_name_or_continued_as_if_untouched(
    in_memory, base, stopped, reference, table, trials
):
    with table(
        "33",
        "run directories with one entry changed: bits, lines, values, kinds of files",
        "74 or 78 and what is wrong, or the losses and the ledger of the untouched run",
        SEED + 1,
    ) as row:
        rng, refused = random.Random(SEED + 1), 0
        whole = reference(1, *CONTINUED, length=8)
        for trial in range(trials):
            home = in_memory / str(trial)
            shutil.copytree(stopped / "run", home / "run")
            refused += continues_or_refuses(home, base, mutate(rng, home / "run"), whole)
            remove_tree(home)
            row.trials += 1
        row.note = f"{refused} refused"


def reported(run: Path) -> None:
    """Read all that reports and figures show of a run."""
    build({"run": run})
    panels({"run": read_metrics(run)})
    record_of(run)


def continues_or_refuses(
    home: Path, base: Path, where: tuple[Path, str], whole: rig.Record
) -> bool:
    """Read and continue a run directory of which ``where`` was changed; whether it was refused."""
    for read in (load_run, read_metrics, reported):
        try:
            with answered_within(120):
                read(home / "run")
        except PdnError:
            pass
        except (Exception, Hang) as error:
            raise AssertionError(f"{where}: {read.__name__}: {error!r}") from error
    started = rig.launch(home, 1, rig.overrides(home, base, *CONTINUED))
    (code,) = started.wait()
    if code != 0:
        assert code in (74, 78) and not untraced(started), (where, code, started.text())
        return True
    if where[0].name in HARMLESS:
        assert rig.read_lines(home, "ledger.jsonl")[-1]["step"] == 8, where
    elif where[0].name == "ledger.jsonl":  # gone, and said so
        assert "ledger.jsonl: is gone" in started.text(), where
    else:
        found = rig.record(home, 8)
        assert (found.ledger, found.shards) == (whole.ledger, whole.shards), where
    return False


# ------------------------------------------------------------ caches of prepared data


@pytest.fixture(scope="module")
def prepared(base):
    """Return a cache of the corpus, and what a run of four steps on it leaf_paths."""
    home = base / "on-the-whole-cache"
    cache = base / "cache-to-be-mutated"
    started = rig.launch(home, 1, on_cache(home, base, cache))
    assert started.wait() == [0], started.text()
    return cache, trained(home)


def on_cache(home: Path, base: Path, cache: Path) -> list[str]:
    evaluated = ("eval=validation", "eval.every=4", "eval.max_samples=4", "eval.at_start=false")
    return rig.overrides(home, base, "trainer.stop_at=4", *evaluated, f"data.cache_dir={cache}")


def trained(home: Path) -> tuple:
    return rig.record(home, 4), rig.validations(home)


@amount(12, 500)
def test_a_mutated_cache_is_refused_by_name_or_gives_the_same_data(
    in_memory, base, prepared, table, trials
):
    with table(
        "34",
        "caches of prepared data with one entry changed: bits, lines, values, kinds of files",
        "65 or 74 and what is wrong, or the losses, ledger and validation of the whole cache",
        SEED + 2,
    ) as row:
        rng, refused = random.Random(SEED + 2), 0
        cache, whole = prepared
        for trial in range(trials):
            home = in_memory / str(trial)
            shutil.copytree(cache, home / "cache")
            where = mutate(rng, home / "cache")
            refused += same_data_or_refused(home, base, where, whole)
            remove_tree(home)
            row.trials += 1
        row.note = f"{refused} refused"


def same_data_or_refused(home: Path, base: Path, where: tuple[Path, str], whole: tuple) -> bool:
    """Train on a cache of which ``where`` was changed; whether it was refused."""
    started = rig.launch(home, 1, on_cache(home, base, home / "cache"))
    (code,) = started.wait()
    if code != 0:
        assert code in (65, 74) and not untraced(started), (where, code, started.text())
        return True
    assert trained(home) == whole, (where, started.text())
    return False
