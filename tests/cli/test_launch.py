"""How a launch begins and ends.

Exit codes, and trials that do not disturb each other.
"""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml

from pdn.cli import launch
from pdn.cli.compose import CONFIGS
from pdn.errors import DataError, NumericError, Preempted, StorageError

ROOT = CONFIGS.parent
pytestmark = pytest.mark.usefixtures("as_a_plain_process")


def run(*argv, train=lambda config: None) -> int:
    return launch.main(argv, train)


# ------------------------------------------------------------ one process


def test_the_trainer_gets_the_typed_configuration(capsys):
    seen = []
    assert run("model=gdn_tiny", "seed=3", train=seen.append) == 0
    assert (seen[0].model.name, seen[0].seed) == ("gdn_tiny", 3)
    assert "none chosen: the embedded text" in capsys.readouterr().out


def test_data_that_were_chosen_are_not_announced(capsys):
    assert run("data=text") == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("SHARD", "shard 3 is cut off"), 65),
        (NumericError("NONFINITE", "the loss is nan"), 70),
        (StorageError("DISK-FULL", "no space"), 74),
        (Preempted("PREEMPTED", "stopped and saved"), 75),
    ],
)
def test_an_expected_error_is_its_one_message_and_its_exit_code(error, code, capsys):
    def train(config):
        raise error

    assert run("data=text", train=train) == code
    assert capsys.readouterr().err == f"{error}\n"


def test_an_unexpected_error_keeps_its_traceback(capsys):
    assert run("data=text", train=lambda config: 1 / 0) == 70
    assert "Traceback" in (err := capsys.readouterr().err)
    assert "ZeroDivisionError" in err


