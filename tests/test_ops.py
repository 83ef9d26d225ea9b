"""Each fast body, in C and in torch, against its plain twin: values and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from lit_gpt import lora, ops, rope
from lit_gpt.kernels import rows
from lit_gpt.lora import LoRALinear, LoRASettings
from lit_gpt.ops import Layout

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}  # of the largest number


def both(fast, plain, *inputs: torch.Tensor, tolerance: float | None = None) -> None:
    """Same outputs, and same gradients for one random seed of the way back."""
    results = []
    for function in (fast, plain):
        leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        out = function(*leaves)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype))
        results.append([out.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)])
    for got, expected in zip(*results, strict=True):
        limit = TOLERANCE[expected.dtype] if tolerance is None else tolerance
        assert (got - expected).abs().max() <= limit * expected.abs().max()


@pytest.fixture(autouse=True, params=["in C", "in torch"])
def body(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "in torch":
        monkeypatch.setattr(ops, "in_c", lambda x: False)
    elif not rows.available():
        pytest.skip("no C compiler")
    torch.manual_seed(0)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trains", [True, False])
def test_rms_norm(dtype: torch.dtype, trains: bool) -> None:
    x = torch.randn(2, 7, 48, dtype=dtype, requires_grad=True)
    weight = (torch.randn(48, dtype=dtype) + 1).requires_grad_(trains)
    both(lambda *a: ops.rms_norm(*a, 1e-5), lambda *a: ops.rms_norm_reference(*a, 1e-5), x, weight)


def test_rms_norm_rounds_under_autocast_as_the_layer_that_reads_it() -> None:
    x, weight = torch.randn(3, 64), torch.randn(64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.rms_norm(x, weight, 1e-5), ops.rms_norm_reference(x, weight, 1e-5).bfloat16())
        assert ops.rms_norm(x.half(), weight, 1e-5).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_silu(dtype: torch.dtype) -> None:
    gate, up = (torch.randn(5, 33, dtype=dtype, requires_grad=True) for _ in range(2))
    both(lambda *a: ops.gated("silu", *a), ops.gated_silu_reference, gate, up)


@pytest.mark.parametrize("share", [16, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation(share: int, dtype: torch.dtype) -> None:
    cos, sin = (t.to(dtype) for t in rope.table(torch.arange(9)[None], share, 1e4, None, 64, 9))
    x = torch.randn(2, 9, 3, 16, dtype=dtype).transpose(1, 2).requires_grad_()
    both(lambda x: ops.rotate(x, cos, sin), lambda x: ops.rotate_reference(x, cos, sin), x)


def reference_attention(lengths, scale, window=None, branch=None):
    """Row by row in float64, with the definition written out; `branch` is a number for each token of one row."""

    def attend(q, k, v):
        out = []
        for a, b, c in zip(*(x.double().split(list(lengths), dim=2) for x in (q, k, v)), strict=True):
            keys, values = (x.repeat_interleave(a.shape[1] // x.shape[1], dim=1) for x in (b, c))
            hidden = torch.ones(a.shape[2], a.shape[2], dtype=torch.bool).triu(1)
            if window is not None:
                hidden |= torch.ones_like(hidden).tril(-window)
            if branch is not None:
                hidden |= (branch != 0) & (branch != branch[:, None])
            out.append((a @ keys.mT * scale).masked_fill(hidden, float("-inf")).softmax(-1) @ values)
        return torch.cat(out, dim=2)

    return attend


@pytest.mark.parametrize("lengths", [(5,), (256,), (257,), (300, 1, 520, 256)])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_attention_in_blocks(lengths: tuple[int, ...], groups: int) -> None:
    layout = Layout.of(torch.zeros(1, sum(lengths), dtype=torch.long), lengths)
    q, k, v = (torch.randn(1, sum(lengths), n, 16).transpose(1, 2) for n in (6, groups, groups))

    def fast(q, k, v):
        return ops._CPUAttention.apply(q, k, v, 0.3, None, layout)

    def through_ops(q, k, v):
        return ops.attention(q, k, v, scale=0.3, layout=layout)

    reference = reference_attention(lengths, 0.3)
    both(fast, lambda *a: reference(*a).float(), *(x.requires_grad_() for x in (q, k, v)))
    both(through_ops, reference, *(x.detach().double().requires_grad_() for x in (q, k, v)), tolerance=1e-12)
    half = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    both(through_ops, lambda *a: reference(*a).bfloat16(), *half)
    assert "CPUAttention" in type(through_ops(*half).grad_fn).__name__  # so it was the fast body that was tested


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [24, 64, 80])  # of a head: less than two vectors, whole ones, more
@pytest.mark.parametrize("window", [2, 7, 32, 33])
def test_attention_within_a_window(window: int, size: int, dtype: torch.dtype) -> None:
    lengths = (5, 32, 70, 1)
    layout = Layout.of(torch.zeros(1, sum(lengths), dtype=torch.long), lengths)
    q, k, v = (torch.randn(1, sum(lengths), n, size, dtype=dtype).transpose(1, 2).requires_grad_() for n in (4, 2, 2))
    reference = reference_attention(lengths, 0.3, window)
    both(
        lambda *a: ops.attention(*a, scale=0.3, layout=layout, window=window),
        lambda *a: reference(*a).to(dtype),
        *(q, k, v),
    )


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_branches(dtype: torch.dtype) -> None:
    branch = torch.tensor([0] * 37 + [1] * 5 + [2] + [3] * 40)
    q, k, v = (torch.randn(1, 2 * 83, n, 16, dtype=dtype).transpose(1, 2) for n in (4, 2, 2))
    positions = torch.arange(83).repeat(2)[None]  # any that rise within a branch will do where there is no window
    ours = ops.attention(q, k, v, scale=0.3, layout=Layout(positions, 83, (83, 83), branch.repeat(2)[None]))
    expected = reference_attention((83, 83), 0.3, branch=branch)(q, k, v)
    assert (ours - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


def test_attention_of_long_rows_in_bfloat16() -> None:
    lengths = (ops._CPUAttention.LONGEST_BACK + 7,)
    layout = Layout.of(torch.zeros(1, *lengths, dtype=torch.long))
    q, k, v = (torch.randn(1, *lengths, n, 16).bfloat16().transpose(1, 2).requires_grad_() for n in (2, 1, 1))
    reference = reference_attention(lengths, 0.3)
    both(lambda *a: ops.attention(*a, scale=0.3, layout=layout), lambda *a: reference(*a).bfloat16(), q, k, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 5), (37, 300)])
def test_causal_softmax_and_its_gradient(dtype: torch.dtype, queries: int, keys: int) -> None:
    scores = (torch.randn(2, 3 * queries, keys) * 9).to(dtype)
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1).repeat(3, 1)

    class Ours(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            weights = ops.causal_softmax(x.clone(), queries, 0.2)
            ctx.save_for_backward(weights)
            return weights

        @staticmethod
        def backward(ctx, grad):
            return ops.causal_softmax_backward(grad.clone(), *ctx.saved_tensors, queries, 0.2)

    def plain(x):
        return (x.float() * 0.2).masked_fill(hidden, float("-inf")).softmax(-1).to(x.dtype)

    both(Ours.apply, plain, scores.requires_grad_())
    assert not Ours.apply(scores).masked_select(hidden).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_none_stay_visible(dtype: torch.dtype, value: float) -> None:
    x = torch.randn(4, 64).to(dtype)
    x[1, 3] = value
    ones = torch.ones_like(x)
    losses, _gradient = ops.cross_entropy(x, torch.zeros(4, dtype=torch.long), True)
    expected = F.cross_entropy(x.double(), torch.zeros(4, dtype=torch.long), reduction="none")
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=0, equal_nan=True)
    for got, wanted in (
        (ops.gated("silu", x, ones), F.silu(x.double())),
        (ops.gated("silu", ones, x), F.silu(ones.double()) * x),
        (ops.rms_norm(x, ones[0], 1e-5), ops.rms_norm_reference(x, ones[0], 1e-5)),
    ):
        assert torch.equal(got.isfinite(), wanted.to(dtype).isfinite())


def test_numbers_that_do_not_lie_end_to_end_are_read_right() -> None:
    x, weight = torch.randn(6, 16).t(), torch.randn(12)[::2]
    assert torch.allclose(ops.rms_norm(x, weight, 1e-5), ops.rms_norm_reference(x, weight, 1e-5), atol=1e-5)
    labels = torch.randint(0, 6, (32,))[::2]
    losses, gradient = ops.cross_entropy(x, labels, True)
    logits = x.clone().requires_grad_()
    expected = F.cross_entropy(logits, labels, reduction="none")
    expected.sum().backward()
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-5, atol=1e-6)


def test_numbers_of_kinds_that_the_fast_bodies_do_not_know() -> None:
    x, weight = torch.randn(4, 8), torch.randn(8)
    expected = ops.rms_norm_reference(x, weight, 1e-5)
    torch.testing.assert_close(ops.rms_norm(x, weight.double(), 1e-5), expected)
    torch.testing.assert_close(ops.gated("silu", x[:1], x), F.silu(x[:1]) * x)
    torch.testing.assert_close(ops.gated("silu", x, x.bfloat16()), F.silu(x) * x.bfloat16())
    scores = torch.randn(3, 5)
    hidden = torch.ones(3, 5, dtype=torch.bool).triu(3)
    wanted = (-0.7 * scores).masked_fill(hidden, float("-inf")).softmax(-1)
    torch.testing.assert_close(ops.causal_softmax(scores.clone(), 3, -0.7), wanted)


def test_silu_of_very_negative_numbers_is_nothing() -> None:
    x, up = torch.tensor([-3e38, -1e37, -60.0]), torch.tensor([1.0, 1.0, 1e37])
    expected = (F.silu(x.double()) * up).float()  # the last: 60 * exp(-60) * 1e37 = 5e12
    torch.testing.assert_close(ops.gated("silu", x, up), expected, rtol=1e-5, atol=1e-30)


def test_a_label_out_of_range_does_not_go_unseen(body: str) -> None:
    logits, labels = torch.randn(2, 5), torch.tensor([1, 5])
    if body == "in torch":
        with pytest.raises(RuntimeError, match="out of bounds"):
            ops.cross_entropy(logits, labels, True)
        return
    losses, gradient = ops.cross_entropy(logits, labels, True)
    assert gradient is not None
    assert losses.isnan().tolist() == [False, True]
    assert gradient.isnan().all(-1).tolist() == [False, True]


@pytest.mark.parametrize("lengths", [None, (4, 0, 3)])
def test_attention_without_tokens(lengths: tuple[int, ...] | None) -> None:
    n = sum(lengths or ())
    q, k, v = (torch.randn(1, heads, n, 8) for heads in (4, 2, 2))
    layout = Layout.of(torch.zeros(1, n, dtype=torch.long), lengths)
    y = ops.attention(q, k, v, scale=0.3, layout=layout)
    kept = [length for length in lengths or () if length]
    expected = reference_attention(kept, 0.3)(q, k, v).float() if kept else q
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_nothing_is_computed_of_nothing(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, dtype=torch.bfloat16)
    assert ops.rms_norm(x, torch.ones(8, dtype=torch.bfloat16), 1e-5).shape == shape
    assert ops.gated("silu", x, x).shape == shape


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 2, 16), (6, 1, 7), (3, 3, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_one_cached_query_each(
    dtype: torch.dtype, heads: int, groups: int, size: int, window: int | None
) -> None:
    """Rows of different lengths in one store, whose unused places hold numbers too."""
    places, capacity = torch.tensor([[6], [0], [10]]), 15
    q = torch.randn(3, 1, heads, size).to(dtype).transpose(1, 2)
    keys, values = (torch.randn(3, groups, capacity, size).to(dtype) for _ in range(2))
    layout = Layout(places, 11, cached=True, ragged=True)
    y = ops.attention(q, keys[:, :, :11], values[:, :, :11], scale=0.3, layout=layout, window=window)
    for row, place in enumerate(places[:, 0].tolist()):
        seen = slice(0 if window is None else max(0, place + 1 - window), place + 1)
        k, v = (x[row, :, seen].double().repeat_interleave(heads // groups, dim=0) for x in (keys, values))
        expected = (q[row].double() @ k.mT * 0.3).softmax(-1) @ v
        assert (y[row].double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


def test_attention_in_blocks_of_a_padded_batch() -> None:
    layout = Layout.of(torch.zeros(2, 270, dtype=torch.long))
    q, k, v = (torch.randn(2, 270, n, 16).transpose(1, 2).requires_grad_() for n in (4, 2, 2))
    both(
        lambda *a: ops._CPUAttention.apply(*a, 0.25, None, layout),
        lambda *a: reference_attention((270,), 0.25)(*a).float(),
        *(q, k, v),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_and_its_gradient(dtype: torch.dtype) -> None:
    logits = (torch.randn(9, 300) * 5).to(dtype).requires_grad_()
    labels = torch.randint(0, 300, (9,))
    before = logits.detach().clone()
    losses, gradient = ops.cross_entropy(logits.detach(), labels, True)
    expected = F.cross_entropy(logits.float(), labels, reduction="none")
    expected.sum().backward()
    assert torch.equal(logits, before)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-6, atol=1e-6)
    assert gradient is not None
    torch.testing.assert_close(gradient, logits.grad, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3,), (2, 1029), (64, 513)])  # whole pieces and what is left of them
def test_dropout_drops_what_its_seed_says(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=dtype)
    drawn = ops.draw_dropout(x, 0.3)
    expected = x * ops.dropout_mask_reference(x, drawn, 0.3)
    assert torch.equal(ops.dropped(x, drawn, 0.3), expected)
    assert torch.equal(ops.dropped(x.t(), drawn, 0.3), x.t() * ops.dropout_mask_reference(x.t(), drawn, 0.3))
    assert torch.equal(ops.dropped(x.clone(), drawn, 0.3, inplace=True), expected)


def test_dropout_repeats_with_the_random_state() -> None:
    x = torch.ones(400)
    seen = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        seen.append(ops.dropped(x, ops.draw_dropout(x, 0.5), 0.5))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_dropout_of_all_but_everything_drops_everything() -> None:
    x = torch.ones(1000)
    assert ops.dropped(x, ops.draw_dropout(x, 0.999999), 0.999999).sum() <= 1


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_drops_its_share_independently(p: float) -> None:
    x = torch.ones(1000, 1001)
    mask = ops.dropped(x, ops.draw_dropout(x, p), p) != 0
    n = mask.numel()
    assert float(mask.float().mean()) == pytest.approx(1 - p, abs=4 * (p * (1 - p) / n) ** 0.5)
    for step in (1, 4, 1001):  # neighbours, numbers of one draw, numbers below one another
        flat = mask.flatten()
        both_dropped = (~flat[:-step] & ~flat[step:]).float().mean()
        assert float(both_dropped) == pytest.approx(p * p, abs=5 * p / n**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_lora_update_is_the_definition(dtype: torch.dtype, p: float) -> None:
    layer = LoRALinear(torch.nn.Linear(24, 40, dtype=dtype), LoRASettings(r=4, alpha=6, dropout=p))
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 5, 24, dtype=dtype)
    torch.manual_seed(7)
    mask = ops.dropout_mask_reference(x, ops.draw_dropout(x, p), p) if p else torch.ones_like(x, dtype=torch.bool)
    a, b = layer.lora_A.detach().requires_grad_(), layer.lora_B.detach().requires_grad_()

    def fast(x, a, b):
        torch.manual_seed(7)
        return lora._Update.apply(layer.base(x), x, a, b, layer.scaling, p)

    def plain(x, a, b):
        seen = x.float() * mask / (1 - p)
        return layer.base(x) + (seen @ a.T @ b.T * layer.scaling).to(dtype)

    both(fast, plain, x.requires_grad_(), a, b, tolerance=3e-2 if dtype == torch.bfloat16 else 1e-5)
    torch.manual_seed(7)
    assert torch.equal(layer(x), fast(x, layer.lora_A, layer.lora_B))


def test_a_head_that_trains_is_not_differentiated_where_only_the_loss_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = torch.nn.Linear(8, 20)
    x, labels = torch.randn(1, 5, 8), torch.randint(0, 20, (1, 5))
    arguments = (head, list(head.parameters()), x, labels, torch.arange(5))
    expected = ops.head_loss(*arguments)
    monkeypatch.setattr(torch.autograd, "grad", None)  # nobody may call it
    with torch.no_grad():
        assert torch.equal(ops.head_loss(*arguments), expected)
    with torch.inference_mode():
        assert torch.equal(ops.head_loss(*arguments), expected)
