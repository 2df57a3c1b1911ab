"""Around torch's compiler: where it keeps what it made, what it lacks here, and how a cache that was cut off in mid-write is mended."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
# what loaders, linkers and readers say of a file that ends too early
CORRUPT = re.compile(
    r"file too short|invalid ELF header|cannot read file data|file truncated|file format not recognized|ELF load command|"
    r"Ran out of input|pickle data was truncated|unexpected end of file",
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
    try:
        return make()
    except Exception as e:  # torch wraps what the loader says in errors of its own
        if not CORRUPT.search(told(e)):
            raise
        clear(cache, told(e))
    return make()


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
