"""What the generate scripts share: open a model with all that its folder tells, answer on stdout, figures on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from lit_gpt import checkpoint, decoding, quantization
from lit_gpt.adapter import Adapter
from lit_gpt.generation import generate
from lit_gpt.model import GPT
from lit_gpt.report import Progress
from lit_gpt.runtime import Precision, autocast, device_of_this_machine, peak_memory_gb, resolve_precision
from lit_gpt.tokenizer import Tokenizer


class Assistant:
    """A model ready to answer: base, merged, or base with an adapter run unmerged; nothing has to be said twice."""

    def __init__(
        self,
        checkpoint_dir: Path,
        precision: str | None = None,
        lora_path: Path | None = None,
        quantize: str | None = None,
    ):
        """`quantize` defaults to what the adapter was trained on."""
        adapter = Adapter.load(lora_path) if lora_path is not None else None
        kind = quantization.resolve(quantize or (adapter.quantize if adapter is not None else None))
        self.precision: Precision = resolve_precision(precision, training=False)
        self.device = device_of_this_machine()
        self.tokenizer = Tokenizer(checkpoint_dir)
        with Progress("loading", 1) as progress:
            self.model: GPT = checkpoint.load_model(
                checkpoint_dir,
                self.precision.frozen,
                norm_dtype=self.precision.trained,
                device=self.device,
                quantize=kind,
                progress=lambda done, total: progress.update(done / total),
            )
        self.prompt_style = checkpoint.prompt_style(checkpoint_dir)
        if adapter is not None and lora_path is not None:
            adapter.attach(self.model, checkpoint_dir, lora_path)
            self.prompt_style = adapter.prompt_style
        self.model.eval()
        if self.device.type == "cpu" and self.precision.frozen == torch.bfloat16:
            decoding.lay_out(self.model)  # this process only runs the model

    def autocast(self) -> AbstractContextManager[object]:
        """What mixed precision needs around the model."""
        return autocast(self.precision, self.device.type)

    def stream(
        self, prompt: str, max_new_tokens: int, sampler: Callable[[torch.Tensor], torch.Tensor], taken: list[int]
    ) -> Iterator[str]:
        """Pieces of the answer as they come, without the space that it begins with; its tokens are put into `taken`."""
        ids = self.tokenizer.encode(prompt)

        def noted() -> Iterator[int]:
            for token in generate(self.model, ids, max_new_tokens, sampler=sampler, stop_ids=self.tokenizer.stop_ids):
                taken.append(token)
                yield token

        begun = False
        with self.autocast():
            for piece in self.tokenizer.decode_stream(noted()):
                piece = piece if begun else piece.lstrip()
                begun = begun or bool(piece)
                yield piece

    def print_answer(
        self, prompt: str, max_new_tokens: int, sampler: Callable[[torch.Tensor], torch.Tensor], number: int = 1
    ) -> None:
        """The answer alone on stdout, as it comes; its speed and the memory on stderr."""
        taken: list[int] = []
        started = time.perf_counter()
        for piece in self.stream(prompt, max_new_tokens, sampler, taken):
            print(piece, end="", flush=True)
        print(flush=True)
        seconds = time.perf_counter() - started
        speed = f"{len(taken) / seconds:.2f} tokens/sec"
        print(f"Time for inference {number}: {seconds:.2f} sec total, {speed}", file=sys.stderr)
        print(f"Memory used: {peak_memory_gb():.2f} GB", file=sys.stderr)
