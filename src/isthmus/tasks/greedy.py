"""Greedy answers to prompts, of which each leaves the batch as it ends: nothing is computed, and nothing crosses, for
an answer that is there.

Shapes: B rows that are still written, L positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList, PreTrainedModel

Decode = Callable[[list[int]], str]
"""Token ids as text, without control tokens."""


@dataclass(frozen=True, slots=True)
class Written:
    """An answer."""

    text: str
    """Up to where it ends, without white space around it."""
    stopped: bool
    """Whether it ended by itself; otherwise it reached the greatest length."""


@torch.no_grad()
def write_answers(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    decode: Callable[[list[int]], str],
    *,
    longest: int,
    ends: Collection[int] = (),
    stop: Sequence[str] = (),
    pad: int = 0,
) -> list[Written]:
    """The likeliest token after each prompt, and so on: what transformers' ``generate`` without sampling writes after
    each prompt by itself, with the model's own generation settings.

    The model is left in eval mode.

    Args:
        model: any causal model with a cache, split or uncut.
        prompts: in token ids, none of them empty.
        longest: most tokens of an answer.
        ends: tokens that end an answer.
        stop: texts before which an answer ends; one that an answer begins with, after white space, does not end it.
        pad: token id for padding.
    """
    model.eval()
    length, device = max(map(len, prompts)), model.device
    ids_BL = torch.tensor([[*[pad] * (length - len(one)), *one] for one in prompts], device=device)
    mask_BL = torch.tensor([[0] * (length - len(one)) + [1] * len(one) for one in prompts], device=device)
    places_BL = (mask_BL.cumsum(dim=1) - 1).clamp_min(0)
    settings, rows = generation_processors(model, length), list(range(len(prompts)))
    given: list[list[int]] = [[] for _ in prompts]
    finished: dict[int, Written] = {}
    output = model(input_ids=ids_BL, attention_mask=mask_BL, position_ids=places_BL, logits_to_keep=1, use_cache=True)
    while True:
        scores_BV = output.logits[:, -1].float()
        for row, scores_V in zip(rows, scores_BV, strict=True):
            token = _likeliest([*prompts[row], *given[row]], scores_V, settings)
            text = text_before(decode([*given[row], token]), stop) if stop else None
            if token not in ends:
                given[row].append(token)
            if token in ends or text is not None or len(given[row]) == longest:
                whole = decode(given[row]).strip() if text is None else text
                finished[row] = Written(whole, token in ends or text is not None)
        going = [number for number, row in enumerate(rows) if row not in finished]
        if not going:
            return [finished[row] for row in range(len(prompts))]
        cache = output.past_key_values
        if len(going) < len(rows):
            rows = [rows[number] for number in going]
            cache.batch_select_indices(torch.tensor(going, device=device))
            mask_BL = mask_BL[going]
        output = model(
            input_ids=torch.tensor([[given[row][-1]] for row in rows], device=device),
            attention_mask=(mask_BL := torch.cat([mask_BL, mask_BL.new_ones(len(rows), 1)], dim=1)),
            position_ids=mask_BL.sum(dim=1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )


def generation_processors(model: PreTrainedModel, length: int) -> LogitsProcessorList:
    """What the model's generation settings make of scores, such as a penalty for repetitions.

    Args:
        length: number of tokens of the prompt.
    """
    config, _ = model._prepare_generation_config(None, do_sample=False)
    model._prepare_special_tokens(config, True, device=model.device)
    settings: LogitsProcessorList = model._get_logits_processor(config, length, device=str(model.device))
    return settings


def _likeliest(before: list[int], scores_V: torch.Tensor, settings: LogitsProcessorList) -> int:
    if settings:
        scores_V = settings(torch.tensor([before], device=scores_V.device), scores_V[None])[0]
    return int(scores_V.argmax())


def text_before(text: str, stop: Sequence[str]) -> str | None:
    """A text up to the first of these texts in it, without white space around it; None: there is none.

    What would stop it at its beginning, after white space, does not: a model may begin its answer with a line's end.
    """
    text = text.lstrip()
    ends = [at for one in stop if (at := text.find(one)) >= 0]
    return text[: min(ends)].strip() if ends else None
