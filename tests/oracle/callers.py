"""What callers of transformers do with a model, row by row: with the split model each is exact, or refused by name.

``tests/oracle/test_callers.py`` runs every row on the split model and on the uncut one. The tables in
``docs/features/transformers.md`` are these rows: ``python -m tests.oracle.callers`` writes them.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StaticCache,
    StoppingCriteriaList,
    TextStreamer,
    WatermarkingConfig,
)
from transformers.cache_utils import EncoderDecoderCache
from transformers.generation.stopping_criteria import MaxLengthCriteria

from isthmus.errors import DataError, IsthmusError, NotSupportedError
from isthmus.model.split import SplitForCausalLM
from isthmus.silo.join import load_tokenizer
from tests.conftest import VOCABULARY, make_recipe, targets_of, uncut
from tests.oracle.twins import Twins, make_twins, prompts, ragged, save_vivid_model

PAGE = Path(__file__).parents[2] / "docs" / "features" / "transformers.md"
EXACT, REFUSED, OWN = "exact", "refused", "the silo's"
LEFT, RIGHT = ragged("left", lengths=(3, 20, 9)), ragged("right", lengths=(3, 20, 9))
IDS, MASK, LABELS = LEFT["input_ids"], LEFT["attention_mask"], LEFT["labels"]
FULL = ragged("left", lengths=(12, 12))["input_ids"]
"""Rows without padding."""
PACKED = torch.cat([torch.arange(5), torch.arange(4), torch.arange(3)]).unsqueeze(0).expand(2, -1)
"""Positions of three sequences in a row of 12."""
PROMPT = prompts((3, 20, 9))
ONE = prompts((11,))


@dataclass(frozen=True)
class Kit:
    """What calls need besides the model."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    assistant: PreTrainedModel


Call = Callable[[Any, Kit], Any]


@dataclass(frozen=True)
class Row:
    """One thing that a caller may do."""

    section: str
    covers: str
    """Name of the argument, field or method."""
    how: str
    """What is passed or done, as the table says it."""
    call: Call
    kind: str = EXACT
    note: str = ""
    """For the table, in place of a refusal's remedy."""

    @property
    def name(self) -> str:
        """The row's name in tests."""
        return f"{self.section}-{self.covers}-{self.how}".replace("`", "").replace(" ", "-")


def past_of(model: Any) -> Any:
    return model.new_cache() if isinstance(model, SplitForCausalLM) else DynamicCache(config=model.config)


def real(logits: torch.Tensor, mask: torch.Tensor = MASK) -> torch.Tensor:
    return logits[mask.bool()]


def outputs(mask: torch.Tensor | None = None, **inputs: Any) -> Call:
    """A forward; logits at real tokens, and the loss."""

    def call(model: Any, kit: Kit) -> Any:
        out = model(**inputs)
        return out.logits if mask is None else real(out.logits, mask), out.loss

    return call


def cached(first: dict[str, Any], second: dict[str, Any]) -> Call:
    """Two forwards with a cache; the second's logits."""

    def call(model: Any, kit: Kit) -> Any:
        past = past_of(model)
        model(**first, past_key_values=past)
        return model(**second, past_key_values=past).logits

    return call


