"""The instruction sets that kernels are compiled for, and their compiler flags: of the extension (`setup.py`) and of
the C library (`tools/build_library.py`)."""

# Each set contains the one before it. A name is that of csrc/cpu/isa_<name>.cpp, in lower case.
X86_FLAGS: dict[str, list[str]] = {"portable": []}
X86_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
X86_FLAGS["avx512"] = [*X86_FLAGS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
X86_FLAGS["avx512_bf16"] = [*X86_FLAGS["avx512"], "-mavx512bf16"]
X86_FLAGS["avx512_amx"] = [*X86_FLAGS["avx512_bf16"], "-mamx-tile", "-mamx-bf16"]
BFLOAT16_ALONE = {"avx512_bf16", "avx512_amx"}
OTHER_FLAGS: dict[str, list[str]] = {"portable": []}

# Gate arithmetic must see NaN and infinity, hence no -ffast-math: only the two of its parts that change no result.
MATH_FLAGS = ["-fno-math-errno", "-fno-trapping-math"]


def known_sets(machine: str) -> dict[str, list[str]]:
    """All of an architecture, as `platform.machine()` or the first word of a compiler's target names it."""
    return X86_FLAGS if machine.lower() in ("x86_64", "amd64") else OTHER_FLAGS


def choose_sets(machine: str, wanted: str | None, name: str) -> dict[str, list[str]]:
    """Those that are wanted, separated by commas, and the portable one; ValueError, which calls the list `name`."""
    known = known_sets(machine)
    chosen = {"portable", *filter(None, (",".join(known) if wanted is None else wanted).split(","))}
    if unknown := chosen - set(known):
        raise ValueError(f"{name}: expected some of {','.join(known)}, got {','.join(sorted(unknown))}")
    if chosen & BFLOAT16_ALONE and "avx512" not in chosen:
        raise ValueError(f"{name}: avx512_bf16 and avx512_amx have bfloat16 kernels alone and need avx512 beside them")
    return {set_name: flags for set_name, flags in known.items() if set_name in chosen}
