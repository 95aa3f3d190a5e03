"""What a gateway's requests send over the wire: noised states of their tokens, and no text."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import torch

from isthmus.gateway.generation import GenerationRequest
from isthmus.gateway.sampling import SamplingSettings
from isthmus.wire import isthmus_pb2 as pb
from tests.conftest import Split, save_tiny_model
from tests.features.silo.test_wiretap import (
    FIELDS,
    FORWARD,
    HEADER,
    NOISE,
    assert_noised,
    matrix_of,
    recipe_of,
    tapped,
    tensor_of,
)
from tests.oracle.gateway import batching, written

PROMPTS = [[4, 5, 6, 7, 8], [40, 41], list(range(10, 60))]


@pytest.mark.parametrize("answers", [1, 3])
def test_noised_states_of_the_tokens_cross_and_nothing_else(answers: int, split: Split, tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")
    silo = tapped(split, recipe_of(folder, **NOISE))
    silo.model.bottom.family.backbone_of(silo.model.bottom.model)._forward_hooks.clear()  # of another way of computing
    settings = SamplingSettings(seed=3)
    requests = [GenerationRequest(prompt, 30, settings=settings, answers=answers) for prompt in PROMPTS]
    with batching(silo.model) as batcher:
        found = written(batcher, requests)
    sent: defaultdict[int, list[pb.Decode]] = defaultdict(list)
    for data, request in zip(silo.tap.sent, silo.tap.requests, strict=True):
        assert isinstance(request, pb.Decode | pb.Close | pb.Ping)
        if isinstance(request, pb.Decode):
            sent[request.session].append(request)
            assert type(request) in FIELDS
            matrix = matrix_of(request)
            assert matrix is not None
            room = 3 * (len(request.lengths) + len(request.rows))
            assert 0 < len(data) - len(matrix.data) <= HEADER + room
    assert len(sent) == len(PROMPTS)
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad():
        for prompt, told, steps in zip(PROMPTS, found, sent.values(), strict=True):
            assert list(steps[0].lengths) == [len(prompt)]
            rows = [
                silo.model.bottom.hidden(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False)[0]
                for ids in told.ids
            ]
            clean = [rows[0][: len(prompt)]]
            clean += [torch.stack([row[place] for row in rows]) for place in range(len(prompt), len(prompt) + 29)]
            released = [tensor_of(step.hidden) for step in steps]
            assert [len(one) for one in released] == [len(one) for one in clean]
            pairs += zip(released, clean, strict=True)
    assert_noised([one for one, _ in pairs], [own for _, own in pairs], FORWARD)
    assert len(silo.ledger.releases) == 30 * len(PROMPTS)
