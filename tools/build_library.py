"""Compiles the C library of streams (include/fused_rnn.h): `make library`. Needs Python and a C++17 compiler alone.

    python tools/build_library.py                                    build/library
    python tools/build_library.py --prefix /usr/local                copies it there, too
    python tools/build_library.py --cxx aarch64-linux-gnu-g++ --out build/library-aarch64
    python tools/build_library.py --sanitize address,undefined --isas portable --out build/library-sanitize

Written are, under the folder: `include/fused_rnn.h`, `lib/libfused_rnn.so` and `lib/libfused_rnn.a`,
`lib/pkgconfig/fused_rnn.pc` and `lib/cmake/fused_rnn/fused_rnnConfig.cmake`, which may be moved as a whole. The library
needs libc alone: no libstdc++, no OpenMP. What has not changed is not compiled again.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from kernel_flags import BFLOAT16_ALONE, MATH_FLAGS, choose_sets  # noqa: E402

SOURCES = [
    "csrc/library/library.cpp",
    "csrc/library/description.cpp",
    "csrc/library/file.cpp",
    "csrc/library/errors.cpp",
    "csrc/stream/stack.cpp",
    "csrc/cpu/dispatch.cpp",
    "csrc/cpu/memory.cpp",
]
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", *MATH_FLAGS, "-Wall", "-Wextra", "-DFRNN_STREAMS_ALONE"]
# Nothing of the C++ library: a C program links the archive as it stands.
FLAGS += ["-fno-exceptions", "-fno-rtti"]


def fail(message: str) -> None:
    raise SystemExit(f"error: {message}")


def output(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        fail(f"{shlex.join(command)}: {error}")
        raise


def version() -> str:
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "fused_rnn/__init__.py").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


class Library:
    def __init__(self, cxx: list[str], out: Path, isas: str | None, sanitize: str) -> None:
        self.cxx, self.out, self.sanitize = cxx, out.resolve(), sanitize
        self.target = output([*cxx, "-dumpmachine"])
        self.is_clang = "clang" in output([*cxx, "--version"])
        try:
            self.sets = choose_sets(self.target.split("-")[0], isas, "--isas")
        except ValueError as error:
            fail(str(error))
        if isas is None and "neon" in self.sets:
            del self.sets["portable"]  # which no processor of this architecture would be given

    def flags(self) -> list[str]:
        flags = [*FLAGS, "-O3", "-g0"]
        if self.sanitize:
            flags = [*FLAGS, "-O1", "-g1", "-fno-omit-frame-pointer", f"-fsanitize={self.sanitize}"]
            # As setup.py has them, for its reasons: without the checks that take longest to compile, others as calls.
            flags += ["-fexpensive-optimizations", "-fno-sanitize-recover=all"]
            flags += ["-fno-sanitize=null,object-size,alignment,pointer-overflow"]
            if not self.is_clang:
                flags.append("--param=asan-instrumentation-with-call-threshold=0")
        if self.is_clang:
            # As GCC does by itself: a product and a sum are one instruction where there is one.
            flags += ["-ffp-contract=fast", "-Wno-unknown-pragmas", "-Wno-psabi"]
        else:
            # Else symbols of templates stay global whatever is said of their visibility.
            flags.append("-fno-gnu-unique")
        macros = [f"-DFRNN_ISA_{name.upper()}=1" for name in self.sets]
        return [*flags, *macros, f"-I{ROOT / 'include'}", f"-I{ROOT / 'csrc'}"]

    def tool(self, name: str) -> str:
        return output([*self.cxx, f"-print-prog-name={name}"])

    def build(self, jobs: int) -> None:
        folder = self.out / "objects"
        folder.mkdir(parents=True, exist_ok=True)
        # What takes longest first, lest one processor be busy with it alone in the end.
        of_sets = sorted(self.sets, key=lambda name: name in BFLOAT16_ALONE)
        sources = {f"csrc/cpu/isa_{name}.cpp": self.sets[name] for name in of_sets} | dict.fromkeys(SOURCES, [])
        self.objects = [folder / f"{Path(source).stem}.o" for source in sources]
        with ThreadPoolExecutor(jobs) as pool:
            compiled = pool.map(self.compile, sources, sources.values(), self.objects)
            if not all(compiled):
                fail("compiling the library failed; the compiler's messages are above")
        self.link()

    def compile(self, source: str, of_set: list[str], result: Path) -> bool:
        command = [*self.cxx, *self.flags(), *of_set, "-MMD", "-MF", f"{result}.d", "-c", str(ROOT / source)]
        command += ["-o", str(result)]
        if is_newer(result, shlex.join(command)):
            return True
        result.unlink(missing_ok=True)
        if subprocess.run(command, check=False).returncode != 0:
            return False
        Path(f"{result}.command").write_text(shlex.join(command))
        return True

    def link(self) -> None:
        lib, include = self.out / "lib", self.out / "include"
        for folder in (lib / "pkgconfig", lib / "cmake/fused_rnn", include):
            folder.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / "include/fused_rnn.h", include / "fused_rnn.h")
        objects = [str(result) for result in self.objects]
        archive, shared = lib / "libfused_rnn.a", lib / "libfused_rnn.so"
        # One object of which the library's functions alone are seen: other programs' names are nothing to it.
        whole = self.out / "objects/fused_rnn.o"
        # The C++ compiler as a linker would add libstdc++, of which nothing is used.
        libraries = ["-nodefaultlibs", "-lc", "-lgcc"] if not self.sanitize else [f"-fsanitize={self.sanitize}"]
        # Nothing is left to be looked up in the first call of a function.
        libraries += [] if self.sanitize else ["-Wl,--strip-debug", "-Wl,--no-undefined", "-Wl,-z,now"]
        commands = [
            [*self.cxx, "-r", "-nostdlib", "-o", str(whole), *objects],
            [self.tool("objcopy"), "--localize-hidden", str(whole)],
            [self.tool("ar"), "rcs", str(archive), str(whole)],
            [*self.cxx, "-shared", "-o", str(shared), *objects, "-Wl,-soname,libfused_rnn.so", *libraries],
        ]
        record, text = self.out / "objects/link.command", "\n".join(map(shlex.join, commands))
        is_linked = record.exists() and record.read_text() == text
        if not is_linked or any(older(result, self.objects) for result in (archive, shared)):
            archive.unlink(missing_ok=True)
            for command in commands:
                run(command)
            record.write_text(text)
        (lib / "pkgconfig/fused_rnn.pc").write_text(PKG_CONFIG.format(version=version()))
        (lib / "cmake/fused_rnn/fused_rnnConfig.cmake").write_text(CMAKE)
        (lib / "cmake/fused_rnn/fused_rnnConfigVersion.cmake").write_text(CMAKE_VERSION.format(version=version()))


def run(command: list[str]) -> None:
    if subprocess.run(command, check=False).returncode != 0:
        fail(f"{shlex.join(command[:4])} ... failed; the messages are above")


def older(result: Path, sources: list[Path]) -> bool:
    return not result.exists() or any(source.stat().st_mtime > result.stat().st_mtime for source in sources)


def is_newer(result: Path, command: str) -> bool:
    """Whether an object was compiled by this command and from files that are as they were."""
    record, files = Path(f"{result}.command"), Path(f"{result}.d")
    if not (result.exists() and record.exists() and files.exists()) or record.read_text() != command:
        return False
    read = [Path(name) for name in files.read_text().replace("\\\n", " ").split()[1:]]
    return all(path.exists() for path in read) and not older(result, read)


# prefix follows from where the file is, so that the folder may be moved.
PKG_CONFIG = """\
prefix=${{pcfiledir}}/../..
libdir=${{prefix}}/lib
includedir=${{prefix}}/include

