"""The key/value cache of generation, owned by whoever generates."""

from typing import Any

import torch


class KVCache:
    """Keys and values of every layer, one row per sequence; rows may have different lengths.

    Right-padded prompts are allowed: `truncate` to the true lengths after the first pass, and the next tokens overwrite
    the padding, which no query has been able to see.
    """

    def __init__(self, n_layer: int, batch: int, capacity: int):
        self.capacity = capacity
        self.lengths = [0] * batch  # tokens stored per row
        self._positions: dict[int, torch.Tensor] = {}  # by the number of new tokens: every layer asks for the same
        self._stores: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * n_layer  # k, v (B, G, capacity, D)
        self.recorded: Any = None  # the step that a GPU replays on these stores, see recorded.py

    @property
    def ragged(self) -> bool:
        """Whether rows differ in length."""
        return len(set(self.lengths)) > 1

    def positions(self, n_new: int) -> torch.Tensor:
        """Positions (B, n_new) of the tokens that come next."""
        if n_new not in self._positions:
            self._positions[n_new] = torch.tensor(self.lengths)[:, None] + torch.arange(n_new)
        return self._positions[n_new]

    def stores(self, layer: int, sizes: tuple[int, int, int], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's room for keys (B, G, capacity, D) and values, made on first use; `sizes`: G, D, D of values."""
        store = self._stores[layer]
        if store is None:
            groups, *widths = sizes
            shapes = ((len(self.lengths), groups, self.capacity, width) for width in widths)
            k, v = (like.new_zeros(shape) for shape in shapes)
            store = self._stores[layer] = (k, v)
        return store

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new k and v (B, G, T, D) of a layer; returns all that is stored, (B, G, S, D)."""
        _, groups, n_new, size = k.shape
        store = self.stores(layer, (groups, size, v.shape[-1]), k)
        start, end = min(self.lengths), max(self.lengths) + n_new
        assert end <= self.capacity, f"{end} tokens do not fit a cache made for {self.capacity}"
        if start + n_new == end:  # all rows are equally long: a plain slice
            for old, new in zip(store, (k, v), strict=True):
                old[:, :, start:end] = new
        else:
            rows, at = torch.arange(len(self.lengths))[:, None].to(k.device), self.positions(n_new).to(k.device)
            for old, new in zip(store, (k, v), strict=True):
                old.transpose(1, 2)[rows, at] = new.transpose(1, 2)
        return store[0][:, :, :end], store[1][:, :, :end]

    def advance(self, n_new: int) -> None:
        """Count `n_new` stored tokens in, once every layer has been updated."""
        self.truncate([length + n_new for length in self.lengths])

    def truncate(self, lengths: list[int]) -> None:
        """Forget what lies beyond these lengths, one per row."""
        self.lengths = list(lengths)
        self._positions.clear()

    def select(self, rows: list[int]) -> None:
        """Keep only these rows: the sequences that are not finished."""
        self.recorded = None
        self.truncate([self.lengths[row] for row in rows])
        self._stores = [None if store is None else (store[0][rows], store[1][rows]) for store in self._stores]
