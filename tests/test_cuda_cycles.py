"""The tool that adds up a step's cycles from machine code (tools/cuda_cycles.py): what it decodes, walks, times, finds.

Needs no nvcc: machine code is made up here, or is that of tests/data/roles.cu as nvdisasm printed it.
"""

from __future__ import annotations

import dataclasses
import json
import random
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cuda_plan import plan

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import cuda_cycles  # noqa: E402
import gpu_constants  # noqa: E402
import sass  # noqa: E402
import sass_time  # noqa: E402
import sass_walk  # noqa: E402

LISTING = ROOT / "tests" / "data" / "roles.sass"
SOURCE = ROOT / "tests" / "data" / "roles.cu"
STEPS = 10


def instruction(
    position: int, text: str, stall: int = 1, write: int = 7, read: int = 7, waits: tuple[int, ...] = (), line: int = 0
) -> sass.Instruction:
    mask = sum(1 << b for b in waits)
    upper = (stall | write << 5 | read << 8 | mask << 11) << 41
    return sass.decode(16 * position, text, upper, (("kernel.cu", line),))


def kernel_of(*lines: Any, labels: dict[str, int] | None = None) -> sass.Kernel:
    """A kernel of texts, or of tuples of what instruction() takes after the position."""
    parts = [line if isinstance(line, tuple) else (line,) for line in lines]
    instructions = [instruction(i, *part) for i, part in enumerate(parts)]
    return sass.Kernel("kernel", instructions, {name: 16 * i for name, i in (labels or {}).items()})


def launch_of(warp: int = 0, constants: bytes = b"", **other: Any) -> sass_walk.Launch:
    place: dict[str, Any] = {"threads": 256, "block": (0, 0, 0), "grid": (1, 1, 1), "cluster_rank": 0}
    place |= {"cluster_blocks": 0, **other}
    return sass_walk.Launch(warp=warp, constants={0: bytes(0x210) + constants}, known_from=0x210, **place)


def walked(kernel: sass.Kernel, launch: sass_walk.Launch | None = None, **other: Any) -> sass_walk.Walk:
    walk = sass_walk.Walk(kernel, launch or launch_of(), **other)
    walk.run()
    return walk


def times(*traces: list[sass.Instruction], alone: bool = False, **assumed: float) -> list[list[float]]:
    """When the instructions of each warp are issued; all of them are executed by all lanes."""
    kernel = [i for trace in traces for i in trace]
    warps, at = [], 0
    for number, trace in enumerate(traces):
        executed = [sass_walk.Executed(at + i, sass_walk.ALL, _where(one), _count(one)) for i, one in enumerate(trace)]
        warps.append(sass_time.Warp(executed, 0, number))
        at += len(trace)
    machine = sass_time.Machine(alone, {**sass_time.Machine().cycles, **assumed})
    return [[issue.time for issue in warp] for warp in sass_time.Replay(kernel, warps, machine).run()]


def _where(one: sass.Instruction) -> Any:
    return int(one.operands[0], 0) if one.name == "BAR" else 0


def _count(one: sass.Instruction) -> Any:
    return int(one.operands[1], 0) if one.name == "BAR" else None


# --- Decoding


def test_an_instruction_has_its_stall_scoreboards_and_lines() -> None:
    (kernel,) = sass.parse(LISTING.read_text())
    assert kernel.name == "roles"
    wait = next(i for i in kernel.instructions if "TRYWAIT" in i.modifiers)
    # Its upper half is 0x000e24000800017f, from bit 41 on 0x712.
    assert (wait.name, wait.stall, wait.write_barrier, wait.read_barrier, wait.waits) == ("SYNCS", 2, 0, 7, ())
    assert wait.operands[0].startswith("P") and wait.operands[1].startswith("[")
    assert [file for file, _ in wait.frames] == ["device.h", "device.h", "roles.cu"]
    line = SOURCE.read_text().splitlines()[wait.frames[-1][1] - 1]
    assert "mbarrier_wait(ready" in line
    assert [i.address for i in kernel.instructions] == [16 * n for n in range(len(kernel.instructions))]
    branches = [i for i in kernel.instructions if i.name == "BRA"]
    assert branches and all(i.operands[-1].strip("`()") in kernel.labels for i in branches)


