"""Attention, in C and in torch, against its definition: values and every gradient."""

import pytest
import torch
from bodies import TOLERANCE, both
from conftest import KINDS
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lit_gpt import attention, ops
from lit_gpt.attention import Layout
from lit_gpt.kernels import attention as fused

BODIES = [
    ("in torch", next(iter(KINDS))),
    *(("in C", kind) for kind in KINDS),
    *(("wide", kind) for kind in list(KINDS)[:2]),
]
pytestmark = [
    pytest.mark.usefixtures("body", "processor"),
    pytest.mark.parametrize(("body", "processor"), BODIES, indirect=True),
]


@pytest.mark.skipif(not fused.available(), reason="no C compiler")
def test_pairs_are_multiplied_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 2, 40, 64).bfloat16()
    results = []
    for pairs in (False, True):
        monkeypatch.setattr(fused, "in_pairs", lambda pairs=pairs: pairs)
        results.append(fused.attention(q, q, q, (40,), 0.3, None, None))
    assert torch.equal(*results) != fused._FUNCTIONS.with_pairs  # weights that were rounded give other sums


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
        return attention._CPUAttention.apply(q, k, v, 0.3, None, layout)

    def chosen(q, k, v):
        return attention.attend(q, k, v, scale=0.3, layout=layout)

    reference = reference_attention(lengths, 0.3)
    both(fast, lambda *a: reference(*a).float(), *(x.requires_grad_() for x in (q, k, v)))
    both(chosen, reference, *(x.detach().double().requires_grad_() for x in (q, k, v)), tolerance=1e-12)
    half = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    both(chosen, lambda *a: reference(*a).bfloat16(), *half)
    assert "CPUAttention" in type(chosen(*half).grad_fn).__name__  # so it was the fast body that was tested


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [24, 64, 80])  # of a head: less than two vectors, whole ones, more
@pytest.mark.parametrize("window", [2, 7, 32, 33])
def test_attention_within_a_window(window: int, size: int, dtype: torch.dtype) -> None:
    lengths = (5, 32, 70, 1)
    layout = Layout.of(torch.zeros(1, sum(lengths), dtype=torch.long), lengths)
    q, k, v = (torch.randn(1, sum(lengths), n, size, dtype=dtype).transpose(1, 2).requires_grad_() for n in (4, 2, 2))
    reference = reference_attention(lengths, 0.3, window)
    both(
        lambda *a: attention.attend(*a, scale=0.3, layout=layout, window=window),
        lambda *a: reference(*a).to(dtype),
        *(q, k, v),
    )


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_branches(dtype: torch.dtype) -> None:
    branch = torch.tensor([0] * 37 + [1] * 5 + [2] + [3] * 40)
    q, k, v = (torch.randn(1, 2 * 83, n, 16, dtype=dtype).transpose(1, 2) for n in (4, 2, 2))
    positions = torch.arange(83).repeat(2)[None]  # any that rise within a branch will do where there is no window
    ours = attention.attend(q, k, v, scale=0.3, layout=Layout(positions, 83, (83, 83), branch.repeat(2)[None]))
    expected = reference_attention((83, 83), 0.3, branch=branch)(q, k, v)
    assert (ours - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


def test_attention_of_long_rows_in_bfloat16() -> None:
    lengths = (attention._CPUAttention.LONGEST_BACK + 7,)
    layout = Layout.of(torch.zeros(1, *lengths, dtype=torch.long))
    q, k, v = (torch.randn(1, *lengths, n, 16).bfloat16().transpose(1, 2).requires_grad_() for n in (2, 1, 1))
    reference = reference_attention(lengths, 0.3)
    both(lambda *a: attention.attend(*a, scale=0.3, layout=layout), lambda *a: reference(*a).bfloat16(), q, k, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 5), (37, 300)])
