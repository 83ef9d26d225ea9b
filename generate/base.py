"""Continue a prompt with a base or merged model."""

from pathlib import Path

from lit_gpt.cli import run


def main(
    prompt: str = "What food do llamas eat?",
    input: str = "",
    num_samples: int = 1,
    max_new_tokens: int = 50,
    top_k: int | None = 200,
    top_p: float = 1.0,
    temperature: float = 0.8,
    checkpoint_dir: Path = Path("checkpoints/stabilityai/stablelm-base-alpha-3b"),
    precision: str | None = None,
    quantize: str | None = None,
    prompt_style: str | None = None,
    seed: int = 1234,
) -> None:
    """Continue a prompt with a base or merged model.

    The answer alone goes to stdout, as it comes; speed and memory go to stderr.

    Args:
        prompt: What to continue, or to answer.
        input: Context for the prompt, where the prompt style has a place for it.
        num_samples: How many answers.
        max_new_tokens: Length of an answer at most.
        top_k: Draw from the k likeliest tokens.
        top_p: Draw from the likeliest tokens that together have this probability.
        temperature: Below 1 bolder choices are rarer; 0 always takes the likeliest token.
        checkpoint_dir: The model.
        precision: bf16-true, 16-true, 32-true or a mixed one; the default is the best that this machine has.
        quantize: bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq or bnb.int8: keep the frozen weights in 4 or 8 bits;
            with +head after it the output head too.
        prompt_style: Template around the prompt; by default the one that the model was fine-tuned with, else none.
        seed: Of the sampling.
    """
    import torch

    from lit_gpt.generation import Sampler
    from lit_gpt.inference import Assistant
    from lit_gpt.prompts import get_style

    assistant = Assistant(checkpoint_dir, precision, quantize=quantize)
    text = get_style(prompt_style or assistant.prompt_style or "plain")(prompt, input)
    sampler = Sampler(temperature, top_k, top_p, torch.Generator(assistant.device).manual_seed(seed))
    for number in range(1, num_samples + 1):
        assistant.print_answer(text, max_new_tokens, sampler, number)


if __name__ == "__main__":
    run(main)
