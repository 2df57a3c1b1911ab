"""What a technique learns from data, in one format: a directory with `artifact.json` (kind, fingerprint, files with their SHA-256),
`arrays.safetensors`, and `info.json`. It is written under a temporary name and renamed, and refused where it does not fit.

A fingerprint is a mapping of what the artifact depends on: `{"model": model_fingerprint(path), "settings": {…}, "data": digest}`.
No pickle is written or read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.values import UserError

if TYPE_CHECKING:
    import torch

MANIFEST, ARRAYS, INFO = "artifact.json", "arrays.safetensors", "info.json"
_WHOLE, _BLOCK, _SAMPLES = 64 << 20, 64 << 10, 64  # files up to 64 MiB are hashed whole, larger ones at 64 places of 64 KiB


@dataclass(frozen=True)
class Artifact:
    """arrays: tensors by name, on the CPU. info: plain JSON. digest: names the artifact's content; a recipe refers to it as `DIR#digest`."""

    path: Path
    kind: str
    fingerprint: Mapping[str, Any]
    arrays: Mapping[str, torch.Tensor] = field(default_factory=dict)
    info: Any = None
    digest: str = ""

    @property
    def reference(self) -> str:
        """`DIR#digest`: what a recipe holds, so that another artifact in its place is noticed."""
        return f"{self.path}#{self.digest[:16]}"


def save(
    path: str | Path,
    kind: str,
    fingerprint: Mapping[str, Any],
    arrays: Mapping[str, torch.Tensor] | None = None,
    info: Any = None,
    created_by: str = "hasten",
) -> Artifact:
    """Write an artifact, replacing an older one at that place. UserError if the place holds something else. All or nothing."""
    path = Path(path)
    if path.exists() and not (path / MANIFEST).is_file():
        raise UserError(f"{path}: exists and is not an artifact, so it is not overwritten")
    with replacing(path) as new:
        if arrays:
            from safetensors.torch import save_file

            save_file({name: array.detach().cpu().contiguous().clone() for name, array in arrays.items()}, new / ARRAYS)
        if info is not None:
            (new / INFO).write_text(json.dumps(info, indent=1, sort_keys=True), "utf-8")
        files = {file.name: _sha256(file) for file in sorted(new.iterdir())}
        manifest = {"kind": kind, "fingerprint": dict(fingerprint), "files": files, "created_by": created_by}
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", "utf-8")
    return load(path, kind, fingerprint)


def load(path: str | Path, kind: str, fingerprint: Mapping[str, Any]) -> Artifact:
    """Read an artifact of that kind. UserError if it is missing or damaged, of another kind, or was made for something else; the message
    names the part of the fingerprint that differs. path may be a reference `DIR#digest`, whose digest must then match.
    """
    place, _, digest = str(path).partition("#")
    where = Path(place)
    manifest, found = _manifest(where)
    if not found.startswith(digest):
        raise UserError(f"{where}: this is not the artifact the recipe names (its digest is {found[:16]}, not {digest})")
    if manifest["kind"] != kind:
        raise UserError(f"{where}: holds {manifest['kind']!r}, and {kind!r} is needed")
    if wrong := _differing(manifest["fingerprint"], json.loads(json.dumps(dict(fingerprint)))):
        raise UserError(f"{where}: was made for another {wrong}, so it does not fit here; make it again")
    for name, digest_of_file in manifest["files"].items():
        if not (where / name).is_file() or _sha256(where / name) != digest_of_file:
            raise UserError(f"{where}: {name} is missing or damaged; make the artifact again")
    return Artifact(where, kind, manifest["fingerprint"], _arrays(where), _info(where), found)


def model_fingerprint(path: str | Path) -> str:
    """64 hex digits for a model directory, from its configuration and its weights (large files by size and 64 places, so this takes
    milliseconds). UserError if there is no such model.
    """
    path = Path(path)
    config = path / "config.json"
    if not config.is_file():
        raise UserError(f"{path}: not a model directory (it has no config.json)")
    weights = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".bin", ".pt"))
    return hashlib.sha256("\n".join([_sha256(config), *map(_quick, weights)]).encode()).hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new directory that takes the place of `path` when the block ends, and vanishes if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield new
        new.chmod(0o755)  # mkdtemp makes it private
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            os.replace(path, old)  # a directory may replace an empty one
            os.replace(new, path)
            shutil.rmtree(old)
        else:
            os.replace(new, path)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        new.write_text(text, "utf-8")
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def _manifest(path: Path) -> tuple[dict[str, Any], str]:
    try:
        text = (path / MANIFEST).read_text("utf-8")
        manifest = json.loads(text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return {key: manifest[key] for key in ("kind", "fingerprint", "files")}, digest
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no artifact here") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise UserError(f"{path}: its {MANIFEST} is damaged; make the artifact again") from None


def _differing(have: Mapping[str, Any], want: Mapping[str, Any]) -> str | None:
    """The name of the first part that differs, else None."""
    return next((key for key in sorted({*have, *want}) if have.get(key) != want.get(key)), None)


def _arrays(path: Path) -> dict[str, torch.Tensor]:
    if not (path / ARRAYS).is_file():
        return {}
    from safetensors.torch import load_file

    return load_file(path / ARRAYS)


def _info(path: Path) -> Any:
    return json.loads((path / INFO).read_text("utf-8")) if (path / INFO).is_file() else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _quick(path: Path) -> str:
    """Name, size and content of a weight file; of a large one, the content at evenly spread places, its header included."""
    size = path.stat().st_size
    if size <= _WHOLE:
        return f"{path.name} {size} {_sha256(path)}"
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for i in range(_SAMPLES):
            file.seek((size - _BLOCK) * i // (_SAMPLES - 1))
            digest.update(file.read(_BLOCK))
    return f"{path.name} {size} {digest.hexdigest()}"