def test_control_bits_are_where_they_are_made_up() -> None:
    one = instruction(3, "@!P2 LDS.128 R8, [R4+0x10]", stall=5, write=2, read=4, waits=(0, 5))
    assert (one.predicate, one.opcode, one.operands) == ("!P2", "LDS.128", ("R8", "[R4+0x10]"))
    assert (one.address, one.stall, one.write_barrier, one.read_barrier, one.waits) == (48, 5, 2, 4, (0, 5))


def test_a_kernel_says_for_how_many_threads_it_was_compiled() -> None:
    other = struct.pack("<BBH", 3, 0x1B, 255) + struct.pack("<BBHI", 4, 0x2F, 4, 5)
    threads = struct.pack("<BBHIII", 4, 5, 12, 384, 1, 1)
    assert sass.most_threads(other + threads) == 384
    with pytest.raises(ValueError, match="__launch_bounds__"):
        sass.most_threads(other)


# --- Walking


def test_a_loop_runs_as_often_as_the_argument_says() -> None:
    kernel = kernel_of(
        "MOV R0, 0x0",
        "VIADD R0, R0, 0x1",
        "ISETP.GE.AND P0, PT, R0, c[0x0][0x210], PT",
        "@!P0 BRA `(.L_x_1)",
        "EXIT",
        labels={".L_x_1": 1},
    )
    walk = walked(kernel, launch_of(constants=(7).to_bytes(4, "little")))
    assert [executed.index for executed in walk.trace].count(1) == 7


def test_lanes_that_part_meet_again_and_both_sides_count() -> None:
    kernel = kernel_of(
        "S2R R0, SR_TID.X",
        "ISETP.LT.AND P0, PT, R0, 0x4, PT",
        "BSSY B0, `(.L_x_3)",
        "@P0 BRA `(.L_x_2)",
        "MOV R1, 0x5",
        "BRA `(.L_x_3)",
        "MOV R1, 0x6",
        "BSYNC B0",
        "VIADD R2, R1, 0x1",
        "EXIT",
        labels={".L_x_2": 6, ".L_x_3": 7},
    )
    walk = walked(kernel)
    after = [executed for executed in walk.trace if executed.index == 8]
    assert [executed.lanes for executed in after] == [sass_walk.ALL]
    assert walk.registers[2].tolist() == [7] * 4 + [6] * 28
    assert {executed.index: executed.lanes for executed in walk.trace if executed.index in (4, 6)} == {
        4: sass_walk.ALL & ~0xF,
        6: 0xF,
    }


def test_a_branch_of_diverged_warps_is_taken_by_those_alone() -> None:
    parted = ["S2R R0, SR_TID.X", "ISETP.LT.AND P0, PT, R0, 0x4, PT", "@P0 EXIT"]
    for before, taken in (([], False), (parted, False), ([*parted[:2], "@P0 BRA `(.L_x_5)"], True)):
        after = ["UMOV UR4, 0xffffffff"] if not taken else []
        lines = [
            "UMOV UR4, 0xffffffff",
            *before,
            *after,
            "BRA.DIV UR4, `(.L_x_6)",
            "MOV R9, 0x1",
            "EXIT",
            "MOV R9, 0x2",
        ]
        end = len(lines)
        kernel = kernel_of(*lines, "EXIT", labels={".L_x_5": end, ".L_x_6": end - 1})
        assert [e.index for e in walked(kernel).trace].count(end - 1) == int(taken)


