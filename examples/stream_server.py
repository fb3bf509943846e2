"""A server of many sessions on one recurrent layer: whoever has input waits a few milliseconds and is batched.

    python examples/stream_server.py                         # simulated sessions, how long their answers took
    python examples/stream_server.py --sessions 500 --seconds 10
    python examples/stream_server.py --port 8765             # a server; each message is a row of float32 numbers

Every few milliseconds one step is made of those sessions that have input, by index into a StreamPool: sessions come,
go and pause as they like, and no state is ever copied. A session whose client does not read its answers is not given
steps until it does, and one whose client has gone frees its slot: neither concerns the others.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from common import options
from common.options import ExampleError

import fused_rnn

CELLS = {"lstm": fused_rnn.LSTM, "gru": fused_rnn.GRU, "rnn": fused_rnn.RNN}
Array = np.ndarray[Any, np.dtype[np.float32]]

# Answers that a client may leave unread, and inputs that it may send ahead, before it has to wait.
MOST_UNREAD = 16


class Session:
    """One client's place in the pool: what it has sent, and what it was answered."""

    def __init__(self, server: StreamServer, slot: int) -> None:
        self._server = server
        self.slot = slot
        self.inputs: deque[Array] = deque()
        self.answers: asyncio.Queue[Array] = asyncio.Queue(MOST_UNREAD)
        self._has_room = asyncio.Event()

    async def send(self, x: Array) -> None:
        """Hands in the input of one step, (I); waits while there are too many that have had no step."""
        while len(self.inputs) >= MOST_UNREAD:
            self._has_room.clear()
            await self._has_room.wait()
        self.inputs.append(x)
        self._server.waiting[self.slot] = self

    async def receive(self) -> Array:
        """The next answer, h of the step, (P), in the order of the inputs."""
        answer = await self.answers.get()
        if self.inputs:
            self._server.waiting[self.slot] = self
        return answer

    def close(self) -> None:
        """Ends the session, whatever it still has to be answered."""
        if self._server.waiting.pop(self.slot, None) is not None:
            self.inputs.clear()
        self._server.pool.close(self.slot)

    def take_input(self) -> Array:
        self._has_room.set()
        return self.inputs.popleft()


class StreamServer:
    """Batches the inputs of all sessions into one step every `interval` seconds."""

    def __init__(self, layer: torch.nn.Module, capacity: int, interval: float) -> None:
        self.pool = fused_rnn.StreamPool(layer, capacity)
        self.interval = interval
        self.waiting: dict[int, Session] = {}  # by slot, those that have input
        self.steps = self.rows = 0
        self.seconds = 0.0  # in steps
        self._x = np.empty((capacity, self.pool.input_size), np.float32)

    def open(self) -> Session:
        """Begins a session.

        Raises:
            RuntimeError: the pool is full.
        """
        return Session(self, self.pool.open())

    def step(self) -> int:
        """One step of every session that has input and room for its answer; returns how many there were."""
        ready = [session for session in self.waiting.values() if not session.answers.full()]
        self.waiting = {}
        if not ready:
            return 0
        ready.sort(key=lambda session: session.slot)  # neighbours are a little faster
        for row, session in enumerate(ready):
            self._x[row] = session.take_input()
        begin = time.perf_counter()
        h = self.pool.step(self._x[: len(ready)], [session.slot for session in ready])
        self.seconds += time.perf_counter() - begin
        answers = np.array(h)  # the pool's own memory is written again in the next step
        for answer, session in zip(answers, ready, strict=True):
            session.answers.put_nowait(answer)
            if session.inputs:
                self.waiting[session.slot] = session
        self.steps += 1
        self.rows += len(ready)
        return len(ready)

    async def run(self) -> None:
        """Steps until it is cancelled."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            self.step()
            due = max(due + self.interval, loop.time())
            await asyncio.sleep(due - loop.time())


async def serve_client(server: StreamServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A connection: rows of I float32 numbers come in, rows of P go out."""
    try:
        session = server.open()
    except RuntimeError:  # full
        writer.close()
        return

    async def answer() -> None:
        while True:
            writer.write((await session.receive()).tobytes())
            await writer.drain()  # as fast as the client reads, and no faster

    answering = asyncio.ensure_future(answer())
    try:
        while True:
            row = await reader.readexactly(4 * server.pool.input_size)
            await session.send(np.frombuffer(row, np.float32))
    except (asyncio.IncompleteReadError, ConnectionError):
        pass  # the client has gone
    finally:
        answering.cancel()
        with contextlib.suppress(asyncio.CancelledError, ConnectionError):
            await answering
        session.close()
        writer.close()


