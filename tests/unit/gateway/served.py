"""A gateway's parts over a tiny split model, whose trunk is in this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from transformers import AutoTokenizer

from isthmus.gateway.answer_grammar import GrammarReader
from isthmus.gateway.app import ServedModel, gateway_app
from isthmus.gateway.batcher import Batcher
from isthmus.gateway.metrics import GatewayMetrics
from isthmus.gateway.prompts import PromptReader
from isthmus.gateway.server import decoder
from isthmus.model.split import SplitForCausalLM
from tests.conftest import VOCABULARY
from tests.integration.gateways import TEMPLATE
from tests.oracle.gateway import opened


@contextmanager
def served(model: SplitForCausalLM, folder: Path, **settings: Any) -> Iterator[tuple[FastAPI, Batcher]]:
    """The application of a gateway while the block runs, and its batcher."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    batcher = Batcher(decoder(tokenizer), **settings)
    own = ServedModel("tiny", "a", "run-1", 1, model.context, 1e-5, 64)
    thread = threading.Thread(target=batcher.run, args=(model,), daemon=True)
    thread.start()
    with opened(batcher, thread):
        yield (
            gateway_app(
                own,
                batcher,
                PromptReader(tokenizer, VOCABULARY),
                GrammarReader(tokenizer, VOCABULARY),
                GatewayMetrics(batcher),
            ),
            batcher,
        )