def test_a_branch_may_have_two_predicates() -> None:
    for first, second, taken in ((0, 0, True), (1, 0, False), (0, 1, False)):
        texts = [f"ISETP.EQ.AND P0, PT, RZ, {first:#x}, PT", f"ISETP.EQ.AND P1, PT, RZ, {second:#x}, PT"]
        kernel = kernel_of(*texts, "@P0 BRA P1, `(.L_x_1)", "NOP", "EXIT", labels={".L_x_1": 4})
        assert (3 in [executed.index for executed in walked(kernel).trace]) != taken


LOADED = (
    ("LDG.E R1, desc[UR4][R2.64]", 1, 7, 7, (), 11),
    ("ISETP.NE.AND P0, PT, R1, 0x0, PT", 1, 7, 7, (), 12),
    ("@P0 BRA `(.L_x_0)", 1, 7, 7, (), 12),
    "EXIT",
)


def test_a_branch_on_what_memory_holds_is_an_error_that_names_it() -> None:
    with pytest.raises(sass_walk.Undecided, match=r"kernel\.cu:12.*P0 is from 00010 ISETP"):
        walked(kernel_of(*LOADED, labels={".L_x_0": 0}))


def test_a_loop_on_what_memory_holds_ends_where_its_line_says_so() -> None:
    walk = walked(kernel_of(*LOADED, labels={".L_x_0": 0}), leaves=[("kernel.cu", 12)])
    assert [executed.index for executed in walk.trace] == [0, 1, 2, 3]


def test_an_instruction_that_is_not_listed_is_an_error() -> None:
    with pytest.raises(sass_walk.NotUnderstood, match="FROB"):
        walked(kernel_of("FROB R1, R2", "EXIT"))


def test_what_a_predicate_forbids_to_all_lanes_is_issued_and_does_nothing() -> None:
    walk = walked(kernel_of("ISETP.NE.AND P0, PT, RZ, RZ, PT", "MOV R1, 0x1", "@P0 MOV R1, 0x2", "EXIT"))
    assert walk.registers[1] == 1
    assert walk.trace[2].lanes == 0


def _run(texts: list[str], **registers: int) -> sass_walk.Walk:
    moves = [f"MOV {name}, {value & 0xFFFFFFFF:#x}" for name, value in registers.items()]
    return walked(kernel_of(*moves, *texts, "EXIT"))


def test_arithmetic_of_64_bits_is_python_s() -> None:
    random.seed(7)
    for _ in range(40):
        a, b = (random.choice([random.getrandbits(64), random.getrandbits(20), (1 << 64) - 1]) for _ in range(2))
        c, d = random.getrandbits(32), random.getrandbits(32)
        halves = {"R0": a, "R1": a >> 32, "R2": b, "R3": b >> 32, "R4": c, "R5": d}
        walk = _run(
            [
                "IADD3 R6, P0, R0, R2, RZ",
                "IADD3.X R7, R1, R3, RZ, P0, !PT",
                "IADD3 R8, P1, R0, -R2, RZ",
                "IADD3.X R9, R1, ~R3, RZ, P1, !PT",
                "IMAD.WIDE.U32 R10, R4, R5, R0",
                "IMAD.WIDE R12, R4, R5, R0",
                "LEA R14, P2, R0, R2, 0x3",
                "LEA.HI.X R15, R0, R3, R1, 0x3, P2",
                "SHF.R.U64 R16, R0, 0x7, R1",
                "SHF.R.S32.HI R17, RZ, 0x7, R1",
                "SHF.L.U64.HI R18, R0, 0x7, R1",
                "ISETP.GE.U32.AND P3, PT, R0, R2, PT",
                "ISETP.GE.AND.EX P4, PT, R1, R3, PT, P3",
                "LOP3.LUT R19, R0, R2, R4, 0x96, !PT",
                "PRMT R20, R0, 0x5410, R2",
                "IMAD.HI.U32 R21, R4, R5, RZ",
            ],
            **halves,
        )
        r = walk.registers

        def pair(low: int, r: list[Any] = r) -> int:
            return r[low] | r[low + 1] << 32

        def signed(v: int, bits: int) -> int:
            v &= (1 << bits) - 1
            return v - (1 << bits) if v >> bits - 1 else v

        full = (1 << 64) - 1
        assert pair(6) == (a + b) & full
        assert pair(8) == (a - b) & full
        assert pair(10) == (c * d + a) & full
        assert pair(12) == (signed(c, 32) * signed(d, 32) + a) & full
        assert pair(14) == ((a << 3) + b) & full
        assert r[16] == a >> 7 & 0xFFFFFFFF
        assert r[17] == signed(a >> 32, 32) >> 7 & 0xFFFFFFFF
        assert r[18] == a << 7 >> 32 & 0xFFFFFFFF
        assert walk.predicates[4] == int(signed(a, 64) >= signed(b, 64))
        assert r[19] == (a ^ b ^ c) & 0xFFFFFFFF
        assert r[20] == (a & 0xFFFF) | (b & 0xFFFF) << 16
        assert r[21] == c * d >> 32


