"""Small steps through `torch.compile` (Ansel et al. 2024, PyTorch 2), and on a GPU replayed as CUDA graphs: the same tokens, to rounding.

Compiling takes seconds to minutes when a step is first met; what the compiler made is kept for the next process. Where it cannot be done there
is one warning, and steps are done as they were. `lm/compiled.py` says how.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from hasten import hf
from hasten.values import UserError, did_you_mean


@dataclass(frozen=True)
class Options:
    """rows: positions in a compiled step at most; larger steps (prompts) go through torch as before. backend: of `torch.compile`; "none": none,
    which leaves CUDA graphs. graphs: replay CUDA graphs, on a GPU.
    """

    rows: int = 64
    backend: str = "inductor"
    graphs: bool = True


def why_not(options: Options, target: Any) -> str | None:
    if options.rows < 1:
        return f"compile: rows={options.rows}: must be at least 1"
    known = ["none", *torch.compiler.list_backends(None)]
    if options.backend not in known:
        return f"compile: torch has no backend {options.backend!r} here{did_you_mean(options.backend, known)}"
    return None


def build(options: Options, target: Any) -> Any:
    """A copy of the model (weights shared) whose small steps are compiled when they are first met."""
    if getattr(target.model, "small_step", None) is not None:
        raise UserError("compile: small steps of this model are one call into C++ already; leave out native, or take int8(fused=false)")
    return hf.derived(target.model, ("compile", options, torch.get_num_threads()), lambda: compiled(target.model, options))


def compiled(model: Any, options: Options) -> Any:
    from hasten.lm import inductor
    from hasten.lm.compiled import CompiledStep
    from hasten.lm.graphs import Graphs

    cuda, backend = model.device.type == "cuda", options.backend
    lacks = inductor.lacks(model.device.type) if backend == "inductor" else None
    if lacks:
        warnings.warn(f"compile: nothing is compiled, {lacks}", RuntimeWarning, stacklevel=2)
        backend = "none"
    graphs = Graphs if cuda and options.graphs else None
    if backend == "none" and graphs is None:
        return model
    twin = hf.shared_copy(model)
    return hf.stepped(twin, CompiledStep(twin, rows=options.rows, backend=backend, graphs=graphs))
