"""Walks a warp through the machine code of a kernel as the hardware would: which instructions it executes, in order.

What the control flow depends on - the kernel's argument, indices of threads and blocks, integers, predicates - is
computed for all 32 lanes. Everything else (memory, floating point) is *unknown*, and so is what is computed from it. A
branch that depends on something unknown is an error, unless its line of source says `// cycles: leaves`: that a loop
ends there. Nothing is guessed: an instruction that is not listed here is an error too.

An unknown value is None, one that all lanes share an int, any other an array of 32 int64 of which -1 is unknown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from sass import Frame, Instruction, Kernel

Value = Any  # None, int, or an array
LANES = 32
ALL = (1 << LANES) - 1
MASK = 0xFFFFFFFF
_BITS = np.arange(LANES, dtype=np.int64)


class Undecided(Exception):
    """A branch, a guard of one or an address that depends on something unknown."""


class NotUnderstood(Exception):
    """An instruction that is not listed here."""


@dataclass(frozen=True)
class Launch:
    """Where the warp is, and what constant memory holds."""

    warp: int
    threads: int
    block: tuple[int, int, int]
    grid: tuple[int, int, int]
    cluster_rank: int
    cluster_blocks: int  # 0: not launched as clusters
    constants: dict[int, bytes]  # by bank
    known_from: int  # of bank 0: what is before belongs to the driver

    def constant(self, bank: int, offset: int) -> int | None:
        if bank == 0 and offset < self.known_from:
            # On sm_90: sizes of the block and the grid; whether there are clusters, and of how many blocks.
            driver = {0: self.threads, 4: 1, 8: 1, 12: self.grid[0], 16: self.grid[1], 20: self.grid[2]}
            driver |= {0x140: int(self.cluster_blocks > 0), 0x188: self.cluster_blocks}
            return driver.get(offset)
        data = self.constants.get(bank)
        if data is None or offset + 4 > len(data):
            return None
        return int.from_bytes(data[offset : offset + 4], "little")


@dataclass(frozen=True)
class Executed:
    """An instruction that the warp has executed."""

    index: int  # among the kernel's instructions
    lanes: int  # bits of the lanes that its predicate let pass; those of an unknown predicate are counted
    address: Value = None  # of a memory access or an mbarrier
    count: Value = None  # of bytes that an mbarrier expects, of threads that a barrier waits for; its barrier's address


# Those without results in registers; and whose results are unknown.
_SILENT = frozenset(
    """NOP YIELD BAR MEMBAR ERRBAR CGAERRBAR CCTL FENCE UCGABAR_ARV UCGABAR_WAIT DEPBAR LDGDEPBAR LDGSTS STG STS ST STL
    STAS RED REDG REDAS SYNCS ARRIVES PREFETCH UTMACMDFLUSH NANOSLEEP CCTLL""".split()
)
_UNKNOWN = frozenset(
    """FADD FMUL FFMA FSEL FMNMX FSET FSETP FCHK F2F F2FP F2I I2F I2FP MUFU HMMA HADD2 HMUL2 HFMA2 HSETP2 HMNMX2 FSWZADD
    FRND DADD DMUL DFMA DSETP LDG LDS LD LDL LDSM SHFL MATCH REDUX ATOM ATOMG ATOMS QSPC CS2UR IDP
    POPC FLO BREV LEPC B2R HGMMA S2R S2UR UFLO UPOPC""".split()
)


def _apply(f: Callable[..., Any], *values: Value) -> Value:
    """f of the values, in 32 bits, where all are known."""
    arrays = False
    for value in values:
        if value is None:
            return None
        arrays = arrays or not isinstance(value, int)
    if not arrays:
        return int(f(*values)) & MASK
    wide = [np.full(LANES, v, dtype=np.int64) if isinstance(v, int) else v for v in values]
    result = np.asarray(f(*wide)).astype(np.int64) & MASK
    for value in wide:
        result[value < 0] = -1
    return result


def _signed(v: Any) -> Any:
    return (v ^ 0x80000000) - 0x80000000


def _high_product(a: Any, b: Any, signed: bool) -> tuple[Any, Any]:
    """The lower and upper halves of a 64-bit product, without overflow in int64."""
    if isinstance(a, int) and isinstance(b, int):
        product = _signed(a) * _signed(b) if signed else a * b
        return product & MASK, product >> 32 & MASK
    a_low, a_high, b_low, b_high = a & 0xFFFF, a >> 16, b & 0xFFFF, b >> 16
    middle = a_low * b_high + (a_low * b_low >> 16)
    cross = a_high * b_low + (middle & 0xFFFF)
    high = a_high * b_high + (middle >> 16) + (cross >> 16)
    if signed:
        high = high - np.where(a >> 31, b, 0) - np.where(b >> 31, a, 0)
    return a * b & MASK, high & MASK


class Walk:
    def __init__(
        self, kernel: Kernel, launch: Launch, leaves: Iterable[Frame] = (), contents: dict[int, int] | None = None
    ):
        self.kernel = kernel
        self.launch = launch
        self.leaves = frozenset(leaves)
        self.contents = contents or {}  # of words of shared memory, where it is known
        self.stored: dict[int, int | None] = {}  # words that this warp stored, None where it is not known what
        # Registers in which the compiler keeps flags are never set as a whole: what they begin with does not matter.
        self.registers: list[Value] = [0] * 256
        self.uniform: list[Value] = [0] * 256
        self.predicates: list[Value] = [0] * 8
        self.uniform_predicates: list[Value] = [0] * 8
        self.convergence: dict[str, int] = {}
        self.trace: list[Executed] = []
        self.origins: dict[str, Instruction] = {}  # of unknown values, for the message
        self._operands: dict[int, tuple[Any, ...]] = {}

    # Operands

    def _register(self, name: str) -> Value:
        if name in ("RZ", "URZ", "SRZ"):
            return 0
        if name[0] == "U":
            return self.uniform[int(name[2:])]
        return self.registers[int(name[1:])]

    @staticmethod
    def _next(name: str) -> str:
        """The register of the upper half."""
        if name.endswith("Z"):
            return name
        digits = name.lstrip("UR")
        return name[: len(name) - len(digits)] + str(int(digits) + 1)

    def value(self, text: str, carries: bool = False) -> Value:
        """A 32-bit operand; with carries, a negated one is 2^32 minus it, so that sums have their carry."""
        sign = ""
        while text[0] in "-~|+":
            sign += text[0]
            text = text[1:]
        text = text.rstrip("|").partition(".reuse")[0]
        result: Value
        if text[0] in "RU" or text == "SRZ":
            result = self._register(text)
        elif text[0] == "c":
            result = self.constant(text)
        elif text[0] in "0123456789":
            try:
                number = int(text, 0)
            except ValueError:
                return None  # a floating-point number
            return (-number if "-" in sign else ~number if "~" in sign else number) & MASK
        else:
            return None
        if not sign or result is None:
            return result
        if "|" in sign:
            result = _apply(lambda v: abs(_signed(v)), result)
        if "-" in sign:
            if carries and isinstance(result, int):
                return (1 << 32) - result
            if carries:
                return np.where(result < 0, -1, (1 << 32) - result)
            result = _apply(lambda v: -v, result)
        elif "~" in sign:
            result = _apply(lambda v: ~v, result)
        return result

    def pair(self, text: str, signed: bool = False) -> tuple[Value, Value]:
        """Both halves of a 64-bit operand."""
        text = text.partition(".reuse")[0]
        if text[0] in "RU":
            return self._register(text), self._register(self._next(text))
        if text[0] == "c":
            return self.constant(text), self.constant(text, 4)
        value = self.value(text)
        return value, (MASK if signed and isinstance(value, int) and value >> 31 else 0)

    def constant(self, text: str, further: int = 0) -> Value:
        bank_text, _, offset_text = text[1:].strip("[]").partition("][")
        bank, offset = int(bank_text, 0), self.address(offset_text)
        if offset is None:
            return None
        if isinstance(offset, int):
            return self.launch.constant(bank, (offset + further) & MASK)
        values = [-1 if o < 0 else self.launch.constant(bank, int(o) + further) for o in offset]
        return np.array([-1 if v is None else v for v in values], dtype=np.int64)

    def address(self, text: str) -> Value:
        """The sum between brackets, its lower 32 bits."""
        total: Value = 0
        for part in text.strip("[]").replace("+-", "+~~-").split("+"):
            part = part.removeprefix("~~").split(".")[0]
            if part:
                value = self.value(part)
                total = _apply(lambda a, b: a + b, total, value)
        return total

    def predicate(self, text: str) -> Value:
        negated = text.startswith("!")
        name = text.lstrip("!")
        if name in ("PT", "UPT"):
            result: Value = 1
        elif name[0] == "U":
            result = self.uniform_predicates[int(name[2:])]
        else:
            result = self.predicates[int(name[1:])]
        return _apply(lambda p: 1 - p, result) if negated else result

    # Results

    def _merge(self, old: Value, new: Value, lanes: int, unsure: int) -> Value:
        """New in `lanes`, unknown in those of `unsure` whose predicate is not known."""
        if lanes == ALL and not unsure:
            return new
        wide_old = np.full(LANES, -1 if old is None else old, dtype=np.int64) if not _is_array(old) else old
        wide_new = np.full(LANES, -1 if new is None else new, dtype=np.int64) if not _is_array(new) else new
        merged = np.where(lanes >> _BITS & 1, wide_new, wide_old)
        if unsure:
            merged[(unsure >> _BITS & 1) == 1] = -1
        if (merged < 0).all():
            return None
        return merged

    def write(self, name: str, value: Value) -> None:
        if name in ("RZ", "URZ", "PT", "UPT"):
            return
        if name[0] == "U":
            bank = self.uniform_predicates if name[1] == "P" else self.uniform
            if self._unsure:
                value = None
            elif not self._lanes:
                return
            elif _is_array(value):
                value = self._of_first_lane(value)
            bank[int(name[2:])] = value
        else:
            bank = self.predicates if name[0] == "P" else self.registers
            index = int(name[1:])
            value = bank[index] = self._merge(bank[index], value, self._lanes, self._unsure)
        if value is None:
            self.origins[name] = self._instruction

    def _of_first_lane(self, value: Value) -> int | None:
        if not _is_array(value):
            return value
        lanes = self._lanes or ALL
        first = int(value[(lanes & -lanes).bit_length() - 1])
        return None if first < 0 else first

    # Execution

    def run(self, most: int = 2_000_000) -> list[Executed]:
        """Until all lanes have left the kernel."""
        running: list[tuple[int, int]] = [(0, ALL)]  # index of the next instruction, lanes
        waiting: list[tuple[str, int, int]] = []  # the same at a point where lanes meet, with its name
        live = ALL
        instructions = self.kernel.instructions
        while running or waiting:
            if not running:
                running, waiting = self._meet(waiting, live)
            index, lanes = running.pop()
            while True:
                if len(self.trace) > most:
                    raise Undecided(f"{self.kernel.name}: no end after {most} instructions")
                instruction = instructions[index]
                self._instruction = instruction
                self._lanes, self._unsure = self._guard(instruction, lanes)
                name = instruction.name
                if name == "BRA" and len(instruction.operands) > 1:
                    self._lanes, self._unsure = self._further_condition(instruction, lanes, live)
                if name in ("BRA", "BRX", "EXIT", "BSSY", "BSYNC", "BREAK", "WARPSYNC"):
                    if self._unsure:
                        self._lanes = self._decide(instruction, index)
                    taken = self._lanes
                    self.trace.append(Executed(index, taken))
                    if name == "EXIT":
                        live &= ~taken
                        lanes &= ~taken
                        waiting = [(n, i, w) for n, i, w in waiting]
                        if not lanes:
                            break
                    elif name == "BSSY":
                        self.convergence[instruction.operands[0]] = lanes
                    elif name == "BREAK":
                        barrier = instruction.operands[0]
                        self.convergence[barrier] = self.convergence.get(barrier, lanes) & ~taken
                    elif name in ("BSYNC", "WARPSYNC"):
                        key = instruction.operands[0] if name == "BSYNC" else f"warp {index}"
                        if taken and (name == "BSYNC" or lanes != live):
                            waiting.append((key, index + 1, taken))
                            lanes &= ~taken
                            if lanes:
                                running.append((index + 1, lanes))
                            ready = self._ready(waiting, live, key)
                            if not ready:
                                break
                            waiting = [w for w in waiting if w[0] != key]
                            index, lanes = ready
                            continue
                    elif taken:
                        parts = self._targets(instruction, index, taken)
                        if lanes != taken:
                            parts.append((index + 1, lanes & ~taken))
                        running.extend(parts[:-1])
                        index, lanes = parts[-1]
                        continue
                else:
                    self._execute(instruction, index)
                index += 1
        return self.trace

    def _ready(self, waiting: list[tuple[str, int, int]], live: int, key: str) -> tuple[int, int] | None:
        """Where lanes that meet go on, when all are there."""
        there = 0
        for name, index, lanes in waiting:
            if name == key:
                there |= lanes
                after = index
        wanted = (live if key.startswith("warp") else self.convergence.get(key, there)) & live
        return (after, there) if wanted & ~there == 0 else None

    def _meet(
        self, waiting: list[tuple[str, int, int]], live: int
    ) -> tuple[list[tuple[int, int]], list[tuple[str, int, int]]]:
        """After lanes have left: those that waited for them alone."""
        for key in dict.fromkeys(name for name, _, _ in waiting):
            if ready := self._ready(waiting, live, key):
                return [ready], [w for w in waiting if w[0] != key]
        raise Undecided(f"{self.kernel.name}: lanes wait for each other at {waiting}")

    def _further_condition(self, instruction: Instruction, lanes: int, live: int) -> tuple[int, int]:
        """As _guard, of a branch that has another condition as an operand."""
        condition = instruction.operands[0]
        if "DIV" in instruction.modifiers:
            # Taken by a warp whose lanes are not together.
            together = self.value(condition)
            if not isinstance(together, int):
                return 0, self._lanes
            return (self._lanes if lanes != together & live else 0), 0
        if not _is_predicate(condition):
            raise NotUnderstood(f"{instruction} is not listed in {__name__}.py")
        if self._unsure:
            return self._lanes, self._unsure
        return self._guard(dataclasses.replace(instruction, predicate=condition), self._lanes)

    def _guard(self, instruction: Instruction, lanes: int) -> tuple[int, int]:
        """Of these lanes, those that execute; and those of which that is not known."""
        if not instruction.predicate:
            return lanes, 0
        value = self.predicate(instruction.predicate)
        if isinstance(value, int):
            return (lanes if value else 0), 0
        if value is None:
            return 0, lanes
        yes = int((1 << _BITS[value == 1]).sum())
        unsure = int((1 << _BITS[value < 0]).sum())
        return lanes & yes, lanes & unsure

    def _decide(self, instruction: Instruction, index: int) -> int:
        """The lanes that take a branch whose predicate is unknown: in a loop that ends, none that go back."""
        target = instruction.operands[-1].strip("`()")
        if instruction.name == "BRA" and any(frame in self.leaves for frame in instruction.frames):
            back = self.kernel.labels[target] <= instruction.address
            return 0 if back else self._lanes | self._unsure
        name = instruction.predicate.lstrip("!")
        where = "; ".join(f"{file.rpartition('/')[2]}:{line}" for file, line in instruction.frames)
        origin = self.origins.get(name)
        raise Undecided(
            f"whether warp {self.launch.warp} takes the branch {instruction} ({where}) is not known"
            + (f": {name} is from {origin}" if origin else "")
        )

    def _targets(self, instruction: Instruction, index: int, lanes: int) -> list[tuple[int, int]]:
        if instruction.name == "BRA":
            target = self.kernel.labels[instruction.operands[-1].strip("`()")]
            return [(self.kernel.index_of(target), lanes)]
        register, offset = instruction.operands[0].split()
        value = self.value(register)
        if value is None:
            raise Undecided(f"where warp {self.launch.warp} jumps in {instruction} is not known")
        by_target: dict[int, int] = {}
        for lane in range(LANES):
            if lanes >> lane & 1:
                to = int(value if isinstance(value, int) else value[lane])
                address = (to + int(offset, 0) + instruction.address + 16) & MASK
                by_target[address] = by_target.get(address, 0) | 1 << lane
        return [(self.kernel.index_of(address), mask) for address, mask in by_target.items()]

    def _execute(self, instruction: Instruction, index: int) -> None:
        name = instruction.name
        lanes = self._lanes | self._unsure
        address = count = None
        if lanes:
            if name in _MEMORY:
                address, count = self._access(instruction)
            handler = _HANDLERS.get(name)
            if name in ("STS", "ST") and address is not None:
                self._store(instruction, address)
            if handler:
                handler(self, instruction)
            elif name == "LDS" and address is not None and self.contents:
                self._load(instruction, address)
            elif name == "SYNCS" and "TRYWAIT" in instruction.modifiers:
                self.write(instruction.operands[0], 1)  # sometime it succeeds
            elif name == "USETMAXREG":
                if "TRY_ALLOC" in instruction.modifiers:
                    self.write(instruction.operands[0], 1)
            elif name in _UNKNOWN:
                self._forget(instruction)
            elif name not in _SILENT:
                raise NotUnderstood(f"{instruction} is not listed in {__name__}.py")
        self.trace.append(Executed(index, lanes, address, count))

    def _access(self, instruction: Instruction) -> tuple[Value, Value]:
        operands = instruction.operands
        if instruction.name == "BAR":
            # Its number, and of how many threads; all of the block's where that is not said.
            return self.value(operands[0]), self.value(operands[1]) if len(operands) > 1 else self.launch.threads
        at = next((operand for operand in operands if "[" in operand), None)
        if at is None:
            return None, None
        text = at[at.rindex("[") :]
        if instruction.name == "STAS":
            return self.address(text), self._register(self._next(text.strip("[]").partition(".")[0]))
        last = operands[-1]
        return self.address(text), self.value(last) if instruction.name == "SYNCS" and last != at else None

    @staticmethod
    def _words(instruction: Instruction) -> int:
        """That a lane loads or stores; 0 for parts of one."""
        if any(narrow in instruction.modifiers for narrow in ("U8", "S8", "U16", "S16")):
            return 0
        return 4 if "128" in instruction.modifiers else 2 if "64" in instruction.modifiers else 1

    def _store(self, instruction: Instruction, address: Value) -> None:
        """Remembers what is stored. A word that is stored twice has to be the same to be known."""
        name = instruction.operands[-1].partition(".reuse")[0]
        words = self._words(instruction)
        for word in range(max(words, 1)):
            value = self.value(name) if words else None
            for lane in range(LANES):
                if not self._lanes >> lane & 1:
                    continue
                at = int(address[lane]) if _is_array(address) else address
                what = int(value[lane]) if _is_array(value) else value
                if at is None or at < 0:
                    continue
                at, what = (at & ~3) + 4 * word, None if what is None or what < 0 else what
                self.stored[at] = what if at not in self.stored or self.stored[at] == what else None
            name = self._next(name)

    def _load(self, instruction: Instruction, address: Value) -> None:
        """What is known of the words that are loaded."""
        name = instruction.operands[0]
        at = address if _is_array(address) else np.full(LANES, address, dtype=np.int64)
        words = self._words(instruction)
        for word in range(max(words, 1)):
            known = [self.contents.get(int(a) + 4 * word, -1) if words and a >= 0 else -1 for a in at]
            self.write(name, None if max(known) < 0 else np.array(known, dtype=np.int64))
            name = self._next(name)

    def _forget(self, instruction: Instruction) -> None:
        """Makes everything unknown that an instruction writes."""
        wide = 1
        if instruction.name in ("HMMA", "LDSM") or "128" in instruction.modifiers:
            wide = 4
        elif "64" in instruction.modifiers or instruction.name.startswith("D"):
            wide = 2
        for operand in instruction.operands:
            name = operand.partition(".reuse")[0]
            if name[0] == "P" or name.startswith("UP"):
                self.write(name, None)
                continue
            if name[0] in "RU":
                for _ in range(wide):
                    self.write(name, None)
                    name = self._next(name)
            break


def _is_array(value: Value) -> bool:
    return isinstance(value, np.ndarray)


_MEMORY = frozenset("LDS LDSM STS LDG STG LD ST STAS SYNCS RED REDG BAR LDGSTS".split())

_Handler = Callable[[Walk, Instruction], None]
_HANDLERS: dict[str, _Handler] = {}


def _handles(*names: str) -> Callable[[_Handler], _Handler]:
    def register(handler: _Handler) -> _Handler:
        for name in names:
            _HANDLERS[name] = handler
        return handler

    return register


def _is_predicate(text: str) -> bool:
    text = text.lstrip("!")
    return text.startswith(("P", "UP")) and text.lstrip("U")[1:] in "01234567T"


def _split(instruction: Instruction) -> tuple[str, list[str], list[str]]:
    """The destination, predicates written with it, and all other operands."""
    first, *rest = instruction.operands
    written = []
    while rest and _is_predicate(rest[0]) and not rest[0].startswith("!"):
        written.append(rest.pop(0))
    return first, written, rest


def _add(walk: Walk, to: str, carries: list[str], terms: list[Value], further: Value = 0) -> None:
    """The sum of the terms, and its carries (there are two of three terms)."""
    values = [*terms, further]
    if any(value is None for value in values):
        for name in [to, *carries]:
            walk.write(name, None)
        return
    arrays = any(_is_array(value) for value in values)
    if not arrays:
        total = sum(values)
        walk.write(to, total & MASK)
        for i, name in enumerate(carries):
            walk.write(name, int(total >> 32 > i))
        return
    wide = [np.full(LANES, v, dtype=np.int64) if not _is_array(v) else v for v in values]
    unknown = np.zeros(LANES, dtype=bool)
    for value in wide:
        unknown |= value < 0
    total = np.sum(wide, axis=0)
    walk.write(to, np.where(unknown, -1, total & MASK))
    for i, name in enumerate(carries):
        walk.write(name, np.where(unknown, -1, (total >> 32 > i).astype(np.int64)))


@_handles("IADD3", "UIADD3")
def _iadd3(walk: Walk, i: Instruction) -> None:
    to, carries, rest = _split(i)
    further: Value = 0
    extended = "X" in i.modifiers
    if extended:
        for predicate in (walk.predicate(p) for p in rest[3:]):
            further = None if predicate is None or further is None else further + predicate
    _add(walk, to, carries, [walk.value(v, carries=not extended) for v in rest[:3]], further)


@_handles("VIADD")
def _viadd(walk: Walk, i: Instruction) -> None:
    walk.write(i.operands[0], _apply(lambda a, b: a + b, walk.value(i.operands[1]), walk.value(i.operands[2])))


@_handles("IMAD", "UIMAD")
def _imad(walk: Walk, i: Instruction) -> None:
    to, carries, rest = _split(i)
    a, b = walk.value(rest[0]), walk.value(rest[1])
    signed = "U32" not in i.modifiers
    if "WIDE" in i.modifiers or "HI" in i.modifiers:
        low, high = walk.pair(rest[2], signed)
        if None in (x if not _is_array(x) else 0 for x in (a, b, low, high)):
            product: tuple[Value, Value] = (None, None)
        else:
            if _is_array(a) or _is_array(b):
                a, b = (np.full(LANES, v, dtype=np.int64) if not _is_array(v) else v for v in (a, b))
            bad = [v for v in (a, b) if _is_array(v)]
            product = _high_product(a, b, signed)
            for v in bad:
                product = (np.where(v < 0, -1, product[0]), np.where(v < 0, -1, product[1]))
        sums: list[Value] = [None, None]
        if product[0] is not None:
            lower = _apply(lambda x, y: x + y, product[0], low)
            carry = _apply(lambda x, y: (x + y) >> 32, product[0], low)
            sums = [lower, _apply(lambda x, y, z: x + y + z, product[1], high, carry)]
        if "WIDE" in i.modifiers:
            walk.write(to, sums[0])
            walk.write(walk._next(to), sums[1])
        else:
            walk.write(to, sums[1])
        for carry_to in carries:
            walk.write(carry_to, None)
        return
    c = walk.value(rest[2])
    further = walk.predicate(rest[3]) if "X" in i.modifiers else 0
    # 0 times anything: an addition, or a move.
    if a == 0 if isinstance(a, int) else False:
        b = 0
    elif b == 0 if isinstance(b, int) else False:
        a = 0
    walk.write(to, _apply(lambda x, y, z, w: x * y + z + w, a, b, c, further))
    for carry_to in carries:
        walk.write(carry_to, None)


@_handles("MOV", "UMOV")
def _mov(walk: Walk, i: Instruction) -> None:
    walk.write(i.operands[0], walk.value(i.operands[1]))


@_handles("R2UR")
def _r2ur(walk: Walk, i: Instruction) -> None:
    to, written, rest = _split(i)
    walk.write(to, walk._of_first_lane(walk.value(rest[0])))
    for name in written:
        walk.write(name, None)


@_handles("SEL", "USEL")
def _sel(walk: Walk, i: Instruction) -> None:
    to, a, b, predicate = i.operands
    p = walk.predicate(predicate)
    if isinstance(p, int):
        walk.write(to, walk.value(a if p else b))
        return
    x, y = walk.value(a), walk.value(b)
    if p is None:
        walk.write(to, None)
        return
    wide = [np.full(LANES, -1 if v is None else v, dtype=np.int64) if not _is_array(v) else v for v in (x, y)]
    walk.write(to, np.where(p < 0, -1, np.where(p == 1, wide[0], wide[1])))


@_handles("LEA", "ULEA")
def _lea(walk: Walk, i: Instruction) -> None:
    to, carries, rest = _split(i)
    extended = "X" in i.modifiers
    further: Value = walk.predicate(rest.pop()) if extended else 0
    shift = int(rest.pop(), 0)
    a, b = walk.value(rest[0]), walk.value(rest[1], carries=not extended)
    if "HI" in i.modifiers:
        if "SX32" in i.modifiers:
            high: Value = _apply(lambda v: _signed(v) >> 31, a)
        else:
            high = walk.value(rest[2])
        shifted = _apply(lambda low, up: up << shift | low >> (32 - shift), a, high) if shift else high
    else:
        shifted = _apply(lambda v: v << shift, a)
    _add(walk, to, carries, [shifted, b], further)


def _lut(table: int, a: Any, b: Any, c: Any) -> Any:
    result = a & 0
    for bit in range(8):
        if table >> bit & 1:
            x = a if bit & 4 else ~a
            y = b if bit & 2 else ~b
            z = c if bit & 1 else ~c
            result = result | (x & y & z)
    return result


def _known_bits(table: int, values: list[Value], ones: int) -> Value:
    """A table of three, where unknown values may not matter: x & 0 is 0."""
    for fill in (0, ones):
        for position, value in enumerate(values):
            if value is None:
                filled = [*values[:position], fill, *values[position + 1 :]]
                other = [*values[:position], ones - fill, *values[position + 1 :]]
                if None in [v if not _is_array(v) else 0 for v in filled]:
                    return None
                first = _apply(lambda a, b, c: _lut(table, a, b, c), *filled)
                second = _apply(lambda a, b, c: _lut(table, a, b, c), *other)
                if _is_array(first) or _is_array(second):
                    return first if np.array_equal(np.asarray(first), np.asarray(second)) else None
                return first if first == second else None
    return _apply(lambda a, b, c: _lut(table, a, b, c), *values)


@_handles("LOP3", "ULOP3")
def _lop3(walk: Walk, i: Instruction) -> None:
    operands = list(i.operands)
    written = operands.pop(0) if _is_predicate(operands[0]) else None
    to, a, b, c, table, combined = operands
    result = _known_bits(int(table, 0), [walk.value(v) for v in (a, b, c)], MASK)
    walk.write(to, result)
    if written:
        walk.write(written, _apply(lambda r, p: (r != 0) | (p != 0), result, walk.predicate(combined)))


@_handles("PLOP3", "UPLOP3")
def _plop3(walk: Walk, i: Instruction) -> None:
    first, second, a, b, c, *tables = i.operands
    inputs = [walk.predicate(p) for p in (a, b, c)]
    for to, table in zip((first, second), tables):
        result = _known_bits(int(table, 0), inputs, MASK)
        walk.write(to, _apply(lambda r: r & 1, result))


@_handles("SHF", "USHF")
def _shf(walk: Walk, i: Instruction) -> None:
    to, low, shift, high = i.operands
    left, signed, upper = "L" in i.modifiers, "S32" in i.modifiers or "S64" in i.modifiers, "HI" in i.modifiers
    wide = "U64" in i.modifiers or "S64" in i.modifiers

    def shifted(lo: Any, s: Any, hi: Any) -> Any:
        if isinstance(lo, np.ndarray):
            return np.array([shifted(int(x), int(y), int(z)) for x, y, z in zip(lo, s, hi)], dtype=np.int64)
        if lo < 0 or s < 0 or hi < 0:
            return 0
        s = min(s, 64 if wide else 32) if "W" not in i.modifiers else s & (63 if wide else 31)
        if not wide and left:
            return (hi if upper else lo) << s & MASK
        if not wide:
            value = hi if upper else lo
            return (_signed(value) if signed else value) >> s & MASK
        both = hi << 32 | lo
        if signed and both >> 63:
            both -= 1 << 64
        both = both << s if left else both >> s
        return (both >> 32 if upper else both) & MASK

    walk.write(to, _apply(shifted, walk.value(low), walk.value(shift), walk.value(high)))


@_handles("PRMT", "UPRMT")
def _prmt(walk: Walk, i: Instruction) -> None:
    to, a, selector, b = i.operands
    chosen = walk.value(selector)
    if not isinstance(chosen, int):
        walk.write(to, None)
        return
    values = walk.value(a), walk.value(b)
    picks = [chosen >> 4 * byte & 0xF for byte in range(4)]
    needed = [any((p & 7) // 4 == side for p in picks) for side in (0, 1)]
    if chosen == 0x7610 and b == to and values[1] is None:
        needed[1] = False  # a move of 16 bits: nobody reads the upper half
    first, second = (v if used else 0 for v, used in zip(values, needed))

    def permuted(x: Any, y: Any) -> Any:
        result = x & 0
        for byte, pick in enumerate(picks):
            value = (x if pick & 4 == 0 else y) >> 8 * (pick & 3) & 0xFF
            if pick & 8:
                value = (value >> 7) * 0xFF
            result = result | value << 8 * byte
        return result

    walk.write(to, _apply(permuted, first, second))


@_handles("IABS")
def _iabs(walk: Walk, i: Instruction) -> None:
    walk.write(i.operands[0], _apply(lambda v: abs(_signed(v)), walk.value(i.operands[1])))


def _extreme(walk: Walk, i: Instruction, a: Value, b: Value, which: str) -> Value:
    least = walk.predicate(which)
    if not isinstance(least, int):
        return None
    read = (lambda v: v) if "U32" in i.modifiers else _signed

    def chosen(x: Any, y: Any) -> Any:
        x, y = read(x), read(y)
        if isinstance(x, np.ndarray):
            return np.minimum(x, y) if least else np.maximum(x, y)
        return min(x, y) if least else max(x, y)

    return _apply(chosen, a, b)


@_handles("IMNMX", "VIMNMX")
def _vimnmx(walk: Walk, i: Instruction) -> None:
    to, _, rest = _split(i)
    walk.write(to, _extreme(walk, i, walk.value(rest[0]), walk.value(rest[1]), rest[-1]))


@_handles("VIADDMNMX")
def _viaddmnmx(walk: Walk, i: Instruction) -> None:
    to, _, rest = _split(i)
    total = _apply(lambda a, b: a + b, walk.value(rest[0]), walk.value(rest[1]))
    walk.write(to, _extreme(walk, i, total, walk.value(rest[2]), rest[-1]))


_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}


@_handles("ISETP", "UISETP")
def _isetp(walk: Walk, i: Instruction) -> None:
    modifiers = i.modifiers
    comparison = modifiers[0]
    compare = _COMPARISONS[comparison]
    combine = next(m for m in modifiers if m in ("AND", "OR", "XOR"))
    first, second, a, b, combined, *low = i.operands
    read = (lambda v: v) if "U32" in modifiers else _signed
    x, y = walk.value(a), walk.value(b)
    if "EX" in modifiers:
        below = walk.predicate(low[0])
        strict = {"GE": "GT", "LE": "LT"}.get(comparison, comparison)
        if comparison == "EQ":
            result = _apply(lambda p, q, r: (p == q) & (r != 0), x, y, below)
        elif comparison == "NE":
            result = _apply(lambda p, q, r: (p != q) | (r != 0), x, y, below)
        else:
            ahead = _COMPARISONS[strict]
            result = _apply(lambda p, q, r: ahead(read(p), read(q)) | (p == q) & (r != 0), x, y, below)
    else:
        result = _apply(lambda p, q: compare(read(p), read(q)), x, y)
    other = walk.predicate(combined)
    for to, value in ((first, result), (second, _apply(lambda r: 1 - r, result))):
        # false and anything is false, true or anything true
        decisive = 0 if combine == "AND" else 1 if combine == "OR" else None
        if other == decisive if isinstance(other, int) else False:
            walk.write(to, decisive)
        elif value == decisive if isinstance(value, int) else False:
            walk.write(to, decisive)
        else:
            f = {"AND": lambda p, q: p & q, "OR": lambda p, q: p | q, "XOR": lambda p, q: p ^ q}[combine]
            walk.write(to, _apply(f, value, other))


@_handles("P2R")
def _p2r(walk: Walk, i: Instruction) -> None:
    to, _, other, mask_text = i.operands
    mask = int(mask_text, 0)
    result = _apply(lambda v: v & ~mask, walk.value(other))
    for bit in range(7):
        if mask >> bit & 1:
            result = _apply(lambda r, p, b=bit: r | p << b, result, walk.predicates[bit])
    walk.write(to, result)


@_handles("R2P")
def _r2p(walk: Walk, i: Instruction) -> None:
    _, value_text, mask_text = i.operands
    value = walk.value(value_text)
    for bit in range(7):
        if int(mask_text, 0) >> bit & 1:
            walk.write(f"P{bit}", _apply(lambda v, b=bit: v >> b & 1, value))


@_handles("VOTE", "VOTEU")
def _vote(walk: Walk, i: Instruction) -> None:
    *written, source = i.operands
    lanes = walk._lanes
    votes = walk.predicate(source)
    wide = np.full(LANES, -1 if votes is None else votes, dtype=np.int64) if not _is_array(votes) else votes
    asked = wide[(lanes >> _BITS & 1) == 1]
    known = bool((asked >= 0).all())
    for name in written:
        if not known:
            walk.write(name, None)
        elif _is_predicate(name):
            walk.write(name, int(asked.all() if "ALL" in i.modifiers else asked.any()))
        else:
            walk.write(name, int((wide * (lanes >> _BITS & 1) << _BITS).sum()))


@_handles("CS2R")
def _cs2r(walk: Walk, i: Instruction) -> None:
    to, source = i.operands
    value = 0 if source == "SRZ" else None
    walk.write(to, value)
    if "32" not in i.modifiers:
        walk.write(walk._next(to), value)


@_handles("S2R", "S2UR")
def _s2r(walk: Walk, i: Instruction) -> None:
    to, source = i.operands
    launch = walk.launch
    values: dict[str, Value] = {
        "SR_TID.X": launch.warp * LANES + _BITS,
        "SR_TID.Y": 0,
        "SR_TID.Z": 0,
        "SR_LANEID": _BITS.copy(),
        "SR_CTAID.X": launch.block[0],
        "SR_CTAID.Y": launch.block[1],
        "SR_CTAID.Z": launch.block[2],
        "SR_CgaCtaId": launch.cluster_rank,
        "SR_SWINHI": 0,
    }
    walk.write(to, values.get(source))


@_handles("LDC", "ULDC", "LDCU")
def _ldc(walk: Walk, i: Instruction) -> None:
    to, source = i.operands
    narrow = [m for m in i.modifiers if m in ("U8", "S8", "U16", "S16")]
    value = None if narrow else walk.constant(source)
    walk.write(to, value)
    if "64" in i.modifiers:
        walk.write(walk._next(to), walk.constant(source, 4))


def _as_floats(value: Value) -> Any:
    return np.asarray(value, dtype=np.int64).astype(np.uint32).view(np.float32)


# Integer division goes through floating point.


@_handles("I2F")
def _i2f(walk: Walk, i: Instruction) -> None:
    value = walk.value(i.operands[1])
    unsigned = "U32" in i.modifiers

    def bits(v: Any) -> Any:
        exact = np.asarray(v if unsigned else _signed(v), dtype=np.float64)
        near = exact.astype(np.float32)
        if "RP" in i.modifiers:
            near = np.where(near.astype(np.float64) < exact, np.nextafter(near, np.float32(np.inf)), near)
        result = near.astype(np.float32).view(np.uint32).astype(np.int64)
        return int(result) if isinstance(v, int) else result

    walk.write(i.operands[0], _apply(bits, value))


@_handles("F2I")
def _f2i(walk: Walk, i: Instruction) -> None:
    value = walk.value(i.operands[1])
    if not {"U32", "TRUNC"} <= set(i.modifiers):
        walk._forget(i)
        return

    def bits(v: Any) -> Any:
        result = np.clip(np.nan_to_num(_as_floats(v).astype(np.float64)), 0, MASK).astype(np.int64)
        return int(result) if isinstance(v, int) else result

    walk.write(i.operands[0], _apply(bits, value))


@_handles("MUFU")
def _mufu(walk: Walk, i: Instruction) -> None:
    value = walk.value(i.operands[1])
    if "RCP" not in i.modifiers:
        walk._forget(i)
        return

    def bits(v: Any) -> Any:
        with np.errstate(all="ignore"):
            result = (np.float32(1) / _as_floats(v)).view(np.uint32).astype(np.int64)
        return int(result) if isinstance(v, int) else result

    walk.write(i.operands[0], _apply(bits, value))