def test_lanes_have_the_values_that_one_for_all_has() -> None:
    texts = [
        "IMAD.WIDE R4, R0, R1, R2",
        "IADD3 R6, P0, R0, -R1, RZ",
        "SHF.R.S32.HI R7, RZ, 0x3, R0",
        "LEA R8, R0, R1, 0x2",
    ]
    alike = _run(texts, R0=0xFFFFFFF0, R1=0x80000003, R2=9, R3=1)
    per_lane = sass_walk.Walk(kernel_of(*texts, "EXIT"), launch_of())
    for register, value in enumerate((0xFFFFFFF0, 0x80000003, 9, 1)):
        per_lane.registers[register] = np.full(32, value, dtype=np.int64)
    per_lane.run()
    for register in range(4, 9):
        assert per_lane.registers[register].tolist() == [alike.registers[register]] * 32
    assert per_lane.predicates[0].tolist() == [alike.predicates[0]] * 32


def test_an_integer_division_as_the_compiler_writes_it() -> None:
    for a, b in ((1000, 7), (255, 16), (6, 48), (0, 3), (4_000_000_000, 3)):
        walk = _run(
            [
                "I2F.U32.RP R2, R1",
                "MUFU.RCP R2, R2",
                "VIADD R2, R2, 0xffffffe",
                "F2I.FTZ.U32.TRUNC.NTZ R3, R2",
                "MOV R2, RZ",
                "IMAD.MOV R4, RZ, RZ, -R3",
                "IMAD R4, R4, R1, RZ",
                "IMAD.HI.U32 R3, R3, R4, R2",
                "IMAD.HI.U32 R5, R3, R0, RZ",
                "IMAD.MOV R6, RZ, RZ, -R5",
                "IMAD R6, R1, R6, R0",
                "ISETP.GE.U32.AND P0, PT, R6, R1, PT",
                "@P0 IMAD.IADD R6, R6, 0x1, -R1",
                "@P0 VIADD R5, R5, 0x1",
                "ISETP.GE.U32.AND P1, PT, R6, R1, PT",
                "@P1 VIADD R5, R5, 0x1",
            ],
            R0=a,
            R1=b,
        )
        assert walk.registers[5] == a // b


# --- Timing


def test_stalls_add_up() -> None:
    trace = [instruction(i, "FADD R1, R1, R1", stall) for i, stall in enumerate((4, 2, 0, 15, 1))]
    assert times(trace, alone=True) == times(trace) == [[0, 4, 6, 7, 22]]


def test_a_scoreboard_is_waited_for_with_latencies_and_not_without() -> None:
    trace = [
        instruction(0, "MUFU.RCP R1, R1", 1, write=3),
        instruction(1, "FADD R2, R2, R2", 2),
        instruction(2, "FADD R3, R1, R1", 1, waits=(3,)),
    ]
    assert times(trace, MUFU=22) == [[0, 1, 22]]
    assert times(trace, MUFU=30) == [[0, 1, 30]]
    assert times(trace, alone=True) == [[0, 1, 3]]


