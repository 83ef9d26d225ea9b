"""Products of many tokens with a weight, in C as by torch: the definition in float64, forward and back."""

import pytest
import torch

from lit_gpt import products
from lit_gpt.kernels import products as own

pytestmark = pytest.mark.usefixtures("processor")
DTYPES = [torch.float32, torch.bfloat16]
# Tokens that leave a rest of every block; sides whose lines are whole pages apart, which are laid out anew.
SHAPES = [(own.FEWEST, 32, 32), (own.FEWEST + 1, 96, 32), (77, 32, 2048), (131, 2048, 64), (100, 160, 1536)]


@pytest.fixture
def in_c(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Products in C wherever this processor has them, be they faster or not; the dtypes of those that ran."""
    monkeypatch.setattr(own, "_by_amd", lambda: True)
    monkeypatch.setattr(products, "SLOW", frozenset())
    ran: list[torch.dtype] = []
    product = own.product
    monkeypatch.setattr(own, "product", lambda x, *rest, **how: (ran.append(x.dtype), product(x, *rest, **how))[1])
    return ran


def near(got: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether each number is within six roundings of the largest; torch's were seen at three, ours at four."""
    return bool(((got.double() - exact).abs() <= 6 * torch.finfo(got.dtype).eps * exact.abs().max()).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_is_the_definition(
    shape: tuple[int, int, int], biased: bool, dtype: torch.dtype, in_c: list[torch.dtype]
) -> None:
    torch.manual_seed(0)
    n, n_in, n_out = shape
    x = torch.randn(1, n, n_in, dtype=dtype, requires_grad=True)
    weight, bias = torch.randn(n_out, n_in, dtype=dtype), torch.randn(n_out, dtype=dtype) if biased else None
    y = products.linear(x, weight, bias)
    grad = torch.randn_like(y)
    y.backward(grad)
    exact = x.detach().double() @ weight.double().t() + (0 if bias is None else bias.double())
    assert y.dtype == dtype
    assert near(y, exact)
    assert x.grad is not None
    assert near(x.grad, grad.double() @ weight.double())
    assert in_c == [dtype, dtype] * own.pays(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_has_the_same_numbers_among_others(dtype: torch.dtype, in_c: list[torch.dtype]) -> None:
    if not own.pays(dtype):
        pytest.skip("torch multiplies here")
    weight = torch.randn(96, 64, dtype=dtype)
    for back in (False, True):
        x = torch.randn(200, 96 if back else 64, dtype=dtype)
        many = own.product(x, weight, back=back)
        for start, stop in ((0, 64), (1, 70), (131, 200)):
            assert torch.equal(own.product(x[start:stop], weight, back=back), many[start:stop])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_does_not_fit_is_left_to_torch(dtype: torch.dtype, in_c: list[torch.dtype]) -> None:
    x, weight = torch.randn(own.FEWEST, 64, dtype=dtype), torch.randn(32, 64, dtype=dtype)
    for y, w in (
        (x[1:], weight),  # too few tokens
        (x[:, :48], weight[:, :48].contiguous()),  # sides with a rest
        (x, weight[:30]),
        (x[:, ::2].contiguous(), weight[:, ::2]),  # not end to end
        (x.new_zeros(0, 64), weight),
    ):
        assert (
            near(products.linear(y, w), y.double() @ w.double().t()) if len(y) else products.linear(y, w).numel() == 0
        )
    assert in_c == []
    products.linear(x, weight)
    with torch.no_grad():
        products.linear(x, weight)
    assert in_c == [dtype, dtype] * own.pays(dtype)


def test_a_frozen_layer_keeps_nothing_of_its_input(in_c: list[torch.dtype]) -> None:
    kept: list[torch.Tensor] = []
    x, weight = torch.randn(own.FEWEST, 64, requires_grad=True), torch.randn(32, 64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        products.linear(x, weight)
    assert [t.shape for t in kept] == [weight.shape]


def test_sides_that_do_not_match_are_refused_as_torch_does(in_c: list[torch.dtype]) -> None:
    weight = torch.randn(32, 64)
    for x, bias in ((torch.randn(40, 128), None), (torch.randn(40, 32), None), (torch.randn(40, 64), torch.randn(31))):
        with pytest.raises(RuntimeError):
            products.linear(x, weight, bias)
    assert in_c == []
    x = torch.randn(64)
    assert torch.allclose(products.linear(x, weight.requires_grad_()), weight @ x, atol=1e-4)
    with pytest.raises(AssertionError):
        own.product(torch.randn(40, 128), weight)
