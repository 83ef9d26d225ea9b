"""Look whether a checkpoint folder is whole, without loading it."""

from pathlib import Path

from lit_gpt.cli import run

SAMPLE = "Hello, world! 1234 äöü 😀"


def main(checkpoint_dir: Path) -> int:
    """Look whether a checkpoint folder is whole, without loading it.

    Names, shapes and dtypes of its weights are compared with what its config demands, and the tokenizer is tried.
    The exit status is 1 if anything is wrong.

    Args:
        checkpoint_dir: The folder, of HF files or converted.
    """
    from lit_gpt import checkpoint
    from lit_gpt.tokenizer import Tokenizer

    problems = []
    try:
        weights = checkpoint.Weights.from_folder(checkpoint_dir)
        config, sizes = weights.config, weights.metas.values()
        kinds = sorted({str(meta.dtype).removeprefix("torch.") for meta in sizes})
        n_parameters, n_bytes = sum(meta.numel() for meta in sizes), sum(meta.nbytes for meta in sizes)
        print(
            f"weights    {len(sizes)} tensors, {n_parameters:,} parameters, {n_bytes / 1e9:.2f} GB, {', '.join(kinds)}"
        )
        print(
            f"config     {config.name}: family {config.family}, {config.n_layer} layers of {config.n_embd}, "
            f"{config.n_head} heads in {config.n_query_groups} groups, context {config.block_size}"
        )
        if odd := [kind for kind in kinds if kind not in ("float32", "float16", "bfloat16", "float64")]:
            problems.append(f"weights of the type {', '.join(odd)} cannot be used")
    except ValueError as error:
        problems.append(str(error))
    try:
        tokenizer = Tokenizer(checkpoint_dir)
        ids = tokenizer.encode(SAMPLE)
        starts = "with" if tokenizer.use_bos else "without"
        print(f"tokenizer  {tokenizer.vocab_size:,} tokens, {starts} BOS, ends at {sorted(tokenizer.stop_ids)}")
        if tokenizer.decode(ids) != SAMPLE:
            print(f"           note: {SAMPLE!r} comes back as {tokenizer.decode(ids)!r}")
        if not tokenizer.stop_ids:
            problems.append("the tokenizer names no end-of-text token: training and generation need one")
        if not problems and max(ids) >= config.vocab_size:
            problems.append(f"the tokenizer gives id {max(ids)} and the model has {config.vocab_size} embeddings")
    except ValueError as error:
        problems.append(str(error))
    print("\n".join(f"error: {problem}" for problem in problems) or "whole")
    return 1 if problems else 0


if __name__ == "__main__":
    run(main)
