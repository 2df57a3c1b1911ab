"""Tiny reference models that ship with hasten, their tasks, and the scripts that train and measure them.

`path(name)` is the directory of a shipped model, an ordinary transformers checkpoint. This module imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hasten.values import UserError, did_you_mean


@dataclass(frozen=True, slots=True)
class Spec:
    """What a model is and what made it.

    tokens: of training, with prompts (0: as many as there are labels); seed: of weights and data; start: the model it begins from.
    """

    kind: str  # "policy", "reward" or "text"
    width: int
    inner: int
    layers: int
    heads: int
    tokens: int
    seed: int
    start: str | None = None
    decay: float = 0.5  # last share of training in which the rate falls to zero
    rate: float = 0.004  # Muon's
    adam: float = 0.003  # AdamW's, of embeddings and norms
    exit: int = (
        0  # layers that draft for it: it is trained so that its first layers alone can answer (`hasten.zoo.layerskip`); 0: it is not
    )

    @property
    def vocabulary(self) -> int:
        """Number of tokens: words of the arithmetic task, or those of `hasten.zoo.python`."""
        return 1024 if self.kind == "text" else 46

    @property
    def positions(self) -> int:
        return 1024 if self.kind == "text" else 256


NAMES: dict[str, Spec] = {
    "arith-xs": Spec("policy", width=64, inner=160, layers=3, heads=4, tokens=13_000_000, seed=1),
    "arith-s": Spec("policy", width=96, inner=256, layers=3, heads=6, tokens=10_000_000, seed=2),
    "arith-m": Spec("policy", width=96, inner=256, layers=9, heads=6, tokens=3_400_000, seed=3, start="arith-s"),
    "arith-m-exit": Spec("policy", width=96, inner=256, layers=9, heads=6, tokens=3_400_000, seed=7, start="arith-s", exit=3),
    "arith-prm-s": Spec("reward", width=96, inner=256, layers=6, heads=6, tokens=0, seed=4, start="arith-s"),
    "python-s": Spec("text", width=160, inner=448, layers=1, heads=5, tokens=5_500_000, seed=5, rate=0.02, adam=0.008),
    "python-m": Spec("text", width=160, inner=448, layers=12, heads=5, tokens=3_400_000, seed=6, start="python-s", rate=0.01, adam=0.004),
}


def spec(name: str) -> Spec:
    """The Spec of a name; raises UserError with the nearest name for an unknown one."""
    if name not in NAMES:
        raise UserError(f"the zoo has no model {name!r}{did_you_mean(name, NAMES)}")
    return NAMES[name]


def path(name: str) -> Path:
    """The directory of a shipped model. Raises UserError with the nearest name, or with what to do when its weights are absent."""
    spec(name)
    directory = Path(__file__).parent / "models" / name
    if not (directory / "model.safetensors").is_file():
        raise UserError(
            f"the weights of {name} are not installed: run `hasten zoo train {name}`, or reinstall hasten with its package data"
        )
    return directory
