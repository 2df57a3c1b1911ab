"""Counter-based randomness: every random number is a pure function of (seed, path, position, purpose).

No generator state exists, so a result never depends on what else is in a batch, on the order of work, or on a restart. The mixing
function is the 64-bit finaliser of MurmurHash3/SplitMix64 (Steele, Lea, Flood 2014); on tensors it runs in wrapping int64, the same on every device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(x: int) -> int:
    """One round of SplitMix64's finaliser on a 64-bit integer."""
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * _M1) & _MASK
    x = ((x ^ (x >> 27)) * _M2) & _MASK
    return x ^ (x >> 31)


def key(*parts: int | str) -> int:
    """A 64-bit key of a stream from integers and words, for example `key(seed, sample, position, "token")`."""
    h = 0
    for part in parts:
        if isinstance(part, str):
            for byte in part.encode():
                h = mix(h ^ byte)
        else:
            h = mix(h ^ (part & _MASK))
    return h


def uniform(*parts: int | str) -> float:
    """One number in (0, 1) with 53 random bits."""
    return ((key(*parts) >> 11) + 0.5) * 2.0**-53


def integer(high: int, *parts: int | str) -> int:
    """One integer in [0, high)."""
    return key(*parts) % high


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def uniforms(keys: torch.Tensor, columns: int) -> torch.Tensor:
    """keys [R] int64 (stream keys, as signed) -> [R, columns] float64 in (0, 1): entry (r, c) depends on keys[r] and c alone."""
    import torch

    c = torch.arange(columns, device=keys.device, dtype=torch.int64) * _signed(_GOLDEN)
    x = keys[:, None] + c[None, :]
    for shift, factor in ((30, _M1), (27, _M2)):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(_signed(factor))
    x.bitwise_xor_((x >> 31).bitwise_and_((1 << 33) - 1))
    return (x >> 11).bitwise_and_((1 << 53) - 1).to(torch.float64).add_(0.5).mul_(2.0**-53)


def gumbel(keys: list[int], columns: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Standard Gumbel noise [len(keys), columns] in float64, one stream a key: argmax(log p + noise) is a sample of p (Gumbel-max)."""
    import torch

    k = torch.tensor([_signed(x) for x in keys], dtype=torch.int64, device=device)
    if columns * len(keys) <= 1 << 17:
        return uniforms(k, columns).log_().neg_().log_().neg_()
    return torch.cat([uniforms(k[i : i + 1], columns).log_().neg_().log_().neg_() for i in range(len(keys))])
