"""Distilling a bridge from the split model's own answers and the hidden states that crossed for them.

Shapes: B rows, L positions (padded on the right), T answer tokens of all rows, D width, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from isthmus.data.tokens import Tokens, collate
from isthmus.model.cut import Part
from isthmus.model.rope import given_lengths
from isthmus.model.split import SplitForCausalLM
from isthmus.silo.drafting.bridge import Bridge, restrict_head
from isthmus.silo.drafting.draft import Corpus, Draft
from isthmus.silo.join import Silo

FEATURE_WEIGHT = 1.0
"""Weight of the distance of hidden states; the divergence of next-token distributions has weight 1."""
WARM_UP = 0.05
"""Fraction of the steps in which the learning rate rises."""
PROMPT_WEIGHT = 0.3
"""Weight of a prompt's position in the loss; an answer's has weight 1, but prompts have many more positions."""
PREDICTED_BEFORE = 0.3
"""Fraction of positions whose input is the bridge's own prediction for the position before, as in a long draft."""
PREDICTED_TO_TOP = 0.7
"""Fraction of positions at which top's input is a prediction."""
WEIGHT_DECAY = 0.05
"""Weight decay of AdamW."""
PROMPTS_PER_BATCH = 32
"""Number of prompts answered in one batch."""
BATCH, EPOCHS, LEARNING_RATE = 8, 4, 1e-3
"""Answers per training batch, epochs, and AdamW's peak learning rate."""


@dataclass(frozen=True)
class RecordedAnswer:
    """One answer of the split model with the hidden states at every position but the last."""

    prompt: int
    """Number of the prompt's tokens."""
    ids_L: torch.Tensor
    """Token ids of prompt and answer."""
    h_LD: torch.Tensor
    """Bottom's output."""
    g_LD: torch.Tensor
    """The trunk's output."""


def distil(
    silo: Silo, rows: list[Tokens], *, longest: int, blocks: int = 1, notify: Callable[[str], None]
) -> tuple[Draft, Corpus]:
    """A draft model trained on the split model's answers to these rows' prompts.

    Args:
        silo: the connected silo; answering releases hidden states and charges its privacy budget.
        longest: largest number of tokens of an answer.
        blocks: number of the bridge's blocks.
        notify: called with messages of progress.

    Returns:
        The draft model, and the texts of its look-up.
    """
    pad = silo.tokenizer.pad_token_id
    records: list[RecordedAnswer] = []
    for record in record_answers(silo.model, rows, pad, longest=longest):
        records.append(record)
        if len(records) % PROMPTS_PER_BATCH == 0 or len(records) == len(rows):
            notify(f"answered {len(records)} of {len(rows)} prompts")
    vocabulary = torch.unique(torch.cat([record.ids_L for record in records]))
    bridge = Bridge(silo.model.bottom, blocks).to(silo.model.device)

    def on_step(step: int, steps: int, loss: float) -> None:
        if step % 20 == 0 or step == steps:
            notify(f"distilled {step} of {steps} steps, loss {loss:.3f}")

    train_bridge(bridge, silo.model.top, vocabulary, records, on_step)
    corpus = [(record.ids_L.tolist(), record.prompt) for record in records]
    return Draft(silo.model, bridge, vocabulary, corpus), corpus


def record_answers(
    model: SplitForCausalLM, rows: list[Tokens], pad: int, *, longest: int, size: int = PROMPTS_PER_BATCH
) -> Iterator[RecordedAnswer]:
    """The split model's greedy answers to these rows' prompts, in random order.

    Nothing crosses beyond what generating the answers sends.

    Args:
        pad: padding token.
        longest: largest number of tokens of an answer.
        size: prompts in a batch; those of a batch have similar lengths.
    """
    ordered = sorted(rows, key=lambda row: len(row.prompt))
    chunks = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    random.Random(0).shuffle(chunks)
    for chunk in chunks:
        yield from _answer(model, chunk, pad, longest)


@torch.no_grad()
def _answer(model: SplitForCausalLM, rows: list[Tokens], pad: int, longest: int) -> Iterator[RecordedAnswer]:
    batch = collate([Tokens(row.prompt, []) for row in rows], pad).to(model.device)
    cache = model.new_cache()
    transcript = cache.start_transcript()
    out_BL = model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        past_key_values=cache,
        max_new_tokens=longest,
        do_sample=False,
        pad_token_id=pad,
    )
    cache.session.close()
    crossed, width = transcript.slice(), batch.input_ids.shape[1]
    for number, row in enumerate(rows):
        stop = width + _length(out_BL[number, width:], model.generation_config.eos_token_id)
        positions = slice(width - len(row.prompt), stop - 1)
        ids_L = out_BL[number, positions.start : stop].clone()
        h_LD, g_LD = (h_BLD[number, positions].clone() for h_BLD in (crossed.h_BLD, crossed.g_BLD))
        yield RecordedAnswer(len(row.prompt), ids_L, h_LD, g_LD)


def _length(ids_L: torch.Tensor, ends: int | list[int] | None) -> int:
    """Number of tokens up to and including the first end-of-text token."""
    over = torch.isin(ids_L, ids_L.new_tensor([] if ends is None else ends)).nonzero()
    return int(over[0]) + 1 if len(over) else len(ids_L)


