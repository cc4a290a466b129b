"""The 52 bad inputs that a launch answers with one message before it builds a model.

How each is made, and its answer. ``CASES`` is the one place where they are counted. A case names
the four parts that its message must have.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np

from pdn.checkpoint.format import step_directory
from pdn.data.shards import read_manifest
from tests.checkpoint.small import resign
from tests.data.corpus import documents, make_shards, tokenizer
from tests.data.test_shards import write_manifest
from tests.faults import rig

COUNT = 52


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        kind: what it is a mistake in.
        what: the mistake.
        words: what the command line adds to ``words()``; paths are relative to the place of the
            launch.
        code: exit code of every rank.
        item, found, expected, fix: the four parts of the message.
        spoil: makes the input bad in the place of the launch, given to every rank or to the last
            one only.
        environment: of the process; ``PRETEND_GPUS`` is for the launcher of the tests, BUSY a port
            in use.
        ranks: of the launch: "any", or "one" or "two" where the other is no mistake.
        alone: on two ranks only the last one finds its input spoilt, as on a node with files of its
            own.
    """

    kind: str
    what: str
    words: str
    code: int
    item: str
    found: str
    expected: str
    fix: str
    spoil: Callable[[Path], object] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    ranks: str = "any"
    alone: bool = False


GOOD = (
    "data=shards data.path=shards data.validation=null data.cache_dir=cache data.seq_len=16 "
    "trainer.steps=12 "
    "trainer.micro_batch_size=1 output_dir=runs name=new"
)


def words(more: str) -> list[str]:
    """Return the command line of a case, complete and good but for ``more``.

    Settings in ``more`` replace those of the same key.
    """
    good = [
        *(
            word
            for word in rig.BASE
            if not word.startswith(("data.", "trainer.steps", "trainer.micro", "name="))
        ),
        *GOOD.split(),
    ]
    given = more.split()
    keys = {word.partition("=")[0] for word in given}
    if "data" in keys:  # another kind of data has other keys
        good = [word for word in good if not word.startswith(("data.path", "data.validation"))]
    return [word for word in good if word.partition("=")[0] not in keys] + given


def build(place: Path) -> Path:
    """Make everything good: shards, a text corpus, a tokenizer, and a run.

    The run has eight steps and checkpoints of steps 4 and 8.
    """
    make_shards(place / "made", documents(120))
    shutil.copytree(place / "made" / "train", place / "shards")
    rig.write_corpus(place / "corpus")
    (place / "tokenizer").mkdir()
    (place / "tokenizer" / "tokenizer.json").write_bytes(tokenizer().content)
    (place / "configs" / "experiment").mkdir(parents=True)
    return place


# ------------------------------------------------------------------ how an input is spoilt


def experiment(text: str) -> Callable[[Path], object]:
    """Write a file for ``experiment=bad --config-dir configs``."""
    return lambda place: (place / "configs/experiment/bad.yaml").write_text(
        f"# @package _global_\n{text}"
    )


def shard(suffix: str = ".bin") -> Path:
    return Path("shards") / f"shard-00001{suffix}"


