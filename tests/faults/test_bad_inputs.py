"""Every bad input is answered once, on every rank, within 10 s and before a model is built."""

import ctypes
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from pdn.cli import launch
from tests.faults import bad_inputs, rig
from tests.faults.bad_inputs import CASES, Case
from tests.ranks import free_port

ROOT = Path(__file__).parent.parent.parent
# on a machine that has nothing else to do; as many times as long where others share its cores
LIMIT_S = 10.0
MODEL_BUILT = "a model was built"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
UNDER_TORCHRUN = (1, 21, 33, 38, 48)  # one case of each kind
_PR_CAPBSET_DROP, _OVERRIDES = 24, (1, 2)  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
PRETENDING = (
    "import runpy, sys; sys.path.insert(0, {root!r}); import torch; torch.cuda.is_available = "
    "lambda: True; "
    "torch.cuda.device_count = lambda: {gpus}; sys.argv = [{train!r}, *sys.argv[1:]]; "
    "runpy.run_path({train!r}, run_name='__main__')"
)


@dataclass
class Answer:
    """What a launch said and how it ended. ``text`` is of all ranks together."""

    codes: list[int]
    text: str
    seconds: float


@pytest.fixture(scope="session")
def good(tmp_path_factory) -> Path:
    """Return a place where everything is as it should be."""
    place = bad_inputs.build(tmp_path_factory.mktemp("bad-inputs") / "good")
    answer = forked([place], bad_inputs.words("name=run trainer.stop_at=8"))
    assert answer.codes == [0], answer.text
    return place


def obey_permissions() -> None:
    """Drop root's right to read and write what it may not.

    It is gone in this process, and in what it executes.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in _OVERRIDES:
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, sets)
    for i in range(3):  # effective, permitted, inheritable
        for capability in _OVERRIDES:
            sets[i] &= ~(1 << capability)
    libc.capset(header, sets)


def environment(case_environment: dict[str, str], place: Path, busy: int) -> dict[str, str]:
    """Return the environment of one process.

    It has nothing of a launcher but what the case gives, and a home without secrets.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("WANDB", "TORCHELASTIC", "PDN_FAULT"))
        and name not in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    }
    given = {name: value.replace("BUSY", str(busy)) for name, value in case_environment.items()}
    return kept | {"HOME": str(place), "OMP_NUM_THREADS": "1"} | given


def forked(
    places: list[Path], words: list[str], more: dict[str, str] | None = None, busy: int = 0
) -> Answer:
    """Launch ``train.py`` in a process forked for each of ``places``.

    That saves the seconds of imports.
    """
    began, port, pids, outputs = time.monotonic(), free_port(), [], []
    for rank, place in enumerate(places):
        outputs.append(place / f"output-{rank}-{time.monotonic_ns()}")
        pid = os.fork()
        if pid == 0:
            try:
                os.environ.clear()
                os.environ.update(environment(more or {}, place, busy))
                if len(places) > 1:
                    os.environ |= {
                        "RANK": str(rank),
                        "WORLD_SIZE": str(len(places)),
                        "LOCAL_RANK": str(rank),
                    }
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                rig.redirect(outputs[-1])
                os.chdir(place)
                obey_permissions()
                os._exit(_answer(words))
            finally:
                os._exit(1)
        pids.append(pid)
    codes = rig.Launch(pids, places[0]).wait()
    return Answer(
        codes, "".join(output.read_text() for output in outputs), time.monotonic() - began
    )


def _answer(words: list[str]) -> int:
    import torch

    from pdn.data import open_data
    from pdn.training import setup
    from pdn.training.fit import fit

    if gpus := int(os.environ.get("PRETEND_GPUS", 0)):
        torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: gpus
    parallelise = setup.parallelise

    def noted(*args, **options):
        print(MODEL_BUILT, flush=True)
        return parallelise(*args, **options)

    setup.parallelise = noted
    code = launch.main(words, lambda config: fit(config, open_data=open_data))
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def executed(
    place: Path, words: list[str], more: dict[str, str], busy: int, launcher: tuple[str, ...] = ()
) -> Answer:
    """Launch ``python train.py``, or ``torchrun``, whose code is then the answer's."""
    train, began = str(ROOT / "train.py"), time.monotonic()
    program = (
        ["-c", PRETENDING.format(gpus=more["PRETEND_GPUS"], train=train, root=str(ROOT))]
        if "PRETEND_GPUS" in more
        else [train]
    )
    done = subprocess.run(
        [sys.executable, *launcher, *program, *words],
        cwd=place,
        env=environment(more, place, busy),
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=obey_permissions,
    )
    return Answer([done.returncode], done.stderr + done.stdout, time.monotonic() - began)


