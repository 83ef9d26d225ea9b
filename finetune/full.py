"""Fine-tune all weights of a model; see tutorials/finetune_full.md."""

from pathlib import Path
from typing import Literal

from lit_gpt.args import EvalArgs, TrainArgs
from lit_gpt.cli import run


def main(
    data_dir: Path = Path("data/alpaca"),
    checkpoint_dir: Path = Path("checkpoints/stabilityai/stablelm-base-alpha-3b"),
    out_dir: Path = Path("out/full/alpaca"),
    precision: str | None = None,
    optimizer: str = "adamw",
    train: TrainArgs = TrainArgs(learning_rate=3e-5),  # noqa: B008 - frozen
    eval: EvalArgs = EvalArgs(),  # noqa: B008
    activation_checkpointing: bool = False,
    compile: bool | Literal["auto"] = False,
    devices: int = 1,
    num_nodes: int = 1,
    seed: int = 1337,
    resume: bool | str | None = None,
    resume_override: bool = False,
) -> None:
    """Fine-tune all weights of a model.

    OUT_DIR becomes a folder that every other script reads: the weights, their config, the tokenizer.

    Args:
        data_dir: Folder that a prepare script wrote.
        checkpoint_dir: The base: a converted folder, or one that holds only HF files.
        out_dir: Where the model, metrics and report go.
        precision: bf16-mixed, bf16-true, 16-mixed, 16-true or 32-true; the default is the best that this machine has.
        optimizer: adamw, adamw-8bit, adamw-paged, adamw-8bit-paged or sgd.
        train: How to train.
        eval: When and how to validate.
        activation_checkpointing: Run each block twice instead of keeping what is inside it: less memory, more work.
        compile: Let torch's compiler fuse the blocks' small operators; auto does so for long runs on a GPU.
        devices: Accelerators (or CPU processes) to train on.
        num_nodes: Machines to train on.
        seed: Of the rows' order.
        resume: true continues OUT_DIR's run exactly; auto too, or begins one; false replaces it; or a folder or state.
        resume_override: Continue with other settings too, though the result is not that of either.
    """
    settings = dict(locals())  # what --config reads back

    from lit_gpt import checkpoint, runtime
    from lit_gpt.finetuning import Job
    from lit_gpt.training import Run

    kind = runtime.resolve_precision(precision, training=True)
    job = Job(data_dir, checkpoint_dir, out_dir, train, eval, None, {**settings, "precision": kind.name})
    fabric = runtime.launch(kind, devices, num_nodes)
    fabric.seed_everything(seed, verbose=False)
    model = job.load_model(fabric, kind.trained)
    checkpoint.unfreeze(model)
    runtime.change_blocks(model, compiled=job.compiles(fabric), checkpointed=activation_checkpointing)

    def save(path: Path, run: Run) -> None:
        checkpoint.save_model(path, model, checkpoint_dir, job.meta["prompt_style"], dtype=kind.frozen)

    job.run(fabric, model, save, checkpoint.files.LIT_MODEL)


if __name__ == "__main__":
    run(main)
