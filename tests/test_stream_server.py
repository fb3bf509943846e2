"""The example server: every session is answered as if it were alone, whatever the others do."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.compare import assert_same

import fused_rnn
from fused_rnn.demo import EXAMPLES

pytestmark = pytest.mark.kernels

FEATURES, HIDDEN, STEPS = 6, 10, 30


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location("stream_server", EXAMPLES / "stream_server.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(EXAMPLES))
        for name in [name for name in sys.modules if name.partition(".")[0] == "common"]:
            del sys.modules[name]


@pytest.fixture
def layer() -> fused_rnn.LSTM:
    return fused_rnn.LSTM(FEATURES, HIDDEN)


def answers_alone(layer: Any, inputs: np.ndarray[Any, Any]) -> torch.Tensor:
    return fused_rnn.Stream(layer).chunk(torch.from_numpy(inputs)[:, None])[:, 0]


def test_sessions_are_answered_as_if_alone_beside_slow_and_vanishing_ones(example: Any, layer: Any) -> None:
    server = example.StreamServer(layer, 12, interval=1e-4)
    inputs = np.random.default_rng(0).standard_normal((12, STEPS, FEATURES), np.float32)

    async def steady(number: int) -> np.ndarray[Any, Any]:
        session, answers = server.open(), []
        for x in inputs[number]:
            await session.send(x)
            if number % 2:  # the others send ahead
                answers.append(await session.receive())
            elif len(session.inputs) > 3:
                answers.append(await session.receive())
        while len(answers) < STEPS:
            answers.append(await session.receive())
        session.close()
        return np.stack(answers)

    async def never_reads(number: int) -> Any:
        session = server.open()
        for x in inputs[number][: example.MOST_UNREAD]:
            await session.send(x)
        while not session.answers.full():
            await asyncio.sleep(0)
        await session.send(inputs[number][-1])
        return session

    async def vanishes(number: int) -> None:
        session = server.open()
        for x in inputs[number][: 3 + number]:
            await session.send(x)
        await asyncio.sleep(2e-4 * number)
        session.close()

    async def everybody() -> list[Any]:
        running = asyncio.ensure_future(server.run())
        unread = await never_reads(8)
        before = server.pool.state(unread.slot)
        work = [steady(number) for number in range(8)] + [vanishes(number) for number in range(9, 12)]
        results = await asyncio.wait_for(asyncio.gather(*work), 60)
        assert_same(server.pool.state(unread.slot), before)  # it gets no step until it reads
        assert len(server.pool) == 1 and unread.inputs
        read = [await unread.receive() for _ in range(example.MOST_UNREAD + 1)]
        sent = np.concatenate([inputs[8][: example.MOST_UNREAD], inputs[8][-1:]])
        assert_same(torch.from_numpy(np.stack(read)), answers_alone(layer, sent))
        running.cancel()
        return results[:8]

    for number, answers in enumerate(asyncio.run(everybody())):
        assert_same(torch.from_numpy(answers), answers_alone(layer, inputs[number]))


def test_connections_are_answered_and_free_their_slots_when_they_end(example: Any, layer: Any) -> None:
    server = example.StreamServer(layer, 3, interval=1e-4)
    inputs = np.random.default_rng(0).standard_normal((3, STEPS, FEATURES), np.float32)

    async def client(port: int, number: int) -> np.ndarray[Any, Any]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(inputs[number].tobytes())
        if number == 2:  # in the middle of everything
            writer.transport.abort()
            return np.empty(0)
        answers = await reader.readexactly(4 * STEPS * HIDDEN)
        writer.close()
        return np.frombuffer(answers, np.float32).reshape(STEPS, HIDDEN)

    async def everybody() -> list[Any]:
        listening = await asyncio.start_server(lambda r, w: example.serve_client(server, r, w), "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        running = asyncio.ensure_future(server.run())
        async with listening:
            results = await asyncio.wait_for(asyncio.gather(*(client(port, number) for number in range(3))), 60)
            while len(server.pool):
                await asyncio.sleep(0)
        running.cancel()
        return results

    for number, answers in enumerate(asyncio.run(everybody())[:2]):
        assert_same(torch.from_numpy(answers.copy()), answers_alone(layer, inputs[number]))
