"""Tokenizers of every kind, trained on a few sentences."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SENTENCES = [
    "She is happy and he is sad today.",
    "The answer is yes or no, and no one knows.",
    "Sentiment: happy\nSentiment: sad\nAnswer: yes",
    "no one is happy, yes, no, no one said so <tag> a/b > c",
] * 8
STORIES = Path(__file__).parents[4] / "shared" / "models" / "stories260k"


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's or Qwen's: bytes, no beginning, no padding; the tokens of a chat."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    chat = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=chat, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", additional_special_tokens=chat[:2]
    )


@cache
def unigram() -> PreTrainedTokenizerFast:
    """As T5's or Gemma's: SentencePiece words, a beginning and an end around every text. Control tokens have scores
    as words do."""
    control = ["<pad>", "<s>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=control, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@cache
def word_piece() -> PreTrainedTokenizerFast:
    """As BERT's: words in lower case."""
    control = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        SENTENCES, trainers.WordPieceTrainer(vocab_size=200, special_tokens=control, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@cache
def slow_bytes() -> PreTrainedTokenizerBase:
    """A slow one, which tells no places, and ends every text."""
    tokenizer: PreTrainedTokenizerBase = ByT5Tokenizer()
    return tokenizer


@cache
def stories() -> PreTrainedTokenizerBase:
    """As Llama-2's: SentencePiece by merges, with bytes for what is unknown."""
    if not STORIES.exists():
        pytest.skip("the small model of stories is not at hand")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(STORIES)
    return tokenizer


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte-level": byte_level,
    "unigram": unigram,
    "word piece": word_piece,
    "slow bytes": slow_bytes,
    "stories": stories,
}


def controls(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of control tokens: all special ones but that for unknown characters."""
    special = {number for number, one in tokenizer.added_tokens_decoder.items() if one.special}
    return special - {tokenizer.unk_token_id}


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen's and SmolLM2's."""
INSTRUCT = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set first = '<<SYS>>\n' + messages[0]['content'].strip() + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + (first if loop.first else '') }}"
    "{{ message['content'].strip() + ' [/INST]' }}{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
"""As Llama 2's: it strips texts, writes the beginning of text itself, at every question, and demands turn and turn."""
FORGETFUL = CHATML.replace("message['content'] +", "(message['content'] if loop.index0 else '') +")
"""It leaves the first turn out."""


def chatting(make: Callable[[], PreTrainedTokenizerBase], template: str) -> PreTrainedTokenizerBase:
    """The tokenizer with a chat template."""
    tokenizer = copy.deepcopy(make())
    tokenizer.chat_template = template
    return tokenizer


CHATS: dict[str, tuple[Callable[[], PreTrainedTokenizerBase], str]] = {
    "chatml": (byte_level, CHATML),
    "instruct": (stories, INSTRUCT),
    "instruct, unigram": (unigram, INSTRUCT),
}