def rewrite(file: Path | str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda place: (place / file).write_bytes(change((place / file).read_bytes()))


def flip(data: bytes) -> bytes:
    return data[:10] + bytes([data[10] ^ 1]) + data[11:]


def id_beyond_vocabulary(place: Path) -> None:
    tokens = np.fromfile(place / shard(), "<u2")
    tokens[7] = 60000
    tokens.tofile(place / shard())
    entries = [entry.model_dump() for entry in read_manifest(place / "shards").shards]
    entries[1]["sha256"] = sha256(tokens.tobytes()).hexdigest()
    write_manifest(place / "shards", shards=entries)


def other_shards(place: Path) -> None:
    shutil.rmtree(place / "shards")
    make_shards(place / "other", documents(120, seed=5))
    (place / "other" / "train").rename(place / "shards")


def checkpoint(place: Path, step: int = 8) -> Path:
    return step_directory(place / "runs/run/checkpoints", step)


def without_optimizer(place: Path) -> None:
    path = checkpoint(place)
    manifest, index = (
        json.loads((path / name).read_bytes()) for name in ("manifest.json", "index.json")
    )
    tensors = {
        name: entry for name, entry in manifest["tensors"].items() if name.startswith("model.")
    }
    data = json.dumps({name: index[name] for name in tensors}).encode()
    (path / "index.json").write_bytes(data)
    files = manifest["files"] | {
        "index.json": {"sha256": sha256(data).hexdigest(), "bytes": len(data)}
    }
    resign(path, {"tensors": tensors, "files": files})


def of_another_dtype(place: Path) -> None:
    tensors = json.loads((checkpoint(place) / "manifest.json").read_bytes())["tensors"]
    tensors["model.embedding.weight"][0] = "int32"  # of as many bytes
    resign(checkpoint(place), {"tensors": tensors})


def hugging_face_weights(place: Path) -> None:
    (place / "hf").mkdir()
    (place / "hf" / "model.safetensors").write_bytes(b"")


def remote_code(place: Path) -> None:
    (place / "tokenizer/tokenizer.json").unlink()
    (place / "tokenizer/tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}})
    )


def read_only(place: Path) -> None:
    (place / "sealed").mkdir()
    (place / "sealed").chmod(0o555)


WEIGHTS = (
    "data=mixture data.sources.web.weight=0 data.sources.code.weight=nan "
    "+data.sources.more={kind:shards,path:shards,validation:null,weight:-1}"
)
FILE = "experiment=bad --config-dir configs"
TEXT = "data=text data.path=corpus data.tokenizer=tokenizer"

# ------------------------------------------------------------------ the table

# fmt: off
CASES = [
    Case("config", "unknown key", "trainer.step=5", 78,
         "trainer.step (command line)", "found an unknown key", "expected one of",
         "did you mean trainer.steps"),
    Case("config", "unknown key, added", "+train.lrr=1", 78,
         "train.lrr (command line)", "found an unknown key", "expected one of",
         "did you mean optim.lr?"),
    Case("config", "text for a number", "optim.lr=abc", 78,
         "optim.lr (command line)", "found 'abc'", "expected a number",
         "leave it out for the shipped value"),
    Case("config", "negative number of steps", "trainer.steps=-5", 78,
         "trainer.steps (command line)", "found -5", "expected at least 1",
         "leave it out for the shipped value"),
    Case("config", "number beyond its limit", "trainer.steps=9223372036854775807", 78,
         "trainer.steps", "= 9223372036854775807", "expected at most 1,000,000,000",
         "trainer.steps: command line"),
    Case("config", "duplicate YAML key", FILE, 78,
         "bad.yaml:3:1", "found duplicate key seed", "expected", "remove all but one",
         experiment("seed: 1\nseed: 2\n")),
    Case("config", "a group set to null", "data=null", 78,
         "data (command line)", "found null", "expected one of", "leave it out"),
    Case("config", "unset environment variable", "name=${oc.env:PDN_NOT_SET}", 78,
         "name (command line)", "PDN_NOT_SET is not set", "expected", "export PDN_NOT_SET"),
    Case("config", "octal and sexagesimal numbers", "seed=010 checkpoint.every=12:30:45", 78,
         "seed (command line)", "found '12:30:45'", "expected an integer",
         "write a decimal number without leading zeros or colons"),
    Case("config", "invalid YAML", FILE, 78,
         "bad.yaml:3:1", "but got", "expected YAML", "correct", experiment("trainer: [1\n")),
    Case("config", "batch that does not divide",
         "trainer.global_batch_size=5 trainer.micro_batch_size=2", 78,
         "trainer.global_batch_size = 5", "is not divisible by", "nearest valid", "4 or 6"),
    Case("config", "warm-up longer than the run", "schedule.warmup_steps=50", 78,
         "schedule.warmup_steps: command line", "= 50 exceed", "trainer.steps = 12",
         "expected at most that"),
    Case("config", "interval of zero", "checkpoint.every=0", 78,
         "checkpoint.every (command line)", "found 0", "expected at least 1",
         "leave it out for the shipped value 500"),
    Case("config", "circular interpolation", "seed=${trainer.stop_at} trainer.stop_at=${seed}", 78,
         "seed (command line)", "refers back to itself", "expected a value at the end",
         "write one instead of a reference"),

    Case("data", "shard missing", "", 65,
         str(shard()), "missing", "expected", "restore", lambda place: (place / shard()).unlink(),
         alone=True),
    Case("data", "shard empty", "", 65,
         str(shard()), "empty", "expected", "byte 0; restore", rewrite(shard(), lambda data: b""),
         alone=True),
    Case("data", "odd byte count", "", 65,
         str(shard()), "not a whole number of tokens", "expected", "restore",
         rewrite(shard(), lambda data: data + b"x"), alone=True),
    Case("data", "uint16 with a vocabulary over 65,536", "", 65,
         "shards", "vocab_size is 70,000", "dtype uint16 holds ids below 65,536", "prepare",
         lambda place: write_manifest(place / "shards", vocab_size=70000), alone=True),
    Case("data", "id beyond the vocabulary", "", 65,
         f"{shard()}", "id 60000 at token 7 (byte 14)", "expected ids below vocab_size 300",
         "restore the file from a copy",
         id_beyond_vocabulary, alone=True),
    Case("data", "index of other documents", "", 65,
         str(shard(".idx")), "224 bytes", "expected 208 for 10 documents", "restore it",
         lambda place: shutil.copy(place / "shards/shard-00000.idx", place / shard(".idx")),
         alone=True),
    Case("data", "hash mismatch", "", 65,
         str(shard()), "SHA-256", "expected", "restore", rewrite(shard(), flip), alone=True),
    Case("data", "shorter than one sequence", "data.seq_len=100000", 65,
         "shards", "tokens, shorter than one sample", "100000 + 1", "reduce data.seq_len"),
    Case("data", "fewer samples than ranks", "data.seq_len=4000", 65,
         "shards", "1 sample of 4000 tokens", "fewer than the 2 ranks", "use fewer ranks",
         ranks="two"),
    Case("data", "weights of zero, below zero and NaN", WEIGHTS, 78,
         "data.sources.web.weight (command line)", "found NaN", "expected more than 0",
         "set data.sources.more.weight"),
    Case("data", "unreadable shard", "", 65,
         str(shard()), "permission denied", "expected a readable file", "fix its permissions",
         lambda place: (place / shard()).chmod(0), alone=True),
    Case("data", "wrong compression",
         "data=text data.path=corpus/corpus.jsonl.gz data.tokenizer=tokenizer", 65,
         "corpus.jsonl.gz", "offset 0", "expected 1f8b", "rename",
         lambda place: (place / "corpus/corpus.jsonl").rename(place / "corpus/corpus.jsonl.gz")),
    Case("data", "validation on the training set", "data.validation=shards", 65,
         "shards", "holds shards of the training set", "expected none in common",
         "give another directory in data.validation"),

    Case("tokenizer", "missing", TEXT, 65,
         "tokenizer/tokenizer.json", "no such file", "expected a tokenizer.json",
         "a directory with one, or a hub name",
         lambda place: (place / "tokenizer/tokenizer.json").unlink(), alone=True),
    Case("tokenizer", "larger than the model's vocabulary", "model.vocab_size=100", 78,
         "model.vocab_size = 100", "has 300 entries", "expected null or at least 300",
         "model.vocab_size"),
    Case("tokenizer", "not the one of the data", "", 65,
         "shards/tokenizer.json", "SHA-256", "but the shards were made with",
         "restore that tokenizer.json",
         rewrite("shards/tokenizer.json", lambda data: data + b" "), alone=True),
    Case("tokenizer", "no end-of-document token", TEXT, 65,
         "tokenizer", "no end-of-document token", "expected one of", "eos_token",
         rewrite("tokenizer/tokenizer.json",
                 lambda data: data.replace(b"<|endoftext|>", b"<|other|>")), alone=True),
    Case("tokenizer", "malformed JSON", TEXT, 65,
         "tokenizer", "not a tokenizer.json", "expected the JSON of a tokenizer",
         "export it again with save_pretrained()",
         rewrite("tokenizer/tokenizer.json", lambda data: data[:-10]), alone=True),
    Case("tokenizer", "needs code of its own", TEXT, 65,
         "tokenizer", "code", "expected", "tokenizer.json", remote_code, alone=True),

    Case("checkpoint", "step that is absent", "name=run resume=step:7", 78,
         "step-00000007", "no checkpoint of step 7", "expected one of", "resume=step:8"),
    Case("checkpoint", "step that was not committed", "name=run resume=step:8", 78,
         "step-00000008", "no COMMITTED marker", "expected one of 4", "resume=step:4",
         lambda place: (checkpoint(place) / "COMMITTED").unlink()),
    Case("checkpoint", "hash mismatch", "name=run resume=step:8", 74,
         "step-00000008/__0_0.distcp", "sha256", "expected", "resume=auto",
         lambda place: rewrite("__0_0.distcp", flip)(checkpoint(place))),
    Case("checkpoint", "other shapes", "init_from=runs/run model.intermediate_size=48", 78,
         "step-00000008", "checkpoint float32[32, 32]", "model float32[48, 32]",
         "Use the configuration it was saved with"),
    Case("checkpoint", "no optimizer state", "name=run resume=step:8", 78,
         "step-00000008", "has no optimizer state", "expected some at step 8", "init_from",
         without_optimizer),
    Case("checkpoint", "newer format", "name=run resume=step:8", 78,
         "step-00000008/manifest.json", "format 3", "expected at most 2", "update pdn",
         lambda place: resign(checkpoint(place), {"format": 3})),
    Case("checkpoint", "step-8-backup", "name=run resume=step:8", 78,
         "step-00000008", "found step-00000008-backup", "expected that name exactly", "rename it",
         lambda place: checkpoint(place).rename(
             checkpoint(place).with_name("step-00000008-backup"))),
    Case("checkpoint", "Hugging Face weights", "init_from=hf", 78,
         "hf", "holds Hugging Face weights", "expected a checkpoint", "with their config.json",
         hugging_face_weights),
    Case("checkpoint", "other dtype", "name=run resume=step:8", 78,
         "step-00000008", "embedding.weight: checkpoint int32", "model float32",
         "Use the configuration it was saved with",
         of_another_dtype),
    Case("checkpoint", "trained on other data", "name=run", 78,
         "runs/run", "was", "now", "start a run of another name with init_from=", other_shards),

    Case("command line", "more ranks than devices", "trainer.device=auto", 78,
         "--nproc-per-node 4", "found 1 CUDA devices", "expected at most one process a device",
         "--nproc-per-node 1",
         environment={"PRETEND_GPUS": "1", "LOCAL_WORLD_SIZE": "4"}),
    Case("command line", "port in use", "", 78,
         "MASTER_PORT: 127.0.0.1:", "is in use by another process", "expected a free port",
         "torchrun --standalone",
         environment={"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                      "MASTER_PORT": "BUSY"}, ranks="one"),
    Case("command line", "not under torchrun", "parallel=hsdp", 78,
         "parallel.replicate = 2", "number of processes, 1", "expected torchrun --nproc-per-node",
         "or another parallel.replicate",
         ranks="one"),
    Case("command line", "output that cannot be written", "output_dir=sealed/runs", 74,
         "sealed/runs", "EACCES", "expected to be allowed", "choose another output_dir", read_only),
    Case("command line", "directory of another run", "name=run seed=1", 78,
         "runs/run/config.yaml", "seed: recorded 0, now 1", "A run keeps what defines it",
         "give the run another name"),
    Case("command line", "unknown evaluation task", "eval.tasks=[hellaswagg]", 78,
         "'hellaswagg'", "no such", "expected one of", "did you mean hellaswag"),
    Case("command line", "no key for wandb", "logger=wandb trainer.stop_at=1", 0,
         "no wandb key", "recording offline", "WANDB_API_KEY or ~/.netrc", "wandb sync"),
    Case("command line", "text too short for an evaluation",
         TEXT + " data.validation=held_out.txt data.seq_len=1000 eval.tasks=[length]", 78,
         "length", "tokens of validation text", "expected at least 16,000",
         "give more validation text",
         spoil=lambda place: (place / "held_out.txt").write_text("held out for the run " * 500)),
    Case("command line", "no CUDA device", "trainer.device=cuda", 78,
         "trainer.device = cuda", "found no usable CUDA device", "expected one",
         "set trainer.device=cpu or auto"),
]
# fmt: on
assert len(CASES) == COUNT
