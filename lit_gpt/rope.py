"""Rotary positions (Su et al. 2021, arXiv:2104.09864) and the ways in which checkpoints stretch them.

A scaling rule turns the plain inverse frequencies (n/2,) into stretched ones and a factor on cos and sin. `length` is
the longest position in the batch plus one: two of the rules depend on it. Keys are those of HF's `rope_scaling`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

Scaled = tuple[torch.Tensor, float]
Rule = Callable[[torch.Tensor, float, dict[str, Any], int, int], Scaled]


def _plain(inv_freq: torch.Tensor, base: float, scaling: dict[str, Any], block_size: int, length: int) -> Scaled:
    return inv_freq, 1.0


def _linear(inv_freq: torch.Tensor, base: float, scaling: dict[str, Any], block_size: int, length: int) -> Scaled:
    """Positions divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""
    return inv_freq / scaling["factor"], 1.0


def _dynamic(inv_freq: torch.Tensor, base: float, scaling: dict[str, Any], block_size: int, length: int) -> Scaled:
    """NTK-aware: a larger base once the text is longer than the original context."""
    original = scaling.get("original_max_position_embeddings") or block_size
    if length <= original:
        return inv_freq, 1.0
    n = 2 * len(inv_freq)
    factor = scaling["factor"]
    stretched = base * (factor * length / original - (factor - 1)) ** (n / (n - 2))
    return frequencies(n, stretched, inv_freq.device), 1.0


def _llama3(inv_freq: torch.Tensor, base: float, scaling: dict[str, Any], block_size: int, length: int) -> Scaled:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between blended."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)  # full turns within the old context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return inv_freq * (kept + (1 - kept) / scaling["factor"]), 1.0


def _yarn(inv_freq: torch.Tensor, base: float, scaling: dict[str, Any], block_size: int, length: int) -> Scaled:
    """YaRN (Peng et al. 2023, arXiv:2309.00071), section 3.2 to 3.4: blend by the number of turns; hotter softmax."""
    n = 2 * len(inv_freq)
    original = scaling.get("original_max_position_embeddings") or block_size
    factor = scaling.get("factor") or block_size / original

    def dimension(turns: float) -> float:
        return n * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, n - 1)
    index = torch.arange(n // 2, dtype=torch.float32, device=inv_freq.device)
    ramp = ((index - low) / max(high - low, 0.001)).clamp(0, 1)

    def heat(weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = scaling.get("attention_factor")
    if attention is None:
        mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = heat(mscale) / heat(mscale_all) if mscale and mscale_all else heat()
    return inv_freq / factor * ramp + inv_freq * (1 - ramp), attention


def _longrope(inv_freq: torch.Tensor, base: float, scaling: dict[str, Any], block_size: int, length: int) -> Scaled:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): searched factors, one list up to the old context, one beyond."""
    original = scaling.get("original_max_position_embeddings") or block_size
    factor = scaling.get("factor") or block_size / original
    attention = scaling.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    each = scaling["long_factor"] if length > original else scaling["short_factor"]
    return inv_freq / torch.tensor(each, dtype=torch.float32, device=inv_freq.device), attention


SCALINGS: dict[str, Rule] = {
    "default": _plain,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}

BY_LENGTH = ("dynamic", "longrope")  # rules by which the length of a text changes the angles of all its tokens


def frequencies(n: int, base: float, device: torch.device | None = None) -> torch.Tensor:
    """Plain inverse frequencies (n/2,), float32."""
    return 1.0 / base ** (torch.arange(0, n, 2, dtype=torch.float32, device=device) / n)


def table(
    positions: torch.Tensor, n: int, base: float, scaling: dict[str, Any] | None, block_size: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (B, 1, T, n), float32, for positions (B, T), as `ops.rotate` takes them.

    Both halves of the last axis are the same angles; the first half of sin is negative.
    """
    scaling = scaling or {}
    rule = SCALINGS[scaling.get("rope_type", "default")]
    inv_freq, factor = rule(frequencies(n, base, positions.device), base, scaling, block_size, length)
    angles = positions[:, None, :, None].float() * inv_freq
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
