"""Distilling a bridge from the split model's own answers, which come back to the silo as they are generated.

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
from isthmus.model.split import SplitForCausalLM
from isthmus.silo.drafting.bridge import Bridge, narrow
from isthmus.silo.drafting.draft import Corpus, Draft
from isthmus.silo.join import Silo

FEATURES = 1.0
"""Weight of the distance between hidden states beside the divergence between next-token distributions."""
WARM_UP = 0.05
"""Share of the steps in which the learning rate rises."""
PROMPTS = 0.3
"""Weight of a prompt's position beside an answer's; prompts have many more, and cross anyway."""
GUESSED = 0.3
"""Share of positions at which the bridge reads its own guess of the position before, as deep in a draft."""
READ = 0.7
"""Share of positions at which top reads a guess."""
DECAY = 0.05
ROWS = 32
"""Prompts answered at a time."""
BATCH, EPOCHS, LEARNING_RATE = 8, 4, 1e-3
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """One answer of the split model, and what crossed for it at every position but the last."""

    prompt: int
    """Tokens of the prompt."""
    ids_L: torch.Tensor
    h_LD: torch.Tensor
    """Bottom's result."""
    g_LD: torch.Tensor
    """The trunk's."""


def distil(silo: Silo, rows: list[Tokens], *, longest: int, blocks: int = 1, tell: Tell) -> tuple[Draft, Corpus]:
    """A draft model that has learned from the split model's answers to these rows' prompts.

    Args:
        longest: most tokens of an answer.
        blocks: of the bridge.
        tell: gets a sentence now and then.

    Returns:
        The draft, and the answers it looks up.
    """
    pad = silo.tokenizer.pad_token_id
    records: list[Answer] = []
    for record in answers(silo.model, rows, pad, longest=longest):
        records.append(record)
        if len(records) % ROWS == 0 or len(records) == len(rows):
            tell(f"answered {len(records)} of {len(rows)} prompts")
    words = torch.unique(torch.cat([record.ids_L for record in records]))
    bridge = Bridge(silo.model.bottom, blocks).to(silo.model.device)

    def told(step: int, steps: int, loss: float) -> None:
        if step % 20 == 0 or step == steps:
            tell(f"distilled {step} of {steps} steps, loss {loss:.3f}")

    train_bridge(bridge, silo.model.top, words, records, told)
    corpus = [(record.ids_L.tolist(), record.prompt) for record in records]
    return Draft(silo.model, bridge, words, corpus), corpus


def answers(
    model: SplitForCausalLM, rows: list[Tokens], pad: int, *, longest: int, size: int = ROWS
) -> Iterator[Answer]:
    """The split model's greedy answers to these rows' prompts, in batches of similar length, drawn in random order.

    Nothing crosses that answering itself does not send.
    """
    ordered = sorted(rows, key=lambda row: len(row.prompt))
    chunks = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    random.Random(0).shuffle(chunks)
    for chunk in chunks:
        yield from _answer(model, chunk, pad, longest)


@torch.no_grad()
def _answer(model: SplitForCausalLM, rows: list[Tokens], pad: int, longest: int) -> Iterator[Answer]:
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
    heard, width = transcript.slice(), batch.input_ids.shape[1]
    for number, row in enumerate(rows):
        stop = width + _length(out_BL[number, width:], model.generation_config.eos_token_id)
        place = slice(width - len(row.prompt), stop - 1)
        ids_L = out_BL[number, place.start : stop].clone()
        yield Answer(len(row.prompt), ids_L, heard.h_BLD[number, place].clone(), heard.g_BLD[number, place].clone())


def _length(ids_L: torch.Tensor, ends: int | list[int] | None) -> int:
    """Tokens up to and with the first that ends a text."""
    over = torch.isin(ids_L, ids_L.new_tensor([] if ends is None else ends)).nonzero()
    return int(over[0]) + 1 if len(over) else len(ids_L)


