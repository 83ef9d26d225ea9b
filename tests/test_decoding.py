"""A model laid out for one-token steps says what it said before."""

import pytest
import torch
from conftest import PROCESSOR, without_pairs
from torch import nn

from lit_gpt import decoding, kernels, lora, quantization
from lit_gpt.cache import KVCache
from lit_gpt.config import Config
from lit_gpt.generation import decode_step, prefill
from lit_gpt.kernels import block as one_call
from lit_gpt.kernels import few_tokens, rows, tiles
from lit_gpt.lora import LoRASettings
from lit_gpt.model import GPT, Linear
from lit_gpt.surgery import swap

# Where it should be there it has to be: a kernel that no longer compiles fails its tests instead of skipping them.
needs_kernel = pytest.mark.skipif(
    PROCESSOR not in kernels.PROCESSORS or not rows.available(), reason="neither AVX2 nor AVX512, or no C compiler"
)
pytestmark = [pytest.mark.usefixtures("processor"), without_pairs]


@needs_kernel
@torch.no_grad()
@pytest.mark.parametrize("kind", ["bnb.nf4", "bnb.nf4-dq", "bnb.fp4"])
@pytest.mark.parametrize(("n", "k"), [(1, 64), (33, 192), (64, 1024)])
@pytest.mark.parametrize("tokens", [1, 3, few_tokens.MOST_TOKENS_4BIT])
def test_few_tokens_are_multiplied_as_dequantizing_first_would(kind: str, n: int, k: int, tokens: int) -> None:
    torch.manual_seed(0)
    layer = quantization.quantize(torch.randn(n, k), kind)
    assert isinstance(layer, quantization.Linear4bit)
    assert decoding.FewTokensLinear4bit.fits(layer)
    x = torch.randn(tokens, k).bfloat16()
    expected = x.double() @ layer.dense(torch.float32).double().T
    ours = decoding.FewTokensLinear4bit(layer)(x[None])
    assert ours.shape == (1, tokens, n)
    assert ours.dtype == torch.bfloat16
    # Two roundings to 8 bits, of the levels and of the result: each 2 ** -9 of the terms at most.
    bound = 2**-8 * (x.double().abs() @ layer.dense(torch.float32).double().abs().T)
    assert ((ours[0].double() - expected).abs() <= bound).all()


@needs_kernel
@torch.no_grad()
def test_a_layer_keeps_its_bias_and_larger_batches_take_the_other_way() -> None:
    layer = quantization.quantize(torch.randn(8, 64), "bnb.nf4")
    layer.bias = nn.Parameter(torch.randn(8).bfloat16(), requires_grad=False)
    fast = decoding.FewTokensLinear4bit(layer)  # type: ignore[arg-type]
    for tokens in (2, few_tokens.MOST_TOKENS_4BIT + 1):
        x = torch.randn(tokens, 64).bfloat16()
        torch.testing.assert_close(fast(x), layer(x), atol=0.1, rtol=0.02)
    x = torch.randn(2, 64)
    assert torch.equal(fast(x), layer(x))  # in float32 nothing changes


@needs_kernel
@torch.no_grad()
def test_tokens_that_do_not_lie_end_to_end_are_read_right() -> None:
    layer = quantization.quantize(torch.randn(512, 64), "bnb.nf4")
    fast = decoding.FewTokensLinear4bit(layer)  # type: ignore[arg-type]
    x = torch.randn(64, 8).bfloat16().t()
    assert not x.is_contiguous()
    assert torch.equal(fast(x), fast(x.contiguous()))
    plain = decoding.FewTokensLinear(nn.Linear(64, 16, bias=False, dtype=torch.bfloat16))
    x = torch.randn(64, 2, 2).bfloat16().permute(2, 1, 0)
    assert torch.equal(plain(x), plain(x.contiguous()))


def test_rows_that_are_no_whole_blocks_do_not_fit() -> None:
    layer = quantization.quantize(torch.randn(4, 96), "bnb.nf4")
    assert not decoding.FewTokensLinear4bit.fits(layer)  # type: ignore[arg-type]


