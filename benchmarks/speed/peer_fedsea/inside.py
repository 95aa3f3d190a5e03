"""Runs one of FedSEA-LLaMA's two programs, unchanged, in its own environment on a CPU, and notes what it uses.

``python inside.py PROGRAM NOTES SERVER [--keep-tokenizer] -- ARGUMENT ...``, started by ``checkout``: SERVER is the
server's process id, or ``none`` in the server itself. What is replaced, all of it from outside, is in ``prepare``.
"""

from __future__ import annotations

import functools
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import flwr
import peft  # noqa: F401  # it and transformers look for packages, so they come before the stand-ins
import torch
import transformers
from meter import Meter  # beside this file: the package cannot be imported in this environment

UNUSED = ("datasets", "flask", "jieba", "nltk", "rouge", "rouge_chinese", "wandb", "Official_eval")
"""Modules that the programs import and that nothing here runs: data sets, scores, logs, a web page."""
SUBMODULES = ("nltk.translate", "nltk.translate.bleu_score", "Official_eval.multirc_eval_v1")
BACKWARD, TOKEN = 3, 2
"""The messages whose answers end a step of training, and a token of an answer."""


def main() -> None:
    split = sys.argv.index("--")
    program, notes, server, *options = sys.argv[1:split]
    path = Path(program)
    prepare(keep_tokenizer="--keep-tokenizer" in options)
    if server != "none":
        meet(Meter(Path(notes), int(server)), TOKEN if "--do_predict" in sys.argv else BACKWARD)
    root = path.parents[1]
    sys.path[:1] = [str(path.parent), *(str(root / part) for part in ("clientA", "clientC", "server"))]
    sys.argv = [program, *sys.argv[split + 1 :]]
    runpy.run_path(program, run_name="__main__")


def prepare(*, keep_tokenizer: bool) -> None:
    """Let the programs run without a GPU and without packages that they import and do not need here.

    Args:
        keep_tokenizer: load a tokenizer once, in place of once for each token.
    """
    for name in (*UNUSED, *SUBMODULES):
        sys.modules[name] = MagicMock()
    torch.cuda.set_device = lambda device: None
    if keep_tokenizer:
        transformers.AutoTokenizer.from_pretrained = functools.cache(transformers.AutoTokenizer.from_pretrained)


def meet(meter: Meter, last: int) -> None:
    """Note what has been used at the end of each step or token, as the client that is about to start answers.

    Args:
        last: type of the message whose answer ends one.
    """
    start = flwr.client.start_client

    def start_noted(*, server_address: str, client: Any) -> None:
        inner = client.numpy_client
        fit = inner.fit

        def noted(parameters: Any, config: dict[str, Any]) -> Any:
            answer = fit(parameters, config)
            if config["type"] == TOKEN:
                noted.loss = answer[2].get("loss")
            if config["type"] == last:
                meter.note(loss=noted.loss, tokens=1)
            return answer

        meter.note(tokens=0)
        inner.fit = noted
        start(server_address=server_address, client=client)

    flwr.client.start_client = start_noted


if __name__ == "__main__":
    main()
