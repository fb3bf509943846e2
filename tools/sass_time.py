"""Times what the warps of a block execute (sass_walk.py), by the scheduling that the compiler chose.

A warp issues its instructions in order: after each it stays away for the cycles that the instruction says (which cover
all that takes a fixed time, matrix products included), and before each it waits for the scoreboards of earlier loads,
reciprocals and the like. Warps wait for each other at barriers, and blocks for what others send. All blocks of a team
do the same at the same time, so what this one sends is also what it gets.

*Stalls alone*: those cycles, the barriers, nothing else; loads, messages and all that is shared between warps take no
time. No GPU takes less. *Typical*: with the latencies below, and with what warps share: a scheduler issues one
instruction a cycle, its matrix unit and its special function unit take what they take for each, shared memory and the
network to other blocks pass their bytes on one after the other.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sass import NONE, Instruction
from sass_walk import LANES, Executed, Value


@dataclass(frozen=True)
class Assumption:
    cycles: float
    what: str
    source: str


_PUBLISHED = "guess, after microbenchmarks published of an H100"
_GUIDE = "CUDA C++ programming guide"
_GUESS = "guess"

# What no machine code says. To be replaced by what a GPU says: the name is that of the measurement.
ASSUMPTIONS: dict[str, Assumption] = {
    "LDS": Assumption(33, "from shared memory to the use, beside passes", _PUBLISHED),
    "SHFL": Assumption(24, "a shuffle to the use of its result", _GUESS),
    "MUFU": Assumption(22, "a reciprocal or exponential to the use of its result", _GUESS),
    "LDC": Assumption(40, "a load from constant memory at an address in a register", _GUESS),
    "S2R": Assumption(30, "an index of the thread or block, to the use of its result", _GUESS),
    "R2UR": Assumption(10, "a move to a uniform register", _GUESS),
    "SYNCS": Assumption(20, "a look at an mbarrier whose phase has ended", _GUESS),
    "BAR": Assumption(20, "the last warp's arrival at a barrier of the block to the next instruction of all", _GUESS),
    "read": Assumption(12, "a store or load until its operands may be overwritten", _GUESS),
    "other": Assumption(6, "any other instruction with a scoreboard, to the use of its result", _GUESS),
    "LDG": Assumption(600, "a load from memory past L2, to the use of its result", _PUBLISHED),
    "L2": Assumption(263, "a load from L2, or a reduction there", f"{_PUBLISHED}: 263"),
    "MEMBAR": Assumption(500, "a fence of the GPU", _GUESS),
    "remote": Assumption(350, "an asynchronous store until its receiver goes on", _PUBLISHED),
    "cluster": Assumption(500, "a barrier of the cluster, from the last arrival", _GUESS),
    "HMMA": Assumption(
        6.5, "between two m16n8k16, or m16n8k8 of TF32, of a scheduler", f"{_PUBLISHED}: 62 % of the peak"
    ),
    "MUFU rate": Assumption(8, "between two reciprocals or exponentials of a scheduler", f"{_GUIDE}: 4 lanes a cycle"),
    "shared": Assumption(
        1, "a pass over shared memory: 32 banks, 8 lanes of 16 bytes", f"{_GUIDE}; the 8 lanes guessed"
    ),
    "remote bytes": Assumption(
        14, "bytes a cycle from the others of the cluster", f"{_PUBLISHED}: 3.3 TB/s of all SMs, clusters of 2"
    ),
    "L2 bytes": Assumption(32, "bytes a cycle into a block from L2", _GUESS),
}


@dataclass(frozen=True)
class Machine:
    """The assumptions in figures; `alone`: without them."""

    alone: bool = False
    cycles: dict[str, float] = field(default_factory=lambda: {name: a.cycles for name, a in ASSUMPTIONS.items()})

    def latency(self, instruction: Instruction) -> float:
        if self.alone:
            return 0
        name = instruction.name
        if name in ("LDSM", "LD"):
            name = "LDS"
        elif name in ("S2UR", "CS2R"):
            name = "S2R"
        elif name in ("ULDC", "LDCU"):
            name = "LDC"
        elif name in ("LDG", "LDGSTS", "ATOMG"):
            name = "L2" if "STRONG" in instruction.modifiers or name == "LDGSTS" else "LDG"
        elif name in ("HMMA", "BAR"):
            name = "other"
        return self.cycles.get(name, self.cycles["other"])

    def of(self, name: str) -> float:
        return 0 if self.alone else self.cycles[name]


@dataclass
class Warp:
    """A warp of a block: what it executes, in order. Blocks of a wavefront stand for one layer each."""

    trace: list[Executed]
    block: int = 0
    number: int = 0


@dataclass(frozen=True)
class Cause:
    """What let a warp go on that waited for others: an instruction of another warp, and when that had its effect."""

    warp: int
    position: int  # in its trace
    time: float


@dataclass(frozen=True)
class Issue:
    time: float
    cause: Cause | None = None  # None: nothing outside of the warp held it up
    memory: float = 0  # of the time before it, how long it waited for global memory


@dataclass
class _Mbarrier:
    count: int = 1
    arrivals: int = 0
    bytes: int = 0
    ended: int = 0  # phases

    def add(self, arrivals: int, got: int) -> bool:
        """Whether that ends a phase. Bytes that are expected count below zero."""
        self.arrivals += arrivals
        self.bytes += got
        if self.arrivals < self.count or self.bytes != 0:
            return False
        self.arrivals -= self.count
        self.ended += 1
        return True


def passes(address: Value, lanes: int, width: int) -> int:
    """How often shared memory is passed over for an access of `width` bytes a lane."""
    per_pass = min(LANES, 128 // width)
    if address is None or isinstance(address, int):
        # One address for all; or an unknown one, which is taken as without conflicts.
        active = lanes.bit_count()
        return 1 if isinstance(address, int) or not active else -(-active // per_pass)
    total = 0
    for first in range(0, LANES, per_pass):
        banks: dict[int, set[int]] = {}
        for lane in range(first, first + per_pass):
            if lanes >> lane & 1:
                for word in range(int(address[lane]) // 4, (int(address[lane]) + width + 3) // 4):
                    banks.setdefault(word % 32, set()).add(word)
        total += max((len(words) for words in banks.values()), default=0)
    return max(total, 1)


def passes_of(executed: Executed, instruction: Instruction, seen: dict[Any, int]) -> int:
    """The passes of what was executed; `seen` remembers those of the same addresses."""
    address = executed.address
    width = 16 if instruction.name == "LDSM" else width_of(instruction)
    key = (address.tobytes() if isinstance(address, np.ndarray) else address, executed.lanes, width)
    if key not in seen:
        seen[key] = passes(address, executed.lanes, width)
    return seen[key]


def width_of(instruction: Instruction) -> int:
    for modifier, width in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("16", 2), ("U8", 1), ("S8", 1)):
        if modifier in instruction.modifiers:
            return width
    return 4


_CLUSTER = -1  # in place of a counter's address: the barrier of the cluster
_GLOBAL = ("LDG", "LDGSTS")
_OWN_SHARED = (1 << 24) - 1  # the upper byte of an address in the cluster's shared memory is the block


Mbarrier = tuple[int, int]  # a block, and an address in its shared memory


class Replay:
    """All warps together. blocks_each: how many blocks of the team each of the blocks here stands for."""

    def __init__(self, instructions: list[Instruction], warps: list[Warp], machine: Machine, blocks_each: int = 1):
        self.instructions = instructions
        self.warps = warps
        self.machine = machine
        self.blocks_each = blocks_each
        self.issues: list[list[Issue]] = [[] for _ in warps]
        self._scoreboards = [[0.0] * 6 for _ in warps]
        self._held: dict[int, float] = {}  # warps that wait for others, and from when on they could go on
        self._causes: dict[int, Cause] = {}
        self._loads = [[0.0] * 6 for _ in warps]  # scoreboards again, of loads from global memory
        self._free: dict[tuple[Any, ...], float] = {}  # when a unit is free again
        self._barriers: dict[Any, list[int]] = {}  # warps that have arrived
        self._mbarriers: dict[Mbarrier, _Mbarrier] = {}
        self._at_mbarriers: dict[Mbarrier, list[tuple[int, int]]] = {}  # warps that wait, and for which parity
        self._counters = self._addresses_of_counters()
        self._arrived: dict[int, int] = {}  # of a block's warps, at the barrier of the cluster
        self._counted: dict[tuple[int, int], int] = {}
        self._polled: dict[tuple[int, int], int] = {}  # how often a warp has waited for a counter
        self._at_counters: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self._events: list[tuple[float, int, Any]] = []
        self._order = 0
        self._passes: dict[Any, int] = {}

    def run(self) -> list[list[Issue]]:
        """When each instruction of each warp was issued."""
        for w in range(len(self.warps)):
            self._at(0.0, w)
        while self._events:
            time, _, what = heapq.heappop(self._events)
            if not isinstance(what, int):
                what(time)
                continue
            ready = self._ready(what, time)
            if ready > time:
                self._at(ready, what)
            else:
                self._issue(what, time)
        for w, warp in enumerate(self.warps):
            if len(self.issues[w]) < len(warp.trace):
                last = self._instruction(w, len(self.issues[w]) - 1)
                raise RuntimeError(f"warp {warp.number} of block {warp.block} waits for ever at {last}")
        return self.issues

    def _at(self, time: float, what: Any) -> None:
        """A warp (its index here) that may issue, or something that happens."""
        self._order += 1
        heapq.heappush(self._events, (time, self._order, what))

    def _instruction(self, w: int, position: int) -> Instruction:
        return self.instructions[self.warps[w].trace[position].index]

    def _unit(self, w: int, name: str) -> tuple[Any, ...]:
        """The scheduler of a warp, or a unit of it. Alone: as if each warp had its own."""
        warp = self.warps[w]
        return name, warp.block, w if self.machine.alone else warp.number % 4

    def _rate(self, name: str) -> float:
        return self.machine.cycles["MUFU rate"] if name == "MUFU" else self.machine.of("HMMA")

    def _ready(self, w: int, time: float) -> float:
        position = len(self.issues[w])
        instruction = self._instruction(w, position)
        ready = time
        for b in self._waits_of(instruction):
            ready = max(ready, self._scoreboards[w][b], self._loads[w][b])
        if not self.machine.alone:
            ready = max(ready, self._free.get(self._unit(w, "issue"), 0.0))
        if instruction.name in ("HMMA", "MUFU") and self.warps[w].trace[position].lanes:
            ready = max(ready, self._free.get(self._unit(w, instruction.name), 0.0))
        return ready

    def _issue(self, w: int, time: float) -> None:
        position = len(self.issues[w])
        executed, instruction = self.warps[w].trace[position], self._instruction(w, position)
        self.issues[w].append(Issue(time, self._causes.pop(w, None), self._waited_for_memory(w, instruction, time)))
        self._free[self._unit(w, "issue")] = time + 1
        after = time + max(instruction.stall, 1)
        held = False
        if executed.lanes:
            if instruction.name in ("HMMA", "MUFU"):
                self._free[self._unit(w, instruction.name)] = time + self._rate(instruction.name)
            done = time + self._takes(w, executed, instruction, time)
            board = self._scoreboards[w]
            if instruction.write_barrier != NONE:
                written = self._loads[w] if instruction.name in _GLOBAL else board
                written[instruction.write_barrier] = max(written[instruction.write_barrier], done)
            if instruction.read_barrier != NONE:
                read = time + self.machine.of("read")
                board[instruction.read_barrier] = max(board[instruction.read_barrier], read)
            self._held[w] = after
            held = self._meets(w, executed, instruction, position, time)
        if not held:
            self._held.pop(w, None)
            if position + 1 < len(self.warps[w].trace):
                self._at(after, w)

    def _waited_for_memory(self, w: int, instruction: Instruction, time: float) -> float:
        """How much later than otherwise an instruction was issued because loads from global memory were under way."""
        if not self.issues[w]:
            return 0.0
        stall = self._instruction(w, len(self.issues[w]) - 1).stall
        otherwise = self.issues[w][-1].time + max(stall, 1)
        for b in self._waits_of(instruction):
            otherwise = max(otherwise, self._scoreboards[w][b])
        loads = max((self._loads[w][b] for b in self._waits_of(instruction)), default=0.0)
        return max(0.0, min(loads, time) - otherwise)

    @staticmethod
    def _waits_of(instruction: Instruction) -> tuple[int, ...]:
        return tuple(range(6)) if instruction.name == "DEPBAR" else instruction.waits

    def _go_on(self, w: int, time: float, cause: tuple[int, int]) -> None:
        """A warp that waited goes on, and has the result for which it waited."""
        instruction = self._instruction(w, len(self.issues[w]) - 1)
        earliest = self._held.pop(w)
        if time > earliest:
            self._causes[w] = Cause(*cause, time)
        if instruction.write_barrier != NONE:
            board = self._loads[w] if instruction.name in _GLOBAL else self._scoreboards[w]
            done = time + self.machine.latency(instruction)
            board[instruction.write_barrier] = max(board[instruction.write_barrier], done)
        if len(self.issues[w]) < len(self.warps[w].trace):
            self._at(max(time, earliest), w)

    def _all_go_on(self, arrived: list[int], time: float, cause: tuple[int, int]) -> None:
        for w in arrived:
            if w >= 0:
                self._go_on(w, time, cause)

    def _takes(self, w: int, executed: Executed, instruction: Instruction, time: float) -> float:
        """Until the result is there."""
        machine, name, block = self.machine, instruction.name, self.warps[w].block
        latency = machine.latency(instruction)
        if machine.alone:
            return latency
        if name in ("LDS", "LDSM", "STS"):
            busy = machine.cycles["shared"] * passes_of(executed, instruction, self._passes)
            return self._queue(("shared", block), time, busy) - time - machine.cycles["shared"] + latency
        if name in ("LDG", "LDGSTS") and not self._polls(executed):
            width = 16 if name == "LDGSTS" else width_of(instruction)
            busy = executed.lanes.bit_count() * width / machine.cycles["L2 bytes"]
            return self._queue(("L2", block), time, busy) - time + latency
        return latency

    def _queue(self, unit: tuple[Any, ...], time: float, busy: float) -> float:
        """When a unit that does one thing after the other is done with one more."""
        self._free[unit] = max(time, self._free.get(unit, 0.0)) + busy
        return self._free[unit]

    def _meets(self, w: int, executed: Executed, instruction: Instruction, position: int, time: float) -> bool:
        """What an instruction means to others; whether the warp waits for them."""
        name, block, machine = instruction.name, self.warps[w].block, self.machine
        by = w, position
        if name == "BAR":
            key, wanted = (block, executed.address), executed.count
            if not isinstance(wanted, int):
                raise ValueError(f"how many threads meet at {instruction} is not known")
            waits = "SYNC" in instruction.modifiers
            there = self._barriers.setdefault(key, [])
            there.append(w if waits else -1)
            if len(there) * LANES >= wanted:
                self._at(time + machine.of("BAR"), lambda then: self._all_go_on(there, then, by))
                del self._barriers[key]
            return waits
        if name.startswith("UCGABAR"):
            # How often all warps have arrived is counted like what others wait for in global memory.
            counter = block, _CLUSTER
            if name == "UCGABAR_WAIT":
                return self._waits_for_counter(w, counter)
            self._arrived[block] = self._arrived.get(block, 0) + 1
            if self._arrived[block] % sum(other.block == block for other in self.warps) == 0:
                self._at(time + machine.of("cluster"), lambda then: self._count(counter, then, by))
            return False
        if name == "SYNCS" and "EXCH" in instruction.modifiers:
            initial = executed.count
            count = 0x100000 - (initial >> 1) if isinstance(initial, int) else 1
            self._mbarriers[block, self._own(executed)] = _Mbarrier(count)
        elif name == "SYNCS" and "TRYWAIT" in instruction.modifiers:
            mbarrier_at, parity = (block, self._own(executed)), _lane(executed.count, 0) >> 31
            if self._mbarriers.setdefault(mbarrier_at, _Mbarrier()).ended & 1 == parity:
                self._at_mbarriers.setdefault(mbarrier_at, []).append((w, parity))
                return True
        elif name == "SYNCS" and "ARRIVE" in instruction.modifiers:
            if "RED" in instruction.modifiers:
                for to, lanes in self._receivers(executed.address, executed.lanes).items():
                    self._arrives(time + machine.of("remote"), to, by, lanes, 0)
            else:
                lane = (executed.lanes & -executed.lanes).bit_length() - 1
                expected = 0 if "A1T0" in instruction.modifiers else _lane(executed.count, lane)
                self._arrives(time, (block, self._own(executed)), by, executed.lanes.bit_count(), -expected)
        elif name == "STAS":
            for to, lanes in self._receivers(executed.count, executed.lanes).items():
                size = lanes * width_of(instruction)
                arrives = time + machine.of("remote")
                if not machine.alone:
                    arrives = self._queue(("remote", to[0]), arrives, size / machine.cycles["remote bytes"])
                self._arrives(arrives, to, by, 0, size)
        elif name in ("RED", "REDG") and isinstance(executed.address, int):
            counter = block, executed.address
            self._at(time + machine.of("L2"), lambda then: self._count(counter, then, by))
        elif name == "LDG" and self._polls(executed):
            return self._waits_for_counter(w, (block, executed.address))
        return False

    def _waits_for_counter(self, w: int, counter: tuple[int, int]) -> bool:
        """A warp's n-th wait is for the n-th time that a counter was added to; whether that is still to come."""
        wanted = self._polled[w, counter[1]] = self._polled.get((w, counter[1]), 0) + 1
        if self._counted.get(counter, 0) >= wanted:
            return False
        self._at_counters.setdefault(counter, []).append((w, wanted))
        return True

    def _arrives(self, time: float, to: Mbarrier, by: tuple[int, int], arrivals: int, size: int) -> None:
        def happens(then: float) -> None:
            mbarrier = self._mbarriers.setdefault(to, _Mbarrier())
            if not mbarrier.add(arrivals, size):
                return
            waiting = self._at_mbarriers.pop(to, [])
            for w, parity in waiting:
                if mbarrier.ended & 1 != parity:
                    self._go_on(w, then, by)
                else:
                    self._at_mbarriers.setdefault(to, []).append((w, parity))

        self._at(time, happens)

    def _count(self, counter: tuple[int, int], time: float, by: tuple[int, int]) -> None:
        self._counted[counter] = self._counted.get(counter, 0) + 1
        waiting = self._at_counters.pop(counter, [])
        for w, wanted in waiting:
            if self._counted[counter] >= wanted:
                self._go_on(w, time, by)
            else:
                self._at_counters.setdefault(counter, []).append((w, wanted))

    def _addresses_of_counters(self) -> set[int]:
        """Of counters in global memory that blocks wait for: those that they add to."""
        return {
            int(executed.address)
            for warp in self.warps
            for executed in warp.trace
            if self.instructions[executed.index].name in ("RED", "REDG") and isinstance(executed.address, int)
        }

    def _polls(self, executed: Executed) -> bool:
        return isinstance(executed.address, int) and executed.address in self._counters

    @staticmethod
    def _own(executed: Executed) -> int:
        """Where in its block's shared memory an mbarrier is."""
        return _lane(executed.address, (executed.lanes & -executed.lanes).bit_length() - 1) & _OWN_SHARED

    def _receivers(self, address: Value, lanes: int) -> dict[tuple[int, int], int]:
        """Of each mbarrier, how many lanes mean it: those of the blocks that one here stands for are one."""
        found: dict[tuple[int, int], int] = {}
        for lane in range(LANES):
            if lanes >> lane & 1:
                at = _lane(address, lane)
                key = (at >> 24) // self.blocks_each, at & _OWN_SHARED
                found[key] = found.get(key, 0) + 1
        return found


