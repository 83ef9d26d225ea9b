"""What the sampler may draw."""

import pytest
import torch

from lit_gpt.generation import Sampler

LOGITS = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]]))


def drawn(sampler: Sampler, n: int = 4000) -> list[dict[int, float]]:
    draws = torch.stack([sampler(LOGITS) for _ in range(n)])
    return [{i: float((column == i).float().mean()) for i in column.unique().tolist()} for column in draws.T]


def sampler(**how: float | int | None) -> Sampler:
    return Sampler(**{"temperature": 1.0, "top_k": None, **how}, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]


def test_frequencies_are_the_probabilities() -> None:
    first, second = drawn(sampler())
    assert first == pytest.approx({0: 0.5, 1: 0.25, 2: 0.15, 3: 0.1}, abs=0.03)
    assert second == pytest.approx({0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}, abs=0.03)


def test_temperature_sharpens() -> None:
    weights = torch.tensor([0.5, 0.25, 0.15, 0.1]) ** 2
    assert drawn(sampler(temperature=0.5))[0] == pytest.approx(
        dict(enumerate((weights / weights.sum()).tolist())), abs=0.03
    )
    assert drawn(sampler(temperature=0), 20) == [{0: 1.0}, {3: 1.0}]


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    assert drawn(sampler(top_k=2))[0] == pytest.approx({0: 2 / 3, 1: 1 / 3}, abs=0.03)
    assert set(drawn(sampler(top_p=0.6))[0]) == {0, 1}
    assert set(drawn(sampler(top_p=0.6))[1]) == {2, 3}
    assert drawn(sampler(top_p=1e-6), 50) == [{0: 1.0}, {3: 1.0}]
    assert set(drawn(sampler(top_k=3, top_p=0.8))[0]) == {0, 1}


def test_a_seed_repeats() -> None:
    first, second = sampler(), sampler()
    assert [first(LOGITS).tolist() for _ in range(20)] == [second(LOGITS).tolist() for _ in range(20)]
