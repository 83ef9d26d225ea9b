"""Answer with a base and its LoRA adapter."""

from pathlib import Path

from lit_gpt.cli import run


def main(
    prompt: str = "What food do llamas eat?",
    input: str = "",
    lora_path: Path = Path("out/lora/alpaca/lit_model_lora_finetuned.pth"),
    checkpoint_dir: Path = Path("checkpoints/stabilityai/stablelm-base-alpha-3b"),
    num_samples: int = 1,
    max_new_tokens: int = 100,
    top_k: int | None = 200,
    top_p: float = 1.0,
    temperature: float = 0.8,
    precision: str | None = None,
    quantize: str | None = None,
    seed: int = 1234,
) -> None:
    """Answer with a base and its LoRA adapter, which is run unmerged.

    Rank, targets and prompt style come from the adapter. The answer alone goes to stdout, as it comes; speed and memory
    go to stderr.

    Args:
        prompt: The instruction.
        input: Context for the instruction.
        lora_path: The adapter.
        checkpoint_dir: The base that it was trained on.
        num_samples: How many answers.
        max_new_tokens: Length of an answer at most.
        top_k: Draw from the k likeliest tokens.
        top_p: Draw from the likeliest tokens that together have this probability.
        temperature: Below 1 bolder choices are rarer; 0 always takes the likeliest token.
        precision: bf16-true, 16-true, 32-true or a mixed one; the default is the best that this machine has.
        quantize: bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq or bnb.int8, with +head for the output head too; by
            default what the adapter was trained on.
        seed: Of the sampling.
    """
    import torch

    from lit_gpt.generation import Sampler
    from lit_gpt.inference import Assistant
    from lit_gpt.prompts import get_style

    assistant = Assistant(checkpoint_dir, precision, lora_path, quantize)
    text = get_style(assistant.prompt_style or "alpaca")(prompt, input)
    sampler = Sampler(temperature, top_k, top_p, torch.Generator(assistant.device).manual_seed(seed))
    for number in range(1, num_samples + 1):
        assistant.print_answer(text, max_new_tokens, sampler, number)


if __name__ == "__main__":
    run(main)
