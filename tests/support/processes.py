"""Processes that compute together, as ranks of one gloo process group on this machine."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_TIMEOUT = 120  # seconds, of a call: far more than any takes


class Processes:
    """``processes(function, *arguments)``: what the function returns in each process, in the order of ranks.

    The processes are started by the first call and kept for the following ones, because each imports PyTorch. The
    function has to be found by its name in a module. An exception in one is raised here as an AssertionError with its
    traceback; the others, which may wait for it, are ended.
    """

    def __init__(self, count: int = 2) -> None:
        self._count = count
        self._running: list[tuple[Any, Connection]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        if not self._running:
            self._start()
        call = pickle.dumps((function, arguments))
        for _, connection in self._running:
            connection.send_bytes(call)
        results: dict[int, Any] = {}
        deadline = time.monotonic() + _TIMEOUT
        while len(results) < self._count:
            waiting = {connection: rank for rank, (_, connection) in enumerate(self._running) if rank not in results}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self.stop()
                raise AssertionError(f"processes {sorted(waiting.values())} do not end {function.__name__}")
            for connection in ready:
                rank = waiting[connection]  # type: ignore[index]
                failed, results[rank] = self._answer(connection, rank)
                if failed:
                    self.stop()
                    raise AssertionError(f"in process {rank}:\n{results[rank]}")
        return [results[rank] for rank in range(self._count)]

    @staticmethod
    def _answer(connection: Any, rank: int) -> tuple[bool, Any]:
        try:
            return pickle.loads(connection.recv_bytes())
        except EOFError:
            return True, f"process {rank} ended"

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = Path(self._folder.name) / "store"  # a file, where a port could be taken by another before it is used
        for rank in range(self._count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._count, str(store), theirs), daemon=True)
            process.start()
            theirs.close()
            self._running.append((process, ours))

    def stop(self) -> None:
        for process, connection in self._running:
            connection.close()
            process.kill()
            process.join()
        self._running = []
        if self._folder is not None:
            self._folder.cleanup()


def _serve(rank: int, count: int, store: str, connection: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=_TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timeout)
    with contextlib.suppress(EOFError):  # the end of the tests
        while True:
            function, arguments = pickle.loads(connection.recv_bytes())
            try:
                torch.manual_seed(0)
                answer = pickle.dumps((False, function(*arguments)))
            except BaseException:
                answer = pickle.dumps((True, traceback.format_exc()))
            connection.send_bytes(answer)
