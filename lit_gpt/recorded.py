"""One-token steps on a GPU, recorded once and replayed: starting a step's thousand kernels takes longer than they."""

import warnings

import torch

from lit_gpt.cache import KVCache
from lit_gpt.model import GPT
from lit_gpt.rope import BY_LENGTH


def fits(model: GPT, tokens: torch.Tensor) -> bool:
    """Whether a step does the same work for every token, and on a GPU, where that can be recorded."""
    config = model.config
    by_length = (config.rope_scaling or {}).get("rope_type") in BY_LENGTH
    return tokens.is_cuda and not (by_length or config.n_expert or torch.is_grad_enabled())


class Places(KVCache):
    """Another cache's stores, in which a token's place is looked up when the step is replayed.

    Keys are always as many as the stores hold, those beyond a token hidden from it.
    """

    ragged = True

    def __init__(self, cache: KVCache, device: torch.device):
        batch = len(cache.lengths)
        super().__init__(len(cache._stores), batch, cache.capacity)
        self._stores, self.lengths = cache._stores, [cache.capacity - 1] * batch
        self.rows = torch.arange(batch, device=device)[:, None]
        self.at = torch.zeros_like(self.rows)

    def positions(self, n_new: int) -> torch.Tensor:
        return self.at

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        store = self._stores[layer]
        assert store is not None
        for old, new in zip(store, (k, v), strict=True):
            old.transpose(1, 2)[self.rows, self.at] = new.transpose(1, 2)
        return store

    def advance(self, n_new: int) -> None:
        """Nothing: the other cache counts."""


class Recorded:
    """The step of one cache. It runs once as it is, since much is set up on first use, before it is recorded."""

    def __init__(self, cache: KVCache, tokens: torch.Tensor):
        self.places, self.tokens = Places(cache, tokens.device), torch.empty_like(tokens)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.has_run = self.fails = False

    def __call__(self, model: GPT, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self.tokens.copy_(tokens)
        self.places.at.copy_(positions)
        if self.graph is None and self.has_run and not self.fails:
            self._record(model)
        if self.graph is None:
            self.has_run = True
            return self._run(model)
        self.graph.replay()
        return self.logits

    def _run(self, model: GPT) -> torch.Tensor:
        logits: torch.Tensor = model(self.tokens, cache=self.places)[:, -1]
        return logits

    def _record(self, model: GPT) -> None:
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.logits = self._run(model)
        except RuntimeError as problem:
            self.fails = True
            warnings.warn(
                f"a token's kernels are started one by one, since none can be recorded: {problem}", stacklevel=2
            )
        else:
            self.graph = graph


def step(model: GPT, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Logits (B, V) after one more token per row (B, 1), which the next step writes over."""
    if cache.recorded is None:
        cache.recorded = Recorded(cache, tokens)
    logits: torch.Tensor = cache.recorded(model, tokens, cache.positions(1))
    cache.advance(1)
    return logits
