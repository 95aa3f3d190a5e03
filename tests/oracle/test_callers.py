"""Every row of ``tests/oracle/callers.py``: what is exact equals the uncut model, what is refused names its remedy."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils.generic import TransformersKwargs

from tests.oracle.callers import EXACT, OWN, PAGE, REFUSED, ROWS, Kit, Row, callers_twins, line, refusal_of
from tests.oracle.twins import Twins, distance


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Twins, Kit]]:
    with callers_twins(tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("trunk")) as made:
        yield made


def same(actual: Any, expected: Any) -> bool:
    """Equal, tensors of floats to rounding."""
    if isinstance(expected, torch.Tensor):
        if not expected.is_floating_point():
            return torch.equal(actual, expected)
        finite = expected.isfinite()
        return torch.equal(actual.isfinite(), finite) and distance(actual[finite], expected[finite]) <= 1e-5
    if isinstance(expected, (tuple, list)):
        return len(actual) == len(expected) and all(map(same, actual, expected))
    return bool(actual == expected)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row(row: Row, case: tuple[Twins, Kit]) -> None:
    twins, kit = case
    whole = twins.whole.base_model.model
    if row.kind == REFUSED:
        error = refusal_of(row, twins.split, kit)
        assert error.remedy
    else:
        with torch.no_grad():
            if row.kind == EXACT:
                assert same(row.call(twins.split, kit), row.call(whole, kit))
            elif row.kind == OWN:
                row.call(twins.split, kit)
            else:
                for model in (twins.split, whole):
                    with pytest.raises(Exception) as caught:  # noqa: PT011
                        row.call(model, kit)
                    assert type(caught.value).__name__ == row.kind
    written = line(row, twins.split, kit) in PAGE.read_text().splitlines()
    assert written, "docs/features/transformers.md differs: python -m tests.oracle.callers writes it"


def test_the_page_has_no_other_row() -> None:
    lines = [text for text in PAGE.read_text().splitlines() if text.startswith("| `")]
    assert len(lines) == len(ROWS)


def covered(section: str) -> set[str]:
    return {row.covers for row in ROWS if row.section == section}


def test_every_argument_of_the_uncut_forward_has_a_row() -> None:
    arguments = set(inspect.signature(LlamaForCausalLM.forward).parameters) - {"self"}
    assert (arguments | TransformersKwargs.__optional_keys__) - covered("forward") == set()


METADATA = {"transformers_version", "continuous_batching_config", "is_assistant"}
"""Fields that a caller's ``generate`` does not read; the last is set on an assistant's own."""


def test_every_field_of_a_generation_has_a_row() -> None:
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    arguments = set(inspect.signature(GenerationMixin.generate).parameters) - {"self"}
    assert (fields | arguments) - covered("generate") - METADATA == set()


INTERNAL = {
    "add_model_tags", "adjust_generation_fn", "barrier_after_gathered_checkpoint_save", "base_model_prefix",
    "can_record_outputs", "config_class", "destroy_cached_continuous_batching_manager", "dummy_inputs", "ep_plan",
    "fsdp_plan", "fsdp_size", "gather_sharded_state_dict_for_save", "generation_config_class", "get_compiled_call",
    "get_correct_attn_implementation", "get_correct_experts_implementation", "get_encoder",
    "get_expanded_tied_weights_keys", "get_experts_implementation", "get_init_context", "get_parameter_or_buffer",
    "get_position_embeddings", "heal_tokens", "init_parallel_plans", "input_modalities", "is_backend_compatible",
    "is_custom_code", "is_distributed_loading_by_transformers", "is_remote_code", "load_custom_generate",
    "mark_tied_weights_as_initialized", "model_tags", "named_non_persistent_buffers", "output_modalities", "post_init",
    "pp_plan", "prepare_inputs_for_generation", "retrieve_modules_from_names", "should_save_on_this_rank",
    "supports_context_parallel", "supports_gradient_checkpointing", "supports_pp_plan", "supports_tp_plan", "tp_plan",
    "tp_size", "use_kernels",
}  # fmt: skip
"""What transformers itself calls or reads, or what concerns other rows (a method of ``generate``, a class's name)."""
ELSEWHERE = {"load_adapter", "save_pretrained", "generate"}
"""What has tests of its own."""
TOGETHER = {
    "activation_checkpointing_disable", "gradient_checkpointing_disable", "is_activation_checkpointing",
    "is_gradient_checkpointing", "disable_input_require_grads",
}  # fmt: skip
"""What a row calls beside the method that it is named after."""


def test_every_method_of_transformers_models_has_a_row() -> None:
    own = {name for name in {*dir(PreTrainedModel), *dir(GenerationMixin)} if not name.startswith("_")}
    own -= set(dir(torch.nn.Module))
    assert own - covered("methods") - INTERNAL - ELSEWHERE - TOGETHER == set()


STATES = {
    "get_conv_state", "get_recurrent_state", "has_previous_state", "update_conv_state", "update_indexer",
    "update_recurrent_state",
}  # fmt: skip
"""What blocks of linear attention call on their part of a cache."""


def test_every_method_of_a_cache_has_a_row() -> None:
    assert {name for name in dir(Cache) if not name.startswith("_")} - covered("cache") - STATES == set()