def tiny(kind: str | None = None, skip: tuple[str, ...] = (), **changes: object) -> GPT:
    torch.manual_seed(1)
    sizes = {"block_size": 64, "vocab_size": 96, "n_layer": 2, "n_head": 4, "n_query_groups": 2, "n_embd": 64}
    model = GPT(Config(**sizes | changes)).bfloat16().eval().requires_grad_(False)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.normal_(1, 0.2)
    if kind:
        swap(
            model,
            lambda name, module: quantization.quantizable(name, module, kind) and not name.endswith(skip or "none"),
            lambda name, module: quantization.quantize(module.weight.detach(), kind),  # type: ignore[arg-type]
        )
    return model


@torch.no_grad()
@pytest.mark.skipif(not tiles.available(), reason="no matrix tiles, or no C compiler")
@pytest.mark.parametrize(("n", "k"), [(16, 32), (48, 96), (192, 576)])
@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 32, 50, tiles.MOST_TOKENS])
def test_tokens_in_tiles_are_multiplied_as_in_float64(tokens: int, n: int, k: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, k).bfloat16(), torch.randn(n, k).bfloat16()
    assert tiles.fits(tokens, weight.shape)
    expected = x.double() @ weight.double().t()
    bound = 2**-8 * (x.double().abs() @ weight.double().abs().t())
    assert ((tiles.product(x, weight).double() - expected).abs() <= bound).all()
    assert not any(tiles.fits(*other) for other in ((0, (n, k)), (65, (n, k)), (1, (n - 1, k)), (1, (n, k - 1))))


@torch.inference_mode()
def steps(model: GPT, prompts: list[list[int]]) -> torch.Tensor:
    """The logits of three one-token steps, and the keys and values of the last layer after them."""
    cache = KVCache(model.config.n_layer, len(prompts), 16)
    prefill(model, prompts, cache, torch.device("cpu"))
    logits = [decode_step(model, torch.full((len(prompts), 1), token), cache) for token in (9, 17, 4)]
    stored = cache.stores(model.config.n_layer - 1, (0, 0, 0), logits[0])
    return torch.cat([t.flatten().float() for t in (*logits, *stored)])


@pytest.mark.parametrize("kind", [None, "bnb.nf4"])
@pytest.mark.parametrize("prompts", [[[1, 2, 3]], [[1, 2, 3], [4, 5, 6, 7, 8]]], ids=["one", "batch"])
def test_the_laid_out_model_agrees(kind: str | None, prompts: list[list[int]]) -> None:
    model = tiny(kind)
    before = steps(model, prompts)
    decoding.lay_out(model)
    assert not any(type(module) is Linear for module in model.modules())
    torch.testing.assert_close(steps(model, prompts), before, atol=0.03, rtol=0)  # numbers of size 1: seen 0.008


@needs_kernel
@pytest.mark.parametrize(
    ("skip", "in_one"),
    [
        (("mlp.proj",), True),
        (("attn.q", "attn.k", "attn.v", "mlp.proj"), True),
        (("attn.k",), False),
        (("mlp.up",), False),
    ],
    ids=str,
)
@pytest.mark.parametrize("prompts", [[[1, 2, 3]], [[1, 2, 3], [4, 5, 6, 7, 8]]], ids=["one", "batch"])
def test_a_model_of_which_some_layers_are_in_full_agrees(skip: tuple, in_one: bool, prompts: list[list[int]]) -> None:
    model = tiny("bnb.nf4", skip)
    before = steps(model, prompts)
    decoding.lay_out(model)
    assert [isinstance(block, decoding.DecodeBlock) for block in model.transformer.h] == [in_one, in_one]
    torch.testing.assert_close(steps(model, prompts), before, atol=0.03, rtol=0)


def test_weights_that_are_stored_transposed_are_read_right() -> None:
    model = tiny()
    before = steps(model, [[1, 2, 3]])
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.t().contiguous().t()
    decoding.lay_out(model)
    torch.testing.assert_close(steps(model, [[1, 2, 3]]), before, atol=0.03, rtol=0)


def test_layers_take_no_tokens() -> None:
    layer = decoding.FewTokensLinear(nn.Linear(64, 32).bfloat16())
    with torch.no_grad():
        assert layer(torch.empty(1, 0, 64, dtype=torch.bfloat16)).shape == (1, 0, 32)


