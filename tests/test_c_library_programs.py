"""The C library in programs: what compilers make of it and of its examples, and what is installed."""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.c_library import BEST, ISAS, ROOT, SANITIZE, SETS, SOURCES, F, H, build, compiled, is_there, made, run
from support.compare import assert_same

import fused_rnn
from fused_rnn import Stream
from fused_rnn.check import instruction_set

pytestmark = pytest.mark.kernels

COMPILERS = [["gcc"], ["clang"]]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-pedantic"]


@pytest.fixture(params=COMPILERS, ids=lambda command: command[0])
def compiler(request: pytest.FixtureRequest) -> str:
    return is_there(request.param[0])


def realtime(folder: Path, *command: Any) -> Path:
    compiled(
        *command[:1], ROOT / "examples/realtime.c", *command[1:], f"-I{ROOT}/include", "-lm", "-o", folder / "realtime"
    )
    return folder / "realtime"


def test_the_header_is_c_and_cpp_by_itself(compiler: str, tmp_path: Path) -> None:
    source = tmp_path / "header.c"
    source.write_text(
        '#include "fused_rnn.h"\nint use(void);\nint use(void) { return (int)fused_rnn_abi_version(); }\n'
    )
    for language in (["-std=c11"], ["-std=c17"], ["-xc++", "-std=c++98", "-Wno-long-long", "-Wno-variadic-macros"]):
        wanted = [*WARNINGS, *language, f"-I{ROOT}/include", "-fsyntax-only"]
        if language[0] == "-xc++":
            wanted = [flag for flag in wanted if flag != "-pedantic"]
        compiled(compiler, *wanted, source)


