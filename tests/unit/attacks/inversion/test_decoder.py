"""The decoder: it starts as the language model, tells tokens of the crossing, and needs own rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from isthmus.attacks.inversion.decoder import Decoder, DecoderSettings, invert_by_decoder
from isthmus.attacks.knowledge import Knowledge
from isthmus.errors import AttackError
from tests.unit.attacks.attacked import Attacked

QUICK = DecoderSettings(epochs=1, width=32, heads=2, blocks=1, others=32)


def test_every_sequence_is_written(attacked: Attacked) -> None:
    view, truth = attacked(own=20)
    written = invert_by_decoder(Knowledge(view), QUICK)
    assert [len(row) for row in written] == [len(row) for row in truth], "all tokens cross, so lengths are known"


def test_the_language_model_stays_out_of_what_trains(attacked: Attacked) -> None:
    view, _ = attacked(own=5)
    model = Knowledge(view).language_model
    decoder = Decoder(model, torch.randn(20, 32), QUICK)
    own = {id(one) for one in decoder.parameters()}
    assert own.isdisjoint({id(one) for one in model.parameters()})


def test_without_own_rows_there_is_nothing_to_learn_from(attacked: Attacked) -> None:
    view, _ = attacked(own=5)
    with pytest.raises(AttackError, match="pairs"):
        invert_by_decoder(Knowledge(replace(view, pairs=())), QUICK)