def test_a_scoreboard_of_several_is_free_when_the_last_is_there() -> None:
    trace = [
        instruction(0, "S2R R1, SR_TID.X", 1, write=0),
        instruction(1, "SHFL.BFLY PT, R2, R3, 0x1, 0x1f", 1, write=0),
        instruction(2, "FADD R3, R1, R1", 1, waits=(0,)),
    ]
    assert times(trace, S2R=30, SHFL=24) == [[0, 1, 30]]
    assert times(trace, S2R=3, SHFL=24) == [[0, 1, 25]]


def test_the_special_function_unit_takes_a_warp_every_eight_cycles() -> None:
    trace = [instruction(i, f"MUFU.EX2 R{i}, R{i}") for i in range(3)]
    assert times(trace) == times(trace, alone=True) == [[0, 8, 16]]
    # Warps 0 and 4 share a scheduler and its unit, unless each is taken alone.
    idle = [[instruction(0, "NOP")] for _ in range(3)]
    assert times(trace[:1], *idle, trace[:1])[4] == [8]
    assert times(trace[:1], *idle, trace[:1], alone=True)[4] == [0]


def test_warps_leave_a_barrier_when_the_last_has_come() -> None:
    def warp(stall: int, meet: str) -> list[sass.Instruction]:
        return [instruction(0, "FADD R1, R1, R1", stall), instruction(1, meet), instruction(2, "NOP")]

    early, late = warp(1, "BAR.SYNC 0x0, 0x40"), warp(9, "BAR.SYNC 0x0, 0x40")
    assert times(early, late, BAR=20) == [[0, 1, 29], [0, 9, 29]]
    assert times(early, late, alone=True) == [[0, 1, 9], [0, 9, 10]]
    # Who only arrives does not wait.
    assert times(warp(1, "BAR.ARV 0x0, 0x40"), late, BAR=20) == [[0, 1, 2], [0, 9, 29]]
    with pytest.raises(RuntimeError, match="waits for ever at 00010 BAR"):
        times(early)


def test_passes_over_shared_memory() -> None:
    lanes = np.arange(32, dtype=np.int64)
    everyone = sass_walk.ALL
    assert sass_time.passes(4 * lanes, everyone, 4) == 1
    assert sass_time.passes(8 * lanes, everyone, 8) == 2
    assert sass_time.passes(16 * lanes, everyone, 16) == 4
    assert sass_time.passes(128 * lanes, everyone, 4) == 32
    assert sass_time.passes(np.zeros(32, dtype=np.int64), everyone, 4) == 1
    # A quarter of a warp at a time: the last eight addresses again take a pass of their own.
    assert sass_time.passes(16 * (lanes % 8), everyone, 16) == 4
    assert sass_time.passes(16 * lanes, 0xFF, 16) == 1


# --- A kernel with two kinds of warps


def roles() -> cuda_cycles.Walked:
    (kernel,) = sass.parse(LISTING.read_text())
    blocks, out = 2, 1 << 32
    arguments = b"".join(value.to_bytes(size, "little") for value, size in ((STEPS, 4), (blocks, 4), (out, 8)))
    launches = [[launch_of(warp, arguments, threads=96, grid=(2, 1, 1), cluster_blocks=blocks) for warp in range(3)]]
    lines = cuda_cycles.phases_of("roles.cu", SOURCE.read_text())
    return cuda_cycles.walk(kernel, launches, lines, set(), STEPS, blocks)


NAMES = ["loop", "barrier", "gates", "sends", "stores", "wait", "products"]


def test_a_step_s_chain_goes_through_both_kinds_of_warps_and_the_network() -> None:
    result = cuda_cycles.figures(roles(), NAMES)
    assert list(result["phases"]) == [*NAMES, sass_time.MEMORY, sass_time.REMOTE]
    typical = {name: part["typical"] for name, part in result["phases"].items()}
    assert all(typical[name] > 0 for name in ("barrier", "gates", "sends", "wait", "products", sass_time.REMOTE))
    assert abs(sum(typical.values()) - result["typical"]) <= len(typical) / 2
    assert result["phases"][sass_time.REMOTE]["stalls"] == 0
    assert 0 < result["stalls"] < result["typical"] - sass_time.ASSUMPTIONS["remote"].cycles
    assert [role["warps"] for role in result["warps"]] == [[0, 1], [2]]
    assert result["matrix"] == sass_time.ASSUMPTIONS["HMMA"].cycles // 1 and result["shared"] > 0