def test_clang_compiles_the_library() -> None:
    """To the end of what is checked; code it makes in a minute (`make library CXX=clang++`)."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from build_library import SOURCES as sources
        from build_library import Library as Build
    finally:
        sys.path.pop(0)
    of_clang = Build([is_there("clang++")], ROOT / "build/library-clang", *ISAS[1:] or [None], "")
    assert of_clang.is_clang and set(SETS) <= set(of_clang.sets)
    for source in sources:
        compiled("clang++", *of_clang.flags(), "-fsyntax-only", ROOT / source)
    for name, flags in of_clang.sets.items():
        compiled("clang++", *of_clang.flags(), *flags, "-fsyntax-only", ROOT / f"csrc/cpu/isa_{name}.cpp")


def test_the_example_says_bit_for_bit_what_the_stream_says(compiler: str, library: Path, tmp_path: Path) -> None:
    archive = library / "lib/libfused_rnn.a"
    program = realtime(tmp_path, compiler, "-std=c11", "-O2", *WARNINGS, archive)
    check_example(program, tmp_path)


def check_example(program: Path, folder: Path, **environment: str) -> None:
    module = fused_rnn.LSTM(4, H, 2)
    fused_rnn.save_weights(module, folder / "weights")
    samples = (8000 * torch.randn(3 * 256).clamp(-3, 3)).to(torch.int16).numpy()
    (folder / "sound.wav").write_bytes(wav(samples, channels=2))
    out, names = folder / "out", ["--weights", folder / "weights", "--wav", folder / "sound.wav"]
    env = os.environ | environment
    result = run(program, *names, "--out", out, "--block", "256", "--fast", env=env)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert "3 blocks of 256 samples" in result.stdout and "deadlines missed:" in result.stdout
    x = torch.from_numpy(samples.astype("f") / 32768).view(-1, 1, 4)
    with instruction_set(environment.get("FUSED_RNN_ISA", BEST)):
        expected = Stream(module).chunk(x)
    assert_same(torch.from_numpy(np.fromfile(out, "f")).view(-1, 1, H), expected)
    # With weights of its own, waiting for each block.
    result = run(program, "--seconds", "0.05", env=env)
    assert result.returncode == 0 and "H 32" in result.stdout, result.stderr
    for wrong in (["--block", "0"], ["--weights", folder / "sound.wav"], ["--what"], ["--wav", folder / "weights"]):
        result = run(program, *wrong, env=env)
        assert result.returncode == 1 and result.stderr.startswith("error: ")


def wav(samples: Any, channels: int) -> bytes:
    frames = np.zeros((len(samples), channels), "<i2")
    frames[:, 0] = samples
    data = frames.tobytes()
    rate = 48000
    numbers = ((1, 2), (channels, 2), (rate, 4), (rate * channels * 2, 4), (channels * 2, 2), (16, 2))
    head = b"".join(value.to_bytes(size, "little") for value, size in numbers)
    chunks = b"fmt " + len(head).to_bytes(4, "little") + head + b"LIST" + (3).to_bytes(4, "little") + b"abc\0"
    chunks += b"data" + len(data).to_bytes(4, "little") + data
    return b"RIFF" + (4 + len(chunks)).to_bytes(4, "little") + b"WAVE" + chunks


def drive(program: Path, name: str, rows: int, dtype: torch.dtype, isa: str, folder: Path) -> None:
    """Run tests/c_library/drive.c and compare all that it wrote with a stream."""
    module = made(name)
    fused_rnn.save_weights(module, folder / "weights", dtype)
    x = torch.randn(9, rows, F).to(dtype)
    (folder / "x").write_bytes(x.view(torch.uint8).numpy().tobytes())
    result = run(program, folder / "weights", rows, folder / "x", folder / "y", env=os.environ | {"FUSED_RNN_ISA": isa})
    assert result.returncode == 0 and result.stdout == f"{isa}\n" and not result.stderr, result.stderr
    with instruction_set(isa):
        stream = Stream(module, rows, dtype)
        y = torch.cat([stream.chunk(x[:2]), stream.chunk(x[2:], [7] * (rows - 1) + [6])])
        h, c = stream._states(None, True)
    expected = [y.view(torch.uint8).flatten()]
    for states in zip(h.flatten(0, 1), h.flatten(0, 1) if c is None else c.flatten(0, 1), strict=True):
        expected += [state.view(torch.uint8) for state in states[: 1 if c is None else 2]]
    assert_same(torch.frombuffer(bytearray((folder / "y").read_bytes()), dtype=torch.uint8), torch.cat(expected))


@pytest.mark.parametrize("name, dtype", [("lstm options", torch.float32), ("gru", torch.bfloat16)])
def test_a_program_in_c_says_bit_for_bit_what_the_stream_says(
    name: str, dtype: torch.dtype, compiler: str, library: Path, tmp_path: Path
) -> None:
    program, source = tmp_path / "drive", SOURCES / "drive.c"
    archive = library / "lib/libfused_rnn.a"
    compiled(compiler, "-std=c11", *WARNINGS, source, f"-I{ROOT}/include", archive, "-o", program)
    drive(program, name, 5, dtype, BEST, tmp_path)


def test_programs_under_the_sanitizers(library: Path, tmp_path: Path) -> None:
    """All but the kernels is instrumented; those would take most of a minute to compile (`make library
    LIBRARY_ARGS="--sanitize address,undefined"`)."""
    sources = [ROOT / "csrc/stream/stack.cpp", *sorted((ROOT / "csrc/library").glob("*.cpp"))]
    sources += [ROOT / f"csrc/cpu/{name}.cpp" for name in ("dispatch", "memory")]
    kernels = library / "objects/isa_portable.o"
    flags = [
        "-std=c++17",
        "-fno-exceptions",
        "-fno-rtti",
        "-DFRNN_STREAMS_ALONE",
        f"-I{ROOT}/include",
        f"-I{ROOT}/csrc",
    ]
    objects = [tmp_path / f"{source.stem}.o" for source in sources]
    for source, result in zip(sources, objects, strict=True):
        compiled("g++", *SANITIZE, *flags, "-c", source, "-o", result)
    check_example(
        realtime(tmp_path, "gcc", "-std=c11", *SANITIZE, *objects, kernels), tmp_path, FUSED_RNN_ISA="portable"
    )
    program, source = tmp_path / "drive", SOURCES / "drive.c"
    compiled("gcc", "-std=c11", *SANITIZE, source, f"-I{ROOT}/include", *objects, kernels, "-o", program)
    for name in ("projection", "layer_norm, heads", "lstm options", "indrnn", "heads"):
        drive(program, name, 70, torch.float64, "portable", tmp_path)


def test_the_program_that_is_timed_runs(library: Path, tmp_path: Path) -> None:
    fused_rnn.save_weights(fused_rnn.LSTM(8, 8), tmp_path / "weights")
    source, archive = ROOT / "benchmarks/c_step.c", library / "lib/libfused_rnn.a"
    compiled("gcc", "-std=c11", "-O2", *WARNINGS, source, f"-I{ROOT}/include", archive, "-o", tmp_path / "c_step")
    result = run(tmp_path / "c_step", tmp_path / "weights", "0.01")
    isa, step, chunk, refused = result.stdout.split()
    assert isa == BEST and float(step) > float(refused) > 0 and float(chunk) > 0


WRAPPED = ("malloc", "calloc", "realloc", "aligned_alloc", "free", "pthread_mutex_lock")


def test_calls_allocate_nothing_take_no_lock_and_make_no_system_call(library: Path, tmp_path: Path) -> None:
    program = tmp_path / "no_calls"
    wraps = [f"-Wl,--wrap={name}" for name in WRAPPED]
    archive = library / "lib/libfused_rnn.a"
    compiled(
        "gcc",
        "-std=c11",
        "-O1",
        *WARNINGS,
        SOURCES / "no_calls.c",
        f"-I{ROOT}/include",
        archive,
        *wraps,
        "-lm",
        "-o",
        program,
    )
    for name, dtype in (("projection", None), ("layer_norm, heads", None), ("lstm options", torch.bfloat16)):
        fused_rnn.save_weights(made(name), tmp_path / name, dtype)
        result = run(program, tmp_path / name, "nothing")
        if result.returncode == 5:
            pytest.skip("this system has no seccomp, by which system calls are caught")
        assert result.returncode == 0, (name, result.returncode, result.stderr)
    # What such a mistake would look like.
    for mistake, function in (("allocate", "malloc"), ("free", "free"), ("lock", "pthread_mutex_lock")):
        result = run(program, tmp_path / name, mistake)
        assert result.returncode == 3 and result.stderr == f"{function} was called\n"
    assert run(program, tmp_path / name, "call").returncode == -signal.SIGKILL


def test_code_of_the_page_runs(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs/c-library.md").read_text()
    python, program = (
        re.findall(rf"^```{name}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) for name in ("python", "c")
    )
    assert len(python) == len(program) == 1
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"fused_rnn": fused_rnn}
    exec(python[0], names)
    Path("program.c").write_text(program[0])
    compiled("gcc", *WARNINGS, "program.c", f"-I{library}/include", library / "lib/libfused_rnn.a", "-o", "program")
    result = run(tmp_path / "program")
    assert result.returncode == 0 and result.stdout
    x = torch.zeros(1, 20)
    x[0, 0] = 1
    assert float(result.stdout) == pytest.approx(
        Stream(names["layer"]).chunk(x.expand(100, 1, 20))[-1, 0, 0].item(), rel=1e-4
    )


# ---- what is installed ----------------------------------------------------------------------------------------------

# Of the C library and of the compiler's own; nothing of threads or of C++.
NEEDED = {
    *("aligned_alloc", "free", "malloc", "madvise", "getenv", "syscall"),
    *("fopen", "fread", "fclose", "fileno", "fstat"),
    *("memchr", "memcpy", "memcmp", "memset", "memmove", "strlen", "strcmp", "bcmp", "__stack_chk_fail"),
    *("__cpu_model", "__cpu_features2", "_GLOBAL_OFFSET_TABLE_"),
}


def declared() -> set[str]:
    return set(
        re.findall(r"^FUSED_RNN_API [^(]*?(fused_rnn_\w+)\(", (ROOT / "include/fused_rnn.h").read_text(), re.MULTILINE)
    )


def symbols(*arguments: Any) -> set[str]:
    result = run(is_there("nm"), *arguments)
    assert result.returncode == 0, result.stderr
    return {line.split()[-1].split("@")[0] for line in result.stdout.splitlines() if len(line.split()) > 1}


def test_the_library_exports_what_the_header_declares_and_nothing_else(library: Path) -> None:
    shared, archive = library / "lib/libfused_rnn.so", library / "lib/libfused_rnn.a"
    assert len(declared()) == 17
    assert symbols("-D", "--defined-only", shared) == declared()
    assert symbols("-g", "--defined-only", archive) == declared()
    assert symbols("-u", archive) <= NEEDED
    result = run(is_there("readelf"), "-d", shared)
    assert re.findall(r"NEEDED.*\[(.*)\]", result.stdout) == ["libc.so.6"]


def test_what_has_not_changed_is_not_compiled_again_and_what_is_built_is_installed(
    library: Path, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (library / "objects").glob("*.o")}
    build("library-tests", *ISAS, "--prefix", str(tmp_path))
    assert before == {path: path.stat().st_mtime_ns for path in (library / "objects").glob("*.o")}
    assert (tmp_path / "include/fused_rnn.h").read_text() == (ROOT / "include/fused_rnn.h").read_text()
    found = {str(path.relative_to(tmp_path / "lib")) for path in (tmp_path / "lib").rglob("*") if path.is_file()}
    cmake = {f"cmake/fused_rnn/fused_rnnConfig{part}.cmake" for part in ("", "Version")}
    assert found == {"libfused_rnn.so", "libfused_rnn.a", "pkgconfig/fused_rnn.pc", *cmake}


def test_instruction_sets_that_there_are_not_are_refused(tmp_path: Path) -> None:
    wrong = [("sse9", "expected some of portable")]
    if platform.machine() == "x86_64":
        wrong.append(("avx512_bf16", "needs avx512 beside it"))
    for isas, message in wrong:
        result = run(sys.executable, ROOT / "tools/build_library.py", "--isas", isas, "--out", tmp_path)
        assert result.returncode == 1 and result.stderr.startswith("error: --isas") and message in result.stderr
    result = run(sys.executable, ROOT / "tools/build_library.py", "--cxx", "no-such-compiler", "--out", tmp_path)
    assert result.returncode == 1 and result.stderr.startswith("error: no-such-compiler")


@pytest.mark.parametrize("kind", ["static", "shared"])
def test_what_is_installed_is_found_by_cmake_wherever_it_is_moved(kind: str, library: Path, tmp_path: Path) -> None:
    is_there("cmake")
    prefix = tmp_path / "moved"
    for folder in ("include", "lib"):
        shutil.copytree(library / folder, prefix / folder)
    project = tmp_path / "project"
    project.mkdir()
    (project / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.13)\nproject(p C)\nfind_package(fused_rnn 0.1 REQUIRED)\n"
        f"add_executable(p {ROOT}/examples/realtime.c)\ntarget_link_libraries(p fused_rnn::{kind} m)\n"
    )
    for command in (
        ("-S", project, "-B", tmp_path / "b", f"-DCMAKE_PREFIX_PATH={prefix}"),
        ("--build", tmp_path / "b"),
    ):
        result = run("cmake", *command)
        assert result.returncode == 0, result.stdout + result.stderr
    assert run(tmp_path / "b/p", "--fast", "--seconds", "0.01").returncode == 0


def test_what_is_installed_is_found_by_pkg_config(library: Path, tmp_path: Path) -> None:
    is_there("pkg-config")
    prefix = tmp_path / "moved"
    for folder in ("include", "lib"):
        shutil.copytree(library / folder, prefix / folder)
    env = os.environ | {"PKG_CONFIG_PATH": str(prefix / "lib/pkgconfig")}
    flags = run("pkg-config", "--cflags", "--libs", "fused_rnn", env=env).stdout.split()
    assert run("pkg-config", "--modversion", "fused_rnn", env=env).stdout.strip() == fused_rnn.__version__
    program = tmp_path / "p"
    compiled("gcc", ROOT / "examples/realtime.c", *flags, f"-Wl,-rpath,{prefix}/lib", "-lm", "-o", program)
    assert run(program, "--fast", "--seconds", "0.01").returncode == 0
