"""The only code that replaces a submodule."""

from collections.abc import Callable

from torch import nn


def swap(
    model: nn.Module, pick: Callable[[str, nn.Module], bool], make: Callable[[str, nn.Module], nn.Module]
) -> list[str]:
    """Replace each submodule that `pick(name, module)` accepts by `make(name, module)`; returns their names.

    The hits are collected before the first replacement, so that a wrapper's inner layer is not visited again.
    """
    hits = [(name, module) for name, module in model.named_modules() if pick(name, module)]
    for name, module in hits:
        put(model, name, make(name, module))
    return [name for name, _ in hits]


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule of that name."""
    model.set_submodule(name, module)
