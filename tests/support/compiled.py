"""Compiles what tests run: once for all processes that share the tests, and again only where something has changed.

A result is current where its command, its compiler and the contents of all files that went into it are the same: dates
do not matter, so neither does another branch and back.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import fcntl
import functools
import hashlib
import os
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "tests"
COMPILER = tuple(shlex.split(os.environ.get("CXX", "g++")))


@dataclasses.dataclass(frozen=True)
class Step:
    """A call of a compiler that writes `result`; files besides those that it says it read are in `inputs`."""

    result: Path
    command: tuple[str, ...]
    inputs: tuple[Path, ...] = ()


def make(steps: Sequence[Step]) -> list[Path]:
    """Brings all results up to date, as many at once as there are processors for each process of the tests."""
    with concurrent.futures.ThreadPoolExecutor(_processors()) as pool:
        # What another process is at is left to it while there is something else to do.
        done = list(pool.map(lambda step: _make(step, wait=False), steps))
        list(pool.map(_make, [step for step, is_done in zip(steps, done, strict=True) if not is_done]))
    return [step.result for step in steps]


def _processors() -> int:
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def _make(step: Step, *, wait: bool = True) -> bool:
    """False where another process makes it and `wait` is false."""
    step.result.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{step.result}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        stamp = Path(f"{step.result}.made")
        if not step.result.exists() or not stamp.exists() or stamp.read_text() != _state_of(step):
            # Under a name of its own until it is whole: this process may be stopped at any time.
            unfinished, begun = f"{step.result}.{os.getpid()}", time.time()
            command = [*step.command, "-MMD", "-MF", f"{step.result}.d", "-o", unfinished]
            process = subprocess.run(command, capture_output=True, text=True, check=False)
            assert process.returncode == 0, f"{shlex.join(command)}\n{process.stderr}"
            stamp.unlink(missing_ok=True)
            os.replace(unfinished, step.result)
            # What has been edited meanwhile is made again the next time.
            if all(file.stat().st_mtime < begun for file in _files_of(step)):
                stamp.write_text(_state_of(step))
    return True


def _files_of(step: Step) -> list[Path]:
    """What went into the result, as soon as the compiler has said what it read."""
    dependencies = Path(f"{step.result}.d")  # of a link there are none
    read = dependencies.read_text().replace("\\\n", " ").partition(":")[2].split() if dependencies.exists() else []
    return [*map(Path, read), *step.inputs]


def _state_of(step: Step) -> str:
    """A digest of everything that the result depends on."""
    digests = map(_digest_of, _files_of(step))
    return hashlib.sha256("\n".join([*step.command, _version_of(step.command[0]), *digests]).encode()).hexdigest()


def _digest_of(file: Path) -> str:
    try:
        status = file.stat()
    except FileNotFoundError:
        return "none"
    return _digest_at(file, status.st_mtime_ns, status.st_size, status.st_ino)


@functools.cache
def _digest_at(file: Path, *status: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@functools.cache
def _version_of(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