def with_cache(act: Callable[[Any], Any]) -> Call:
    """``act`` on a filled cache, then a forward with it."""

    def call(model: Any, kit: Kit) -> Any:
        past = past_of(model)
        model(input_ids=FULL, past_key_values=past)
        found = act(past)
        rows = past.layers[0].keys.shape[0]
        return found, model(input_ids=FULL[:, :2].repeat(rows // 2, 1), past_key_values=past).logits

    return call


def generated(inputs: dict[str, Any] | None = None, **settings: Any) -> Call:
    """``generate``; its tokens, and with ``return_dict_in_generate`` its scores and logits."""

    def call(model: Any, kit: Kit) -> Any:
        torch.manual_seed(3)
        given = {"max_new_tokens": 8, "do_sample": False}
        given |= {key: value(kit) if callable(value) and value in LATE else value for key, value in settings.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = model.generate(**(PROMPT if inputs is None else inputs), **given)
        return out if isinstance(out, torch.Tensor) else (out.sequences, out.get("scores"), out.get("logits"))

    return call


def assistant(kit: Kit) -> PreTrainedModel:
    return kit.assistant


def tokenizer(kit: Kit) -> PreTrainedTokenizerBase:
    return kit.tokenizer


LATE = (assistant, tokenizer)
"""Values that only the kit has."""


def method(act: Callable[[Any], Any]) -> Call:
    return lambda model, kit: act(model)


def forward_row(covers: str, how: str, call: Call, kind: str = EXACT, note: str = "") -> Row:
    return Row("forward", covers, how, call, kind, note)


def generate_row(covers: str, how: str, kind: str = EXACT, inputs: Any = None, note: str = "", **settings: Any) -> Row:
    return Row("generate", covers, how, generated(inputs, **settings), kind, note)


def method_row(covers: str, how: str, act: Callable[[Any], Any], kind: str = EXACT, note: str = "") -> Row:
    return Row("methods", covers, how, method(act), kind, note)


def refused_method(covers: str, *arguments: Any) -> Row:
    return method_row(covers, "called", lambda model: getattr(model, covers)(*arguments), REFUSED)


def cache_row(covers: str, how: str, act: Callable[[Any], Any], kind: str = EXACT, note: str = "") -> Row:
    return Row("cache", covers, how, with_cache(act), kind, note)


def embedded(model: Any, ids: torch.Tensor) -> torch.Tensor:
    embeddings: torch.Tensor = model.get_input_embeddings()(ids)
    return embeddings


def holes(mask: torch.Tensor) -> torch.Tensor:
    pierced = torch.ones_like(mask)
    pierced[0, 3] = 0
    return pierced


def backward_through_a_cache(model: Any, kit: Kit) -> None:
    with torch.enable_grad():
        model(input_ids=FULL, labels=FULL, use_cache=True).loss.backward()


def compiled(model: Any) -> Any:
    """``torch.compile`` as such: without a compiler for the uncut model, which would only take time here."""
    return (torch.compile(model) if isinstance(model, SplitForCausalLM) else model)(input_ids=FULL).logits


def checkpointed(model: Any) -> Any:
    """Loss and gradient of an adapter in the silo's own blocks, with activations computed again in backward."""
    model.zero_grad()
    enabled = model.is_activation_checkpointing
    model.activation_checkpointing_enable()
    model.train()
    with torch.enable_grad():
        loss = model(input_ids=FULL, labels=FULL, use_cache=False).loss
        loss.backward()
    gradients = [one.grad.norm() for name, one in model.named_parameters() if one.grad is not None and one.grad.any()]
    found = (loss.detach(), gradients[0], gradients[-1], model.is_activation_checkpointing, enabled)
    model.zero_grad()
    model.activation_checkpointing_disable()
    model.eval()
    return found


def deprecated_checkpointing(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable()
        enabled = model.is_gradient_checkpointing
        model.gradient_checkpointing_disable()
        return enabled, model.is_gradient_checkpointing


def with_input_gradients(model: Any) -> Any:
    model.enable_input_require_grads()
    with torch.enable_grad():
        wanted = embedded(model, FULL).requires_grad
    model.disable_input_require_grads()
    with torch.enable_grad():
        return wanted, embedded(model, FULL).requires_grad


def streamed(model: Any, kit: Kit) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        model.generate(**ONE, max_new_tokens=6, do_sample=False, streamer=TextStreamer(kit.tokenizer))
    return text.getvalue()


def attention(model: Any) -> Any:
    model.set_attn_implementation("eager")
    eager = model(input_ids=FULL).logits
    model.set_attn_implementation("sdpa")
    return eager


def transition_scores(model: Any) -> Any:
    out = model.generate(**ONE, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_scores=True)
    return model.compute_transition_scores(out.sequences, out.scores)


def greedy_by_hand(model: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
    return torch.cat([input_ids, model(input_ids=input_ids).logits[:, -1:].argmax(dim=-1)], dim=1)


def data_row(covers: str, how: str, **inputs: Any) -> Row:
    return forward_row(covers, how, outputs(**inputs), REFUSED)


FORWARD = [
    forward_row("input_ids", "`[rows, tokens]`", outputs(input_ids=FULL)),
    forward_row("input_ids", "int32", outputs(input_ids=FULL.int())),
    data_row("input_ids", "floats", input_ids=FULL.float()),
    data_row("input_ids", "one dimension", input_ids=FULL[0]),
    data_row("input_ids", "an id that is not in the vocabulary", input_ids=FULL + VOCABULARY),
    data_row("input_ids", "no row", input_ids=FULL[:0]),
    data_row("input_ids", "no token", input_ids=FULL[:, :0]),
    data_row("input_ids", "neither they nor `inputs_embeds`"),
    data_row("input_ids", "they and `inputs_embeds`", input_ids=FULL, inputs_embeds=torch.zeros(2, 12, 32)),
    forward_row("inputs_embeds", "in place of ids", lambda m, _: m(inputs_embeds=embedded(m, FULL)).logits),
    data_row("inputs_embeds", "of another width", inputs_embeds=torch.zeros(2, 12, 31)),
    forward_row("attention_mask", "padding on the left", outputs(MASK, input_ids=IDS, attention_mask=MASK)),
    forward_row(
        "attention_mask",
        "padding on the right",
        outputs(RIGHT["attention_mask"], input_ids=RIGHT["input_ids"], attention_mask=RIGHT["attention_mask"]),
    ),
    forward_row("attention_mask", "bool", outputs(MASK, input_ids=IDS, attention_mask=MASK.bool())),
    forward_row("attention_mask", "floats 0.0 and 1.0", outputs(MASK, input_ids=IDS, attention_mask=MASK.float())),
    data_row("attention_mask", "additive (0 and −∞)", input_ids=FULL, attention_mask=torch.full((2, 12), -torch.inf)),
    data_row("attention_mask", "sequences' numbers", input_ids=FULL, attention_mask=torch.full((2, 12), 2)),
    data_row("attention_mask", "holes: 0 between tokens", input_ids=FULL, attention_mask=holes(FULL)),
    data_row("attention_mask", "3-D", input_ids=FULL, attention_mask=torch.ones(2, 12, 12)),
    data_row("attention_mask", "4-D", input_ids=FULL, attention_mask=torch.ones(2, 1, 12, 12)),
    data_row("attention_mask", "one a kind of attention (dict)", input_ids=FULL, attention_mask={"full": MASK}),
    data_row("attention_mask", "another length", input_ids=FULL, attention_mask=torch.ones(2, 11)),
    data_row(
        "attention_mask", "a row without a token", input_ids=FULL, attention_mask=torch.eye(2)[:, :1].expand(2, 12)
    ),
    forward_row("position_ids", "0, 1, 2, … in each row", outputs(input_ids=FULL, position_ids=torch.arange(12)[None])),
    forward_row(
        "position_ids",
        "as `generate` counts them, after padding",
        outputs(MASK, input_ids=IDS, attention_mask=MASK, position_ids=LEFT["position_ids"]),
    ),
    forward_row(
        "position_ids",
        "restarting at 0: several sequences in a row (packed), `use_cache=False`",
        outputs(input_ids=FULL, position_ids=PACKED, labels=FULL, use_cache=False),
    ),
    data_row("position_ids", "restarting, with a cache", input_ids=FULL, position_ids=PACKED, use_cache=True),
    data_row("position_ids", "restarting, the configuration's `use_cache` true", input_ids=FULL, position_ids=PACKED),
    data_row(
        "position_ids",
        "restarting, with a mask",
        input_ids=FULL,
        position_ids=PACKED,
        attention_mask=torch.ones(2, 12),
        use_cache=False,
    ),
    data_row("position_ids", "gaps", input_ids=FULL, position_ids=torch.arange(12)[None] * 2),
    data_row("position_ids", "an offset", input_ids=FULL, position_ids=torch.arange(12)[None] + 3),
    data_row(
        "position_ids", "counting padding", input_ids=IDS, attention_mask=MASK, position_ids=torch.arange(20)[None]
    ),
    data_row("position_ids", "descending", input_ids=FULL, position_ids=torch.arange(11, -1, -1)[None]),
    data_row("position_ids", "another length", input_ids=FULL, position_ids=torch.arange(11)[None]),
    data_row("position_ids", "floats", input_ids=FULL, position_ids=torch.arange(12.0)[None]),
    data_row("position_ids", "3-D", input_ids=FULL, position_ids=torch.zeros(3, 2, 12, dtype=torch.long)),
    forward_row(
        "cu_seq_lens_q",
        "with `position_ids` that agree",
        outputs(
            input_ids=FULL[:1],
            position_ids=PACKED[:1],
            use_cache=False,
            cu_seq_lens_q=torch.tensor([0, 5, 9, 12], dtype=torch.int32),
        ),
    ),
    data_row("cu_seq_lens_q", "without", input_ids=FULL[:1], cu_seq_lens_q=torch.tensor([0, 5, 9, 12])),
    data_row("cu_seq_lens_k", "without", input_ids=FULL[:1], cu_seq_lens_k=torch.tensor([0, 5, 9, 12])),
    forward_row(
        "max_length_q",
        "with `position_ids` that agree",
        outputs(input_ids=FULL[:1], position_ids=PACKED[:1], use_cache=False, max_length_q=5),
    ),
    data_row("max_length_q", "without", input_ids=FULL[:1], max_length_q=5),
    data_row("max_length_k", "without", input_ids=FULL[:1], max_length_k=5),
    forward_row(
        "seq_idx",
        "with `position_ids` that agree",
        outputs(
            input_ids=FULL[:1],
            position_ids=PACKED[:1],
            use_cache=False,
            seq_idx=torch.tensor([[0] * 5 + [1] * 4 + [2] * 3], dtype=torch.int32),
        ),
    ),
    data_row("seq_idx", "without", input_ids=FULL[:1], seq_idx=torch.tensor([[0] * 5 + [1] * 7])),
    forward_row("past_key_values", "a split model's cache", cached({"input_ids": FULL}, {"input_ids": FULL[:, :3]})),
    forward_row(
        "past_key_values",
        "with the mask of all positions so far",
        cached(
            {"input_ids": IDS, "attention_mask": MASK},
            {"input_ids": IDS[:, -2:], "attention_mask": torch.cat([MASK, torch.ones(3, 2).long()], dim=1)},
        ),
    ),
    Row(
        "forward",
        "past_key_values",
        "with a mask that shows past padding",
        cached(
            {"input_ids": IDS, "attention_mask": MASK},
            {"input_ids": IDS[:, -2:], "attention_mask": torch.ones(3, IDS.shape[1] + 2)},
        ),
        REFUSED,
    ),
    Row(
        "forward",
        "past_key_values",
        "padding in the past, and no mask now",
        cached({"input_ids": IDS, "attention_mask": MASK}, {"input_ids": IDS[:, -2:]}),
        REFUSED,
    ),
    Row(
        "forward",
        "past_key_values",
        "tokens after padding on the right",
        cached(
            {"input_ids": RIGHT["input_ids"], "attention_mask": RIGHT["attention_mask"]},
            {
                "input_ids": IDS[:, -2:],
                "attention_mask": torch.cat([RIGHT["attention_mask"], torch.ones(3, 2).long()], dim=1),
            },
        ),
        REFUSED,
    ),
    Row(
        "forward", "past_key_values", "of other rows", cached({"input_ids": FULL}, {"input_ids": FULL[:1, :3]}), REFUSED
    ),
    data_row("past_key_values", "`DynamicCache`", input_ids=FULL, past_key_values=DynamicCache()),
    data_row("past_key_values", "a tuple", input_ids=FULL, past_key_values=((FULL, FULL),)),
    forward_row(
        "past_key_values",
        "`StaticCache`",
        lambda m, _: m(input_ids=FULL, past_key_values=StaticCache(m.config, max_cache_len=20)),
        REFUSED,
    ),
    forward_row(
        "past_key_values",
        "`EncoderDecoderCache`",
        lambda m, _: m(input_ids=FULL, past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache())),
        REFUSED,
    ),
    forward_row("labels", "the loss of each next token", outputs(MASK, **LEFT)),
    data_row("labels", "of another shape", input_ids=FULL, labels=FULL[:, :5]),
    data_row("labels", "an id that is not in the vocabulary", input_ids=FULL, labels=FULL + VOCABULARY),
    forward_row(
        "shift_labels",
        "the token that each position should predict",
        outputs(input_ids=FULL, labels=FULL, shift_labels=FULL.roll(-1, dims=1)),
    ),
    forward_row(
        "num_items_in_batch",
        "the loss is the sum over it",
        outputs(input_ids=FULL, labels=FULL, num_items_in_batch=torch.tensor(50)),
    ),
    forward_row(
        "skip_logits",
        "true, with labels: the loss in less memory, no logits",
        lambda m, _: m(input_ids=FULL, labels=FULL, skip_logits=True).loss,
    ),
    data_row("skip_logits", "true, without labels", input_ids=FULL, skip_logits=True),
    data_row("ignore_index", "other than −100", input_ids=FULL, labels=FULL, ignore_index=5),
    forward_row("use_cache", "false", lambda m, _: m(input_ids=FULL, use_cache=False).past_key_values),
    forward_row(
        "use_cache",
        "true",
        lambda m, _: m(input_ids=FULL[:, :2], past_key_values=m(input_ids=FULL, use_cache=True).past_key_values).logits,
    ),
    forward_row(
        "use_cache",
        "not given",
        lambda m, _: m(input_ids=FULL).past_key_values.get_seq_length(),
        note="exact; with labels or gradients there is no cache, since one costs memory on the trunk",
    ),
    forward_row("use_cache", "true, then `backward`", backward_through_a_cache, REFUSED),
    forward_row("logits_to_keep", "a number", outputs(input_ids=FULL, logits_to_keep=3)),
    forward_row(
        "logits_to_keep",
        "a tensor of positions",
        outputs(input_ids=FULL, labels=FULL[:, :3], logits_to_keep=torch.tensor([2, 5, 7])),
    ),
    data_row("output_hidden_states", "true", input_ids=FULL, output_hidden_states=True),
    data_row("output_attentions", "true", input_ids=FULL, output_attentions=True),
    data_row("output_router_logits", "true", input_ids=FULL, output_router_logits=True),
    forward_row("output_attentions", "false", outputs(input_ids=FULL, output_attentions=False)),
    forward_row(
        "return_dict",
        "false: a tuple",
        lambda m, _: m(input_ids=FULL, labels=FULL, use_cache=False, return_dict=False),
    ),
    forward_row("is_causal", "true", outputs(input_ids=FULL, is_causal=True)),
    data_row("is_causal", "false", input_ids=FULL, is_causal=False),
    forward_row("token_type_ids", "all 0", outputs(input_ids=FULL, token_type_ids=torch.zeros_like(FULL))),
    data_row("token_type_ids", "others", input_ids=FULL, token_type_ids=torch.ones_like(FULL)),
    data_row("cache_position", "given", input_ids=FULL, cache_position=torch.arange(12)),
    data_row("kwargs", "a name that no one knows", input_ids=FULL, atention_mask=torch.ones(2, 12)),
]

CACHE = [
    cache_row("get_seq_length", "", lambda past: past.get_seq_length()),
    cache_row("crop", "a negative number", lambda past: past.crop(-4)),
    cache_row("reorder_cache", "", lambda past: past.reorder_cache(torch.tensor([1, 0]))),
    cache_row("batch_repeat_interleave", "", lambda past: past.batch_repeat_interleave(2)),
    cache_row("batch_select_indices", "", lambda past: past.batch_select_indices(torch.tensor([1, 0]))),
    cache_row("activate_past_recording", "", lambda past: past.activate_past_recording()),
    cache_row("batch_size", "", lambda past: past.batch_size),
    cache_row("get_max_length", "", lambda past: past.get_max_length()),
    cache_row("get_mask_sizes", "", lambda past: past.get_mask_sizes(1, 0)),
    cache_row("get_query_offset", "", lambda past: past.get_query_offset(0)),
    cache_row("is_compileable", "", lambda past: past.is_compileable),
    cache_row("is_croppable", "", lambda past: past.is_croppable),
    cache_row("is_initialized", "", lambda past: past.is_initialized),
    cache_row("is_dummy", "of the silo's blocks", lambda past: past.is_dummy, OWN, "of the silo's blocks"),
    cache_row("is_linear", "of the silo's blocks", lambda past: past.is_linear, OWN, "of the silo's blocks"),
    cache_row("is_sliding", "of the silo's blocks", lambda past: past.is_sliding, OWN, "of the silo's blocks"),
    cache_row("is_recording_past", "", lambda past: past.is_recording_past(0)),
    cache_row("reset", "", lambda past: past.reset(), REFUSED),
    cache_row("offload", "", lambda past: past.offload(0), REFUSED),
    cache_row("prefetch", "", lambda past: past.prefetch(0), REFUSED),
    cache_row("update", "", lambda past: past.update(None, None, 0), REFUSED),
    cache_row("early_initialization", "", lambda past: past.early_initialization(1, 1, 1, None, None), REFUSED),
    cache_row("copy.deepcopy", "", copy.deepcopy, REFUSED),
    cache_row("pickle", "", pickle.dumps, REFUSED),
]

SAMPLED = {"do_sample": True, "top_k": 0}
BEAMS = {"num_beams": 3}
GENERATE = [
    generate_row("inputs", "greedy"),
    generate_row("inputs", "none: from the first token", inputs={}, bos_token_id=1),
    Row(
        "generate",
        "inputs_embeds",
        "in place of ids",
        lambda m, _: m.generate(inputs_embeds=embedded(m, FULL), max_new_tokens=6, do_sample=False),
    ),
    generate_row("attention_mask", "none: padding is known by `pad_token_id`", inputs={"inputs": IDS}),
    generate_row(
        "position_ids", "as `generate` counts them", inputs={**PROMPT, "position_ids": LEFT["position_ids"].clone()}
    ),
    generate_row(
        "position_ids", "others", REFUSED, inputs={"input_ids": FULL, "position_ids": torch.arange(12)[None] * 2}
    ),
    generate_row(
        "attention_mask",
        "padding on the right",
        REFUSED,
        inputs={"input_ids": RIGHT["input_ids"], "attention_mask": RIGHT["attention_mask"]},
    ),
    Row(
        "generate",
        "past_key_values",
        "continuing a text",
        lambda m, _: m.generate(
            m.generate(FULL, max_new_tokens=4, min_new_tokens=4, do_sample=False, past_key_values=(past := past_of(m))),
            past_key_values=past,
            max_new_tokens=4,
            do_sample=False,
        ),
    ),
    generate_row("past_key_values", "a foreign cache", REFUSED, past_key_values=DynamicCache()),
    generate_row("generation_config", "an object", generation_config=GenerationConfig(max_new_tokens=5)),
    generate_row(
        "logits_processor", "", logits_processor=LogitsProcessorList([MinLengthLogitsProcessor(26, eos_token_id=[2])])
    ),
    generate_row("stopping_criteria", "", stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(24)])),
    generate_row("prefix_allowed_tokens_fn", "", prefix_allowed_tokens_fn=lambda row, ids: [5, 6, 7]),
    generate_row("synced_gpus", "false", synced_gpus=False),
    generate_row("assistant_model", "an uncut model", inputs=ONE, assistant_model=assistant),
    Row(
        "generate",
        "assistant_model",
        "this model, for an uncut one",
        lambda m, kit: kit.assistant.generate(**ONE, assistant_model=m, max_new_tokens=8, do_sample=False),
    ),
    Row("generate", "streamer", "`TextStreamer`", streamed),
    generate_row("negative_prompt_ids", "with guidance", inputs=ONE, negative_prompt_ids=FULL[:1], guidance_scale=1.5),
    generate_row(
        "negative_prompt_attention_mask",
        "with guidance",
        inputs=ONE,
        negative_prompt_ids=FULL[:1],
        negative_prompt_attention_mask=torch.ones_like(FULL[:1]),
        guidance_scale=1.5,
    ),
    generate_row("custom_generate", "a function", inputs={"inputs": FULL}, custom_generate=greedy_by_hand),
    generate_row(
        "assistant_confidence_threshold",
        "",
        inputs=ONE,
        assistant_model=assistant,
        assistant_confidence_threshold=0.1,
    ),
    generate_row("assistant_early_exit", "", REFUSED, inputs=ONE, assistant_early_exit=1),
    generate_row("assistant_ensemble_weight", "", inputs=ONE, assistant_model=assistant, assistant_ensemble_weight=0.2),
    generate_row("assistant_lookbehind", "", inputs=ONE, assistant_model=assistant, assistant_lookbehind=3),
    generate_row("target_lookbehind", "", inputs=ONE, assistant_model=assistant, target_lookbehind=3),
    generate_row("bad_words_ids", "", bad_words_ids=[[5]]),
    generate_row("begin_suppress_tokens", "", begin_suppress_tokens=[5, 6]),
    generate_row("bos_token_id", "", inputs={}, bos_token_id=7),
    generate_row("cache_config", "", REFUSED, cache_config={"nbits": 4}),
    generate_row("cache_implementation", '`"dynamic"`', cache_implementation="dynamic"),
    generate_row("cache_implementation", '`"hybrid"`, of old configurations', cache_implementation="hybrid"),
    *(
        generate_row("cache_implementation", f'`"{name}"`', REFUSED, cache_implementation=name)
        for name in ("static", "offloaded", "offloaded_static", "quantized")
    ),
    generate_row("compile_config", "without effect, since no cache is static", compile_config=CompileConfig()),
    generate_row("disable_compile", "", disable_compile=True),
    generate_row("constraints", "", REFUSED, num_beams=2, constraints=[object()]),
    generate_row("force_words_ids", "", REFUSED, num_beams=2, force_words_ids=[[5]]),
    generate_row("decoder_start_token_id", "without effect", decoder_start_token_id=1),
    generate_row("diversity_penalty", "", REFUSED, num_beams=4, num_beam_groups=2, diversity_penalty=0.5),
    generate_row("num_beam_groups", "over 1", REFUSED, num_beams=4, num_beam_groups=2, diversity_penalty=0.5),
    generate_row("do_sample", "true", **SAMPLED),
    generate_row("dola_layers", "", REFUSED, dola_layers="low"),
    generate_row("early_stopping", "", early_stopping=True, **BEAMS),
    generate_row("encoder_no_repeat_ngram_size", "", encoder_no_repeat_ngram_size=2),
    generate_row("encoder_repetition_penalty", "", encoder_repetition_penalty=1.3),
    generate_row("eos_token_id", "several", eos_token_id=[2, 9, 11, 20]),
    generate_row("epsilon_cutoff", "", epsilon_cutoff=0.02, **SAMPLED),
    generate_row("eta_cutoff", "", eta_cutoff=0.02, **SAMPLED),
    generate_row("exponential_decay_length_penalty", "", exponential_decay_length_penalty=(2, 1.5)),
    generate_row("forced_bos_token_id", "", inputs={}, forced_bos_token_id=9),
    generate_row("forced_eos_token_id", "", forced_eos_token_id=2),
    generate_row("guidance_scale", "", guidance_scale=1.5, inputs=ONE),
    generate_row("length_penalty", "", length_penalty=0.5, **BEAMS),
    generate_row("low_memory", "without effect", low_memory=True),
    generate_row("max_cache_len", "without effect", max_cache_len=64),
    generate_row("max_length", "", max_new_tokens=None, max_length=26),
    generate_row("max_matching_ngram_size", "", inputs=ONE, prompt_lookup_num_tokens=3, max_matching_ngram_size=1),
    generate_row("max_new_tokens", "", max_new_tokens=3),
    generate_row("max_time", "", max_time=1000.0),
    generate_row("min_length", "", min_length=27),
    generate_row("min_new_tokens", "", min_new_tokens=7),
    generate_row("min_p", "", min_p=0.1, **SAMPLED),
    generate_row("no_repeat_ngram_size", "", no_repeat_ngram_size=2),
    generate_row("num_assistant_tokens", "", inputs=ONE, assistant_model=assistant, num_assistant_tokens=3),
    generate_row(
        "num_assistant_tokens_schedule",
        "",
        inputs=ONE,
        assistant_model=assistant,
        num_assistant_tokens_schedule="heuristic",
    ),
    generate_row("num_beams", "", **BEAMS),
    generate_row("num_return_sequences", "", num_return_sequences=2, **SAMPLED),
    generate_row("num_return_sequences", "of beams", num_return_sequences=2, **BEAMS),
    generate_row("output_attentions", "", REFUSED, return_dict_in_generate=True, output_attentions=True),
    generate_row("output_hidden_states", "", REFUSED, return_dict_in_generate=True, output_hidden_states=True),
    generate_row("output_logits", "", return_dict_in_generate=True, output_logits=True),
    generate_row("output_scores", "", return_dict_in_generate=True, output_scores=True),
    generate_row("pad_token_id", "", pad_token_id=3, eos_token_id=[2, 9, 11, 20]),
    generate_row("penalty_alpha", "", REFUSED, penalty_alpha=0.6, top_k=4),
    generate_row("prefill_chunk_size", "rows without padding", inputs={"input_ids": FULL}, prefill_chunk_size=5),
    generate_row("prefill_chunk_size", "a chunk of padding alone", REFUSED, prefill_chunk_size=5),
    generate_row("prompt_lookup_num_tokens", "", inputs=ONE, prompt_lookup_num_tokens=3),
    generate_row("remove_invalid_values", "", remove_invalid_values=True),
    generate_row("renormalize_logits", "", renormalize_logits=True, **BEAMS),
    generate_row("repetition_penalty", "", repetition_penalty=1.4),
    generate_row("return_dict_in_generate", "", return_dict_in_generate=True),
    generate_row("sequence_bias", "", sequence_bias=[[[5], 3.0]]),
    generate_row("speculation_type", "", REFUSED, inputs=ONE, assistant_model=assistant, speculation_type="dflash"),
    generate_row("stop_strings", "with `tokenizer`", stop_strings=["w9", "w11"], tokenizer=tokenizer),
    generate_row("suppress_tokens", "", suppress_tokens=[5, 6]),
    generate_row("temperature", "", temperature=1.7, **SAMPLED),
    generate_row("token_healing", "with `tokenizer`", inputs=ONE, token_healing=True, tokenizer=tokenizer),
    generate_row("top_h", "", top_h=0.4, do_sample=True),
    generate_row("top_k", "", top_k=5, do_sample=True),
    generate_row("top_p", "", top_p=0.7, **SAMPLED),
    generate_row("typical_p", "", typical_p=0.7, **SAMPLED),
    generate_row("use_cache", "false", use_cache=False),
    generate_row("use_mtp", "", REFUSED, inputs=ONE, use_mtp=True),
    generate_row("watermarking_config", "", watermarking_config=WatermarkingConfig(bias=2.5), **SAMPLED),
    generate_row(
        "kwargs", "a name that no one knows", ValueError.__name__, max_new_token=5, note="`ValueError`, as uncut"
    ),
]

METHODS = [
    method_row("config", "read", lambda m: (m.config.hidden_size, m.config.num_hidden_layers, m.config.vocab_size)),
    method_row("generation_config", "read", lambda m: m.generation_config.eos_token_id),
    method_row("device", "read", lambda m: str(m.device)),
    method_row("dtype", "read", lambda m: str(m.dtype)),
    method_row("main_input_name", "read", lambda m: m.main_input_name),
    method_row("base_model", "called", lambda m: m.base_model(input_ids=FULL, use_cache=False).last_hidden_state),
    method_row("get_decoder", "called", lambda m: m.get_decoder()(input_ids=FULL).last_hidden_state),
    method_row("get_input_embeddings", "called", lambda m: m.get_input_embeddings().weight),
    method_row("get_output_embeddings", "called", lambda m: m.get_output_embeddings().weight),
    method_row("loss_function", "called", lambda m: m.loss_function(m(input_ids=FULL).logits, FULL, VOCABULARY)),
    method_row("can_generate", "called", lambda m: m.can_generate()),
    method_row("compute_transition_scores", "called", transition_scores),
    method_row("activation_checkpointing_enable", "for the silo's own blocks", checkpointed),
    method_row("gradient_checkpointing_enable", "for the silo's own blocks", deprecated_checkpointing),
    method_row("enable_input_require_grads", "called", with_input_gradients),
    method_row("set_attn_implementation", "for the silo's own blocks", attention),
    method_row(
        "warn_if_padding_and_no_attention_mask", "called", lambda m: m.warn_if_padding_and_no_attention_mask(FULL, None)
    ),
    method_row("torch.compile", "runs without a graph", compiled),
    method_row("to", "a device", lambda m: m.to("cpu")(input_ids=FULL).logits),
    method_row("to", "a dtype", lambda m: m.to(torch.float16), REFUSED),
    *(refused_method(name) for name in ("half", "bfloat16", "double")),
    method_row("float", "of a model in fp32", lambda m: m.float()(input_ids=FULL).logits),
    method_row("train", "the base model has no dropout", lambda m: (m.train().training, m.eval().training)),
    method_row("eval", "called", lambda m: m.eval().training),
    method_row("tie_weights", "called", lambda m: (m.tie_weights(), m(input_ids=FULL).logits)[1]),
    method_row("num_parameters", "called", lambda m: m.num_parameters(), OWN, "of bottom, top and their adapters"),
    method_row(
        "get_memory_footprint", "called", lambda m: m.get_memory_footprint(), OWN, "of bottom, top and their adapters"
    ),
    method_row("active_adapters", "called", lambda m: m.active_adapters(), OWN, "the one adapter"),
    method_row("enable_adapters", "called", lambda m: m.enable_adapters(), OWN, "the adapter is always enabled"),
    method_row(
        "get_adapter_state_dict", "called", lambda m: sorted(m.get_adapter_state_dict()), OWN, "of bottom and top"
    ),
    method_row("state_dict", "called", lambda m: sorted(m.state_dict()), OWN, "of bottom, top and their adapters"),
    method_row("copy.deepcopy", "", copy.deepcopy, REFUSED),
    method_row("copy.copy", "", copy.copy, REFUSED),
    method_row("pickle", "", pickle.dumps, REFUSED),
    method_row("DataParallel", "several devices", lambda m: m._replicate_for_data_parallel(), REFUSED),
    *(
        refused_method(name, *arguments)
        for name, *arguments in (
            ("resize_token_embeddings", 128),
            ("resize_position_embeddings", 128),
            ("set_input_embeddings", None),
            ("set_output_embeddings", None),
            ("set_decoder", None),
            ("set_encoder", None),
            ("init_weights",),
            ("initialize_weights",),
            ("dequantize",),
            ("to_empty",),
            ("share_memory",),
            ("generate_batch", [[1]]),
            ("init_continuous_batching",),
            ("continuous_batching_context_manager",),
            ("save_distributed_checkpoint", "x"),
            ("prepare_distribute_model",),
            ("maybe_distribute_model",),
            ("push_to_hub", "x/y"),
            ("add_adapter", None),
            ("set_adapter", "x"),
            ("disable_adapters",),
            ("delete_adapter", "x"),
            ("enable_peft_hotswap",),
            ("set_use_kernels", True),
            ("set_experts_implementation", "x"),
            ("from_pretrained", "x"),
            ("register_for_auto_class",),
        )
    ),
]

ROWS = [*FORWARD, *CACHE, *GENERATE, *METHODS]
TITLES = {"forward": "Arguments of the forward", "cache": "The cache", "generate": "`generate`", "methods": "Methods"}


def refusal_of(row: Row, split: SplitForCausalLM, kit: Kit) -> IsthmusError:
    """The error with which the split model refuses a row."""
    try:
        with torch.no_grad():
            row.call(split, kit)
    except (NotSupportedError, DataError) as error:
        return error
    raise AssertionError(f"{row.name} is not refused")


def line(row: Row, split: SplitForCausalLM, kit: Kit) -> str:
    """The row's line of its table."""
    outcome = row.note or row.kind
    if row.kind == REFUSED:
        outcome = f"refused: {refusal_of(row, split, kit).remedy}"
    elif row.kind == OWN:
        outcome = row.note
    return f"| `{row.covers}` | {row.how} | {outcome} |".replace("|  |", "| |")


def tables(split: SplitForCausalLM, kit: Kit) -> str:
    """All tables of the page."""
    found = []
    for section, title in TITLES.items():
        rows = [line(row, split, kit) for row in ROWS if row.section == section]
        found.append("\n".join([f"## {title}", "", "| what | how | |", "|---|---|---|", *rows]))
    return "\n\n".join(found) + "\n"


@contextlib.contextmanager
def callers_twins(folder: Path, store: Path) -> Iterator[tuple[Twins, Kit]]:
    """The twins that rows run on, and what they need."""
    save_vivid_model("llama", folder)
    recipe = make_recipe(folder, lora={"targets": targets_of("llama")}, model={"bottom": 1, "top": 2})
    twins = make_twins(recipe, store, ends_train_a=True)
    words = load_tokenizer(folder)
    words.add_tokens(["abcdef"])  # which transformers needs to know for stop strings
    yield twins, Kit(folder, words, uncut(folder))
    twins.close()


def main() -> None:
    """Write the tables into the page, below its first heading of a table."""
    with (
        tempfile.TemporaryDirectory() as folder,
        callers_twins(Path(folder) / "model", Path(folder) / "trunk") as (twins, kit),
    ):
        written = tables(twins.split, kit)
    head, _, _ = PAGE.read_text().partition(f"## {TITLES['forward']}")
    PAGE.write_text(head + written)


if __name__ == "__main__":
    sys.exit(main())
