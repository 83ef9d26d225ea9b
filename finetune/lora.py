"""Fine-tune a model with LoRA or QLoRA; see tutorials/finetune_lora.md."""

from pathlib import Path
from typing import Literal

from lit_gpt.args import EvalArgs, TrainArgs
from lit_gpt.cli import run


def main(
    data_dir: Path = Path("data/alpaca"),
    checkpoint_dir: Path = Path("checkpoints/stabilityai/stablelm-base-alpha-3b"),
    out_dir: Path = Path("out/lora/alpaca"),
    precision: str | None = None,
    quantize: str | None = None,
    lora_r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.05,
    lora_query: bool = True,
    lora_key: bool = False,
    lora_value: bool = True,
    lora_projection: bool = False,
    lora_mlp: bool = False,
    lora_head: bool = False,
    optimizer: str = "adamw",
    train: TrainArgs = TrainArgs(),  # noqa: B008 - frozen
    eval: EvalArgs = EvalArgs(),  # noqa: B008
    activation_checkpointing: bool = False,
    compile: bool | Literal["auto"] = False,
    devices: int = 1,
    num_nodes: int = 1,
    seed: int = 1337,
    resume: bool | str | None = None,
    resume_override: bool = False,
) -> None:
    """Fine-tune a model with LoRA.

    Args:
        data_dir: Folder that a prepare script wrote.
        checkpoint_dir: The base: a converted folder, or one that holds only HF files.
        out_dir: Where adapter, metrics and report go.
        precision: bf16-mixed, bf16-true, 16-mixed, 16-true or 32-true; the default is the best that this machine has.
        quantize: Keep frozen weights in bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq or bnb.int8; +head: the head's too.
        lora_r: Rank of the update.
        lora_alpha: The update is scaled by alpha / r.
        lora_dropout: Share of a layer's inputs that its update does not see while training.
        lora_query: Adapt the queries.
        lora_key: Adapt the keys.
        lora_value: Adapt the values.
        lora_projection: Adapt the attention's output.
        lora_mlp: Adapt the MLP's layers.
        lora_head: Adapt the output head.
        optimizer: adamw, adamw-8bit, adamw-paged, adamw-8bit-paged or sgd.
        train: How to train.
        eval: When and how to validate.
        activation_checkpointing: Run each block twice instead of keeping what is inside it: less memory, more work.
        compile: Let torch's compiler fuse the blocks' small operators; auto does so for long runs on a GPU.
        devices: Accelerators (or CPU processes) to train on.
        num_nodes: Machines to train on.
        seed: Of the rows' order, the factors and the dropout.
        resume: true continues OUT_DIR's run exactly; auto too, or begins one; false replaces it; or a folder or state.
        resume_override: Continue with other settings too, though the result is not that of either.
    """
    settings = dict(locals())  # what --config reads back

    from lit_gpt import checkpoint, lora, quantization, runtime
    from lit_gpt.adapter import Adapter
    from lit_gpt.finetuning import Job
    from lit_gpt.training import Run

    targets = {name: settings[f"lora_{name}"] for name in lora.TARGETS}
    adapter = lora.LoRASettings.from_flags(lora_r, lora_alpha, lora_dropout, **targets)
    kind, bits = runtime.resolve_precision(precision, training=True), quantization.resolve(quantize)
    job = Job(data_dir, checkpoint_dir, out_dir, train, eval, adapter, {**settings, "precision": kind.name})
    fabric = runtime.launch(kind, devices, num_nodes)
    fabric.seed_everything(seed, verbose=False)
    model = job.load_model(fabric, kind.frozen, norm_dtype=kind.trained, quantize=bits)
    lora.attach(model, adapter)
    runtime.change_blocks(model, compiled=job.compiles(fabric), checkpointed=activation_checkpointing)

    def save(path: Path, run: Run) -> None:
        base = {"base_name": model.config.name, "base_fingerprint": job.base_fingerprint}
        told = {"prompt_style": job.meta["prompt_style"], "precision": kind.name, "quantize": bits, "step": run.step}
        Adapter(lora.adapter_state(model), adapter, **base, **told).save(path)

    job.run(fabric, model, save, checkpoint.files.ADAPTER)


if __name__ == "__main__":
    run(main)