def test_a_latency_on_the_chain_is_a_step_s_whole_difference() -> None:
    walked_roles = roles()
    before = cuda_cycles.figures(walked_roles, NAMES)
    remote = cuda_cycles.figures(walked_roles, NAMES, {"remote": sass_time.ASSUMPTIONS["remote"].cycles + 100})
    assert remote["typical"] == before["typical"] + 100
    assert remote["stalls"] == before["stalls"]
    barrier = cuda_cycles.figures(walked_roles, NAMES, {"BAR": sass_time.ASSUMPTIONS["BAR"].cycles + 7})
    assert barrier["phases"]["barrier"]["typical"] == before["phases"]["barrier"]["typical"] + 7


def test_steps_that_have_not_become_alike_are_an_error() -> None:
    walked_roles = roles()
    # A step of which the tool takes two for one.
    walked_roles.begins = [[*begins[:3], *begins[4:]] for begins in walked_roles.begins]
    with pytest.raises(cuda_cycles.Failed, match="not alike"):
        cuda_cycles.figures(walked_roles, NAMES)


def test_a_phase_without_instructions_is_an_error() -> None:
    with pytest.raises(cuda_cycles.Failed, match="no instruction belongs to the phase prefetch"):
        cuda_cycles.figures(roles(), [*NAMES, "prefetch"])


def test_a_step_begins_where_something_runs_once_in_it_or_else_every_second_time() -> None:
    def of(indices: list[int]) -> list[int]:
        return cuda_cycles.steps_of([sass_walk.Executed(i, 1) for i in indices], [None, "a", "b", "b"], 3)

    assert of([0, 1, 2, 3, 3, 1, 2, 3, 3, 1, 2, 3, 3]) == [1, 5, 9]
    assert of([1, 2, 3, 2, 3, 2, 3]) == [1, 3, 5]
    assert of([2, 2, 2, 2, 2, 2, 0, 0, 0]) == [0, 2, 4]
    assert of([0, 0, 0, 2]) == []


# --- Marks and figures


def test_a_phase_goes_from_its_mark_to_the_next() -> None:
    source = "a\n  // phase: one\nb\nc\n// phase: two words\nd\n// phase: end\ne\n// phase: one\nf\n"
    lines = cuda_cycles.phases_of("x.cuh", source)
    assert lines == {
        **{("x.cuh", n): "one" for n in (2, 3, 4)},
        **{("x.cuh", n): "two words" for n in (5, 6)},
        **{("x.cuh", n): "one" for n in (9, 10)},
    }


def test_the_innermost_line_with_a_phase_decides() -> None:
    lines = {("k.cuh", 5): "gates", ("helper.cuh", 9): "sends"}
    frames = [
        (("other.h", 3), ("k.cuh", 5)),
        (("helper.cuh", 9), ("k.cuh", 5)),
        (("other.h", 3), ("k.cuh", 1)),
    ]
    instructions = [dataclasses.replace(instruction(0, "NOP"), frames=f) for f in frames]
    assert cuda_cycles.phase_of_each(instructions, lines) == ["gates", "sends", None]


COMMITTED = {
    "plan": "cluster of 16, 2 columns, counted",
    "typical": 1000,
    "stalls": 700,
    "phases": {
        "gates": {"typical": 400, "stalls": 300, "instructions": 90},
        "loop": {"typical": 20, "stalls": 20, "instructions": 9},
    },
}


