"""A model behind lm-eval's interface: base, merged, or base with an adapter run unmerged. Needs lm-eval installed."""

import fnmatch
import os.path
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from lit_gpt import ops, rope
from lit_gpt.attention import Layout
from lit_gpt.generation import Sampler, generate_batch, greedy
from lit_gpt.inference import Assistant
from lit_gpt.report import Progress

OLD_NAMES = {  # the original's spelling -> today's; `*` on the left is carried over
    "hendrycksTest-*": "mmlu_*",
    "truthfulqa_mc": "truthfulqa_mc1,truthfulqa_mc2",
    "lambada": "lambada_openai",
}
AT_ONCE = 256  # rows of logits
Request = tuple[tuple[str, str], list[int], list[int]]


def find_tasks(wanted: Sequence[str], manager: TaskManager) -> list[str]:
    """Names and patterns (`arc_*`) as lm-eval's task names; the original's old names are mapped.

    Raises ValueError for one that matches nothing.
    """
    found: list[str] = []
    for name in wanted:
        matches = fnmatch.filter(manager.all_tasks, name)
        for old, new in OLD_NAMES.items():
            if not matches and fnmatch.fnmatch(name, old):
                tail = name[len(old) - 1 :] if old.endswith("*") else ""
                today = "mmlu" if tail == "*" else new.replace("*", tail)
                matches = [task for task in today.split(",") if task in manager.all_tasks]
        if not matches:
            raise ValueError(f"no task is named {name!r}; give --include_path for task files of your own")
        found += [match for match in matches if match not in found]
    return found


def _beginning(answers: Sequence[list[int]]) -> list[int]:
    """What all of them begin with."""
    return list(os.path.commonprefix(answers))  # noqa: RUF071 - it takes sequences of anything


def _alike(item: Sequence[Request]) -> int:
    """With how many of the tokens that are run all answers of an item begin."""
    return len(_beginning([wanted[:-1] for _, _, wanted in item]))


def _row_length(item: Sequence[Request]) -> int:
    """Tokens of a context and of what follows it in each of its requests; what these begin with is there once."""
    return len(item[0][1]) + sum(len(wanted) - 1 for _, _, wanted in item) - (len(item) - 1) * _alike(item)


def _batches(items: Iterable[tuple[int, list[int]]], most: int) -> Iterator[list[list[int]]]:
    """The items, told with their tokens, in batches of `most` tokens together, or of one item that has more."""
    batch: list[list[int]] = []
    total = 0
    for n_tokens, item in items:
        if batch and total + n_tokens > most:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += n_tokens
    if batch:
        yield batch


