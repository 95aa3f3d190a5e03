"""Answers that are held to JSON, or to a JSON schema: which tokens may come next.

Shapes: V vocabulary.
"""

from __future__ import annotations

import copy
import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerBase

from isthmus.errors import DataError, NotSupportedError
from isthmus.gateway.grammar_trial import new_matcher, try_grammar

if TYPE_CHECKING:  # llguidance has it for type checkers alone
    from llguidance._lib import JsonCompileOptions

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
"""The schema of any JSON object."""
LARGEST_SCHEMA = 64 * 2**10
"""Characters of a schema as JSON."""
KEPT_GRAMMARS = 32
"""Most compiled schemas that are kept for the next request with the same."""
COMPILER_OPTIONS: JsonCompileOptions = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_pattern": r" |\n {0,16}",
    "coerce_one_of": False,
    "lenient": False,
}
"""White space has a bound: each token costs a release, and a small model may write blanks without end."""
NEEDED_BYTES = (*range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF5))
"""Of which any JSON text can be spelled: printable ASCII, and what UTF-8 needs for all other characters."""
SIMPLIFY = "simplify it: fewer alternatives, lengths and properties"


class GrammarState:
    """How far one answer is. Implements ``sampling.TokenRule``.

    Args:
        ends: tokens that end an answer; they are allowed where it is whole.
    """

    def __init__(self, matcher: LLMatcher, special: Collection[int], ends: Collection[int]) -> None:
        self._matcher, self._special, self._ends = matcher, sorted(special), sorted(ends)

    @property
    def complete(self) -> bool:
        """Whether the answer is whole, and nothing can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed(self, size: int) -> torch.Tensor:
        """Which tokens may come next, ``[V]``, bool; at least one.

        Args:
            size: V, of the model's logits.

        Raises:
            DataError: the grammar has become too complex.
        """
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        self._check()
        mask_V = torch.zeros(size, dtype=torch.bool)
        known_V = (bits[:, None] >> torch.arange(8)).bitwise_and(1).flatten()[:size].bool()
        mask_V[: len(known_V)] = known_V
        mask_V[[token for token in self._special if token < size]] = False
        mask_V[[token for token in self._ends if token < size]] = self._matcher.is_accepting()
        return mask_V

    def take(self, token: int) -> None:
        """The token that was chosen; not one that ends the answer.

        Raises:
            DataError: as ``allowed``.
        """
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise DataError("the schema became too complex while the answer was written", remedy=SIMPLIFY)


class AnswerGrammar:
    """What answers are held to. It serves any number of answers, in any thread."""

    def __init__(self, matcher: LLMatcher, tokenizer: LLTokenizer) -> None:
        self._matcher, self._tokenizer = matcher, tokenizer

    def begin(self, ends: Collection[int]) -> GrammarState:
        """The state of a new answer.

        Args:
            ends: as in ``GrammarState``.
        """
        return GrammarState(self._matcher.deep_copy(), self._tokenizer.eos_tokens, ends)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text that the grammar sees in these tokens: a tokenizer's own decoding may trim or join it."""
        return self._tokenizer.decode_str(list(tokens))


class GrammarReader:
    """Makes grammars of schemas for the answers of one model; may be called from any thread.

    The tokenizer is read at the first of them: it takes a second or so.

    Args:
        vocabulary: number of tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        self._source, self._vocabulary = copy.deepcopy(tokenizer), vocabulary
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[str, AnswerGrammar] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, schema: Mapping[str, Any]) -> AnswerGrammar:
        """The grammar of a JSON schema.

        Raises:
            DataError: the schema is malformed, too large, too complex, or says what no grammar can hold an answer to.
            NotSupportedError: the tokenizer is of a kind whose tokens have no text of their own.
        """
        text = _as_json(schema)
        with self._lock:
            if text in self._kept:
                self._kept.move_to_end(text)
                return self._kept[text]
            tokenizer = self._tokenizer = self._tokenizer or read_tokenizer(self._source, self._vocabulary)
        try:
            grammar = LLMatcher.grammar_from_json_schema(text, overrides=COMPILER_OPTIONS)
        except ValueError as error:
            raise _refused(str(error)) from error
        if wrong := try_grammar(grammar):
            raise _refused(wrong)
        matcher = new_matcher(tokenizer, grammar)
        if matcher.is_error():
            raise _refused(matcher.get_error())
        with self._lock:
            found = self._kept[text] = AnswerGrammar(matcher, tokenizer)
            while len(self._kept) > KEPT_GRAMMARS:
                self._kept.popitem(last=False)
        return found


def read_tokenizer(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> LLTokenizer:
    """The tokens' bytes.

    Raises:
        NotSupportedError: as ``GrammarReader.read``.
    """
    remedy = "leave out response_format; models with a byte-level or byte-fallback tokenizer can be held to it"
    try:
        found = from_tokenizer(tokenizer, n_vocab=vocabulary)
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise NotSupportedError("this model's tokenizer cannot be held to a response_format", remedy=remedy) from error
    spelled = {found.decode_bytes([token]) for token in range(found.vocab_size) if not found.is_special_token(token)}
    if any(bytes([one]) not in spelled for one in NEEDED_BYTES):
        raise NotSupportedError("this model's tokens do not spell every JSON text", remedy=remedy)
    return found


def _as_json(schema: Mapping[str, Any]) -> str:
    """The schema as JSON, if it is one that can be read.

    Raises:
        DataError: it cannot.
    """
    try:
        text = json.dumps(schema, allow_nan=False)
        parts = list(_parts(schema))
    except (ValueError, RecursionError) as error:
        raise DataError("the schema is no JSON, or nested too deeply", remedy="give a JSON schema") from error
    if len(text) > LARGEST_SCHEMA:
        raise DataError(
            f"the schema has {len(text):,} characters: too many", remedy=f"give one of at most {LARGEST_SCHEMA:,}"
        )
    if "x-guidance" in schema:
        raise DataError("the schema has the keyword x-guidance", remedy="leave it out")
    for part in parts:
        least, required = part.get("minProperties"), part.get("required")
        if isinstance(least, int | float) and least > (len(required) if isinstance(required, list) else 0):
            raise DataError(
                "minProperties cannot be held: names may repeat", remedy="name the properties in required instead"
            )
    return text


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    """All JSON objects within a value."""
    if isinstance(value, dict):
        yield value
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _parts(one)


def _refused(wrong: str) -> DataError:
    """What the compiler says, in one line that is not too long."""
    said = " ".join(wrong.replace("<non-verbose/>", "").split())[:300]
    return DataError(f"the schema cannot be held: {said}", remedy="change it, or leave out response_format")
