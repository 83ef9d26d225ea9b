"""Our model behind lm-eval against lm-eval's own HF model, task for task, on the same weights."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, STORIES, run_script

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from lit_gpt import evaluation  # noqa: E402
from lit_gpt.evaluation import LitGPT, _batches, evaluate, find_tasks  # noqa: E402
from lit_gpt.inference import Assistant  # noqa: E402

ITEMS = [
    {
        "q": "Once upon a time",
        "choices": [" there was a girl.", " the car", " of of", " she"],
        "answer": 0,
        "text": "Tim ran.",
    },
    {
        "q": "Tim had a big red",
        "choices": [" ball.", " run", " happy and then he went", " a"],
        "answer": 1,
        "text": "A b c.",
    },
    {
        "q": "The dog was",
        "choices": [" sad", " very happy. He", " dog", " blue"],
        "answer": 2,
        "text": "Lily saw a cat. " * 70,
    },
    {"q": "Lily", "choices": [" went", " and", " wanted to play", " is"], "answer": 3, "text": "One day, " * 9},
] * 3
COMMON = "dataset_path: json\ndataset_kwargs: {data_files: {test: FILE}}\ntest_split: test\n"
TASKS = {
    "our_choice": "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: choices\ndoc_to_target: answer\n"
    "target_delimiter: ''\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n",
    "our_rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\n"
    "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n",
    "our_greedy": "output_type: generate_until\ndoc_to_text: q\ndoc_to_target: text\n"
    "process_results: !function u.keep\n"
    "generation_kwargs: {until: ['.', 'He'], do_sample: false, max_gen_toks: 24}\n"
    "metric_list: [{metric: hash, aggregation: mean, higher_is_better: true}]\n",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))
    (folder / "u.py").write_text(
        "import zlib\ndef keep(doc, results):\n    return {'hash': float(zlib.crc32(results[0].encode()))}\n"
    )
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\n{COMMON.replace('FILE', str(folder / 'items.jsonl'))}{text}"
        )
    return folder


@pytest.fixture(scope="module")
def manager(tasks: Path) -> TaskManager:
    """One for all tests: to index lm-eval's own tasks takes seconds."""
    return TaskManager(include_path=[str(tasks), str(ROOT / "eval" / "tasks")])


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("batch_size", [1, 5])
def test_scores_equal_lm_evals_own(name: str, batch_size: int, manager: TaskManager) -> None:
    how = {"tasks": [name], "task_manager": manager, "bootstrap_iters": 0}
    theirs = lm_eval.simple_evaluate(HFLM(pretrained=str(STORIES), dtype="float32", device="cpu", batch_size=4), **how)
    ours = lm_eval.simple_evaluate(LitGPT(Assistant(STORIES, "32-true"), batch_size), **how)
    mine, yours = (
        {key: value for key, value in results["results"][name].items() if isinstance(value, float)}
        for results in (ours, theirs)
    )
    assert yours
    assert mine == pytest.approx(yours, rel=1e-5)


def test_every_choices_likelihood_equals_lm_evals_own() -> None:
    from lm_eval.api.instance import Instance

    pairs = [(item["q"], choice) for item in ITEMS[:4] for choice in item["choices"]] + [
        ("", "Once"),
        ("a " * 600, "b"),
        *(("She", end) for end in (" was very happy", " was very happy and then", " was very sad", " was very happy")),
    ]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    theirs = HFLM(pretrained=str(STORIES), dtype="float32", device="cpu", batch_size=4).loglikelihood(requests)
    ours = LitGPT(Assistant(STORIES, "32-true"), 3).loglikelihood(requests)
    for (value, greedy), (expected, also) in zip(ours, theirs, strict=True):
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy == also


@pytest.mark.parametrize("end", ["generation_config.json", "special token"])
def test_answers_end_where_lm_evals_own_do(end: str, tmp_path: Path) -> None:
    """At each end of text that the folder names, and at stop strings that are special tokens."""
    from lm_eval.api.instance import Instance

    folder = Path(shutil.copytree(STORIES, tmp_path / "m"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    dot = tokenizer["model"]["vocab"]["."]
    if end == "special token":
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": dot, "content": ".", "special": True})
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    else:
        (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2, dot]}))
    until = ["."] if end == "special token" else ["Q:"]
    settings = {"until": until, "do_sample": False, "max_gen_toks": 40}
    theirs, ours = (
        model.generate_until([Instance("generate_until", {}, ("Once upon a time, there was a girl", settings), 0)])
        for model in (
            HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1),
            LitGPT(Assistant(folder, "32-true"), 1),
        )
    )
    assert ours == theirs
    assert 0 < len(ours[0]) < 60


