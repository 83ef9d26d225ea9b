"""What LoRA means: nothing at the start, the targets and nothing else, peft's numbers, and gone after merging."""

from pathlib import Path

import pytest
import torch
from twins import make_twin

from lit_gpt import checkpoint, lora, ops, quantization
from lit_gpt.kernels import lora as fused
from lit_gpt.kernels import rows
from lit_gpt.lora import LoRASettings
from lit_gpt.model import GPT

PEFT_NAMES = {  # our target -> peft's module names in Llama
    "query": ["q_proj"],
    "key": ["k_proj"],
    "value": ["v_proj"],
    "projection": ["o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
    "head": ["lm_head"],
}
ALL = tuple(lora.TARGETS)


def model_with(folder: Path, targets: tuple[str, ...], twin: str = "llama-grouped") -> GPT:
    make_twin(twin, folder)
    model = checkpoint.load_model(folder, torch.float32)
    lora.attach(model, LoRASettings(r=4, alpha=8, dropout=0.0, targets=targets))
    return model


def train_a_little(model: GPT, steps: int = 3) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    tokens = torch.randint(0, 101, (2, 16), generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        model(tokens, labels=tokens.roll(-1, dims=1)).backward()
        optimizer.step()


@torch.no_grad()
def test_does_nothing_at_the_start(tmp_path: Path) -> None:
    adapted = model_with(tmp_path, ALL).eval()
    tokens = torch.randint(0, 101, (2, 16))
    assert torch.equal(adapted(tokens), checkpoint.load_model(tmp_path, torch.float32).eval()(tokens))


@pytest.mark.parametrize("twin", ["llama-grouped", "llama-one-group-tied", "neox"])
@pytest.mark.parametrize("target", ALL)
def test_only_the_targeted_weights_move_and_merging_leaves_the_base_names(
    tmp_path: Path, target: str, twin: str
) -> None:
    model = model_with(tmp_path, (target,), twin)
    before = {
        name: tensor.clone() for name, tensor in checkpoint.load_model(tmp_path, torch.float32).state_dict().items()
    }
    train_a_little(model)
    tokens = torch.randint(0, 101, (2, 16))
    with torch.no_grad():
        unmerged = model.eval()(tokens)
        lora.merge(model)
        torch.testing.assert_close(model(tokens), unmerged, atol=2e-5, rtol=1e-5)
    after = model.state_dict()
    assert after.keys() == before.keys()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    ends = {"query": ".q", "key": ".k", "value": ".v", "projection": "attn.proj", "head": "lm_head"}
    mlp = (".gate", ".up", "mlp.proj") if twin.startswith("llama") else (".fc", "mlp.proj")
    wanted = tuple(f"{end}.weight" for end in (mlp if target == "mlp" else (ends[target],)))
    assert moved == {name for name in after if name.endswith(wanted)}
    assert moved


SEPARATE = ["mistral", "qwen2", "qwen3", "gemma2", "gemma3", "stablelm", "olmo2", "smollm3", "granite"]


@pytest.mark.parametrize(
    ("twin", "targets"),
    [("llama-grouped", ALL), ("llama-grouped", ("query", "value")), *((twin, ALL[:5]) for twin in SEPARATE)],
)
def test_loss_and_gradients_equal_pefts(tmp_path: Path, twin: str, targets: tuple[str, ...]) -> None:
    import peft

    theirs = make_twin(twin, tmp_path)
    names = [name for target in targets for name in PEFT_NAMES[target]]
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=names, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(theirs, config)
    ours = checkpoint.load_model(tmp_path, torch.float32)
    lora.attach(ours, LoRASettings(r=4, alpha=8, dropout=0.0, targets=targets))

    # One row of the weight table tells which of their factors is which of ours.
    weights = checkpoint.Weights.from_folder(tmp_path)
    pairs = {}
    for step in weights.steps:
        for factor in ("A", "B"):
            key = f"base_model.model.{step.theirs.removesuffix('.weight')}.lora_{factor}.default.weight"
            pairs[f"{step.ours[0].removesuffix('.weight')}.lora_{factor}"] = key
    mine = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    yours = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    assert {pairs[name] for name in mine} == set(yours)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            yours[pairs[name]].copy_(parameter)

    tokens = torch.randint(0, 101, (2, 24), generator=generator)
    expected = theirs(tokens, labels=tokens).loss
    loss = ours(tokens[:, :-1], labels=tokens[:, 1:]) / (2 * 23)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    expected.backward()
    loss.backward()
    for name, parameter in mine.items():
        torch.testing.assert_close(parameter.grad, yours[pairs[name]].grad, atol=1e-6, rtol=1e-4)


def test_factors_stay_float32_on_a_bfloat16_base(tmp_path: Path) -> None:
    make_twin("llama", tmp_path)
    model = checkpoint.load_model(tmp_path, torch.bfloat16)
    lora.attach(model, LoRASettings())
    dtypes = {name.rsplit(".", 1)[-1]: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes["lora_A"] == dtypes["lora_B"] == torch.float32
    assert dtypes["weight"] == torch.bfloat16
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(lora.adapter_state(model))


def test_trainable_parameters_of_a_known_model(tmp_path: Path) -> None:
    """SmolLM2-135M, r = 8 on query and value: 30 layers of (576 + 576 + 576 + 192) * 8."""
    from lit_gpt.config import Config

    config = Config(n_layer=30, n_head=9, n_query_groups=3, n_embd=576, intermediate_size=1536, vocab_size=49152)
    model = checkpoint.hollow(config)
    lora.attach(model, LoRASettings())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 460_800


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ("queries",)}, "queries"),
        ({"targets": ()}, "none is on"),
        ({"r": 0}, "lora_r"),
        ({"dropout": 1.0}, "lora_dropout"),
    ],
)
def test_wrong_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRASettings(**settings)


