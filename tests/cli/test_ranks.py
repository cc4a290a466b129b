"""What the processes of one launch agree on, and which of them reports."""

import multiprocessing
import os
import socket
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from importlib.metadata import version

import pytest
from torch.distributed import TCPStore

from pdn.cli import launch, ranks
from pdn.cli.ranks import Ranks
from pdn.errors import ConfigError, DataError, StorageError
from pdn.runs.launcher import own_seat
from tests.children import PYTHON_PATH
from tests.cli.test_launch import run
from tests.ranks import free_port

pytestmark = pytest.mark.usefixtures("as_a_plain_process")

FAKE = """
import os, sys
from pdn.cli.launch import main

def train(config):
    print(f"rank {os.environ['RANK']} trains", flush=True)

code = main(sys.argv[1:], train)
# in one piece, since the other rank writes there too
os.write(1, f"rank {os.environ['RANK']} ends with {code}\\n".encode())
"""


def torchrun(tmp_path, program: str, *argv: str) -> subprocess.CompletedProcess:
    (tmp_path / "fake.py").write_text(program)
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    environment = os.environ | {"PYTHONPATH": PYTHON_PATH, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, str(tmp_path / "fake.py"), *argv],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,  # on a machine that does other work as well
        check=False,
    )


@pytest.mark.parametrize("given", [False, True])
def test_each_node_caches_where_its_own_pdn_cache_says_unless_told(given, tmp_path):
    def work(rank: int):
        os.environ["PDN_CACHE"] = f"/node-{rank}"
        seen = []
        words = ["data.cache_dir=/all"] if given else []
        run("data=text", "trainer.micro_batch_size=1", *words, train=seen.append)
        return [config.data.cache_dir for config in seen]

    found = [output.splitlines()[-1] for output in as_ranks(work, tmp_path)]
    assert found == (["['/all']"] * 2 if given else ["['/node-0']", "['/node-1']"])


