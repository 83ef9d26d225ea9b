"""What the sampler may draw, and steps as a GPU records them."""

from pathlib import Path

import pytest
import torch
from twins import make_twin

from lit_gpt import checkpoint, recorded
from lit_gpt.generation import Sampler, generate_batch

LOGITS = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]]))


def drawn(sampler: Sampler, n: int = 4000) -> list[dict[int, float]]:
    draws = torch.stack([sampler(LOGITS) for _ in range(n)])
    return [{i: float((column == i).float().mean()) for i in column.unique().tolist()} for column in draws.T]


def sampler(**how: float | int | None) -> Sampler:
    return Sampler(**{"temperature": 1.0, "top_k": None, **how}, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]


def test_a_row_goes_on_as_its_own_text_when_a_longer_one_has_ended(tmp_path: Path) -> None:
    """LongRoPE rotates all of a text of up to 32 tokens otherwise; what is cached must be rotated alike."""
    make_twin("phi3-longrope", tmp_path)
    model = checkpoint.load_model(tmp_path, torch.float32).eval()
    torch.manual_seed(0)
    for _ in range(5):
        long, short = (torch.randint(1, 101, (n,)).tolist() for n in (40, 6))
        steps = list(generate_batch(model, [long, short], 12, ends=lambda row, token: row == 0))
        first, *others = [step[1] for step in steps]
        assert all(step[0] is None for step in steps[1:])
        assert others == [step[0] for step in generate_batch(model, [[*short, first]], 11)]


def test_no_tokens_are_no_answer(tmp_path: Path) -> None:
    make_twin("llama", tmp_path)
    with pytest.raises(ValueError, match="--max_new_tokens must be at least 1, not -3"):
        list(generate_batch(checkpoint.load_model(tmp_path, torch.float32), [[1, 2]], -3))


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


def no_graph() -> None:
    raise RuntimeError("there is no GPU\nand more is said of it")


@pytest.mark.parametrize("family", ["llama-grouped", "mistral", "gemma2", "qwen2-tied-window", "gpt2", "neox"])
def test_a_step_to_be_recorded_finds_each_tokens_place(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values lie where they would, and nothing else of the stores is seen; here nothing can be recorded."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", no_graph)
    monkeypatch.setattr(recorded.Recorded, "works", True)  # put back afterwards
    make_twin(family, tmp_path)
    model = checkpoint.load_model(tmp_path, torch.float32).eval()
    prompts = [[5, 9, 60], [7, 2, 3, 11, 80, 12, 44, 3, 90, 17], [1]]
    stops = {(1, 4), (0, 9)}  # row and step: the batch shrinks

    def continued(step) -> list[list[int | None]]:
        seen = [0, 0, 0]

        def ends(row: int, token: int) -> bool:
            seen[row] += 1
            return (row, seen[row]) in stops

        return list(generate_batch(model, prompts, 20, ends=ends, step=step))

    with pytest.warns(UserWarning, match="none can be recorded: there is no GPU$"):
        found = continued(recorded.step)
    assert found == continued(lambda model, tokens, cache: model(tokens, cache=cache)[:, -1])