def train_bridge(
    bridge: Bridge,
    top: Part,
    vocabulary: torch.Tensor,
    records: list[RecordedAnswer],
    notify: Callable[[int, int, float], None] = lambda step, steps, loss: None,
    *,
    epochs: int = EPOCHS,
    batch: int = BATCH,
    learning_rate: float = LEARNING_RATE,
) -> None:
    """Train the bridge so that top predicts the same next tokens from its predictions as from the trunk's answers.

    Args:
        vocabulary: token ids that a draft may use.
        notify: called after each step with its number, the number of steps and the loss.
        batch: answers in a batch.
        learning_rate: AdamW's peak learning rate.
    """
    bridge.scale.fill_(torch.cat([record.g_LD[1:] for record in records]).float().square().mean().sqrt())
    narrowed = restrict_head(top, vocabulary)
    optimizer = torch.optim.AdamW(bridge.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY)
    steps = epochs * -(-len(records) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (WARM_UP * steps + 1), (steps - step) / steps)
    )
    draw = torch.Generator().manual_seed(0)
    bridge.train()
    for number, rows in enumerate(_batches(records, batch, epochs), 1):
        optimizer.zero_grad()
        loss = _loss(bridge, narrowed, rows, draw)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(bridge.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        notify(number, steps, float(loss.detach()))
    bridge.eval()


def _batches(records: list[RecordedAnswer], size: int, epochs: int) -> Iterator[list[RecordedAnswer]]:
    """Batches of answers of similar length, in a new random order each epoch."""
    draw = random.Random(1)
    for _ in range(epochs):
        order = sorted(records, key=lambda record: len(record.g_LD) + 40 * draw.random())
        chunks = [order[start : start + size] for start in range(0, len(order), size)]
        draw.shuffle(chunks)
        yield from chunks


def _loss(bridge: Bridge, top: Part, rows: list[RecordedAnswer], draw: torch.Generator) -> torch.Tensor:
    """Divergence of next-token distributions, where top's input is a prediction, plus the distance of hidden states.

    As in a draft, some inputs of bridge and top are the trunk's answers and some are predictions.
    """
    with given_lengths([len(row.g_LD) for row in rows]):
        return _padded_loss(bridge, top, rows, draw)


def _padded_loss(bridge: Bridge, top: Part, rows: list[RecordedAnswer], draw: torch.Generator) -> torch.Tensor:
    h_BLD = pad_sequence([row.h_LD.float() for row in rows], batch_first=True)
    g_BLD = pad_sequence([row.g_LD.float() for row in rows], batch_first=True)
    before_BLD = functional.pad(g_BLD[:, :-1], (0, 0, 1, 0))
    weight_BL = torch.stack([_weights(row, h_BLD.shape[1]) for row in rows])
    with torch.no_grad():
        target = _logits(top, g_BLD).softmax(dim=-1)
        predicted_BLD = functional.pad(bridge.predict(h_BLD, before_BLD)[:, :-1], (0, 0, 1, 0))
    before_BLD = torch.where(_some(weight_BL, PREDICTED_BEFORE, draw), predicted_BLD, before_BLD)
    predicted_BLD = bridge.predict(h_BLD, before_BLD)
    predicted_BL1 = _some(weight_BL, PREDICTED_TO_TOP, draw)
    logits = _logits(top, torch.where(predicted_BL1, predicted_BLD, g_BLD))
    divergence_BL = -(target * logits.log_softmax(dim=-1)).sum(dim=-1) * predicted_BL1[..., 0] / PREDICTED_TO_TOP
    distance_BLD = functional.smooth_l1_loss(predicted_BLD / bridge.scale, g_BLD / bridge.scale, reduction="none")
    loss: torch.Tensor = (
        (divergence_BL + FEATURE_WEIGHT * distance_BLD.mean(dim=-1)) * weight_BL
    ).sum() / weight_BL.sum()
    return loss


def _logits(top: Part, g_BLD: torch.Tensor) -> torch.Tensor:
    """Top's logits, ``[B, L, V]``, fp32, computed in its base's type."""
    logits: torch.Tensor = top.model(inputs_embeds=g_BLD.to(top.model.dtype), use_cache=False).logits
    return logits.float()


def _weights(row: RecordedAnswer, length: int) -> torch.Tensor:
    """Loss weights of the positions, ``[L]``: 1 in the answer, less in the prompt, 0 at its first and at padding."""
    weight_L = torch.zeros(length, device=row.g_LD.device)
    weight_L[1 : len(row.g_LD)] = PROMPT_WEIGHT
    weight_L[row.prompt - 1 : len(row.g_LD)] = 1.0
    return weight_L


def _some(like_BL: torch.Tensor, share: float, draw: torch.Generator) -> torch.Tensor:
    """A random mask with this fraction of positions, never the first, ``[B, L, 1]``."""
    drawn_BL1 = torch.rand(like_BL.shape, generator=draw).to(like_BL).unsqueeze(-1) < share
    drawn_BL1[:, 0] = False
    return drawn_BL1
