"""On one GPU: planned memory beside the allocator's peak, and the speed beside peft's, of models with random weights.

Usage: python benchmarks/gpu.py memory|training|decoding [MODEL]   (by default Llama-2-7b-hf)
`memory` takes 85 s on an H100. The others want transformers and peft, which the tests' environment has.
"""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lit_gpt import checkpoint, lora, memory, optimizers, quantization, runtime, surgery
from lit_gpt.config import Config
from lit_gpt.data import Batch
from lit_gpt.generation import generate
from lit_gpt.memory import Setting
from lit_gpt.model import GPT
from lit_gpt.report import table
from lit_gpt.training import train_step

GPU = torch.device("cuda", 0)
TRUE, MIXED = runtime.PRECISIONS["bf16-true"], runtime.PRECISIONS["bf16-mixed"]
LONGEST = (1034,) * 4  # the seed's longest Alpaca row, four to a micro-batch
TRAINING = (
    Setting(MIXED, rows=LONGEST),
    Setting(TRUE, rows=LONGEST),
    Setting(TRUE, rows=LONGEST[:1]),
    Setting(TRUE, rows=LONGEST, activation_checkpointing=True),
    Setting(TRUE, "bnb.nf4", rows=LONGEST),
    Setting(TRUE, "bnb.nf4", rows=LONGEST[:1]),
    Setting(TRUE, "bnb.nf4-dq", rows=LONGEST[:1]),
    Setting(TRUE, "bnb.nf4-dq", rows=LONGEST[:1], activation_checkpointing=True),
    Setting(TRUE, "bnb.int8", rows=LONGEST[:1]),
)
RUNNING = tuple(Setting(TRUE, kind, lora=None, rows=(100,)) for kind in (None, "bnb.nf4", "bnb.nf4-dq", "bnb.int8"))


@dataclass(frozen=True)
class Measured:
    peak: int  # bytes that the allocator had given out
    first: float  # seconds of the first turn
    seconds: float  # the median of those after it
    n_tokens: int  # of a turn

    @property
    def speed(self) -> float:
        return self.n_tokens / self.seconds


def measured(turn: Callable[[], object], n_tokens: int, turns: int = 5) -> Measured:
    seconds = []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(turns):
        torch.cuda.synchronize()
        started = time.perf_counter()
        turn()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return Measured(torch.cuda.max_memory_allocated(), seconds[0], statistics.median(seconds[1:]), n_tokens)


def random_model(config: Config, setting: Setting, device: torch.device) -> GPT:
    """As `checkpoint.load_model` makes it, of weights that were never anywhere else."""
    model, kind, precision = checkpoint.hollow(config), setting.quantize, setting.precision
    frozen = precision.trained if setting.lora is None and not kind else precision.frozen
    for name, meta in checkpoint.parameter_metas(model).items():
        weight = torch.randn(meta.shape, dtype=frozen, device=device) * 0.02
        owner = name.removesuffix(".weight")
        if kind and quantization.quantizable(owner, model.get_submodule(owner), kind):
            surgery.put(model, owner, quantization.quantize(weight, kind))
        else:
            checkpoint.place(model, name, weight, frozen, precision.trained, device)
    model.tie()
    return model


def batch_of(lengths: Sequence[int], vocab_size: int) -> Batch:
    """Rows of random tokens laid end to end, every one with a label."""
    tokens = torch.randint(0, vocab_size, (1, sum(lengths)))
    return Batch(tokens, tokens.roll(-1, 1), tuple(lengths))


def measured_training(
    config: Config,
    setting: Setting,
    device: torch.device,
    turns: int = 4,
    *,
    micro_batches: int = 1,
    compiled: bool = False,
) -> Measured:
    """Optimizer steps, each of as many micro-batches of the setting's rows."""
    model = random_model(config, setting, device)
    if setting.lora is None:
        checkpoint.unfreeze(model)
    else:
        lora.attach(model, setting.lora)
    runtime.change_blocks(model, compiled=compiled, checkpointed=setting.activation_checkpointing)
    fabric = runtime.launch(setting.precision)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wrapped, optimizer = fabric.setup(model.train(), optimizers.resolve(setting.optimizer)(trained, lr=1e-4))
    batches = [batch_of([n - 1 for n in setting.rows], config.vocab_size)] * micro_batches
    n_tokens = micro_batches * sum(n - 1 for n in setting.rows)
    return measured(lambda: train_step(fabric, wrapped, optimizer, batches, max_norm=1.0), n_tokens, turns)


def measured_running(config: Config, setting: Setting, device: torch.device, new_tokens: int = 100) -> Measured:
    """A prompt as long as the longest row, and what follows it."""
    model = random_model(config, setting, device).eval()
    prompt = list(range(1, max(setting.rows) + 1))
    with runtime.autocast(setting.precision, device.type):
        return measured(lambda: list(generate(model, prompt, new_tokens)), new_tokens, 3)


def forget() -> None:
    """Give the last model's memory back; Fabric's wrappers refer to one another."""
    gc.collect()
    torch.cuda.empty_cache()


def told(setting: Setting) -> str:
    rows = f"{len(setting.rows)} x {max(setting.rows):,}"
    words = (setting.precision.name, setting.quantize, rows, "checkpointing" * setting.activation_checkpointing)
    return ", ".join(word for word in words if word)


