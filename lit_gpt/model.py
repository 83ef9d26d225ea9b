"""The one model: a decoder-only transformer whose families differ in data (`Config`), not in code.

Shapes: B sequences, T new tokens, S cached ones, C = n_embd, H heads, G query groups, D = head_size, V = vocab_size.
"""

from collections.abc import Sequence

import torch
from torch import nn

from lit_gpt import attention, ops, products, rope
from lit_gpt.attention import Layout
from lit_gpt.cache import KVCache
from lit_gpt.config import Config

IGNORE_INDEX = -100  # a label that asks nothing
Rotations = dict[
    bool, tuple[torch.Tensor, torch.Tensor]
]  # cos and sin; True: for sliding layers with a base of their own


class GPT(nn.Module):
    """Tokens in, logits or a loss out. It holds weights only: cache, sampler and random state are the caller's."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=config.head_bias)
        self.tie()

    def tie(self) -> None:
        """Make the head's weight the embedding's, where the config says so; needed again after weights are assigned."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    def forward(
        self,
        tokens: torch.Tensor,
        *,
        labels: torch.Tensor | None = None,
        where: torch.Tensor | None = None,
        lengths: Sequence[int] | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """Logits (B, T, V) of tokens (B, T); with `labels` (B, T), the summed cross entropy of the labelled positions.

        `where` (n,) are the labelled ones of the B * T positions; if absent they are looked up: a GPU has to wait.
        `lengths` says that one row (1, T) holds several sequences end to end. With `cache`, the tokens follow those
        that it holds, and are stored in it.
        """
        if labels is None:
            return self.head(self.transformer(tokens, lengths, cache))
        trained = [p for p in self.lm_head.parameters() if p.requires_grad]
        if where is None:
            where = (labels != IGNORE_INDEX).flatten().nonzero()[:, 0]
        x = self.transformer(tokens, lengths, cache, where=where)
        return ops.head_loss(self.head, trained, x, labels.flatten()[where])

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) of a state (..., C)."""
        logits = self.lm_head(x)
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        if (cap := self.config.logit_softcap) is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits


class Transformer(nn.Module):
    """Everything below the head."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.learned_positions else None
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = make_norm(config, config.n_embd)

    def forward(
        self,
        tokens: torch.Tensor,
        lengths: Sequence[int] | None = None,
        cache: KVCache | None = None,
        layout: Layout | None = None,
        where: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The state (B, T, C) that the head reads; arguments as `GPT.forward`'s, or `layout` in their place.

        With `where` (n,) only the states (n, C) of those of the B * T positions: once the last block's attention has
        looked at the others, nothing more depends on them.
        """
        layout = layout or Layout.of(tokens, lengths)
        if cache is not None:
            positions = cache.positions(tokens.shape[1]).to(tokens.device)
            layout = Layout(positions, max(cache.lengths) + tokens.shape[1], cached=True, ragged=cache.ragged)
        # The residual stream takes the norms' precision: under mixed precision that is float32 over a bfloat16 base.
        dtype = next(self.ln_f.parameters(), self.wte.weight).dtype
        x = self.wte(tokens).to(dtype)
        if self.wpe is not None:
            x = x + self.wpe(layout.positions).to(dtype)
        if self.config.embedding_scale != 1.0:
            x = x * torch.tensor(self.config.embedding_scale, dtype=dtype)  # rounded as in training
        rotations = self._rotations(layout, dtype)
        last = self.h[-1]
        for block in self.h:
            x = block(x, rotations, layout, cache, where if block is last else None)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.ln_f(x)

    def _rotations(self, layout: Layout, dtype: torch.dtype) -> Rotations:
        config = self.config
        if config.rope_size == 0:
            return {}

        def table(base: float, scaling: dict | None) -> tuple[torch.Tensor, torch.Tensor]:
            n, block_size = config.rope_size, config.block_size
            cos, sin = rope.table(layout.positions, n, base, scaling, block_size, layout.length)
            return cos.to(dtype), sin.to(dtype)

        rotations = {False: table(config.rope_base, config.rope_scaling)}
        if config.rope_local_base is not None:
            rotations[True] = table(config.rope_local_base, None)
        return rotations


def at(x: torch.Tensor, where: torch.Tensor | None) -> torch.Tensor:
    """x (B, T, C) itself, or its numbers (n, C) at `where`."""
    return x if where is None else x.flatten(0, 1).index_select(0, where)


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream; the norms stand before, after, or on both sides."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        before, after = config.norm_placement != "post", config.norm_placement != "pre"
        self.parallel = config.parallel_residual
        self.residual_scale = config.residual_scale
        self.norm_1 = make_norm(config, config.n_embd) if before else nn.Identity()
        self.attn = Attention(config, layer)
        self.post_norm_1 = make_norm(config, config.n_embd) if after else nn.Identity()
        self.norm_2 = make_norm(config, config.n_embd) if before and not config.shared_norm else nn.Identity()
        self.mlp = MLPS["moe" if config.has_experts(layer) else config.mlp](config)
        self.post_norm_2 = make_norm(config, config.n_embd) if after else nn.Identity()
        self.shared_norm = config.shared_norm

    def forward(
        self,
        x: torch.Tensor,
        rotations: Rotations,
        layout: Layout,
        cache: KVCache | None,
        where: torch.Tensor | None = None,
    ) -> torch.Tensor:
        normed = self.norm_1(x)
        attended = self.post_norm_1(self.attn(normed, rotations, layout, cache, where))
        x = at(x, where)
        if not self.parallel:
            x = ops.residual(x, attended, self.residual_scale)
            return ops.residual(x, self.post_norm_2(self.mlp(self.norm_2(x))), self.residual_scale)
        second = at(normed, where) if self.shared_norm else self.norm_2(x)
        return x + (attended + self.post_norm_2(self.mlp(second))) * self.residual_scale


class Attention(nn.Module):
    """Causal self-attention with grouped queries (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        width, kv_width = config.n_head * config.head_size, config.n_query_groups * config.head_size
        self.config, self.layer = config, layer
        self.q = Linear(config.n_embd, width, bias=config.qkv_bias)
        self.k = Linear(config.n_embd, kv_width, bias=config.qkv_bias)
        self.v = Linear(config.n_embd, kv_width, bias=config.qkv_bias)
        self.proj = Linear(width, config.n_embd, bias=config.proj_bias)
        if config.qk_norm is not None:
            per_head = config.qk_norm == "head"
            self.norm_q = make_norm(config, config.head_size if per_head else width)
            self.norm_k = make_norm(config, config.head_size if per_head else kv_width)

    def forward(
        self,
        x: torch.Tensor,
        rotations: Rotations,
        layout: Layout,
        cache: KVCache | None,
        where: torch.Tensor | None = None,
    ) -> torch.Tensor:
        config = self.config
        q, k, v = self.q(x), self.k(x), self.v(x)
        if config.qk_norm == "all":
            q, k = self.norm_q(q), self.norm_k(k)
        if config.clip_qkv is not None:
            q, k, v = (t.clamp(-config.clip_qkv, config.clip_qkv) for t in (q, k, v))
        q, k, v = (t.unflatten(-1, (-1, config.head_size)).transpose(1, 2) for t in (q, k, v))  # (B, H or G, T, D)
        if config.qk_norm == "head":
            q, k = self.norm_q(q), self.norm_k(k)
        window = config.window(self.layer)
        if config.rotates(self.layer):
            cos, sin = rotations[window is not None and True in rotations]
            q, k = ops.rotate(q, cos.to(q.dtype), sin.to(q.dtype)), ops.rotate(k, cos.to(k.dtype), sin.to(k.dtype))
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        y = attention.attend(
            q, k.to(q.dtype), v, scale=config.scale, layout=layout, window=window, softcap=config.attention_softcap
        )
        return self.proj(at(y.transpose(1, 2).flatten(2), where))  # (B, T, C), or (n, C)


class Linear(nn.Linear):
    """torch's, computed by `products.linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return products.linear(x, self.weight, self.bias)


class PlainMLP(nn.Module):
    """Two layers with an activation between."""

    def __init__(self, config: Config):
        super().__init__()
        self.fc = Linear(config.n_embd, config.intermediate_size, bias=config.mlp_bias)
        self.proj = Linear(config.intermediate_size, config.n_embd, bias=config.mlp_bias)
        self.activation = ops.ACTIVATIONS[config.activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.activation(self.fc(x)))


class GatedMLP(nn.Module):
    """The gated linear unit of Shazeer 2020 (arXiv:2002.05202)."""

    def __init__(self, config: Config, size: int | None = None):
        super().__init__()
        size = config.intermediate_size if size is None else size
        self.gate = Linear(config.n_embd, size, bias=config.mlp_bias)
        self.up = Linear(config.n_embd, size, bias=config.mlp_bias)
        self.proj = Linear(size, config.n_embd, bias=config.mlp_bias)
        self.activation = config.activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(ops.gated(self.activation, self.gate(x), self.up(x)))


class MoE(nn.Module):
    """Each token goes to its `n_expert_per_token` best experts (Mixtral, arXiv:2401.04088, section 2.1)."""

    def __init__(self, config: Config):
        super().__init__()
        self.router = Linear(config.n_embd, config.n_expert, bias=False)
        self.experts = nn.ModuleList(GatedMLP(config, config.expert_size) for _ in range(config.n_expert))
        self.n_chosen, self.norm_topk = config.n_expert_per_token, config.expert_norm_topk

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2)  # (B * T, C)
        weights, chosen = self.router(flat).softmax(dim=-1, dtype=torch.float32).topk(self.n_chosen, dim=-1)
        if self.norm_topk:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            row, rank = ops.tokens_of(index, chosen, len(self.experts))
            # Where something trains, those without tokens take part too: other devices wait for their gradients.
            if len(row) or torch.is_grad_enabled():
                out = out.index_add(0, row, (expert(flat[row]) * weights[row, rank, None]).to(out.dtype))
        return out.view_as(x)


class RMSNorm(nn.Module):
    """See `ops.rms_norm`; `offset` is added to the stored weight (Gemma keeps weight - 1)."""

    def __init__(self, size: int, config: Config):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - config.norm_offset))
        self.eps, self.offset = config.norm_eps, config.norm_offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x, self.weight + self.offset if self.offset else self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """torch's, with or without a bias (`norm_bias`)."""

    def __init__(self, size: int, config: Config):
        super().__init__(size, eps=config.norm_eps, bias=config.norm_bias)


class FixedLayerNorm(nn.LayerNorm):
    """A layer norm that has nothing to learn (OLMo 1)."""

    def __init__(self, size: int, config: Config):
        super().__init__(size, eps=config.norm_eps, elementwise_affine=False)


NORMS = {"rms": RMSNorm, "layer": LayerNorm, "fixed_layer": FixedLayerNorm}
MLPS = {"plain": PlainMLP, "gated": GatedMLP, "moe": MoE}


def make_norm(config: Config, size: int) -> nn.Module:
    return NORMS[config.norm](size, config)
