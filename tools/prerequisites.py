"""What a build of fused_rnn needs from the machine; one line about each thing that is missing.

`python tools/prerequisites.py` is what the Makefile runs before it downloads anything, and setup.py calls
`build_problems`. Standard library only, and no syntax newer than Python 3.6, so that an old Python gets its line too.
"""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile

OLDEST_PYTHON = (3, 10)
OLDEST_GCC = 11

# C++20 is what the headers of the newest PyTorch need; <omp.h> is missing where a compiler comes without OpenMP.
PROBE = "#include <concepts>\n#include <vector>\n#include <omp.h>\nint probe() { return std::vector<int>(3).size(); }\n"


def compiler():
    """The C++ compiler command as a list: CXX where it is set, g++ otherwise."""
    return shlex.split(os.environ.get("CXX") or "g++")


def python_problem():
    if sys.version_info < OLDEST_PYTHON:
        versions = sys.version_info[:2] + OLDEST_PYTHON
        return (
            "Python %d.%d is too old: fused_rnn needs Python %d.%d or newer (make PYTHON=... names another)" % versions
        )
    return None


def venv_problem():
    if importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip"):
        return None
    return "Python's venv module is missing: install it (Debian, Ubuntu: apt install python3-venv)"


def header_problem():
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    if os.path.exists(header):
        return None
    install = "install Python's headers (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)"
    return "%s is missing: %s" % (header, install)


def compiler_problem():
    name = " ".join(compiler())
    install = "install g++ %d or newer (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++)" % OLDEST_GCC
    try:
        version = _output(compiler() + ["-dumpfullversion", "-dumpversion"])
        is_clang = "clang" in _output(compiler() + ["--version"])
    except (OSError, subprocess.CalledProcessError):
        return "no C++ compiler (%s does not run): %s, or name another compiler with CXX=" % (name, install)
    if not is_clang and int(re.match(r"\d+", version).group()) < OLDEST_GCC:
        return "%s %s is too old: %s, or name another compiler with CXX=" % (name, version, install)
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "probe.cpp")
        with open(source, "w") as file:
            file.write(PROBE)
        try:
            _output(compiler() + ["-std=c++20", "-fopenmp", "-c", source, "-o", os.path.join(folder, "probe.o")])
        except subprocess.CalledProcessError as error:
            first = next((line for line in error.output.splitlines() if "error" in line), "no message")
            return "%s cannot compile C++20 with OpenMP (%s): %s" % (name, first.strip(), install)
    return None


def build_problems():
    """Lines about what a build lacks: a new enough Python, its headers, a C++ compiler. Empty when nothing does."""
    return [line for line in (python_problem(), header_problem(), compiler_problem()) if line]


def _output(command):
    """Standard output and error of `command`, stripped. Raises CalledProcessError when it fails."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True, check=True
    )
    return done.stdout.strip()


if __name__ == "__main__":
    problems = build_problems()
    if venv_problem():
        problems.append(venv_problem())
    for problem in problems:
        print("error: " + problem, file=sys.stderr)
    sys.exit(1 if problems else 0)