def train_bridge(
    bridge: Bridge,
    top: Part,
    words: torch.Tensor,
    records: list[Answer],
    tell: Callable[[int, int, float], None] = lambda step, steps, loss: None,
    *,
    epochs: int = EPOCHS,
    batch: int = BATCH,
    learning_rate: float = LEARNING_RATE,
) -> None:
    """Teach the bridge to lead top to the next tokens to which the trunk's answers led it.

    Args:
        words: the tokens a draft may use.
        tell: called after each step with its number, their count and the loss.
    """
    bridge.scale.fill_(torch.cat([one.g_LD[1:] for one in records]).float().square().mean().sqrt())
    narrowed = narrow(top, words)
    optimizer = torch.optim.AdamW(bridge.parameters(), lr=learning_rate, weight_decay=DECAY)
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
        tell(number, steps, float(loss.detach()))
    bridge.eval()


def _batches(records: list[Answer], size: int, epochs: int) -> Iterator[list[Answer]]:
    """Batches of rows of similar length, in random order, another one each epoch."""
    draw = random.Random(1)
    for _ in range(epochs):
        order = sorted(records, key=lambda one: len(one.g_LD) + 40 * draw.random())
        chunks = [order[start : start + size] for start in range(0, len(order), size)]
        draw.shuffle(chunks)
        yield from chunks


def _loss(bridge: Bridge, top: Part, rows: list[Answer], draw: torch.Generator) -> torch.Tensor:
    """Divergence of next-token distributions where top reads a guess, and distance of hidden states everywhere.

    As in a draft, some of what bridge and top read is true and some is guessed.
    """
    h_BLD = pad_sequence([row.h_LD.float() for row in rows], batch_first=True)
    g_BLD = pad_sequence([row.g_LD.float() for row in rows], batch_first=True)
    before_BLD = functional.pad(g_BLD[:, :-1], (0, 0, 1, 0))
    weight_BL = torch.stack([_weights(row, h_BLD.shape[1]) for row in rows])
    with torch.no_grad():
        target = top.model(inputs_embeds=g_BLD, use_cache=False).logits.softmax(dim=-1)
        guess_BLD = functional.pad(bridge.guess(h_BLD, before_BLD)[:, :-1], (0, 0, 1, 0))
    before_BLD = torch.where(_some(weight_BL, GUESSED, draw), guess_BLD, before_BLD)
    guess_BLD = bridge.guess(h_BLD, before_BLD)
    read_BL1 = _some(weight_BL, READ, draw)
    logits = top.model(inputs_embeds=torch.where(read_BL1, guess_BLD, g_BLD), use_cache=False).logits
    divergence_BL = -(target * logits.log_softmax(dim=-1)).sum(dim=-1) * read_BL1[..., 0] / READ
    apart_BLD = functional.smooth_l1_loss(guess_BLD / bridge.scale, g_BLD / bridge.scale, reduction="none")
    loss: torch.Tensor = ((divergence_BL + FEATURES * apart_BLD.mean(dim=-1)) * weight_BL).sum() / weight_BL.sum()
    return loss


def _weights(row: Answer, length: int) -> torch.Tensor:
    """What each position counts, ``[L]``: answers whole, prompts less, the first (which no draft guesses) nothing."""
    weight_L = torch.zeros(length, device=row.g_LD.device)
    weight_L[1 : len(row.g_LD)] = PROMPTS
    weight_L[row.prompt - 1 : len(row.g_LD)] = 1.0
    return weight_L


def _some(like_BL: torch.Tensor, share: float, draw: torch.Generator) -> torch.Tensor:
    """This share of positions, drawn, and never the first; ``[B, L, 1]``."""
    drawn_BL1 = torch.rand(like_BL.shape, generator=draw).to(like_BL).unsqueeze(-1) < share
    drawn_BL1[:, 0] = False
    return drawn_BL1
