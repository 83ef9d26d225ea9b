"""The real SmolLM2-135M against transformers."""

import json
from pathlib import Path

import pytest
import torch

from lit_gpt import checkpoint
from lit_gpt.generation import generate
from lit_gpt.tokenizer import Tokenizer

pytestmark = pytest.mark.slow


def test_64_greedy_tokens_are_transformers(real_smollm2: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = checkpoint.load_model(real_smollm2, torch.float32).eval()
    config = json.loads((real_smollm2 / "config.json").read_text())
    theirs = LlamaForCausalLM(LlamaConfig(**config)).eval()
    weights = checkpoint.Weights.from_folder(real_smollm2)
    family = checkpoint.FAMILIES["llama"]
    state = {step.theirs: ours.get_parameter(step.ours[0]) for step in family.steps(ours.config, weights.metas)}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(state[name])
    tokenizer = Tokenizer(real_smollm2)
    for text in ("Once upon a time, in a land far away,", "def fibonacci(n):\n", "The three laws of motion are"):
        prompt = tokenizer.encode(text)
        with torch.no_grad():
            expected = theirs.generate(
                torch.tensor([prompt]),
                max_new_tokens=64,
                min_new_tokens=64,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            logits = theirs(torch.tensor([prompt])).logits
            torch.testing.assert_close(ours(torch.tensor([prompt])), logits, atol=1e-4, rtol=0)
        assert list(generate(ours, prompt, 64)) == expected[0, len(prompt) :].tolist()
