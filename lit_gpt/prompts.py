"""Prompt styles: from a record's instruction and input to the text that the model continues."""

from collections.abc import Callable

Style = Callable[[str, str], str]


def alpaca(instruction: str, input: str = "") -> str:
    """Stanford Alpaca's template: what the original trains on and prompts with. The answer follows with no newline."""
    if input:
        return (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
        )
    return (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Response:"
    )


def plain(instruction: str, input: str = "") -> str:
    """No template: the instruction, then the input on a line of its own."""
    return f"{instruction}\n{input}" if input else instruction


STYLES: dict[str, Style] = {"alpaca": alpaca, "plain": plain}


def get_style(name: str) -> Style:
    """Raises ValueError that lists the styles."""
    if name not in STYLES:
        raise ValueError(f"unknown prompt style {name!r}; known are {', '.join(STYLES)}")
    return STYLES[name]