class LitGPT(TemplateLM):
    """lm-eval's three kinds of request on our model, batched; scores are those of lm-eval's own HF model."""

    def __init__(self, assistant: Assistant, batch_size: int):
        super().__init__()
        self.assistant, self.batch_size = assistant, batch_size
        self.model, self.codec = assistant.model, assistant.tokenizer
        self.max_length = self.model.config.block_size
        self.scaling = self.model.config.rope_scaling or {}
        self.by_length = self.scaling.get("rope_type") in rope.BY_LENGTH
        if batch_size < 1:
            raise ValueError(f"--batch_size must be at least 1, not {batch_size}")
        if self.codec.eos_id is None:
            raise ValueError("the tokenizer has no end-of-text token, which evaluation needs")

    @property
    def eot_token_id(self) -> int:
        assert self.codec.eos_id is not None
        return self.codec.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.codec.bos_id is None else self.codec.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self.codec.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        begins = self.codec.bos_id is not None and string.startswith(
            self.codec.decode([self.codec.bos_id], skip_special=False)
        )
        return self.codec.encode(string, bos=False if begins else add_special_tokens)

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For each request the log probability of its continuation, and whether it is the likeliest one."""
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        items = [(self._laid([requests[i] for i in item]), item) for item in self._items(requests)]
        items.sort(key=lambda sized: -sized[0])
        most = self.batch_size * items[0][0] if items else 0  # tokens: as many rows of the longest kind are held anyway
        if self.by_length:  # beyond the old context an item would change the angles of others: it fills a batch
            original = self.scaling.get("original_max_position_embeddings") or self.max_length
            items = [(most if n_tokens > original else n_tokens, item) for n_tokens, item in items]
        done = 0
        with Progress("scoring", len(requests), enabled=not disable_tqdm) as progress:
            for chosen in _batches(items, most):
                with self.assistant.autocast():
                    scores = self._score([[requests[i] for i in item] for item in chosen])
                for index, score in zip((i for item in chosen for i in item), scores, strict=True):
                    results[index] = score
                done += sum(map(len, chosen))
                progress.update(done)
        return results

    def _room(self, item: Sequence[Request]) -> int:
        """Tokens of an item's context that the model can see beside the longest of its answers."""
        return self.max_length + 1 - max(len(wanted) for _, _, wanted in item)

    def _laid(self, item: Sequence[Request]) -> int:
        """Tokens that scoring an item takes."""
        return _row_length(item) - max(0, len(item[0][1]) - self._room(item))

    def _items(self, requests: Sequence[Request]) -> list[list[int]]:
        """Places of requests with one context, which is run once for all of them, as far as a row holds them."""
        items: list[list[int]] = []
        # Of the item that is open for a context: its places, its answers' tokens and what these begin with.
        open_items: dict[tuple[int, ...], tuple[list[int], int, list[int]]] = {}
        for index, (_, context, wanted) in enumerate(requests):
            run = wanted[:-1]
            item, n_run, alike = open_items.get(tuple(context), ([], 0, run))
            n_run, alike = n_run + len(run), _beginning([alike, run])
            if not item or self.by_length or len(context) + n_run - len(item) * len(alike) > self.max_length:
                item, n_run, alike = [], len(run), run
                items.append(item)
            item.append(index)
            open_items[tuple(context)] = item, n_run, alike
        return items

    def _score(self, items: Sequence[Sequence[Request]]) -> list[tuple[float, bool]]:
        """Of each request of each item: a context and its continuations, which do not see one another.

        All items lie end to end, so that there is no padding to compute.
        """
        tokens: list[int] = []
        positions: list[int] = []
        branches: list[int] = []
        lengths: list[int] = []
        asked: list[int] = []  # places of the tokens that tell what follows them
        for item in items:
            room = self._room(item)
            if room < 1:
                raise ValueError(f"an answer has more than the {self.max_length} tokens that the model can see")
            context, alike = item[0][1][-room:], _alike(item)  # cut on the left to what the model can see
            assert context
            assert all(wanted for _, _, wanted in item)
            begin, n = len(tokens), len(context) + alike
            tokens += context + item[0][2][:alike]
            positions += range(n)
            branches += [0] * n
            for branch, (_, _, wanted) in enumerate(item, start=1):
                more = len(wanted) - 1 - alike
                asked += [*range(begin + n - 1 - alike, begin + n), *range(len(tokens), len(tokens) + more)]
                tokens += wanted[alike:-1]
                positions += range(n, n + more)
                branches += [branch] * more
            lengths.append(len(tokens) - begin)
        ids, at, branch_of = torch.tensor([tokens, positions, branches], device=self.assistant.device)[:, None]
        layout = Layout(at, max(positions) + 1, lengths, branch_of if any(branches) else None)
        places, row_of = torch.tensor(asked, device=ids.device).unique(return_inverse=True)  # answers share some
        x = self.model.transformer(ids, layout=layout, where=places)
        return self._compared(x, row_of, [wanted for item in items for _, _, wanted in item])

    def _compared(
        self, x: torch.Tensor, row_of: torch.Tensor, answers: Sequence[list[int]]
    ) -> list[tuple[float, bool]]:
        """Each answer's log probability, and whether it is the likeliest.

        `row_of` tells of each token of the answers which state of x (n, C) it follows. Logits are made of a few hundred
        at a time: more would not stay in a cache.
        """
        wanted = torch.tensor([token for answer in answers for token in answer], device=x.device)
        losses, likeliest = torch.empty(len(wanted), device=x.device), torch.empty_like(wanted)
        for start in range(0, len(x), AT_ONCE):
            logits = self.model.head(x[start : start + AT_ONCE])
            best = greedy(logits)
            least = ops.cross_entropy(logits, best, False)[0]
            here = ((row_of >= start) & (row_of < start + AT_ONCE)).nonzero()[:, 0]
            rows = row_of[here] - start
            likeliest[here] = best[rows]
            losses[here] = least[rows] + (logits[rows, best[rows]].float() - logits[rows, wanted[here]].float())
        counts = [len(answer) for answer in answers]
        parts = zip(losses.split(counts), (likeliest == wanted).split(counts), strict=True)
        return [(-float(loss.sum()), bool(is_best.all())) for loss, is_best in parts]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log probability of whole texts, in windows that do not overlap in what they score."""
        windows: list[Request] = []
        counts = []
        for (text,) in (request.args for request in requests):
            pairs = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [utils.make_disjoint_window(pair) for pair in pairs]
            windows += [(("", ""), context, continuation) for context, continuation in parts]
            counts.append(len(parts))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each request up to its first stop string."""
        arguments = [request.args for request in requests]
        results = [""] * len(arguments)
        groups: dict[str, list[int]] = {}
        for index, (_, settings) in enumerate(arguments):
            groups.setdefault(repr(settings), []).append(index)
        with Progress("generating", len(arguments), enabled=not disable_tqdm) as progress:
            done = 0
            for group in groups.values():
                group.sort(key=lambda i: -len(arguments[i][0]))
                for start in range(0, len(group), self.batch_size):
                    chosen = group[start : start + self.batch_size]
                    texts = self._continue([arguments[i][0] for i in chosen], dict(arguments[chosen[0]][1]))
                    for index, text in zip(chosen, texts, strict=True):
                        results[index] = text
                    done += len(chosen)
                    progress.update(done)
        return results

    def _continue(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        until = settings.get("until") or []
        until = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        max_new = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or 256)
        room = self.max_length - max_new
        if room < 1:
            raise ValueError(f"max_gen_toks {max_new} leaves no room in the model's context of {self.max_length}")
        sampler = greedy
        if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
            top_k = settings.get("top_k") or None  # 0 is none
            sampler = Sampler(settings.get("temperature", 1.0), top_k, settings.get("top_p", 1.0))
        prompts = [self.tok_encode(context)[-room:] or [self.prefix_token_id] for context in contexts]
        rows: list[list[int]] = [[] for _ in prompts]
        stop_ids = self.codec.stop_ids | {self.eot_token_id}

        # Tokens that a stop string which has just ended lies within: a character is four of them at worst.
        reach = 8 + 4 * max(map(len, until), default=0)

        def ends(row: int, token: int) -> bool:
            if token in stop_ids:  # here, since one that is no special token is part of the text
                return True
            # Some stop at a special token, such as `<|im_end|>`.
            text = self.codec.decode(rows[row][-reach:], skip_special=False) if until else ""
            return any(stop in text for stop in until)

        with self.assistant.autocast():
            for drawn in generate_batch(self.model, prompts, max_new, sampler=sampler, ends=ends):
                for row, token in zip(rows, drawn, strict=True):
                    if token is not None:
                        row.append(token)
        texts = [self.codec.decode(row) for row in rows]
        for stop in until:
            texts = [text.split(stop, 1)[0] for text in texts]
        return texts