def test_ctrl_c_leaves_no_traceback(capsys):
    def train(config):
        raise KeyboardInterrupt

    assert run("data=text", train=train) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trainer.lrr=1"], "pdn[E-CONFIG-KEY] trainer.lrr"),
        (["--no-such-flag"], "found --no-such-flag"),
        (["seed=1", "--model", "pgdn_tiny", "-m"], "found --model pgdn_tiny; expected key=value"),
        (["-model", "pgdn_tiny"], "found -model pgdn_tiny; expected key=value in one word; write"),
        (["-parallel=ddp"], "found -parallel=ddp (no flag of train.py)"),
        (["--config-name", "mine"], "--config-name would leave configs/train.yaml out"),
        (["--config-path", "mine"], "--config-path would leave configs/ out"),
        (["--cfg", "everything"], "pdn[E-COMMAND-LINE] command line: argument --cfg"),
        (["--experimental-rerun", "x.pickle"], "would run the code in a pickle"),
        (
            ["--config-dir", "nowhere"],
            "pdn[E-COMMAND-LINE] --config-dir: nowhere is not a directory",
        ),
        (
            ["trainer.device=cuda"],
            "pdn[E-DEVICE] trainer.device = cuda: found no usable CUDA device",
        ),
        (["ops.backend=triton"], "pdn[E-DEVICE] ops.backend = triton: found no CUDA device"),
        (["ops.backend=fla"], "pdn[E-DEVICE] ops.backend = fla: found no CUDA device"),
        (["-m", "hydra/launcher=slrum", "seed=1,2"], "Could not find 'hydra/launcher/slrum'"),
    ],
)
def test_a_bad_command_line_is_one_message_and_78_before_training(
    argv, message, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert run(*argv, train=lambda config: pytest.fail("trained")) == 78
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("pdn[E-")
    assert "Traceback" not in err


def test_more_processes_than_devices_are_refused(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert run("data=text") == 78
    assert "--nproc-per-node 4: found 2 CUDA devices" in capsys.readouterr().err
    assert run("data=text", "trainer.device=cpu") == 0


def test_a_dry_run_needs_no_device(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run("data=text", "ops.backend=triton", "trainer.dry_run=true") == 0


@pytest.mark.parametrize(
    ("argv", "output"),
    [
        (["--help"], "== Configuration groups =="),
        (["seed=5", "--cfg", "job"], "seed: 5"),
        (["--cfg", "job", "--resolve", "--package", "schedule"], "kind: cosine"),
        (["--info", "searchpath"], "configs"),
    ],
)
def test_hydras_own_flags_work_and_do_not_train(argv, output, capsys):
    assert run(*argv, train=lambda config: pytest.fail("trained")) == 0
    assert output in capsys.readouterr().out


def test_files_of_another_directory_can_be_added(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 11\n")
    seen = []
    assert run("experiment=mine", "--config-dir", str(tmp_path), train=seen.append) == 0
    assert seen[0].seed == 11


# ------------------------------------------------------------ trials


@pytest.fixture
def trials(monkeypatch):
    """Record the commands of trials instead of running them.

    They are answered with the codes that a test puts in.
    """
    from hydra.core.plugins import Plugins

    Plugins.instance()
    import hydra_plugins.pdn_launchers as launchers

    recorder = SimpleNamespace(commands=[], codes=[], stopped=False)

    def run_trial(command):
        recorder.commands.append(command)
        return recorder.codes.pop(0) if recorder.codes else 0

    recorder.run = run_trial
    monkeypatch.setattr(launchers, "TrialProcess", lambda: recorder)
    return recorder


def test_every_trial_of_a_sweep_runs_in_a_process_of_its_own(trials, tmp_path, capsys):
    assert run("-m", "model=gdn_tiny,pgdn_tiny", "seed=1", f"output_dir={tmp_path}") == 0
    assert [command[3:] for command in trials.commands] == [
        [f"model={model}", "seed=1", f"output_dir={tmp_path}"]
        for model in ("gdn_tiny", "pgdn_tiny")
    ]
    assert all(
        command[:3] == [sys.executable, "-m", "pdn.cli.train"] for command in trials.commands
    )
    out = capsys.readouterr().out
    assert "2 of 2 trials done" in out
    # each ran in a directory of its own
    assert len({line.split()[-1] for line in out.splitlines() if "  done  " in line}) == 2


def test_keys_of_the_corpus_that_swept_models_bring_reach_every_trial(trials, tmp_path):
    words = ["data.block_shards=2", "data.tokenizer=t.json", f"output_dir={tmp_path}"]
    assert run("-m", "model=gdn_340m,pgdn_340m", *words) == 0
    assert [command[4:] for command in trials.commands] == [words, words]


def test_a_failing_trial_does_not_stop_the_later_ones_and_is_summarised(trials, tmp_path, capsys):
    trials.codes = [0, 65, 0]
    assert run("-m", "seed=1,2,3", f"output_dir={tmp_path}") == 65
    assert len(trials.commands) == 3
    err = capsys.readouterr().err
    assert "2 of 3 trials done" in err
    assert "#1  exit 65" in err


def test_a_preempted_trial_ends_the_sweep_so_that_it_can_be_launched_again(
    trials, tmp_path, capsys
):
    trials.codes = [0, 75]
    assert run("-m", "seed=1,2,3", f"output_dir={tmp_path}") == 75
    assert len(trials.commands) == 2
    err = capsys.readouterr().err
    assert "#1  interrupted" in err
    assert "#2  not started" in err


def test_the_torchrun_launcher_starts_every_trial_under_torchrun(trials, tmp_path):
    assert (
        run(
            "-m",
            "hydra/launcher=torchrun",
            "hydra.launcher.nproc_per_node=8",
            "seed=1",
            f"output_dir={tmp_path}",
        )
        == 0
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8"]
    assert trials.commands == [
        [sys.executable, *torchrun, "-m", "pdn.cli.train", "seed=1", f"output_dir={tmp_path}"]
    ]


def test_the_exit_code_that_torchrun_lost_is_read_from_the_run(trials, tmp_path):
    from pdn.runs.records import recorded_exit_code

    (tmp_path / "status.json").write_text(
        json.dumps({"state": "failed", "exit_code": 74, "time": 100.0})
    )
    assert recorded_exit_code(tmp_path, 50.0, 1) == 74
    assert recorded_exit_code(tmp_path, 150.0, 1) == 1  # an earlier launch's
    assert recorded_exit_code(tmp_path / "absent", 50.0, 1) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_trial_that_is_told_to_stop_is_waited_for_and_is_the_last(number, request):
    from hydra.core.plugins import Plugins

    # A shell starts what runs in its background with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    Plugins.instance()  # makes hydra_plugins importable, in whatever order the tests run
    from hydra_plugins import pdn_launchers

    # SIGTERM is passed on; Ctrl-C reaches the trial through the terminal, too.
    saves = "signal.signal(15, lambda *_: sys.exit(75)); time.sleep(1)"  # run() waits by then
    saves += "; os.kill(os.getppid(), int(sys.argv[1]))"
    end = "time.sleep(30)" if number == signal.SIGTERM else "time.sleep(0.2); sys.exit(75)"
    runner = pdn_launchers.TrialProcess()
    assert (
        runner.run(
            [
                sys.executable,
                "-c",
                f"import os, signal, sys, time; {saves}; {end}",
                str(int(number)),
            ]
        )
        == 75
    )
    assert runner.stopped


def test_the_slurm_launcher_writes_a_script_for_every_trial(trials, tmp_path, capsys):
    options = [
        "hydra/launcher=slurm",
        "hydra.launcher.dry_run=true",
        "hydra.launcher.partition=gpu",
        "hydra.launcher.nodes=2",
        "hydra.launcher.gpus_per_node=0",
        "+hydra.launcher.mem_per_cpu=4G",
    ]
    assert run("-m", "seed=1,2", "name='it-s ${seed}'", f"output_dir={tmp_path}", *options) == 0
    scripts = sorted((tmp_path / "slurm").glob("*.sbatch"))
    assert [script.stem for script in scripts] == ["it-s 1", "it-s 2"]
    text = scripts[0].read_text()
    for option in ("partition=gpu", "nodes=2", "signal=TERM@180", "mem-per-cpu=4G"):
        assert f"#SBATCH --{option}\n" in text
    assert "--account" not in text and "gpus-per-node" not in text
    assert "-m pdn.cli.train seed=1" in text
    subprocess.run(["bash", "-n", str(scripts[0])], check=True)


def test_a_slurm_job_is_queued_again_only_if_this_launch_of_it_was_stopped(
    trials, tmp_path, monkeypatch
):
    options = "hydra/launcher=slurm", "hydra.launcher.dry_run=true"
    assert run("-m", "name=one", f"output_dir={tmp_path}", *options) == 0
    for name, line in (
        ("srun", 'cp "$NEXT" "$STATUS"; exit 1'),
        ("scontrol", f'[ "$1" = requeue ] && echo "$2" >> {tmp_path}/queued; echo node0'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    status, following = tmp_path / "one" / "status.json", tmp_path / "next"
    status.parent.mkdir()
    monkeypatch.setenv("STATUS", str(status))
    monkeypatch.setenv("NEXT", str(following))
    queued = []
    for state, time in (
        (None, 0),  # refused before there is a status
        ("preempted", 1),
        ("preempted", 1),  # refused before it changed the status
        ("preempted", 2),
        ("failed", 3),
    ):
        if state is not None:
            following.write_text(json.dumps({"state": state, "time": time}))
        done = subprocess.run(["bash", str(tmp_path / "slurm" / "one.sbatch")], capture_output=True)
        assert done.returncode == 1, done.stderr
        log = tmp_path / "queued"
        queued.append(log.read_text().count("7\n") if log.exists() else 0)
    assert queued == [0, 1, 1, 2, 2]


def test_the_slurm_launcher_submits_with_sbatch_and_says_so_without_it(
    trials, tmp_path, monkeypatch, capsys
):
    argv = ["-m", "seed=1,2", f"output_dir={tmp_path}", "hydra/launcher=slurm"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(*argv) == 78
    assert "pdn[E-SLURM] hydra/launcher=slurm: found no sbatch on PATH" in capsys.readouterr().err
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\necho submitted $1 >> {tmp_path}/log\n")
    (tmp_path / "sbatch").chmod(0o755)
    assert run(*argv) == 0
    assert (tmp_path / "log").read_text().count(".sbatch") == 2


def test_every_launcher_that_is_shipped_is_tested_here():
    names = {path.stem for path in (CONFIGS / "hydra" / "launcher").glob("*.yaml")}
    assert names == {"torchrun", "slurm"}
    for name in names:
        assert yaml.safe_load((CONFIGS / "hydra/launcher" / f"{name}.yaml").read_text())[
            "_target_"
        ].startswith("hydra_plugins.")


def test_what_the_encoding_of_the_output_lacks_is_shown_escaped():
    program = "import pdn.cli.process; print('gr\\xfcn \\u2013 \\udcff')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "gr\\xfcn \\u2013 \\udcff\n", done.stderr


def test_a_program_whose_standard_streams_are_closed_prints_into_nothing():
    program = (
        "import pdn.cli.process, os, sys; print('nobody'); sys.stdin.read()\n"
        "print('reads this', file=sys.stderr)\n"
        "assert os.open('/dev/zero', os.O_RDONLY) > 2  # else print goes into the next file opened"
    )
    shell = 'exec "$0" -c "$1" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", shell, sys.executable, program]).returncode == 0


def test_a_working_directory_that_is_gone_is_told(tmp_path):
    (tmp_path / "gone").mkdir()
    shell = f'cd {tmp_path}/gone && rmdir {tmp_path}/gone && exec "$0" -c "import pdn.cli.process"'
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["sh", "-c", shell, sys.executable], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 74, done.stderr
    assert done.stderr.startswith(
        "pdn[E-IO] working directory: No such file or directory; expected"
    )