def test_causal_softmax_and_its_gradient(dtype: torch.dtype, queries: int, keys: int) -> None:
    scores = (torch.randn(2, 3 * queries, keys) * 9).to(dtype)
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1).repeat(3, 1)

    class Ours(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            weights = attention.causal_softmax(x.clone(), queries, 0.2)
            ctx.save_for_backward(weights)
            return weights

        @staticmethod
        def backward(ctx, grad):
            return attention.causal_softmax_backward(grad.clone(), *ctx.saved_tensors, queries, 0.2)

    def plain(x):
        return (x.float() * 0.2).masked_fill(hidden, float("-inf")).softmax(-1).to(x.dtype)

    both(Ours.apply, plain, scores.requires_grad_())
    assert not Ours.apply(scores).masked_select(hidden).any()


@pytest.mark.parametrize("lengths", [None, (4, 0, 3)])
def test_attention_without_tokens(lengths: tuple[int, ...] | None) -> None:
    n = sum(lengths or ())
    q, k, v = (torch.randn(1, heads, n, 8) for heads in (4, 2, 2))
    layout = Layout.of(torch.zeros(1, n, dtype=torch.long), lengths)
    y = attention.attend(q, k, v, scale=0.3, layout=layout)
    kept = [length for length in lengths or () if length]
    expected = reference_attention(kept, 0.3)(q, k, v).float() if kept else q
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)


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
    y = attention.attend(q, keys[:, :, :11], values[:, :, :11], scale=0.3, layout=layout, window=window)
    for row, place in enumerate(places[:, 0].tolist()):
        seen = slice(0 if window is None else max(0, place + 1 - window), place + 1)
        k, v = (x[row, :, seen].double().repeat_interleave(heads // groups, dim=0) for x in (keys, values))
        expected = (q[row].double() @ k.mT * 0.3).softmax(-1) @ v
        assert (y[row].double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


def test_attention_in_blocks_of_a_padded_batch() -> None:
    layout = Layout.of(torch.zeros(2, 270, dtype=torch.long))
    q, k, v = (torch.randn(2, 270, n, 16).transpose(1, 2).requires_grad_() for n in (4, 2, 2))
    both(
        lambda *a: attention._CPUAttention.apply(*a, 0.25, None, layout),
        lambda *a: reference_attention((270,), 0.25)(*a).float(),
        *(q, k, v),
    )


def test_causal_softmax_by_a_negative_scale() -> None:
    scores = torch.randn(3, 5)
    hidden = torch.ones(3, 5, dtype=torch.bool).triu(3)
    wanted = (-0.7 * scores).masked_fill(hidden, float("-inf")).softmax(-1)
    torch.testing.assert_close(attention.causal_softmax(scores.clone(), 3, -0.7), wanted)


def varlen_as_told(q, k, v, starts, _, longest, __, *, scale, window_size):
    """What torch's documentation says of its kernel, which CPUs do not have."""
    assert window_size[1] == 0
    assert starts.dtype == torch.int32
    lengths = starts.diff().tolist()
    assert longest == max(lengths)
    window = None if window_size[0] == -1 else window_size[0] + 1
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return reference_attention(lengths, scale, window)(q, k, v).to(q.dtype)[0].transpose(0, 1)


@pytest.mark.parametrize("window", [None, 1, 7, 200])
def test_rows_on_a_gpu_are_one_call(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def kernel(*a, **k):
        calls.append(1)
        return varlen_as_told(*a, **k)

    monkeypatch.setattr(attention, "_kernel_of_varlen", lambda: kernel)
    lengths = (5, 1, 32, 12)
    layout = Layout.of(torch.zeros(1, 50, dtype=torch.long), lengths)
    q, k, v = (torch.randn(1, 50, n, 16, dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for n in (4, 2, 2))
    with ops.as_on("cuda"):
        both(
            lambda *a: attention.attend(*a, scale=0.3, layout=layout, window=window),
            lambda *a: reference_attention(lengths, 0.3, window)(*a).bfloat16(),
            *(q, k, v),
        )
    assert len(calls) == 1


class Operators(TorchDispatchMode):
    """Remembers which were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))


def test_torch_kernel_for_all_rows_takes_what_it_is_given() -> None:
    """Torch's own checks and shapes, on tensors without numbers."""
    if attention._kernel_of_varlen() is None:
        pytest.skip("this torch has no varlen_attn with windows and groups")
    layout = Layout.of(torch.zeros(1, 20, dtype=torch.long), (3, 17))
    with ops.as_on("cuda"), FakeTensorMode():
        q, k, v = (torch.empty(1, 20, n, 16).bfloat16().transpose(1, 2).requires_grad_() for n in (4, 2, 2))
        with Operators() as seen:
            y = attention.attend(q, k, v, scale=0.3, layout=layout, window=4)
            y.backward(torch.empty_like(y))
    assert [x.grad.shape for x in (q, k, v)] == [x.shape for x in (q, k, v)]
    assert {"torch_attn::_varlen_attn", "torch_attn::_varlen_attn_backward"} <= seen.names


def raises(*a, **k):
    raise RuntimeError("no such kernel for this GPU")


def sees_all_rows(q, k, v, starts, *rest, **more):
    return varlen_as_told(q, k, v, torch.tensor([0, len(q)], dtype=torch.int32), None, len(q), None, **more)


def sees_one_too_many(*a, window_size, **k):
    before, after = window_size
    return varlen_as_told(*a, window_size=(before + (before > 0), after), **k)


@pytest.mark.parametrize(
    ("kernel", "why"),
    [(raises, "no such kernel"), (sees_all_rows, "others"), (sees_one_too_many, "others"), (varlen_as_told, None)],
)
def test_a_kernel_must_show_that_it_is_right(kernel, why: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_kernel_of_varlen", lambda: kernel)
    attention.varlen_is_right.cache_clear()
    state = torch.get_rng_state()
    arguments = (torch.device("cpu"), torch.bfloat16, 4, 2, 16)
    with torch.inference_mode():
        if why is None:
            assert attention.varlen_is_right(*arguments)
        else:
            with pytest.warns(UserWarning, match=why):
                assert not attention.varlen_is_right(*arguments)
    assert torch.equal(torch.get_rng_state(), state)
    attention.varlen_is_right.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torch_kernel_for_all_rows_on_this_gpu(dtype: torch.dtype) -> None:
    if attention._kernel_of_varlen() is None:
        pytest.skip("this torch has no varlen_attn with windows and groups")
    assert attention.varlen_is_right(torch.device("cuda", 0), dtype, 9, 3, 64)


def test_the_trial_leaves_activation_checkpointing_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is held within the first block that runs: what it keeps for its own way back is none of the block's."""
    monkeypatch.setattr(attention, "_kernel_of_varlen", lambda: varlen_as_told)
    attention.varlen_is_right.cache_clear()

    def block(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        assert attention.varlen_is_right(torch.device("cpu"), torch.bfloat16, 4, 2, 16)
        return y.exp()

    x = torch.randn(5, requires_grad=True)
    checkpoint(block, x, use_reentrant=False).sum().backward()
    attention.varlen_is_right.cache_clear()
    torch.testing.assert_close(x.grad, x.detach().cos() * x.detach().sin().exp())