def compare_memory(name: str) -> None:
    config = Config.from_name(name)
    plans: tuple[tuple[str, Sequence[Setting], Callable[..., memory.Plan], Callable[..., Measured]], ...] = (
        ("training", TRAINING, memory.plan_training, measured_training),
        ("running", RUNNING, memory.plan_inference, measured_running),
    )
    for what, settings, plan, run in plans:
        rows = [(f"{name}, {what}", "planned GB", "measured GB", "ratio", "tokens/s")]
        for setting in settings:
            found, planned = run(config, setting, GPU), plan(config, setting).gb
            figures = (f"{planned:.2f}", f"{found.peak / 1e9:.2f}", f"{planned / found.peak * 1e9:.3f}")
            rows.append((told(setting), *figures, f"{found.speed:,.0f}"))
            forget()
        print(table(rows) + "\n", flush=True)


def products_speed() -> float:
    """Floating-point operations per second of a large product in bfloat16."""
    x, w = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=GPU) for _ in range(2))
    return measured(lambda: x @ w, 2 * 8192**3, 14).speed


def transformers_model(config: Config, kind: str | None) -> Any:
    """Its Llama with random weights; `kind` nf4 puts bitsandbytes' own layers in, as it does when it loads a model."""
    import bitsandbytes
    from transformers import AutoModelForCausalLM, LlamaConfig

    from lit_gpt.families import FAMILIES

    def packed(linear: nn.Linear) -> nn.Module:
        sizes, how = (linear.in_features, linear.out_features), {"compute_dtype": torch.bfloat16, "device": "meta"}
        made: nn.Module = bitsandbytes.nn.Linear4bit(*sizes, bias=False, **how)
        weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        made.weight = weight.to(GPU)
        return made

    with torch.device(GPU):
        model: Any = AutoModelForCausalLM.from_config(
            LlamaConfig(**FAMILIES["llama"].write(config)), dtype=torch.bfloat16
        )
    if kind:
        surgery.swap(
            model,
            lambda name, module: isinstance(module, nn.Linear) and name != "lm_head",
            lambda name, module: packed(module),  # type: ignore[arg-type]
        )
        model.is_loaded_in_4bit = True
    return model


def pefts(config: Config, setting: Setting, micro_batches: int) -> Measured:
    """The same steps by transformers and peft as their documentation has them, rows padded to the longest."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model, kind = transformers_model(config, setting.quantize), setting.quantize
    if kind:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    targets = ["q_proj", "v_proj"]
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=targets)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    longest = max(setting.rows)
    tokens = torch.randint(0, config.vocab_size, (len(setting.rows), longest), device=GPU)
    mask = (torch.arange(longest)[None] < torch.tensor(setting.rows)[:, None]).long().to(GPU)
    labels = tokens.masked_fill(mask == 0, -100)

    def step() -> None:
        for _ in range(micro_batches):
            with torch.autocast("cuda", torch.bfloat16, enabled=kind is not None):  # as its trainer's bf16 does
                loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
            (loss / micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return measured(step, micro_batches * sum(setting.rows))


def compare_training(name: str) -> None:
    config, micro_batches = Config.from_name(name), 2
    metas = checkpoint.parameter_metas(checkpoint.hollow(config))
    need = 4 * sum(p.numel() for key, p in metas.items() if p.ndim == 2 and "wte" not in key)
    peak = products_speed()
    print(f"products of 8192 x 8192 x 8192 in bfloat16: {peak / 1e12:.0f} TF/s; {need / 1e9:.1f} GF per token\n")
    rows = [(name, "rows", "tokens/s", "of peft's", "peak GB", "of peft's", "of the products' speed", "first step, s")]
    for kind in (None, "bnb.nf4"):
        for lengths in ((512,) * 4, (61, 88, 130, 402)):  # the second as Alpaca's are
            setting, how = Setting(TRUE, kind, rows=lengths), {"micro_batches": micro_batches}
            base, base_name = pefts(config, setting, micro_batches), f"peft, {kind or 'bf16'}"
            forget()
            found = {base_name: base, f"ours, {kind or 'bf16'}": measured_training(config, setting, GPU, 5, **how)}
            forget()
            if kind is None:
                found["ours, compiled"] = measured_training(config, setting, GPU, 5, compiled=True, **how)
                forget()
            for who, one in found.items():
                ratios = (one.speed / base.speed, one.peak / base.peak, one.speed * need / peak)
                shown = [f"{ratio:.2f}" for ratio in ratios]
                figures = (f"{one.speed:,.0f}", shown[0], f"{one.peak / 1e9:.2f}", *shown[1:], f"{one.first:.1f}")
                rows.append((who, ", ".join(map(str, lengths)), *figures))
                print(*rows[-1], file=sys.stderr, flush=True)
    print(table(rows))


def compare_decoding(name: str, new_tokens: int = 60) -> None:
    """After a prompt of 100 tokens, greedily, as both do it unasked."""
    config, rows = Config.from_name(name), [(name, "tokens/s", "of transformers'")]
    prompt = torch.arange(1, 101, device=GPU)[None]
    for kind in (None, "bnb.nf4"):
        model = transformers_model(config, kind).eval()
        how = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
        theirs = measured(lambda model=model, how=how: model.generate(prompt, **how), new_tokens, 3)
        del model
        forget()
        ours = measured_running(config, Setting(TRUE, kind, lora=None, rows=(100,)), GPU, new_tokens)
        forget()
        for who, one in (("transformers", theirs), ("ours", ours)):
            rows.append((f"{who}, {kind or 'bf16'}", f"{one.speed:.1f}", f"{one.speed / theirs.speed:.2f}"))
            print(*rows[-1], file=sys.stderr, flush=True)
    print(table(rows))


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a GPU")
    what, *names = sys.argv[1:]
    for name in names or ["Llama-2-7b-hf"]:
        {"memory": compare_memory, "training": compare_training, "decoding": compare_decoding}[what](name)


if __name__ == "__main__":
    main()
