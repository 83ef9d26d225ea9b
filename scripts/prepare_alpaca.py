"""Download and tokenise the Alpaca data. To tune on your own data, copy this file and change `load`."""

from pathlib import Path

from lit_gpt.cli import run

URL = "https://raw.githubusercontent.com/tloen/alpaca-lora/main/alpaca_data_cleaned_archive.json"


def load(file: Path, url: str) -> list[dict[str, str]]:
    """Rows with an instruction, an input (which may be empty) and an output."""
    from lit_gpt.data import read_records
    from lit_gpt.files import fetch

    if not file.is_file():
        fetch(url, file)
    return read_records(file)


def main(
    destination_path: Path = Path("data/alpaca"),
    checkpoint_dir: Path = Path("checkpoints/stabilityai/stablelm-base-alpha-3b"),
    test_split_fraction: float = 0.03865,
    seed: int = 42,
    mask_inputs: bool = True,
    data_file_name: str = "alpaca_data_cleaned_archive.json",
    data_file_url: str = URL,
    max_seq_length: int | None = None,
    prompt_style: str = "alpaca",
) -> None:
    """Download and tokenise the Alpaca data: train.pt, test.pt and meta.json for finetune/lora.py.

    Args:
        destination_path: The folder to write; a data file that lies there is not downloaded again.
        checkpoint_dir: The model whose tokenizer is used.
        test_split_fraction: Share of the rows that is kept for validation.
        seed: Of the split.
        mask_inputs: Train on the answers only; false trains on the prompts too.
        data_file_name: Name of the data file in the destination.
        data_file_url: Where the data file is downloaded from.
        max_seq_length: Rows with more tokens are cut, and keep their end-of-text token; the model's context by default.
        prompt_style: Template around instruction and input.
    """
    from lit_gpt import data
    from lit_gpt.report import Progress

    records = load(destination_path / data_file_name, data_file_url)
    train, test = data.split(records, test_split_fraction, seed)
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