def test_factors_of_another_shape_are_all_named(tmp_path: Path) -> None:
    model = model_with(tmp_path, ("query", "value"))
    state = lora.adapter_state(model)
    state["transformer.h.0.attn.q.lora_A"] = torch.zeros(1, 1)
    state["transformer.h.9.attn.q.lora_A"] = torch.zeros(1, 1)
    del state["transformer.h.1.attn.v.lora_B"]
    with pytest.raises(ValueError, match=r"missing.*h\.1\.attn\.v\.lora_B.*unexpected.*h\.9.*\(1, 1\) instead of"):
        lora.load_adapter_state(model, state, "somewhere")


# Tokens that leave a rest of every block, ranks that have to be filled up.
@pytest.mark.usefixtures("processor")
@pytest.mark.skipif(not rows.available(), reason="no C compiler")
@pytest.mark.parametrize(
    "shape", [(1, 64, 96, 8), (2, 32, 32, 1), (37, 96, 64, 4), (131, 576, 192, 12), (150, 64, 1536, 16)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_update_in_c_is_the_definition(
    shape: tuple[int, int, int, int], dtype: torch.dtype, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    n, n_in, n_out, r = shape
    layer = lora.LoRALinear(torch.nn.Linear(n_in, n_out, dtype=dtype), LoRASettings(r=r, alpha=3 * r, dropout=p))
    torch.nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(1, n, n_in, dtype=dtype, requires_grad=True)
    ran: list[str] = []
    for name in ("update", "update_backward"):
        body = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *a, body=body, name=name, **k: (ran.append(name), body(*a, **k))[1])
    torch.manual_seed(7)
    y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    widened = dtype == torch.bfloat16 and not fused._as_pairs(x)
    assert ran == ["update", "update_backward"] * (r <= (fused.HIGHEST_WIDENED if widened else fused.HIGHEST))

    torch.manual_seed(7)
    kept = ops.dropout_mask_reference(x, ops.draw_dropout(x, p), p).double() if p else torch.ones_like(x).double()
    a, b = ((t.detach() * scale).to(dtype).double() for t, scale in ((layer.lora_A, 1 / (1 - p)), (layer.lora_B, 3.0)))
    seen, g = (kept * x.detach().double())[0], grad.double()[0]
    low, d_low = seen @ a.t(), g @ b
    exact = {
        "y": (y, layer.base(x.detach())[0].double() + low @ b.t()),
        "x": (x.grad, g @ layer.base.weight.double() + kept[0] * (d_low @ a)),
        "a": (layer.lora_A.grad, d_low.t() @ seen / (1 - p)),
        "b": (layer.lora_B.grad, g.t() @ low * 3.0),
    }
    for name, (got, true) in exact.items():
        assert got is not None
        error = float((got.detach().double().view_as(true) - true).norm() / true.norm())
        assert error < (6e-3 if dtype == torch.bfloat16 else 2e-6), (name, error)
    assert layer.lora_A.grad.dtype == torch.float32


@pytest.mark.usefixtures("processor")
@pytest.mark.skipif(not rows.available(), reason="no C compiler")
@pytest.mark.parametrize("kind", [None, "bnb.nf4", "bnb.nf4-dq", "bnb.int8"])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_layer_and_its_update_in_one_are_the_two(
    kind: str | None, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the base is, results and gradients are those of torch's operators one after the other."""
    torch.manual_seed(0)
    base = torch.nn.Linear(64, 96)
    if kind is not None:
        pytest.importorskip("bitsandbytes")
        bias, base = base.bias, quantization.quantize(base.weight.detach(), kind)
        base.bias = bias
    layer = lora.LoRALinear(base, LoRASettings(r=8, dropout=0.2))
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 37, 64)
    found = []
    for _ in range(2):
        leaf, layer.lora_A.grad, layer.lora_B.grad = x.clone().requires_grad_(), None, None
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            y = layer(leaf)
        assert ("_FusedLayer" in type(y.grad_fn).__name__) == (not found)
        y.backward(torch.ones_like(y))
        found.append([y.detach(), leaf.grad, layer.lora_A.grad, layer.lora_B.grad])
        monkeypatch.setattr(fused, "fits", lambda x, a, b: False)
    for one, two in zip(*found, strict=True):
        assert one.dtype == two.dtype
        # Mixed, each way rounds sums of its own to bfloat16, by up to 4e-3 each.
        assert (one - two).norm() < (1e-2 if mixed else 1e-6) * two.norm()


@pytest.mark.usefixtures("processor")
@pytest.mark.skipif(not rows.available(), reason="no C compiler")
def test_the_update_in_c_takes_what_layers_give_it() -> None:
    """An x that does not train, one whose numbers lie apart, and nobody who asks for gradients."""
    torch.manual_seed(0)
    layer = lora.LoRALinear(torch.nn.Linear(64, 96), LoRASettings(r=8, dropout=0.0))
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(64, 20).t()
    assert fused.fits(x, layer.lora_A, layer.lora_B)
    expected = layer.base(x) + x @ layer.lora_A.t() @ layer.lora_B.t() * layer.scaling
    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with mode:
            torch.testing.assert_close(y := layer(x), expected, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert layer.lora_A.grad is not None


@pytest.mark.usefixtures("processor")
@pytest.mark.skipif(not rows.available(), reason="no C compiler")
@pytest.mark.parametrize("kinds", ["float32 float32", "bfloat16 bfloat16", "float32 bfloat16"])
def test_a_norms_result_is_made_again_rather_than_kept(kinds: str) -> None:
    """With the same bits, also where the residual stream is wider than what the layers compute in."""
    torch.manual_seed(0)
    stream, dtype = (getattr(torch, kind) for kind in kinds.split())
    layer = lora.LoRALinear(torch.nn.Linear(96, 64, dtype=dtype), LoRASettings(r=8, dropout=0.3))
    torch.nn.init.normal_(layer.lora_B)
    x, weight = torch.randn(37, 96, dtype=stream, requires_grad=True), torch.rand(96).to(stream)
    leaves, grad, gradients = (x, layer.lora_A, layer.lora_B), torch.randn(37, 64, dtype=dtype), []
    for keeps in (True, False):
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            seen = ops.rms_norm(x, weight, 1e-5)
            y = layer(seen.view_as(seen) if keeps else seen)  # a view does not tell what it was made of
        saved = [t.untyped_storage().data_ptr() for t in y.grad_fn.saved_tensors if t is not None]
        assert (seen.untyped_storage().data_ptr() in saved) == keeps
        assert (x.untyped_storage().data_ptr() in saved) != keeps
        gradients.append(torch.autograd.grad(y, leaves, grad))
    for kept, again in zip(*gradients, strict=True):
        assert torch.equal(kept, again)


def test_higher_ranks_are_left_to_torch() -> None:
    x = torch.randn(4, 64)
    assert not fused.fits(x, torch.zeros(fused.HIGHEST + 1, 64), torch.zeros(64, fused.HIGHEST + 1))
