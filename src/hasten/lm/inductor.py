"""Around torch's compiler: where it keeps what it made, what it lacks here, and how a cache that was cut off in mid-write is mended."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
FRESH = 60.0  # seconds that a file may still be in the making
# what loaders, linkers, readers and compilers (of headers) say of a file that ends too early
CORRUPT = re.compile(
    r"file too short|invalid ELF header|cannot read file data|file truncated|file format not recognized|ELF load command|"
    r"C\+\+ compile error|Ran out of input|pickle data was truncated|unexpected end of file",
    re.I,
)


def folder() -> Path:
    """The cache: the user's (`TORCHINDUCTOR_CACHE_DIR`) if there is one, else ours, which torch is then told of."""
    named = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))
    temporary = named.parent == Path(tempfile.gettempdir()) and named.name.startswith("torchinductor_")  # torch's own choice, which it sets
    if named == Path() or temporary:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(ours())
    return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])


def ours() -> Path:
    root = os.environ.get("HASTEN_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "hasten").absolute() / "inductor"


def lacks(device: str) -> str | None:
    """What the compiler needs on this kind of device and does not find; None if nothing."""
    if device == "cuda":
        return None if importlib.util.find_spec("triton") else "triton is not installed"
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return None if any(map(shutil.which, names)) else "no C++ compiler was found (install g++, or name one with CXX)"


def repaired(make: Callable[[], T]) -> T:
    """What `make` returns; where the cache holds a file that was cut off (a process killed in mid-compile), delete it and try once more."""
    cache = folder()
    sweep(cache)
    try:
        return make()
    except Exception as e:  # torch wraps what the loader says in errors of its own
        if not CORRUPT.search(told(e)):
            raise
        clear(cache, told(e))
    return make()


@functools.cache
def sweep(cache: Path) -> None:
    """Delete shared objects that were cut off. They need not fail when they are loaded: of a trial object that does not run the compiler
    believes that the processor lacks what was tried, and its code is slow. What was written just now may be another process's, not finished.
    """
    for file in cache.rglob("*.so"):
        with suppress(OSError):
            if time.time() - file.stat().st_mtime > FRESH and not whole(file):
                file.unlink()


def whole(file: Path) -> bool:
    """Whether a shared object reaches to the end of its table of sections, which linkers put last."""
    with file.open("rb") as f:
        head = f.read(64)
    if head[:5] != b"\x7fELF\x02" or len(head) < 64:
        return sys.platform != "linux" and bool(head)
    order = "<" if head[5] == 1 else ">"
    (table,), (size, count) = struct.unpack_from(f"{order}Q", head, 40), struct.unpack_from(f"{order}HH", head, 58)
    return file.stat().st_size >= table + size * count


def told(error: BaseException | None) -> str:
    """All that an error and its causes say."""
    texts: list[str] = []
    while error is not None and len(texts) < 10:
        texts.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


def clear(cache: Path, text: str) -> None:
    """Delete our cache; of a user's own cache only the files that the text names. What this process holds of it is forgotten."""
    if cache == ours():
        shutil.rmtree(cache, ignore_errors=True)
    else:
        for name in set(re.findall(rf"{re.escape(str(cache))}[^\s:'\",]*", text)):
            Path(name).unlink(missing_ok=True)
    from torch._inductor import codecache

    for held in [each for each in vars(codecache).values() if isinstance(each, type)]:
        forget: Any = getattr(held, "cache_clear", None)
        if callable(forget):
            forget()