def test_the_version_is_that_of_pdn_and_not_of_hydra(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"pdn {version('pdn')}\n"


def test_ranks_report_a_mistake_once_and_all_end_with_78(tmp_path):
    done = torchrun(tmp_path, FAKE, "trainer.lrr=1")
    assert done.stderr.count("pdn[E-CONFIG-KEY] trainer.lrr (command line)") == 1
    assert "Traceback" not in done.stderr
    assert sorted(done.stdout.splitlines()) == ["rank 0 ends with 78", "rank 1 ends with 78"]


SCRIPT = """
import os, time
from pdn.cli.options import run_script
from pdn.errors import ConfigError

def main(words):
    if os.environ["RANK"] in words:
        raise ConfigError("OPTION", "a mistake")
    time.sleep(20)

run_script(main)
"""


@pytest.mark.parametrize("mistaken", ["0 1", "1"])
def test_ranks_of_a_script_report_a_mistake_once_be_it_of_all_or_of_the_last(mistaken, tmp_path):
    done = torchrun(tmp_path, SCRIPT, *mistaken.split())
    assert done.stderr.count("pdn[E-OPTION] a mistake") == 1, done.stderr
    assert "a mistake" in done.stderr.rpartition("Root Cause")[2]  # at the end of torchrun's report


@pytest.mark.parametrize(("local_rank", "reports"), [("0", 1), ("1", 0)])
def test_of_ranks_that_cannot_meet_the_first_of_each_node_says_so(
    local_rank, reports, monkeypatch, capsys
):
    for name, value in {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": local_rank,
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert run("data=text") == 78
    assert capsys.readouterr().err.count("pdn[E-RANKS] rank 3 cannot meet the others") == reports


def as_ranks(work, tmp_path, *, farewell: float = 110.0) -> list[str]:
    """Return what two forked processes print that run ``work(rank)``.

    They meet as under a launcher; the result of ``work`` comes last.

    Args:
        work: called on every rank.
        tmp_path: for what they print.
        farewell: seconds that rank 0 waits for the other one to leave; a busy machine may keep that
            for longer than a launch would wait.
    """
    port = free_port()

    def child(rank: int) -> None:
        ranks._FAREWELL = farewell
        for name, value in {
            "RANK": rank,
            "WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }.items():
            os.environ[name] = str(value)
        with (
            open(tmp_path / f"output-{rank}", "w") as file,
            redirect_stdout(file),
            redirect_stderr(file),
        ):
            print(work(rank))

    context = multiprocessing.get_context("fork")
    started = [context.Process(target=child, args=(rank,), daemon=True) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        assert process.exitcode == 0
    return [(tmp_path / f"output-{rank}").read_text() for rank in range(2)]


def test_ranks_train_one_configuration_that_rank_0_has_composed(tmp_path):
    def work(rank: int):
        seen = []
        # A rank that composed by itself would read its own RANK.
        run("seed=4", "trainer.micro_batch_size=1", "name=run-${oc.env:RANK}", train=seen.append)
        return [(config.seed, config.name) for config in seen]

    first, second = as_ranks(work, tmp_path)
    assert first.splitlines()[1:] == second.splitlines() == ["[(4, 'run-0')]"]
    assert "none chosen" in first


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_ranks_of_two_commands_at_one_port_refuse_each_other(rank, tmp_path):
    """Let neither ask rank 0: an orphan would be told the configuration, and agree."""

    def work(own: int):
        sys.argv = ["train.py", f"seed={own == rank}"]

        def train(config):
            return pytest.fail("trained")

        return run("data=text", "trainer.micro_batch_size=1", train=train)

    # Rank 0 waits for one of its own launch to leave, and none is there.
    for number, output in enumerate(as_ranks(work, tmp_path, farewell=10.0)):
        assert f"rank {number} (PID" in output and output.endswith("78\n")
        assert "of another launch at the same port: it was called with 'seed=" in output


def test_ranks_of_a_node_that_came_in_place_of_a_lost_one_are_of_the_launch(tmp_path):
    """Its agent has counted no restart yet, the others have."""

    def work(rank: int):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(1 - rank)
        return run("data=text", "trainer.micro_batch_size=1", train=lambda config: None)

    outputs = as_ranks(work, tmp_path)
    assert all(output.endswith("0\n") for output in outputs), outputs


def test_a_rank_whose_place_is_taken_refuses(monkeypatch):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    orphan = replace(own_seat(sys.argv[1:]), place="PID 1 on this node")  # of the same command
    store.set("pdn/0/seat/1", orphan.dump())
    monkeypatch.setattr("pdn.cli.ranks.JOIN_TIMEOUT", 5.0)
    for name, value in {
        "RANK": 1,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
    }.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(
        ConfigError, match=r"found rank 1 .PID 1 on this node.*it took this rank's place"
    ):
        Ranks().agree(lambda: pytest.fail("composed"))


def test_ranks_do_not_wait_for_ever_for_one_that_does_not_come(tmp_path, monkeypatch):
    monkeypatch.setattr("pdn.cli.ranks.JOIN_TIMEOUT", 2.0)

    def work(rank: int):
        os.environ["WORLD_SIZE"] = "3"
        return run("data=text", "trainer.micro_batch_size=1", train=lambda config: None)

    outputs = as_ranks(work, tmp_path)
    assert all(output.endswith("78\n") for output in outputs)
    assert "2 did not come within 2 s; expected 3" in "".join(outputs)


def test_an_error_of_all_ranks_is_reported_by_one(tmp_path):
    def train(config):
        raise StorageError("DISK-FULL", "no space")

    outputs = as_ranks(
        lambda rank: run("data=text", "trainer.micro_batch_size=1", train=train), tmp_path
    )
    assert sorted(outputs) == ["74\n", "pdn[E-DISK-FULL] no space\n74\n"]


def test_an_error_of_one_rank_is_reported_by_that_rank(tmp_path):
    def work(rank: int):
        def train(config):
            if rank == 1:
                raise DataError("SHARD", "shard 3 is cut off")

        return run("data=text", "trainer.micro_batch_size=1", train=train)

    assert as_ranks(work, tmp_path) == ["0\n", "pdn[E-SHARD] shard 3 is cut off\n65\n"]


def test_a_sweep_inside_of_torchrun_is_refused_with_the_fix(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(launch.Ranks, "agree", lambda self, make: make())
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert run("-m", "seed=1,2", train=lambda config: pytest.fail("trained")) == 78
    assert (
        "python train.py -m … hydra/launcher=torchrun hydra.launcher.nproc_per_node=8"
        in capsys.readouterr().err
    )


def test_a_port_in_use_is_named(monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in {
            "RANK": 0,
            "WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": taken.getsockname()[1],
        }.items():
            monkeypatch.setenv(name, str(value))
        assert run("seed=1") == 78
    assert "pdn[E-PORT] MASTER_PORT: 127.0.0.1:" in capsys.readouterr().err
