"""examples/train_distributed.py: one process or two, stopped, killed and started with another number of them."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.apart import PACKAGE

from fused_rnn import demo

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # a checkpoint of one process
]

SMALL = ("--sample", "--hidden-size", "16", "--seq-length", "16", "--streams", "4")


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """The example as a function of its arguments, in this process."""
    monkeypatch.syspath_prepend(str(demo.EXAMPLES))
    example = importlib.import_module("train_distributed")
    monkeypatch.setattr(example.options, "prepare", lambda arguments: None)  # of memory and threads of this process
    yield lambda *arguments: example.main([*SMALL, *arguments])
    for name in [name for name in sys.modules if name.partition(".")[0] in ("common", "char_lm", "train_distributed")]:
        del sys.modules[name]


def losses_in(folder: Path) -> list[float]:
    losses: list[float] = json.loads((folder / "losses.json").read_text())
    return losses


def torchrun(*arguments: str, restarts: int = 0) -> subprocess.Popen[str]:
    """Two processes on this machine."""
    environment = os.environ | {"PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts))
    command = [sys.executable, "-m", *launcher, str(demo.EXAMPLES / "train_distributed.py"), *SMALL, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def ended(process: subprocess.Popen[str]) -> str:
    """What it printed; it must end well."""
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    return printed


def test_a_killed_worker_leaves_no_trace_in_the_loss_curve(tmp_path: Path) -> None:
    given = ("--dropout", "0.2", "--steps", "120", "--save-every", "20")
    ended(torchrun(*given, "--out", str(tmp_path / "whole")))
    process = torchrun(*given, "--out", str(tmp_path / "killed"), restarts=1)
    wait_for(process, lambda: (tmp_path / "killed").exists() and list((tmp_path / "killed").glob("step-????????")))
    os.kill(worker_of(process, rank=1), signal.SIGKILL)
    printed = ended(process)
    steps = re.findall("goes on from step (\\d+)", printed)
    assert len(steps) == 1 and 20 <= int(steps[0]) < 120, printed
    losses = losses_in(tmp_path / "whole")
    assert len(set(losses)) == 120
    assert losses_in(tmp_path / "killed") == losses


def wait_for(process: subprocess.Popen[str], condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, ended(process)
        time.sleep(0.005)


def worker_of(process: subprocess.Popen[str], rank: int) -> int:
    """The process that torchrun has started for this rank."""
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return int(child)
    raise AssertionError(f"torchrun has no process of rank {rank}")


def test_shards_of_two_processes_go_on_in_one(program: Callable[..., int], tmp_path: Path) -> None:
    given = ("--dropout", "0", "--save-every", "10")
    printed = ended(torchrun(*given, "--parallel", "fsdp", "--steps", "10", "--out", str(tmp_path / "parts")))
    assert "2 processes" in printed
    assert program(*given, "--resume", "--steps", "16", "--out", str(tmp_path / "parts")) == 0
    assert program(*given, "--steps", "16", "--out", str(tmp_path / "whole")) == 0
    assert losses_in(tmp_path / "parts") == pytest.approx(losses_in(tmp_path / "whole"), rel=1e-5)


def test_a_resumed_run_is_the_run_that_was_not_stopped(program: Callable[..., int], tmp_path: Path) -> None:
    given = ("--dropout", "0.2", "--save-every", "5")
    assert program(*given, "--steps", "12", "--out", str(tmp_path / "whole")) == 0
    assert program(*given, "--steps", "7", "--out", str(tmp_path / "parts")) == 0
    unfinished = tmp_path / "parts" / "step-00000010.partial"  # as if the process had ended while it wrote
    unfinished.mkdir()
    (unfinished / "run.json").write_text("{")
    assert program(*given, "--steps", "12", "--resume", "--out", str(tmp_path / "parts")) == 0
    assert losses_in(tmp_path / "parts") == losses_in(tmp_path / "whole")
    assert [path.name for path in (tmp_path / "parts").iterdir() if path.is_dir()] == ["step-00000012"]


def test_a_run_that_cannot_go_on_says_why(
    program: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program("--steps", "1", "--out", str(tmp_path)) == 0
    assert program("--steps", "1", "--out", str(tmp_path)) == 2
    assert "--out: expected a folder without checkpoints, got" in capsys.readouterr().err
    assert program("--steps", "2", "--resume", "--hidden-size", "8", "--out", str(tmp_path)) == 2
    assert "--hidden-size: expected 16 as in the checkpoint" in capsys.readouterr().err
