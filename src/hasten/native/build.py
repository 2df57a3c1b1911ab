"""The C++ files beside this one as shared objects, each compiled for this machine the first time it is needed and cached.

Compiling takes some seconds; the object's name is a hash of source, flags and processor, so nothing stale is loaded. `HASTEN_CXX` names
another compiler, `HASTEN_MARCH` another instruction set than the machine's ("x86-64-v3", say).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path

# Most of what -ffast-math allows, by its parts: the flag itself makes the whole process flush subnormal numbers to zero (GCC before 13).
LOOSE = ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-ffinite-math-only"]
FLAGS = ["-O3", "-mprefer-vector-width=512", "-std=c++20", "-shared", "-fPIC", "-pthread"]
EXTRA = {"step": LOOSE, "trie": ["-ffp-contract=off"]}  # beam search's sums are exact, and minus infinity is one of its numbers
ISAS = ("portable", "avx2", "vnni", "amx")

seconds = 0.0  # that this process spent compiling


def compiler() -> str | None:
    """Path of a C++ compiler, or None."""
    names = [os.environ["HASTEN_CXX"]] if os.environ.get("HASTEN_CXX") else ["g++", "c++", "clang++"]
    return next((found for n in names if (found := shutil.which(n))), None)


def why_not() -> str | None:
    """Why the native code cannot run here; None if it can (it is compiled then, if it was not)."""
    if platform.machine() not in ("x86_64", "AMD64") or os.name != "posix":
        return f"its kernels are written for x86-64 Linux, and this is {platform.machine()} {platform.system()}"
    try:
        library()
    except (OSError, subprocess.SubprocessError, RuntimeError) as e:
        return " ".join(str(e).split())[:300]
    return None


@functools.cache
def library(name: str = "step") -> ctypes.CDLL:
    """The object of NAME.cpp, loaded. Raises RuntimeError with the compiler's first words when it cannot be built."""
    source = Path(__file__).with_name(f"{name}.cpp")
    flags = [*FLAGS, *EXTRA[name], f"-march={os.environ.get('HASTEN_MARCH', 'native')}"]
    file = folder() / f"{name}-{_digest(source, flags)}.so"
    if not file.is_file():
        _compile(source, flags, file)
    try:
        return _declared(ctypes.CDLL(str(file)))
    except OSError:  # cut off in mid-write by another program, or of another system: make it anew once
        _compile(source, flags, file)
        return _declared(ctypes.CDLL(str(file)))


def folder() -> Path:
    root = os.environ.get("HASTEN_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "hasten") / "native"


def isa() -> str:
    """The best instruction set that the object was built for and the processor has."""
    return ISAS[library().hasten_isa()]


def _digest(source: Path, flags: list[str]) -> str:
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text(errors="replace").splitlines() if cpu.is_file() else []
    processor = next((line for line in lines if line.startswith("flags")), platform.processor())
    return hashlib.blake2b(source.read_bytes() + repr((flags, processor, compiler())).encode(), digest_size=8).hexdigest()


def _compile(source: Path, flags: list[str], file: Path) -> None:
    global seconds
    began, cxx = time.perf_counter(), compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler was found (install g++, or name one with HASTEN_CXX)")
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    done = subprocess.run([cxx, *flags, str(source), "-o", str(part)], capture_output=True, text=True)
    if done.returncode:
        part.unlink(missing_ok=True)
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip() or "no message")
        raise RuntimeError(f"{cxx} could not compile {source.name}: {first}")
    part.rename(file)
    seconds += time.perf_counter() - began


def _declared(lib: ctypes.CDLL) -> ctypes.CDLL:
    p, i, n = ctypes.c_void_p, ctypes.c_int, ctypes.c_long
    signatures = {
        "hasten_isa": ([], i),
        "hasten_bf16": ([], i),
        "hasten_team": ([i], p),
        "hasten_team_free": ([p], None),
        "hasten_linear": ([p, p, i, i, i], p),
        "hasten_linear_int4": ([p, p, p, p, i, i], p),
        "hasten_linear_free": ([p], None),
        "hasten_linear_run": ([p, p, p, i, p, i], None),
        "hasten_model": ([p, p, p, p, p, p], p),
        "hasten_model_layer": ([p, p, p, p, p, p, p, p, p, i], None),
        "hasten_model_free": ([p], None),
        "hasten_step": ([p, i, p, p, p, i, p, p, p, p, n, n, p], None),
        "hasten_trie": ([p, p, p, p, p, i, i, i], p),
        "hasten_trie_free": ([p], None),
        "hasten_trie_step": ([p, p, i, n, i, i, i, p, p, p, p, p, p, p, p], None),
        "hasten_trie_mask": ([p, i, p, p, p, p, n], None),
        "hasten_trie_walk": ([p, i, p, p, p, n, i], None),
    }
    for name, (arguments, result) in signatures.items():
        if not hasattr(lib, name):  # of another source
            continue
        function = getattr(lib, name)
        function.argtypes, function.restype = arguments, result
    return lib