def spoilt(good: Path, place: Path, case: Case) -> Path:
    shutil.copytree(good, place)
    if case.spoil is not None:
        case.spoil(place)
    return place


def answer(good: Path, tmp_path: Path, case: Case, ranks: int, start) -> Answer:
    tmp_path.mkdir(exist_ok=True)
    last = spoilt(good, tmp_path / "last", case)
    first = shutil.copytree(good, tmp_path / "first") if case.alone else last
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words, busy = bad_inputs.words(case.words), taken.getsockname()[1]
        return (
            start(last, words, case.environment, busy)
            if ranks == 1
            else forked([first, last], words, case.environment, busy)
        )


def assert_answered(case: Case, found: Answer) -> None:
    assert set(found.codes) == {case.code}, (found.codes, found.text)
    assert found.text.count("pdn[E-") == (1 if case.code else 0), found.text
    assert "Traceback" not in found.text, found.text
    for part in ("item", "found", "expected", "fix"):
        assert getattr(case, part) in found.text, (
            f"{part}: {getattr(case, part)!r} is not in\n{found.text}"
        )
    assert (MODEL_BUILT in found.text) <= (case.code == 0), found.text
    assert found.seconds < LIMIT_S * max(1.0, os.getloadavg()[0] / os.cpu_count()), found.text


def launches() -> list:
    """Return case and number of ranks of each launch."""
    return [
        pytest.param(case, ranks, id=f"{number}-{case.what.replace(' ', '-')}-on-{ranks}")
        for number, case in enumerate(CASES, start=1)
        for ranks, name in ((1, "one"), (2, "two"))
        if case.ranks in ("any", name)
    ]


def test_the_place_without_a_mistake_trains(good, tmp_path):
    place = shutil.copytree(good, tmp_path / "place")
    for words in (
        "trainer.stop_at=1",
        "name=run trainer.stop_at=9",
        bad_inputs.TEXT + " trainer.stop_at=1 name=text",
    ):
        found = forked([place, place], bad_inputs.words(words))
        assert found.codes == [0, 0] and MODEL_BUILT in found.text, found.text


@pytest.mark.parametrize(("case", "ranks"), launches())
def test_a_bad_input_is_answered_with_item_found_expected_and_fix(good, tmp_path, case, ranks):
    assert_answered(
        case, answer(good, tmp_path, case, ranks, lambda place, *rest: forked([place], *rest))
    )


@pytest.mark.slow
def test_every_bad_input_is_answered_by_train_py_and_counted(good, tmp_path, table):
    rows = (
        (
            "30",
            f"bad input of {len(CASES)} kinds (`tests/faults/bad_inputs.py`) to `python train.py`",
            1,
            executed,
        ),
        (
            "30.1",
            "the same on two ranks; what may differ by node is bad on the second only",
            2,
            None,
        ),
    )
    expected = (
        "one message with item, found, expected, fix, and the exit code, on every rank, within 10 "
        "s, before a model is built"
    )
    answered: set[int] = set()
    for row_number, what, ranks, start in rows:
        with table(row_number, what, expected if ranks == 1 else "the same") as row:
            slowest = 0.0
            for number, case in enumerate(CASES, start=1):
                if case.ranks in ("any", ("one", "two")[ranks - 1]):
                    found = answer(good, tmp_path / f"{number}-{ranks}", case, ranks, start)
                    assert_answered(case, found)
                    answered.add(number)
                    slowest = max(slowest, found.seconds)
                    row.trials += 1
            row.note = f"slowest {slowest:.1f} s; {len(answered)}/{bad_inputs.COUNT} kinds so far"
    print(f"bad inputs answered: {len(answered)}/{bad_inputs.COUNT}")
    assert answered == set(range(1, bad_inputs.COUNT + 1))


@pytest.mark.slow
def test_a_bad_input_ends_a_real_torchrun_with_one_message(good, tmp_path, table):
    with table(
        "30.2", "one case of each kind to torchrun, two ranks", "one message, torchrun ends with 1"
    ) as row:
        for number in UNDER_TORCHRUN:
            case, home = CASES[number - 1], tmp_path / str(number)
            found = answer(good, home, case, 1, lambda *launch: executed(*launch, TORCHRUN))
            assert found.codes == [1] and found.text.count("pdn[E-") == 1, found.text
            assert all(
                getattr(case, part) in found.text for part in ("item", "found", "expected", "fix")
            ), found.text
            row.trials += 1