Name: fused_rnn
Description: LSTM, GRU and RNN layers step by step
Version: {version}
Libs: -L${{libdir}} -lfused_rnn
Cflags: -I${{includedir}}
"""

CMAKE = """\
get_filename_component(_fused_rnn_prefix "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
foreach(_fused_rnn_kind shared static)
  if(NOT TARGET fused_rnn::${_fused_rnn_kind})
    string(TOUPPER ${_fused_rnn_kind} _fused_rnn_type)
    add_library(fused_rnn::${_fused_rnn_kind} ${_fused_rnn_type} IMPORTED)
    set_target_properties(fused_rnn::${_fused_rnn_kind} PROPERTIES
      INTERFACE_INCLUDE_DIRECTORIES "${_fused_rnn_prefix}/include")
  endif()
endforeach()
set_target_properties(fused_rnn::shared PROPERTIES IMPORTED_LOCATION "${_fused_rnn_prefix}/lib/libfused_rnn.so")
set_target_properties(fused_rnn::static PROPERTIES IMPORTED_LOCATION "${_fused_rnn_prefix}/lib/libfused_rnn.a")
"""

CMAKE_VERSION = """\
set(PACKAGE_VERSION "{version}")
if(PACKAGE_VERSION VERSION_EQUAL PACKAGE_FIND_VERSION)
  set(PACKAGE_VERSION_EXACT TRUE)
  set(PACKAGE_VERSION_COMPATIBLE TRUE)
elseif(NOT PACKAGE_FIND_VERSION)
  set(PACKAGE_VERSION_COMPATIBLE TRUE)
endif()
"""


def install(library: Path, prefix: Path) -> None:
    for folder in ("include", "lib"):
        shutil.copytree(library / folder, prefix / folder, dirs_exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cxx", default=os.environ.get("CXX") or "g++", help="the C++ compiler, a cross compiler, too")
    parser.add_argument("--out", type=Path, default=ROOT / "build/library")
    parser.add_argument("--isas", default=os.environ.get("FUSED_RNN_ISAS"), help="of the target; all that it has")
    parser.add_argument("--sanitize", default="", metavar="address,undefined")
    parser.add_argument("--prefix", type=Path, help="install there, too")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    Library(shlex.split(options.cxx), options.out, options.isas, options.sanitize).build(options.jobs)
    if options.prefix:
        install(options.out, options.prefix)


if __name__ == "__main__":
    main()