@needs_kernel
@pytest.mark.parametrize(
    "changes",
    [
        {"head_size": 24},  # no whole vectors
        {"rotary_percentage": 0.5},
        {"n_query_groups": 4, "n_embd": 96, "intermediate_size": 80},
        {"attention_scale": 0.05, "norm_eps": 0.1},
        {"sliding_layers": [True, False], "sliding_window": 2, "n_layer": 2},
        {"rope_layers": [False, True]},
        {"qkv_bias": True},
        {"qk_norm": "head"},
        {"norm_offset": 1.0},
        {"activation": "gelu"},
    ],
    ids=str,
)
@pytest.mark.parametrize("prompts", [[[1, 2, 3]], [[1, 2, 3], [4, 5], [6, 7, 8]]], ids=["one", "batch"])
def test_one_call_per_block_agrees_wherever_it_is_used(changes: dict, prompts: list[list[int]]) -> None:
    model = tiny(**changes)
    usual = [decoding.DecodeBlock.fits(block) for block in model.transformer.h]
    assert usual == [False, False]  # before the layers are laid out
    before = steps(model, prompts)
    decoding.lay_out(model)
    in_one = [isinstance(block, decoding.DecodeBlock) for block in model.transformer.h]
    expected = {"sliding_layers": [False, True], "rope_layers": [False, True]}
    others = ("qkv_bias", "qk_norm", "norm_offset", "activation")
    assert in_one == expected.get(next(iter(changes)), [next(iter(changes)) not in others] * 2)
    torch.testing.assert_close(steps(model, prompts), before, atol=0.03, rtol=0)


@pytest.mark.skipif(not (tiles.available() and few_tokens.available()), reason="no matrix tiles, or no C compiler")
def test_one_call_per_block_gives_the_numbers_of_its_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny(), [[n] * (n % 7 + 1) for n in range(37)]
    decoding.lay_out(model)
    calls = []
    in_one = one_call.tokens
    monkeypatch.setattr(one_call, "tokens", lambda *told: calls.append(told) or in_one(*told))  # type: ignore[func-returns-value]
    together = steps(model, prompts)
    assert len(calls) == 3 * model.config.n_layer
    for place, block in enumerate(model.transformer.h):
        assert isinstance(block, decoding.DecodeBlock)
        model.transformer.h[place] = block.block
    assert torch.equal(steps(model, prompts), together)


@needs_kernel
@pytest.mark.parametrize("kind", [None, "bnb.nf4"])
@pytest.mark.parametrize("prompts", [[[1, 2, 3]], [[1, 2, 3], [4, 5], [6, 7, 8]]], ids=["one", "batch"])
@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize(("targets", "r"), [(("query", "value"), 3), (("key", "projection", "mlp"), 40)])
def test_one_call_per_block_knows_an_adapter(
    kind: str | None,
    prompts: list[list[int]],
    tiled: bool,
    targets: tuple,
    r: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not tiled:
        monkeypatch.setattr(tiles, "_library", lambda: None)
    elif not tiles.available():
        pytest.skip("no matrix tiles, or no C compiler")
    model = tiny(kind)
    without = steps(model, prompts)
    lora.attach(model, LoRASettings(r=r, alpha=16, targets=targets))
    for name, factor in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(factor, 0, 1.5 / r**0.5)
    before = steps(model.eval(), prompts)
    decoding.lay_out(model)
    assert all(isinstance(block, decoding.DecodeBlock) for block in model.transformer.h)
    together = steps(model, prompts)
    assert (together - without).norm() > 0.2 * without.norm()
    assert (together - before).norm() <= 0.015 * before.norm()  # roundings to 8 bits; seen 0.0075


@needs_kernel
@torch.no_grad()
@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 31), (33, 192), (64, 1000)])
@pytest.mark.parametrize("tokens", [1, 2, 3, few_tokens.AT_ONCE, 2 * few_tokens.AT_ONCE + 1])
def test_few_tokens_are_multiplied_as_in_float64(tokens: int, n: int, k: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, k).bfloat16(), torch.randn(n, k).bfloat16()
    expected = x.double() @ weight.double().t()
    bound = 2**-8 * (x.double().abs() @ weight.double().abs().t())
    assert ((few_tokens.product(x, weight).double() - expected).abs() <= bound).all()
