"""Each fast body, in C and in torch, against its plain twin: values and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from bodies import both
from torch.utils._python_dispatch import TorchDispatchMode

from lit_gpt import lora, ops, products, rope
from lit_gpt.config import Config
from lit_gpt.lora import LoRALinear, LoRASettings
from lit_gpt.model import GPT

pytestmark = pytest.mark.usefixtures("body")


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("shape", [(2, 7, 24), (1, 1, 24), (0, 24)])
def test_linear_is_the_definition(
    shape: tuple[int, ...], trains: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "WIDENED", 100)  # 13 rows are four pieces
    x, weight, bias = (torch.randn(size, dtype=dtype, requires_grad=True) for size in (shape, (13, 24), (13,)))
    y = products.linear(x, weight.requires_grad_(trains), bias)
    y.backward(seed := torch.randn_like(y))
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, weight, bias)]
    expected = F.linear(*exact)
    expected.backward(seed.double())
    assert y.dtype == dtype
    for got, wanted in ((y, expected), *((a.grad, b.grad) for a, b in zip((x, weight, bias), exact, strict=True))):
        assert (got is None) == (wanted is None)
        if got is not None and wanted is not None:
            largest = wanted.abs().max() if wanted.numel() else 0
            assert ((got.double() - wanted).abs() <= 2 * torch.finfo(dtype).eps * largest).all()


def test_linear_rounds_under_autocast_as_torch_does(body: str) -> None:
    x, weight, bias = torch.randn(3, 7, 24), torch.randn(13, 24, requires_grad=True), torch.randn(13)
    with torch.autocast("cpu", torch.bfloat16):
        y = products.linear(x, weight, bias)
        expected = F.linear(x, weight, bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=2**-7)
    if body == "wide":
        assert "_Linear" in type(y.grad_fn).__name__  # so it was this that was tested
    y.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(weight.grad, x.bfloat16().float().sum((0, 1)).expand(13, -1), rtol=2**-7, atol=2**-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nothing_is_multiplied_in_16_bits_where_it_is_slow(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the model's products nor attention's, of any kind, nor what autocast could round again."""
    monkeypatch.setattr(products, "SLOW", {torch.bfloat16, torch.float16})
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(word in str(func) for word in ("mm", "attention", "matmul")):
                seen.extend(t.dtype for t in args if isinstance(t, torch.Tensor))
            return func(*args, **(kwargs or {}))

    for changes in ({}, {"attention_softcap": 5.0, "attention_scale": 0.2}, {"qkv_bias": True, "sliding_window": 3}):
        model = GPT(Config(block_size=64, vocab_size=96, n_layer=2, n_head=4, n_query_groups=2, n_embd=64, **changes))
        lora.attach(model, LoRASettings(r=4, targets=("query", "mlp", "head")))
        tokens = torch.randint(0, 96, (1, 20))
        with Watch():
            with torch.autocast("cpu", dtype):
                loss = model(tokens, labels=tokens, lengths=(12, 8))
            loss.backward()
    assert seen
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
)
@pytest.mark.parametrize("scale", [1.0, 0.22])
def test_a_residual_sum_is_torchs(dtype: torch.dtype, kind: torch.dtype, scale: float) -> None:
    x = torch.randn(3, 700, dtype=dtype, requires_grad=True)
    update = torch.randn(3, 700, dtype=kind, requires_grad=True)
    both(lambda *a: ops.residual(*a, scale), lambda *a: torch.add(*a, alpha=scale), x, update, tolerance=2**-8)
    y = ops.residual(x, update, 1.0)
    assert torch.equal(y, x + update)  # rounded alike, too
    wider = ops.residual(x.detach().bfloat16(), update.detach().float(), scale)
    assert wider.dtype == torch.float32


@pytest.mark.parametrize("share", [16, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation(share: int, dtype: torch.dtype) -> None:
    cos, sin = (t.to(dtype) for t in rope.table(torch.arange(9)[None], share, 1e4, None, 64, 9))
    x = torch.randn(2, 9, 3, 16, dtype=dtype).transpose(1, 2).requires_grad_()
    both(lambda x: ops.rotate(x, cos, sin), lambda x: ops.rotate_reference(x, cos, sin), x)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_none_stay_visible(dtype: torch.dtype, value: float) -> None:
    x = torch.randn(4, 64).to(dtype)
    x[1, 3] = value
    ones = torch.ones_like(x)
    losses, _gradient = ops.cross_entropy(x.clone(), torch.zeros(4, dtype=torch.long), True)
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
    logits = x.clone().requires_grad_()
    losses, gradient = ops.cross_entropy(x, labels, True)
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


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_nothing_is_computed_of_nothing(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, dtype=torch.bfloat16)
    assert ops.rms_norm(x, torch.ones(8, dtype=torch.bfloat16), 1e-5).shape == shape
    assert ops.gated("silu", x, x).shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_and_its_gradient(dtype: torch.dtype) -> None:
    logits = (torch.randn(9, 300) * 5).to(dtype).requires_grad_()
    labels = torch.randint(0, 300, (9,))
    losses, gradient = ops.cross_entropy(logits.detach().clone(), labels, True)
    kept = logits.detach().clone()
    assert torch.equal(ops.cross_entropy(kept, labels, False)[0], losses)
    assert torch.equal(kept, logits)  # only a gradient takes their place
    expected = F.cross_entropy(logits.float(), labels, reduction="none")
    expected.sum().backward()
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
    layer = LoRALinear(torch.nn.Linear(24, 40, dtype=dtype), LoRASettings(r=4, alpha=6, dropout=p))  # too odd for C
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
    x, labels = torch.randn(5, 8), torch.randint(0, 20, (5,))
    arguments = (head, list(head.parameters()), x, labels)
    expected = ops.head_loss(*arguments)
    monkeypatch.setattr(torch.autograd, "grad", None)  # nobody may call it
    with torch.no_grad():
        assert torch.equal(ops.head_loss(*arguments), expected)
    with torch.inference_mode():
        assert torch.equal(ops.head_loss(*arguments), expected)