def _lane(value: Value, lane: int) -> int:
    if value is None:
        raise ValueError("an address or count of an mbarrier is not known")
    return int(value if isinstance(value, int) else value[lane])


def busy(
    instructions: list[Instruction], warps: list[Warp], spans: list[tuple[int, int]], block: int
) -> dict[str, float]:
    """For how many cycles units of a block work at least on what its warps execute in these spans of their traces.

    Shared memory; and the matrix unit of the scheduler that has most to do.
    """
    seen: dict[Any, int] = {}
    shared, matrices = 0, [0, 0, 0, 0]
    for warp, (begin, end) in zip(warps, spans):
        if warp.block != block:
            continue
        for executed in warp.trace[begin:end]:
            instruction = instructions[executed.index]
            if not executed.lanes:
                continue
            if instruction.name == "HMMA":
                matrices[warp.number % 4] += 1
            elif instruction.name in ("LDS", "LDSM", "STS"):
                shared += passes_of(executed, instruction, seen)
    return {
        "shared": shared * ASSUMPTIONS["shared"].cycles,
        "matrix": max(matrices) * ASSUMPTIONS["HMMA"].cycles,
    }


@dataclass
class Part:
    """What a phase has of a step."""

    cycles: float = 0
    instructions: float = 0


# Of no phase: waits for loads from global memory, whichever phase needs them; and from the last send to the next
# instruction of those that receive it.
MEMORY, REMOTE = "memory", "on the way"


