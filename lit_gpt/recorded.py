"""One-token steps on a GPU, recorded and replayed: to start a step's thousand kernels takes longer than they take."""

import warnings

import torch

from lit_gpt.cache import KVCache
from lit_gpt.model import GPT
from lit_gpt.rope import BY_LENGTH

FIRST = 4  # steps of the same rows before one is recorded, which takes as long as some of them


def fits(model: GPT, tokens: torch.Tensor) -> bool:
    """Whether a step does the same work for every token, and on the GPU whose kernels can be recorded."""
    config = model.config
    by_length = (config.rope_scaling or {}).get("rope_type") in BY_LENGTH
    here = tokens.is_cuda and tokens.get_device() == torch.cuda.current_device()
    return here and not (by_length or config.n_expert or torch.is_grad_enabled())


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
        _, groups, _, size = k.shape
        store = self.stores(layer, (groups, size, v.shape[-1]), k)
        for old, new in zip(store, (k, v), strict=True):
            old.transpose(1, 2)[self.rows, self.at] = new.transpose(1, 2).to(old.dtype)
        return store

    def advance(self, n_new: int) -> None:
        """Nothing: the other cache counts."""


class Recorded:
    """The step of one cache's rows. It runs as it is at first: much is set up on first use, and rows may soon end."""

    works = True  # whether no graph has failed yet in this process

    def __init__(self, cache: KVCache, tokens: torch.Tensor):
        self.places, self.tokens = Places(cache, tokens.device), torch.empty_like(tokens)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.n_run = 0

    def __call__(self, model: GPT, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self.tokens.copy_(tokens)
        self.places.at.copy_(positions)
        if self.graph is None and self.n_run >= FIRST and Recorded.works:
            self._record(model)
        if self.graph is None:
            self.n_run += 1
            return self._run(model)
        self.graph.replay()
        return self.logits

    def _run(self, model: GPT) -> torch.Tensor:
        logits: torch.Tensor = model(self.tokens, cache=self.places)[:, -1]
        return logits

    def _record(self, model: GPT) -> None:
        try:
            graph = torch.cuda.CUDAGraph()
            # A graph that fails may leave its own stream the current one.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                self.logits = self._run(model)
        except RuntimeError as problem:
            Recorded.works = False
            why = str(problem).partition("\n")[0]
            warnings.warn(f"a token's kernels are started one by one, since none can be recorded: {why}", stacklevel=2)
        else:
            self.graph = graph


def step(model: GPT, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Logits (B, V) after one more token per row (B, 1), which the next step writes over."""
    assert max(cache.lengths) < cache.capacity, f"the cache is full with {cache.capacity} tokens"
    if cache.recorded is None:
        cache.recorded = Recorded(cache, tokens)
    logits: torch.Tensor = cache.recorded(model, tokens, cache.positions(1))
    cache.advance(1)
    return logits