def _changed(phase: str, **figures: int) -> dict[str, Any]:
    phases = {name: dict(part) for name, part in COMMITTED["phases"].items()}  # type: ignore[attr-defined]
    phases[phase] = {**phases.get(phase, {"typical": 0, "stalls": 0, "instructions": 0}), **figures}
    return {**COMMITTED, "phases": phases}


def test_growth_of_a_phase_by_more_than_three_per_cent_is_named() -> None:
    def found(new: dict[str, Any]) -> list[str]:
        return cuda_cycles.grown(COMMITTED, new, "a case")

    assert found(COMMITTED) == []
    assert found(_changed("gates", typical=412, stalls=309, instructions=500)) == []
    assert found(_changed("gates", typical=413)) == ["a case: gates: 413 cycles (typical), 400 are committed"]
    assert found(_changed("gates", stalls=310)) == ["a case: gates: 310 cycles (stalls), 300 are committed"]
    assert found(_changed("gates", typical=100, stalls=100)) == []
    assert found(_changed("loop", typical=22)) == []  # rounding
    assert found(_changed("loop", typical=23)) != []
    assert found({**COMMITTED, "typical": 1031}) == ["a case: a step: 1031 cycles (typical), 1000 are committed"]
    assert found(_changed("new", typical=1)) == ["a case: the phase new is new"]
    gone = {**COMMITTED, "phases": {"gates": COMMITTED["phases"]["gates"]}}  # type: ignore[index]
    assert found(gone) == ["a case: the phase loop is gone"]
    assert "the plan was" in found({**COMMITTED, "plan": "grid of 128"})[0]


def test_the_table_in_the_docs_is_that_of_the_committed_figures() -> None:
    committed = json.loads(cuda_cycles.FIGURES.read_text())
    docs = cuda_cycles.DOCS.read_text()
    assert cuda_cycles.between_marks(docs, cuda_cycles.documented(committed["nvcc"], committed["cases"])) == docs
    assert list(committed["cases"]) == [case.name for case in cuda_cycles.CASES]
    for case in committed["cases"].values():
        for kind in ("typical", "stalls"):
            parts = [part[kind] for part in case["phases"].values()]
            assert abs(sum(parts) - case[kind]) <= len(parts)


@pytest.mark.slow
def test_cases_have_the_plans_that_layers_get() -> None:
    program = cuda_cycles.build_arguments()
    for case in cuda_cycles.CASES:
        planned = cuda_cycles.plan(case, program)
        dtype, backward, tf32 = case.dtype, case.kernel == "backward", case.dtype == "tf32"
        expected = plan(
            "H200",
            case.cell,
            "float32" if tf32 else dtype,
            case.batch,
            case.hidden,
            backward=backward,
            tf32=tf32,
            layers=case.layers,
        )
        for name in ("variant", "multiply", "team_blocks", "teams", "columns", "layers"):
            assert planned[name] == expected[name], case.name


@pytest.mark.compiles
def test_constants_of_the_planner_are_those_that_follow_from_the_cycles() -> None:
    """Until a GPU has measured them. After other cycles: ``python tools/gpu_constants.py --calculated``."""
    header = gpu_constants.HEADER.read_text()
    origins = {match[1]: match[3] for match in map(gpu_constants.LINE.match, header.splitlines()) if match}
    committed, found = gpu_constants.constants(header), gpu_constants.calculated()
    assert found.keys() == {"gates_cycles", "backward_gates_cycles", "memory_cycles"}
    for name, (value, _) in found.items():
        if not origins[name].startswith("measured"):
            assert origins[name].startswith("calculated")
            assert committed[name] == pytest.approx(value, rel=1e-3)


@pytest.mark.compiles
def test_the_planner_expects_of_a_step_what_the_machine_code_takes() -> None:
    program, figures = cuda_cycles.build_arguments(), json.loads(cuda_cycles.FIGURES.read_text())["cases"]
    for case in cuda_cycles.CASES:
        expected = cuda_cycles.plan(case, program)["predicted_cycles"]
        assert expected == pytest.approx(figures[case.name]["typical"], rel=0.18), case.name