def critical_path(
    instructions: list[Instruction],
    warps: list[Warp],
    issues: list[list[Issue]],
    phases: list[list[str]],
    end: tuple[int, int],
    begin: float,
) -> dict[str, Part]:
    """Where the time went from `begin` until an instruction (a warp, and an index into its trace) was issued.

    Backwards: from an instruction to the one before it in its warp, or, where the warp waited for others, to what let
    it go on. phases: of each warp's instructions.
    """
    parts: dict[str, Part] = {}

    def add(phase: str, since: float, until: float, instructions: int = 0) -> None:
        part = parts.setdefault(phase, Part())
        part.cycles += max(0.0, until - max(since, begin))
        part.instructions += instructions

    w, position = end
    time = issues[w][position].time
    while time > begin and position > 0:
        cause = issues[w][position].cause
        if cause:
            sender = instructions[warps[cause.warp].trace[cause.position].index]
            travels = sender.name in ("STAS", "RED", "REDG") or (sender.name == "SYNCS" and "RED" in sender.modifiers)
            sent = issues[cause.warp][cause.position].time
            add(phases[w][position - 1], cause.time, time, 1)
            add(REMOTE if travels else phases[w][position - 1], sent, cause.time)
            w, position, time = cause.warp, cause.position, sent
            continue
        before = issues[w][position - 1].time
        stalled = min(time, before + max(instructions[warps[w].trace[position - 1].index].stall, 1))
        loaded = time - min(issues[w][position].memory, time - stalled)
        add(MEMORY, loaded, time)
        add(phases[w][position], stalled, loaded)
        add(phases[w][position - 1], before, stalled, 1)
        position, time = position - 1, before
    return parts
