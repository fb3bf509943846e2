"""The processes that torchrun has started to train together."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import uuid
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Attributes:
        rank: 0 to count - 1.
        device: of this one.
        restarts: how often torchrun has started them anew, by the machine that has counted the most: one counts the
            ends of its own processes alone.
        job: what torchrun's --rdzv-id says, the same after every restart; empty without it.
    """

    rank: int
    count: int
    device: torch.device
    restarts: int = 0
    job: str = ""

    def say(self, *words: object) -> None:
        if self.rank == 0:
            print(*words, flush=True)

    def mean(self, value: Tensor) -> float:
        """Return the mean over all processes of a tensor of one element."""
        total = value.detach().double()
        if self.count > 1:
            dist.all_reduce(total)
        return total.item() / self.count

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()

    def from_first(self, value: Any) -> Any:
        """Return what the first process has."""
        values = [value]
        if self.count > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Meet the other processes that torchrun has started; alone without it."""
    if not dist.is_torchelastic_launched():
        yield Processes(0, 1, device)
        return
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=unused_store(rank, count), rank=rank, world_size=count)
    try:
        restarts = torch.tensor(int(os.environ["TORCHELASTIC_RESTART_COUNT"]))
        dist.all_reduce(restarts, dist.ReduceOp.MAX)
        job = os.environ["TORCHELASTIC_RUN_ID"]
        yield Processes(rank, count, device, int(restarts), "" if job == "none" else job)
    finally:
        dist.destroy_process_group()


def unused_store(rank: int, count: int) -> dist.Store:
    """Return a part of torchrun's store in which nobody has written before.

    torchrun keeps its store when it starts all processes anew, and with it the addresses of those that have ended, to
    which `init_process_group` by itself may try to connect (https://github.com/pytorch/pytorch/issues/135712). The
    first process therefore names a new part of it. Each of the others asks by a word of its own, so that it takes no
    answer that was meant for one before it. The number of restarts would not do: machines count them by themselves.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    begins = rank == 0 and not is_torchruns
    store = dist.TCPStore(address, port, is_master=begins, wait_for_workers=False, multi_tenant=True)
    if rank > 0:
        word = uuid.uuid4().hex
        store.set(f"asks/{rank}", word)
        name = store.get(f"answer/{word}").decode()
        store.set(f"knows/{name}/{rank}", "")
        return dist.PrefixStore(name, store)
    name = uuid.uuid4().hex
    others = set(range(1, count))
    while others:
        for other in others:
            if store.check([f"asks/{other}"]):
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", name)
        others = {other for other in others if not store.check([f"knows/{name}/{other}"])}
        time.sleep(0.01)
    return dist.PrefixStore(name, store)
