"""Answers that are held to a schema: whatever a model of random weights writes, what is finished validates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from isthmus.errors import DataError, NotSupportedError
from isthmus.gateway import answer_grammar
from isthmus.gateway.answer_grammar import ANY_OBJECT, GrammarReader, read_tokenizer
from isthmus.gateway.generation import GenerationRequest
from isthmus.gateway.sampling import SamplingSettings, TokenChooser
from isthmus.model.split import SplitForCausalLM
from tests.conftest import VOCABULARY, Split, make_recipe, save_tiny_tokenizer
from tests.integration.gateways import BYTES, save_byte_model
from tests.oracle.gateway import batching, written

END = 2
Schema = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def reader(tokenizer: PreTrainedTokenizerBase) -> GrammarReader:
    return GrammarReader(tokenizer, BYTES)


@pytest.fixture
def model(split: Split, folder: Path) -> SplitForCausalLM:
    return split(make_recipe(folder))[0]


NAMES = st.sampled_from(["a", "b", "long name", 'with "quotes"', "ü"])
VALUES = st.one_of(st.none(), st.booleans(), st.integers(-99, 99), st.text('aé\n"\\', max_size=3))
LEAVES: st.SearchStrategy[Schema] = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["null", "boolean"]}]),
    st.tuples(st.integers(-20, 20), st.integers(0, 300)).map(
        lambda pair: {"type": "integer", "minimum": pair[0], "maximum": pair[0] + pair[1]}
    ),
    st.integers(1, 9).map(lambda bound: {"type": "number", "minimum": -bound, "exclusiveMaximum": bound}),
    st.integers(0, 4).map(lambda length: {"type": "string", "maxLength": length}),
    st.sampled_from(["^[a-c]{1,3}$", "^(x|yz)+$", "é?q"]).map(lambda one: {"type": "string", "pattern": one}),
    st.sampled_from([{"type": "string", "format": "date"}, {"type": "string", "format": "uuid"}]),
    st.lists(VALUES, min_size=1, max_size=3).map(lambda values: {"enum": values}),
    VALUES.map(lambda value: {"const": value}),
)


def _objects(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    properties = st.dictionaries(NAMES, inner, max_size=3)
    return st.tuples(properties, st.booleans()).map(
        lambda pair: {
            "type": "object",
            "properties": pair[0],
            "required": sorted(pair[0])[: None if pair[1] else 1],
            "additionalProperties": False,
        }
    )


def _nested(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    return st.one_of(
        _objects(inner),
        st.tuples(inner, st.integers(0, 2), st.integers(0, 1)).map(
            lambda one: {"type": "array", "items": one[0], "minItems": one[1], "maxItems": one[1] + one[2]}
        ),
        st.lists(inner, min_size=1, max_size=2).map(lambda several: {"anyOf": several}),
    )


PLAIN = st.recursive(LEAVES, _nested, max_leaves=5)
SCHEMAS = st.one_of(PLAIN, PLAIN.map(lambda one: {"$ref": "#/$defs/x", "$defs": {"x": one}}))


@given(schema=SCHEMAS, seed=st.integers(0, 3), temperature=st.sampled_from([0.0, 1.0, 2.0]))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_is_finished_validates(
    schema: Schema, seed: int, temperature: float, model: SplitForCausalLM, reader: GrammarReader
) -> None:
    """Drawn, greedy, several answers, biased against it."""
    request = GenerationRequest(
        [5, 6, 7],
        160,
        ends=[END],
        answers=2,
        settings=SamplingSettings(temperature, seed=seed, logit_bias={40: 100.0, END: 3.0}),
        grammar=reader.read(schema),
    )
    with batching(model) as batcher:
        (found,) = written(batcher, [request])
    for text, finish in zip(found.texts, found.finishes, strict=True):
        if finish == "stop":
            jsonschema.validate(json.loads(text), schema)
        else:
            assert len(text) > 60, "only a number may go on for ever, or white space"


@given(seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_object(seed: int, reader: GrammarReader) -> None:
    """Of random logits, a new draw at each token."""
    draw, grammar = torch.Generator().manual_seed(seed), reader.read(ANY_OBJECT)
    chooser = TokenChooser(SamplingSettings(seed=seed), rule=grammar.begin([END]))
    given_ids: list[int] = []
    while not chooser.complete and len(given_ids) < 200:
        logits_V = torch.randn(BYTES + 20, generator=draw)  # some models have more logits than tokens
        logits_V[[ord("}") - 30, ord('"') - 30]] += 4.0
        token = chooser.choose([], given_ids, logits_V).token
        if token == END:
            break
        chooser.take(token)
        given_ids.append(token)
    if len(given_ids) < 200:
        assert isinstance(json.loads(grammar.decode(given_ids)), dict)


def test_a_model_that_bans_all_that_is_allowed_is_not_obeyed(reader: GrammarReader) -> None:
    from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor

    ids = list(range(BYTES))
    banned = LogitsProcessorList([SuppressTokensLogitsProcessor(ids)])
    grammar = reader.read({"const": True})
    chooser = TokenChooser(SamplingSettings(), banned, rule=grammar.begin([END]))
    assert grammar.decode([chooser.choose([], [], torch.zeros(BYTES)).token]) in ("t", "tr", "true")


def test_an_answer_ends_where_nothing_can_follow(model: SplitForCausalLM, reader: GrammarReader) -> None:
    """No step is sent for a token that ends it; cut off by its length it may be no JSON."""
    grammar = reader.read({"const": {"a": 12}})
    with batching(model) as batcher:
        asked = [GenerationRequest([5], longest, ends=[END], grammar=grammar) for longest in (40, 3)]
        whole, cut = written(batcher, asked)
    assert json.loads(whole.texts[0]) == {"a": 12}
    assert whole.finishes == ["stop"]
    assert whole.end is not None
    assert len(whole.end.releases) == whole.end.written
    assert (cut.finishes, cut.end and cut.end.written) == (["length"], 3)


def lines(count: int) -> Schema:
    return {f"p{number}": {"type": "string"} for number in range(count)}


def chained(count: int) -> Schema:
    """Definitions that each name the next: compilers descend into them."""
    steps = {f"a{n}": {"items": {"$ref": f"#/$defs/a{n + 1}"}} for n in range(count)}
    return {"$ref": "#/$defs/a0", "$defs": {**steps, f"a{count}": {"type": "null"}}}


def deep(depth: int) -> Schema:
    found: Schema = {"type": "null"}
    for _ in range(depth):
        found = {"type": "array", "items": found}
    return found


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"type": "nothing"}, "Invalid type"),
        ({"properties": [1]}, "properties must be an object"),
        ({"type": 5}, "cannot be held"),
        ({"$ref": "#/absent"}, "does not exist"),
        ({"$ref": "https://example.com/schema"}, "cannot be held"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "cannot be held"),
        ({"type": "string", "pattern": "("}, "regex"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "null"}}, "not"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "object", "minProperties": 2, "required": ["a"]}, "minProperties"),
        ({"x-guidance": {"lenient": True}, "uniqueItems": True}, "x-guidance"),
        ({"minimum": float("nan")}, "no JSON"),
        ({"const": "\ud800"}, "cannot be held"),
        ({"type": "object", "properties": lines(5000)}, "characters: too many"),
        (deep(5000), "nested too deeply"),
        (deep(400), "cannot be held"),
        (chained(1300), "too complex"),
        ({"type": "integer", "multipleOf": 999_983}, "too complex"),
        ({"type": "object", "properties": {"a": {"minProperties": 1}}}, "minProperties"),
    ],
    ids=lambda one: one if isinstance(one, str) else None,
)
def test_schemas_that_are_refused(schema: Schema, told: str, reader: GrammarReader) -> None:
    with pytest.raises(DataError, match=told) as found:
        reader.read(schema)
    assert "\n" not in found.value.message
    assert len(found.value.message) < 400


def test_the_same_schema_is_compiled_once(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_grammar, "KEPT_GRAMMARS", 2)
    reader = GrammarReader(tokenizer, BYTES)
    first, second = reader.read({"const": 1}), reader.read({"const": 2})
    assert reader.read({"const": 1}) is first
    reader.read({"const": 3})
    assert reader.read({"const": 1}) is first
    assert reader.read({"const": 2}) is not second


def test_tokenizers_whose_tokens_are_no_bytes(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    save_tiny_tokenizer(tmp_path)
    with pytest.raises(NotSupportedError, match="tokenizer") as found:
        read_tokenizer(AutoTokenizer.from_pretrained(tmp_path), VOCABULARY)
    assert "leave out response_format" in found.value.remedy
