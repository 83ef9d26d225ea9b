"""Tokenise your own JSON rows."""

from pathlib import Path

from lit_gpt.cli import run


def main(
    json_path: Path,
    test_json_path: Path | None = None,
    destination_path: Path = Path("data/json"),
    checkpoint_dir: Path = Path("checkpoints/stabilityai/stablelm-base-alpha-3b"),
    test_split_fraction: float = 0.1,
    seed: int = 42,
    mask_inputs: bool = True,
    max_seq_length: int | None = None,
    prompt_style: str = "alpaca",
) -> None:
    """Tokenise your own rows: train.pt, test.pt and meta.json for finetune/lora.py.

    Each row has an `instruction`, an `input` (which may be empty or absent) and an `output`. Nothing is written unless
    every row is good.

    Args:
        json_path: A JSON list of rows, or one row per line (JSON lines).
        test_json_path: Rows to validate on; by default a part of the others is kept for it.
        destination_path: The folder to write.
        checkpoint_dir: The model whose tokenizer is used.
        test_split_fraction: Share of the rows that is kept for validation.
        seed: Of the split.
        mask_inputs: Train on the answers only; false trains on the prompts too.
        max_seq_length: Rows with more tokens are cut, and keep their end-of-text token; the model's context by default.
        prompt_style: Template around instruction and input.
    """
    from lit_gpt import data
    from lit_gpt.report import Progress

    train = data.read_records(json_path)
    if test_json_path is not None:
        test = data.read_records(test_json_path)
    else:
        train, test = data.split(train, test_split_fraction, seed)
    with Progress("tokenising", len(train) + len(test)) as progress:
        meta = data.prepare(
            train,
            test,
            destination_path,
            checkpoint_dir,
            mask_inputs=mask_inputs,
            max_seq_length=max_seq_length,
            style=prompt_style,
            progress=lambda done, total: progress.update(done),
        )
    print(data.summary(meta, destination_path))


if __name__ == "__main__":
    run(main)