def test_a_model_without_a_first_token_begins_with_its_end(tmp_path: Path) -> None:
    """A tokenizer's `null` counts more than a number in the model's config."""
    folder = Path(shutil.copytree(STORIES, tmp_path / "m"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": None, "add_bos_token": False}))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    theirs = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1)
    assert LitGPT(Assistant(folder, "32-true"), 1).prefix_token_id == theirs.prefix_token_id


def test_what_answers_begin_with_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LitGPT(Assistant(STORIES, "32-true"), 3)
    context, beginning = [1, 400], [300, 261, 378]
    requests = [(("", ""), context, beginning + own) for own in ([12], [13, 14, 15], [13, 16])]
    monkeypatch.setattr(evaluation, "AT_ONCE", 3)
    seen, forward = [], model.model.transformer.forward
    monkeypatch.setattr(model.model.transformer, "forward", lambda *a, **k: seen.append(a[0]) or forward(*a, **k))
    together = model._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [tokens.tolist() for tokens in seen] == [[context + beginning + [13, 14] + [13]]]
    alone = [model._loglikelihood_tokens([request], disable_tqdm=True)[0] for request in requests]
    assert [score for score, _ in together] == pytest.approx([score for score, _ in alone], abs=1e-4)


def test_a_batch_holds_no_more_tokens_than_it_may() -> None:
    items = [(n, [n, -n]) for n in (9, 7, 7, 3, 1, 1)]
    batches = list(_batches(items, 14))
    assert batches == [[[9, -9]], [[7, -7], [7, -7]], [[3, -3], [1, -1], [1, -1]]]
    assert list(_batches(items, 1)) == [[item] for _, item in items]
    assert not list(_batches([], 0))


def test_a_context_that_is_cut_counts_as_it_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LitGPT(Assistant(STORIES, "32-true"), 4)
    sizes = []
    score = model._score
    monkeypatch.setattr(model, "_score", lambda items: sizes.append(sum(map(model._laid, items))) or score(items))
    long, short = [5] * (model.max_length + 900), [[7] * 20 + [n] for n in range(2, 80)]
    alone = [model._loglikelihood_tokens([(("", ""), context, [5, 6])])[0] for context in (long, *short[:9])]
    sizes.clear()
    together = model._loglikelihood_tokens([(("", ""), context, [5, 6]) for context in (long, *short)])
    assert max(sizes) <= 4 * model.max_length
    assert sum(sizes) == model.max_length + 78 * 22
    for one, other in zip(alone, together[: len(alone)], strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-4)


def test_a_text_whose_length_changes_its_angles_is_scored_alone() -> None:
    assistant = Assistant(STORIES, "32-true")
    n = assistant.model.config.rope_size // 2
    assistant.model.config.rope_scaling = {
        "rope_type": "longrope",
        "long_factor": [4.0] * n,
        "short_factor": [1.0] * n,
        "original_max_position_embeddings": 32,
    }
    model = LitGPT(assistant, 8)
    requests = [(("", ""), [7] * length + [length], [5, 6]) for length in (60, 10, 33, 9, 31, 12, 30)]
    together = model._loglikelihood_tokens(requests)
    for request, score in zip(requests, together, strict=True):
        assert model._loglikelihood_tokens([request])[0][0] == pytest.approx(score[0], abs=1e-4)


def test_answers_that_no_context_holds_are_refused() -> None:
    from lm_eval.api.instance import Instance

    with pytest.raises(ValueError, match="more than the 512 tokens"):
        LitGPT(Assistant(STORIES, "32-true"), 3).loglikelihood([Instance("loglikelihood", {}, ("a", " b" * 600), 0)])


def test_the_originals_task_names_are_understood(manager: TaskManager) -> None:
    assert find_tasks(["hendrycksTest-*"], manager) == ["mmlu"]
    assert find_tasks(["hendrycksTest-anatomy", "arc_easy"], manager) == ["mmlu_anatomy", "arc_easy"]
    assert find_tasks(["truthfulqa_mc"], manager) == ["truthfulqa_mc1", "truthfulqa_mc2"]


@pytest.mark.parametrize(
    ("wanted", "with_theirs"),
    [(["our_choice", "our_greedy"], False), (["our_choice", "piqa"], True), (["our_*"], True)],
)
def test_lm_evals_tasks_are_read_only_where_one_of_them_may_be_meant(
    wanted: list[str], with_theirs: bool, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    monkeypatch.setattr(
        evaluation,
        "TaskManager",
        lambda include_path, include_defaults=True: (
            read.append(include_defaults) or TaskManager(include_path=include_path, include_defaults=False)
        ),
    )
    assert set(evaluation._manager(wanted, [tasks]).all_tasks) == set(TASKS)
    assert read == [False] + [True] * with_theirs


def test_the_script_scores_a_task_of_ones_own(tasks: Path, tmp_path: Path) -> None:
    flags = ("--checkpoint_dir", STORIES, "--include_path", tasks, "--eval_tasks", "[our_choice]", "--limit", 8)
    done = run_script("eval/lm_eval_harness", *flags, "--save_filepath", tmp_path / "r.json", "--precision", "32-true")
    results = json.loads((tmp_path / "r.json").read_text())
    expected = evaluate(
        Assistant(STORIES, "32-true"),
        ["our_choice"],
        num_fewshot=0,
        limit=8,
        bootstrap_iters=100000,
        batch_size=2,
        include_paths=[tasks],
    )
    assert results["results"]["our_choice"]["acc,none"] == expected["results"]["our_choice"]["acc,none"]
    assert f"{results['results']['our_choice']['acc,none']:.4f}" in done.stdout
    assert results["config"]["limit"] == 8


def test_the_quickstart_task_counts_exact_answers(manager: TaskManager) -> None:
    class Oracle(LitGPT):
        """Right for every other message."""

        def generate_until(self, requests, disable_tqdm=False):
            return [f" {r.doc['output']}\n" if i % 2 else r.doc["output"][:-1] for i, r in enumerate(requests)]

    results = lm_eval.simple_evaluate(
        Oracle(Assistant(STORIES, "32-true"), 1),
        tasks=["quickstart"],
        task_manager=manager,
        bootstrap_iters=0,
    )
    assert results["results"]["quickstart"]["exact_match,none"] == 0.5
