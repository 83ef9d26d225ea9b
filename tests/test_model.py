"""Our one model against transformers' many."""

from pathlib import Path

import pytest
import torch
from twins import TWINS, make_twin

from lit_gpt import checkpoint
from lit_gpt.attention import Layout
from lit_gpt.cache import KVCache
from lit_gpt.generation import generate, generate_batch
from lit_gpt.model import IGNORE_INDEX
from lit_gpt.sources import FolderSource


@pytest.mark.parametrize("name", TWINS)
@torch.inference_mode()
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    theirs = make_twin(name, tmp_path)
    ours = checkpoint.load_model(tmp_path, torch.float32).eval()
    tokens = torch.randint(0, 101, (2, 40))
    expected = theirs(tokens).logits
    torch.testing.assert_close(ours(tokens), expected, atol=1e-4, rtol=0)

    cache = KVCache(ours.config.n_layer, 2, 40)
    pieces = [ours(tokens[:, :17], cache=cache)] + [ours(tokens[:, i : i + 1], cache=cache) for i in range(17, 40)]
    if name in ("llama-dynamic", "phi3-longrope"):  # a rotation that depends on the length: kept keys are of their time
        first = theirs(tokens[:, :17], use_cache=True)
        later = [theirs(tokens[:, i : i + 1], past_key_values=first.past_key_values).logits for i in range(17, 40)]
        expected = torch.cat([first.logits, *later], dim=1)
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama-grouped", "gemma3", "qwen3-moe", "falcon-40b", "mistral", "gpt2"])
@torch.inference_mode()
def test_padded_rows_equal_transformers_masked_ones(name: str, tmp_path: Path) -> None:
    theirs = make_twin(name, tmp_path)
    ours = checkpoint.load_model(tmp_path, torch.float32).eval()
    tokens, lengths = torch.randint(0, 101, (3, 30)), [30, 11, 1]
    mask = torch.arange(30)[None] < torch.tensor(lengths)[:, None]
    expected = theirs(tokens, attention_mask=mask.long()).logits
    torch.testing.assert_close(ours(tokens)[mask], expected[mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", TWINS)
@torch.inference_mode()
def test_rows_laid_end_to_end_do_not_see_each_other(name: str, tmp_path: Path) -> None:
    make_twin(name, tmp_path)
    model = checkpoint.load_model(tmp_path, torch.float32).eval()
    rows = [torch.randint(0, 101, (1, n)) for n in (7, 23, 1, 12)]
    packed = model(torch.cat(rows, dim=1), lengths=[row.shape[1] for row in rows])
    alone = torch.cat([model(row) for row in rows], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", TWINS)
def test_names_go_both_ways_bit_for_bit(name: str, tmp_path: Path) -> None:
    make_twin(name, tmp_path)
    weights = checkpoint.Weights.from_folder(tmp_path)
    ours = dict(weights)
    source = FolderSource(tmp_path)
    for step in weights.steps:
        back = step.via.join(weights.config, tuple(ours[name] for name in step.ours))
        assert torch.equal(back, source.read(step.theirs)), step.theirs


@pytest.mark.parametrize("name", TWINS)
def test_greedy_continuation_equals_transformers(name: str, tmp_path: Path) -> None:
    theirs = make_twin(name, tmp_path)
    theirs.generation_config.eos_token_id = None
    ours = checkpoint.load_model(tmp_path, torch.float32).eval()
    prompt = torch.randint(0, 101, (1, 9))
    how = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    expected = theirs.generate(prompt, **how)[0, 9:].tolist()
    assert list(generate(ours, prompt[0].tolist(), 30)) == expected


def test_prompts_of_different_length_continue_as_if_alone(tmp_path: Path) -> None:
    make_twin("llama-grouped", tmp_path)
    model = checkpoint.load_model(tmp_path, torch.float32).eval()
    prompts = [torch.randint(0, 101, (n,)).tolist() for n in (3, 20, 11)]
    alone = [list(generate(model, prompt, 12)) for prompt in prompts]
    stop = frozenset({alone[1][4]})  # one row stops early, the others go on

    def until_stop(tokens: list[int]) -> list[int]:
        return next((tokens[:i] for i, token in enumerate(tokens) if token in stop), tokens)

    steps = list(generate_batch(model, prompts, 12, stop_ids=stop))
    together = [[step[row] for step in steps if step[row] is not None] for row in range(3)]
    assert together == [until_stop(tokens) for tokens in alone]
    assert len(together[1]) < 12


@pytest.mark.parametrize("name", ["llama", "falcon-7b", "neox", "gemma2", "mixtral"])
def test_loss_is_the_sum_over_labelled_positions(name: str, tmp_path: Path) -> None:
    make_twin(name, tmp_path)
    model = checkpoint.load_model(tmp_path, torch.float32)
    checkpoint.unfreeze(model)
    tokens, labels = torch.randint(0, 101, (2, 300 // 5)), torch.randint(0, 101, (2, 60))
    labels[0, :30] = IGNORE_INDEX
    reference = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), reduction="sum")
    expected = torch.autograd.grad(reference, list(model.parameters()))
    loss = model(tokens, labels=labels)
    torch.testing.assert_close(loss, reference)
    for got, want in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", TWINS)
@torch.no_grad()
def test_states_that_are_asked_for_are_those_of_the_whole(name: str, tmp_path: Path) -> None:
    make_twin(name, tmp_path)
    model = checkpoint.load_model(tmp_path, torch.float32).eval()
    tokens, where = torch.randint(0, 101, (2, 20)), torch.tensor([0, 7, 19, 30, 39])
    expected = model.transformer(tokens).flatten(0, 1)[where]
    torch.testing.assert_close(model.transformer(tokens, where=where), expected, atol=1e-5, rtol=1e-5)


def test_nothing_labelled_costs_nothing(tmp_path: Path) -> None:
    make_twin("llama", tmp_path)
    model = checkpoint.load_model(tmp_path, torch.float32)
    checkpoint.unfreeze(model)
    tokens = torch.randint(0, 101, (1, 5))
    loss = model(tokens, labels=torch.full_like(tokens, IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("name", [name for name in TWINS if name not in ("llama-dynamic", "phi3-longrope")])
@torch.no_grad()
def test_branches_see_their_beginning_and_themselves(name: str, tmp_path: Path) -> None:
    make_twin(name, tmp_path)
    model = checkpoint.load_model(tmp_path, torch.float32).eval()
    begun, branches = torch.randint(0, 101, (12,)).tolist(), [[2, 6, 5], [8], [9, 7, 9, 3, 2] * 3]
    tokens, positions, numbers = list(begun), list(range(12)), [0] * 12
    for number, branch in enumerate(branches, start=1):
        tokens += branch
        positions += range(12, 12 + len(branch))
        numbers += [number] * len(branch)
    others = [4, 5, 6]  # another sequence before it
    at, branch_of = torch.tensor([[0, 1, 2, *positions], [0, 1, 2, *numbers]])[:, None]
    layout = Layout(at, 27, [len(others), len(tokens)], branch_of)
    x = model.transformer(torch.tensor([others + tokens]), layout=layout)[0, len(others) :]
    beginning, *pieces = x.split([12, *map(len, branches)])
    for piece, branch in zip(pieces, branches, strict=True):
        alone = model.transformer(torch.tensor([begun + branch]))[0]
        torch.testing.assert_close(torch.cat([beginning, piece]), alone, atol=1e-4, rtol=1e-4)
