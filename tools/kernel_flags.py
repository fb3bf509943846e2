"""The instruction sets that kernels are compiled for, and their compiler flags: of the extension (`setup.py`) and of
the C library (`tools/build_library.py`)."""

# Of an architecture each set contains the one before it. A name is that of csrc/cpu/isa_<name>.cpp, in lower case.
X86_FLAGS: dict[str, list[str]] = {"portable": []}
X86_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
X86_FLAGS["avx512"] = [*X86_FLAGS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
X86_FLAGS["avx512_bf16"] = [*X86_FLAGS["avx512"], "-mavx512bf16"]
X86_FLAGS["avx512_amx"] = [*X86_FLAGS["avx512_bf16"], "-mamx-tile", "-mamx-bf16", "-mamx-int8"]

# Before it gives out registers GCC moves loads ahead of what uses them, by default for Arm and not for x86: sums of the
# products, which fill the registers, would go to the stack for it.
ARM_FLAGS: dict[str, list[str]] = {"portable": []}
ARM_FLAGS["neon"] = ["-fno-schedule-insns"]
ARM_FLAGS["neon_bf16"] = [*ARM_FLAGS["neon"], "-march=armv8.2-a+bf16"]

OTHER_FLAGS: dict[str, list[str]] = {"portable": []}

ALL_SETS = {*X86_FLAGS, *ARM_FLAGS, *OTHER_FLAGS}
# What has kernels of bfloat16 alone (and, with AMX, products of bytes), and from which set it takes the others.
BFLOAT16_ALONE = {"avx512_bf16": "avx512", "avx512_amx": "avx512", "neon_bf16": "neon"}
# What every processor of its architecture runs.
RUNS_EVERYWHERE = {"portable", "neon"}

# Gate arithmetic must see NaN and infinity, hence no -ffast-math: only the two of its parts that change no result.
MATH_FLAGS = ["-fno-math-errno", "-fno-trapping-math"]


def known_sets(machine: str) -> dict[str, list[str]]:
    """All of an architecture, as `platform.machine()` or the first word of a compiler's target names it."""
    name = machine.lower()
    if name in ("x86_64", "amd64"):
        return X86_FLAGS
    # 32-bit Arm (armv7l, arm-linux-gnueabihf) has other registers.
    return ARM_FLAGS if name in ("aarch64", "arm64") else OTHER_FLAGS


def choose_sets(machine: str, wanted: str | None, name: str) -> dict[str, list[str]]:
    """Those that are wanted, separated by commas, or all; and the portable one, where no other runs everywhere.

    Raises:
        ValueError: the list, which the message calls `name`, has others, or one without that which it needs.
    """
    known = known_sets(machine)
    chosen = set(filter(None, (",".join(known) if wanted is None else wanted).split(",")))
    if unknown := chosen - set(known):
        raise ValueError(f"{name}: expected some of {','.join(known)}, got {','.join(sorted(unknown))}")
    for lacking in sorted(chosen & set(BFLOAT16_ALONE)):
        if BFLOAT16_ALONE[lacking] not in chosen:
            raise ValueError(
                f"{name}: {lacking} has bfloat16 kernels alone and needs {BFLOAT16_ALONE[lacking]} beside it"
            )
    if not chosen & RUNS_EVERYWHERE:
        chosen.add("portable")
    return {set_name: flags for set_name, flags in known.items() if set_name in chosen}
