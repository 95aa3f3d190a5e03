"""Log-probabilities of choices after prompts, and the choice that they make likeliest.

A row's prompt is read once: its cache is repeated for its choices. Rows of similar length share a batch.

Shapes: B rows, P prompt tokens, C choices, K tokens of a choice, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from isthmus.tasks.task import Ranking

SCORED_TOKENS = 8192
"""Most tokens, with padding, whose keys and values are kept at a time, unless one prompt is longer."""
SCORED_LOGITS = 2**26
"""Most logits at a time, 256 MiB in fp32, unless one choice has more."""


SIMILAR, FEW_TOKENS = 0.75, 24
"""Questions share a batch if they are no shorter than this share of the longest, or by no more than so many tokens."""


@dataclass(frozen=True, slots=True)
class ChoiceQuestion:
    """A prompt and its possible answers, in token ids."""

    prompt: list[int]
    choices: list[list[int]]


@torch.no_grad()
def choice_log_probs(model: PreTrainedModel, questions: Sequence[ChoiceQuestion], *, pad: int = 0) -> list[list[float]]:
    """The total log-probability of each choice after its question's prompt, in nats.

    The model is left in eval mode.

    Args:
        model: any causal model with a cache, split or uncut.
        pad: token id for padding.
    """
    model.eval()
    found: dict[int, list[float]] = {}
    for numbers in _batches(questions, model.config.vocab_size):
        scores = _batch_scores(model, [questions[number] for number in numbers], pad)
        found.update(zip(numbers, scores, strict=True))
    return [found[number] for number in range(len(questions))]


def best_choices(
    log_probs: Sequence[Sequence[float]],
    texts: Sequence[Sequence[str]],
    ranking: Ranking,
    unconditioned: Sequence[Sequence[float]] = (),
) -> list[int]:
    """Number of each question's likeliest choice; of several the first.

    Args:
        log_probs: of each question's choices, after its prompt.
        texts: the choices as text, for ``ranking="length"``.
        unconditioned: log-probabilities of the choices after nothing, for ``ranking="unconditioned"``.
    """
    if ranking == "length":
        log_probs = [[p / len(t) for p, t in zip(*pair, strict=True)] for pair in zip(log_probs, texts, strict=True)]
    if ranking == "unconditioned":
        pairs = zip(log_probs, unconditioned, strict=True)
        log_probs = [[after - alone for after, alone in zip(*pair, strict=True)] for pair in pairs]
    return [max(range(len(scores)), key=scores.__getitem__) for scores in log_probs]


def _batches(questions: Sequence[ChoiceQuestion], vocabulary: int) -> Iterator[list[int]]:
    """Numbers of the questions that are scored together: of similar length, since the others are padded to the longest.
    The longest come first: what needs most memory fails at once."""
    lengths = [len(one.prompt) + max(map(len, one.choices)) for one in questions]
    order = sorted(range(len(questions)), key=lambda number: -lengths[number])
    while order:
        longest = lengths[order[0]]
        choice = max(len(one) for one in questions[order[0]].choices)
        some = order[: max(1, min(SCORED_TOKENS // longest, SCORED_LOGITS // (choice * vocabulary)))]
        alike = [number for number in some if lengths[number] >= SIMILAR * longest - FEW_TOKENS]
        yield alike
        order = order[len(alike) :]


def _batch_scores(model: PreTrainedModel, questions: list[ChoiceQuestion], pad: int) -> list[list[float]]:
    device, prompt = model.device, max(len(one.prompt) for one in questions)
    ids_BP = torch.full((len(questions), prompt), pad)
    mask_BP = torch.zeros((len(questions), prompt), dtype=torch.long)
    for row, one in enumerate(questions):
        ids_BP[row, prompt - len(one.prompt) :] = torch.tensor(one.prompt)
        mask_BP[row, prompt - len(one.prompt) :] = 1
    longest = max(len(choice) for one in questions for choice in one.choices)
    output = model(
        input_ids=ids_BP.to(device),
        attention_mask=mask_BP.to(device),
        position_ids=(mask_BP.cumsum(dim=1) - 1).clamp_min(0).to(device),
        logits_to_keep=1,
        use_cache=longest > 1,
    )
    first_BV = output.logits[:, -1].float().log_softmax(dim=-1)
    first = [first_BV[row, [choice[0] for choice in one.choices]].tolist() for row, one in enumerate(questions)]
    if longest == 1:
        return first
    rest = _continued(model, output.past_key_values, questions, mask_BP, pad)
    return [[one + other for one, other in zip(*pair, strict=True)] for pair in zip(first, rest, strict=True)]


def _continued(
    model: PreTrainedModel, cache: Any, questions: list[ChoiceQuestion], mask_BP: torch.Tensor, pad: int
) -> list[list[float]]:
    """The log-probability of each choice's tokens after its first one. The cache is used up.

    Args:
        cache: of the prompts.
    """
    rows, prompt = mask_BP.shape
    choices = max(len(one.choices) for one in questions)
    longest = max(len(choice) for one in questions for choice in one.choices)
    most = min(SCORED_TOKENS // (prompt + longest), SCORED_LOGITS // (longest * model.config.vocab_size)) // rows
    together = min(choices, max(1, most))
    if together < choices:
        cache.activate_past_recording()  # what a sliding window leaves behind is needed again
    found: list[list[float]] = [[] for _ in questions]
    for start in range(0, choices, together):
        drawn = [
            [one.choices[number % len(one.choices)] for number in range(start, start + together)] for one in questions
        ]
        cache.batch_repeat_interleave(together)
        totals = _after_first(model, cache, [one for some in drawn for one in some], mask_BP, pad)
        for row, one in enumerate(questions):
            own = min(together, max(0, len(one.choices) - start))
            found[row] += totals[row * together : row * together + own]
        if start + together < choices:
            cache.crop(1 - max(len(one) for some in drawn for one in some))
            cache.batch_select_indices(torch.arange(0, rows * together, together))
    return found


def _after_first(
    model: PreTrainedModel, cache: Any, choices: list[list[int]], mask_BP: torch.Tensor, pad: int
) -> list[float]:
    """The log-probability of each of these choices' tokens after its first one; the cache has a row for each."""
    fed = max(len(choice) for choice in choices) - 1
    if not fed:
        return [0.0] * len(choices)
    # what follows a choice's end is read as if it were text: nothing that is counted comes after it
    ids_NK = torch.tensor([[*choice, *[pad] * (fed + 1 - len(choice))] for choice in choices])
    lengths_N = torch.tensor([len(choice) for choice in choices])
    mask_NP = mask_BP.repeat_interleave(len(choices) // len(mask_BP), dim=0)
    position_NK = mask_NP.sum(dim=1, keepdim=True) + torch.arange(fed)
    device = model.device
    logits_NKV = model(
        input_ids=ids_NK[:, :-1].to(device),
        attention_mask=torch.cat([mask_NP, torch.ones(len(choices), fed, dtype=torch.long)], dim=1).to(device),
        position_ids=position_NK.to(device),
        past_key_values=cache,
        use_cache=True,
    ).logits
    next_NK1 = ids_NK[:, 1:, None].to(device)
    picked = [
        row_KV.float().log_softmax(dim=-1).gather(1, of_K1) for row_KV, of_K1 in zip(logits_NKV, next_NK1, strict=True)
    ]
    picked_NK = torch.stack(picked).squeeze(2).cpu()
    counts_NK = torch.arange(1, fed + 1) < lengths_N[:, None]
    totals: list[float] = torch.where(counts_NK, picked_NK, 0.0).sum(dim=1).tolist()
    return totals