async def simulate(
    server: StreamServer, sessions: int, seconds: float, period: float, leaving: int, slow: int
) -> list[float]:
    """Sessions that send an input every `period` seconds; returns how long each answer took, of those that stay.

    `leaving` more vanish half way without a word, `slow` more read an answer only every 20 periods.
    """
    latencies: list[float] = []
    loop = asyncio.get_running_loop()
    generator = np.random.default_rng(0)

    async def client(lasts: float, reads_every: int, counts: bool) -> None:
        session = server.open()
        sent: deque[float] = deque()

        async def read() -> None:
            while True:
                if reads_every > 1:
                    await asyncio.sleep(period * reads_every)
                await session.receive()
                if counts:
                    latencies.append(loop.time() - sent.popleft())

        reading = asyncio.ensure_future(read())
        due = loop.time() + period * float(generator.random())  # they do not send all at once
        end = due + lasts
        try:
            while due < end:
                await asyncio.sleep(max(0.0, due - loop.time()))
                sent.append(loop.time())
                await session.send(generator.standard_normal(server.pool.input_size, np.float32))
                due = max(due + period, loop.time())
        finally:
            reading.cancel()
            session.close()

    running = asyncio.ensure_future(server.run())
    clients = [client(seconds, 1, True) for _ in range(sessions)]
    clients += [client(seconds / 2, 1, False) for _ in range(leaving)]
    clients += [client(seconds, 20, False) for _ in range(slow)]
    await asyncio.gather(*clients)
    running.cancel()
    return latencies


def report(server: StreamServer, latencies: Sequence[float], period: float) -> None:
    if not latencies or not server.rows:
        raise ExampleError("no session was answered: --seconds is too short")
    p50, p95, p99 = (1e3 * value for value in np.percentile(latencies, (50, 95, 99)))
    rows = server.rows / server.steps
    print(f"{len(latencies)} answers; ms until an answer: median {p50:.2f}, 95 % {p95:.2f}, 99 % {p99:.2f}")
    print(f"{server.steps} steps of {rows:.0f} sessions, {1e6 * server.seconds / server.steps:.0f} us each")
    print(f"sessions per core, by the time in steps alone: {server.rows / server.seconds * period:.0f}")


def run(arguments: argparse.Namespace) -> int:
    options.prepare(arguments)
    torch.manual_seed(arguments.seed)
    layer = CELLS[arguments.cell](arguments.input_size, arguments.hidden_size, arguments.layers)
    server = StreamServer(layer, arguments.capacity, arguments.interval / 1e3)
    if arguments.port is not None:
        asyncio.run(serve(server, arguments.port))
        return 0
    extra = min(10, arguments.capacity - arguments.sessions) // 2
    if extra < 0:
        raise ExampleError(f"--capacity: expected at least the {arguments.sessions} of --sessions")
    period = arguments.period / 1e3
    latencies = asyncio.run(simulate(server, arguments.sessions, arguments.seconds, period, extra, extra))
    print(f"{server.pool}: {arguments.sessions} sessions, {extra} that vanish, {extra} that are slow to read")
    report(server, latencies, period)
    return 0


async def serve(server: StreamServer, port: int) -> None:
    listening = await asyncio.start_server(lambda r, w: serve_client(server, r, w), "127.0.0.1", port)
    print(f"serving {server.pool} at port {listening.sockets[0].getsockname()[1]}", flush=True)
    async with listening:
        await server.run()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; the exit status is that of `common.options.run_program`."""
    parser = argparse.ArgumentParser(prog="stream_server", description=str(__doc__).splitlines()[0])
    parser.add_argument("--cell", choices=CELLS, default="lstm")
    for name, default in (("input-size", 64), ("hidden-size", 128), ("layers", 1)):
        parser.add_argument(f"--{name}", type=options.positive_int, default=default, metavar="N")
    parser.add_argument("--threads", type=options.positive_int, metavar="N", help="default: PyTorch's")
    parser.add_argument("--seed", type=options.natural_int, default=0, metavar="N", help="of the weights (default: 0)")
    serving = parser.add_argument_group("the server")
    serving.add_argument(
        "--capacity", type=options.positive_int, default=1024, metavar="N", help="sessions at a time (default: 1024)"
    )
    serving.add_argument(
        "--interval", type=options.positive_float, default=2.0, metavar="MS", help="between steps (default: 2)"
    )
    serving.add_argument("--port", type=options.natural_int, metavar="N", help="serve at this port; 0 for any")
    simulated = parser.add_argument_group("simulated clients, without --port")
    simulated.add_argument("--sessions", type=options.positive_int, default=300, metavar="N", help="(default: 300)")
    simulated.add_argument(
        "--period", type=options.positive_float, default=10.0, metavar="MS", help="between inputs (default: 10)"
    )
    simulated.add_argument("--seconds", type=options.positive_float, default=5.0, metavar="N", help="(default: 5)")
    return options.run_program("stream_server", lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