def _manager(tasks: Sequence[str], include_paths: Sequence[Path]) -> TaskManager:
    """What knows the tasks: only those of one's own where no other is named, since lm-eval's are thousands of files."""
    paths: list[str | Path] = [str(path) for path in include_paths]
    own = TaskManager(include_path=paths, include_defaults=False)
    return own if set(tasks) <= set(own.all_subtasks) else TaskManager(include_path=paths)


def evaluate(
    assistant: Assistant,
    tasks: Sequence[str],
    *,
    num_fewshot: int,
    limit: float | None,
    bootstrap_iters: int,
    batch_size: int,
    include_paths: Sequence[Path] = (),
) -> dict[str, Any]:
    """lm-eval's results of the tasks. Raises ValueError for a task that is not known."""
    import lm_eval

    manager = _manager(tasks, include_paths)
    results = lm_eval.simple_evaluate(
        LitGPT(assistant, batch_size),
        tasks=find_tasks(tasks, manager),
        num_fewshot=num_fewshot,
        limit=limit,
        bootstrap_iters=bootstrap_iters,
        task_manager=manager,
        log_samples=False,
    )
    assert isinstance(results, dict)
    return {
        "results": results["results"],
        "versions": results.get("versions", {}),
        "config": {
            "model": assistant.model.config.name,
            "batch_size": batch_size,
            "device": str(assistant.device),
            "num_fewshot": num_fewshot,
            "limit": limit,
            "bootstrap_iters": bootstrap_iters,
        },
    }
