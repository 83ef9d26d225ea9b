"""From a prompt to tokens: sampling, the decode step, and the loop, which is an iterator."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from lit_gpt import recorded
from lit_gpt.cache import KVCache
from lit_gpt.model import GPT

Step = Callable[[GPT, torch.Tensor, KVCache], torch.Tensor]


@dataclass
class Sampler:
    """How the next token is drawn from logits (B, V); the random state is its own.

    `temperature` 0 takes the likeliest. `top_k` keeps the k likeliest tokens; `top_p` the smallest set whose
    probabilities sum to p (Holtzman et al. 2020, arXiv:1904.09751). Raises ValueError for values out of range.
    """

    temperature: float = 0.8
    top_k: int | None = 200
    top_p: float = 1.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"--temperature must not be negative, and is {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"--top_k must be at least 1, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p must lie in (0, 1], not {self.top_p}")

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """One token per row, (B,)."""
        if self.temperature == 0:
            return greedy(logits)
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        if self.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True)
            probabilities = ordered.softmax(dim=-1)
            beyond = probabilities.cumsum(dim=-1) - probabilities >= self.top_p  # the likeliest always stays
            logits = logits.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=self.generator)[:, 0]


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest token of each row, the first of equals, (B,)."""
    return logits.max(dim=-1).indices  # in bfloat16 several times as fast as argmax


def decode_step(model: GPT, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Logits (B, V) after one more token per row (B, 1); on a GPU they last until the next step."""
    if recorded.fits(model, tokens):
        return recorded.step(model, tokens, cache)
    return model(tokens, cache=cache)[:, -1]


def prefill(model: GPT, prompts: Sequence[Sequence[int]], cache: KVCache, device: torch.device) -> torch.Tensor:
    """Logits (B, V) after the prompts, which may differ in length; only these are computed."""
    lengths = [len(prompt) for prompt in prompts]
    tokens = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    last = torch.arange(len(prompts)) * tokens.shape[1] + torch.tensor(lengths) - 1
    x = model.transformer(tokens.to(device), None, cache, where=last.to(device))
    cache.truncate(lengths)
    return model.head(x)


@torch.inference_mode()
def generate_batch(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampler: Callable[[torch.Tensor], torch.Tensor] = greedy,
    stop_ids: frozenset[int] = frozenset(),
    ends: Callable[[int, int], bool] = lambda row, token: False,
    step: Step = decode_step,
) -> Iterator[list[int | None]]:
    """Continue several prompts at once; yields one list per step: each row's next token, None once it has stopped.

    A stop token ends its row and is not yielded; `ends(row, token)` ends a row after a token that is. Rows that have
    stopped are no longer computed. Raises ValueError for an empty prompt, or one that fills the model's context.
    """
    block_size, longest = model.config.block_size, max(len(prompt) for prompt in prompts)
    if max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens must be at least 1, not {max_new_tokens}")
    if not all(prompts):
        raise ValueError("the prompt is empty")
    if longest >= block_size:
        raise ValueError(f"the prompt has {longest} tokens, and the model's context {block_size}; shorten the prompt")
    max_new_tokens = min(max_new_tokens, block_size - longest)
    device = model.transformer.wte.weight.device
    cache = KVCache(model.config.n_layer, len(prompts), longest + max_new_tokens)
    logits = prefill(model, prompts, cache, device)
    running, rows = list(range(len(prompts))), [list(prompt) for prompt in prompts]
    for produced in range(1, max_new_tokens + 1):
        drawn = sampler(logits).tolist()
        out: list[int | None] = [None] * len(prompts)
        alive = [place for place, token in enumerate(drawn) if token not in stop_ids]
        for place in alive:
            out[running[place]] = drawn[place]
        if alive:
            yield out
        alive = [place for place in alive if not ends(running[place], drawn[place])]
        if not alive or produced == max_new_tokens:
            return
        before = max(cache.lengths)
        if len(alive) < len(running):
            cache.select(alive)
            running, drawn = [running[place] for place in alive], [drawn[place] for place in alive]
        for row, token in zip(running, drawn, strict=True):
            rows[row].append(token)
        change = model.config.rotation_change
        if change is not None and (before > change) != (max(cache.lengths) + 1 > change):
            # What is cached was rotated for shorter texts, or for a longer one that has ended.
            cache = KVCache(model.config.n_layer, len(running), cache.capacity)
            logits = prefill(model, [rows[row] for row in running], cache, device)
            continue
        logits = step(model, torch.tensor(drawn, device=device)[:, None], cache)


def generate(
    model: GPT,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    sampler: Callable[[torch.Tensor], torch.Tensor] = greedy,
    stop_ids: frozenset[int] = frozenset(),
    step: Step = decode_step,
) -> Iterator[int]:
    """Continue one prompt, a token at a time; see `generate_batch`."""
    for (token,) in generate_batch(model, [prompt], max_new_tokens, sampler=sampler, stop_ids=stop_ids, step=step):
        assert token is not None
        yield token
