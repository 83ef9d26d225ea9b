"""Ask a model one question after the other."""

import sys
from pathlib import Path

from lit_gpt.cli import run


def main(
    checkpoint_dir: Path = Path("checkpoints/stabilityai/stablelm-tuned-alpha-3b"),
    lora_path: Path | None = None,
    prompt_style: str | None = None,
    max_new_tokens: int = 500,
    top_k: int | None = 200,
    top_p: float = 1.0,
    temperature: float = 0.8,
    precision: str | None = None,
    quantize: str | None = None,
    seed: int = 1234,
) -> None:
    """Ask a model one question after the other; an empty line or Ctrl-D ends it. Each question stands alone.

    Args:
        checkpoint_dir: The model, or the base of the adapter.
        lora_path: A LoRA adapter to run on it.
        prompt_style: Template around the question; by default what the model was fine-tuned with, else none.
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
    style = get_style(prompt_style or assistant.prompt_style or "plain")
    sampler = Sampler(temperature, top_k, top_p, torch.Generator(assistant.device).manual_seed(seed))
    while True:
        print(">> Prompt: ", end="", file=sys.stderr, flush=True)
        question = sys.stdin.readline().strip()
        if not question:
            return
        print(">> Reply: ", end="", file=sys.stderr, flush=True)
        try:
            assistant.print_answer(style(question, ""), max_new_tokens, sampler)
        except ValueError as error:  # a question beyond the context: the next may be shorter
            print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
