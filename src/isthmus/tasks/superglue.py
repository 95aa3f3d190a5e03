"""The eight tasks of SuperGLUE (Wang et al. 2019) as cloze questions (after Schick and Schütze, PET, 2021).

Rows may have the form of SuperGLUE's own files or that of the ``super_glue`` data set. Where the blank of the cloze is
followed by more text (RTE, CB, ReCoRD), that text is part of each choice: a causal model weighs it given the choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isthmus.errors import DataError
from isthmus.tasks.task import Fields, Item, Task, choose, fixed_fields, label_of, list_of, text_of

YES_NO = {"no": " no", "yes": " yes"}


def _yes_no(row: Fields) -> str:
    return "yes" if label_of(row, ("false", "true")) == "true" else "no"


def _bare(sentence: str) -> str:
    """A sentence without the mark at its end."""
    return sentence.rstrip(".!? ")


def boolq(row: Fields) -> list[Item]:
    """Passage, question, answer."""
    passage, question = text_of(row, "passage"), _bare(text_of(row, "question"))
    return [choose(f"{passage}\nQuestion: {question}?\nAnswer:", _yes_no(row), YES_NO)]


def _entailed(row: Fields, names: tuple[str, ...], words: Mapping[str, str]) -> list[Item]:
    premise, hypothesis = text_of(row, "premise"), _bare(text_of(row, "hypothesis"))
    choices = {name: f" {words[name]}, {premise}" for name in names}
    return [choose(f"{hypothesis}?", label_of(row, names), choices)]


def rte(row: Fields) -> list[Item]:
    """Hypothesis, blank, premise."""
    names = ("entailment", "not_entailment")
    return _entailed(row, names, {"entailment": "yes", "not_entailment": "no"})


def cb(row: Fields) -> list[Item]:
    """Hypothesis, blank, premise."""
    names = ("entailment", "contradiction", "neutral")
    return _entailed(row, names, {"entailment": "yes", "contradiction": "no", "neutral": "maybe"})


def copa(row: Fields) -> list[Item]:
    """Both choices quoted, the premise, and the choice that follows from it or explains it."""
    first, second = _bare(text_of(row, "choice1")), _bare(text_of(row, "choice2"))
    premise, question = _bare(text_of(row, "premise")), text_of(row, "question")
    if question not in ("cause", "effect"):
        raise DataError(f"a row asks for {question!r}", remedy='COPA asks for "cause" or "effect"')
    joint = "because" if question == "cause" else "so"
    choices = {"1": f" {_lower(first)}.", "2": f" {_lower(second)}."}
    return [choose(f'"{first}" or "{second}"? {premise}, {joint}', label_of(row, ("1", "2")), choices)]


def _lower(sentence: str) -> str:
    """A sentence as it goes on after a comma; names lose their capital, too, as in the field's other templates."""
    return sentence[0].lower() + sentence[1:]


def multirc(row: Fields) -> list[Item]:
    """Passage, question, and whether one of its answers is right; several items of a row are one question's."""
    if "paragraph" in row:
        passage, question, answer = (text_of(row, key) for key in ("paragraph", "question", "answer"))
        index = row.get("idx")
        at = f"{index.get('paragraph')}/{index.get('question')}" if isinstance(index, Mapping) else question
        return [_multirc_item(passage, question, answer, _yes_no(row), at)]
    passage, items = text_of(row, "passage", "text"), []
    for number, one in enumerate(list_of(row, "passage", "questions")):
        question, group = text_of(one, "question"), f"{row.get('idx')}/{one.get('idx', number)}"
        for answer in list_of(one, "answers"):
            if answer.get("text") == "":
                continue  # the set itself has a few
            items.append(_multirc_item(passage, question, text_of(answer, "text"), _yes_no(answer), group))
    return items


def _multirc_item(passage: str, question: str, answer: str, right: str, group: str) -> Item:
    return choose(f"{passage}\nQuestion: {question}\nIs it {_bare(answer)}?", right, YES_NO, group)


def record(row: Fields) -> list[Item]:
    """Passage and query, with each entity of the passage in the query's place for it."""
    if "query" in row:
        passage, entities = text_of(row, "passage"), [str(one) for one in list_of(row, "entities")]
        queries = [(text_of(row, "query"), [str(one) for one in list_of(row, "answers")])]
    else:
        passage = text_of(row, "passage", "text")
        entities = [passage_part(row, one) for one in list_of(row, "passage", "entities")]
        queries = [
            (text_of(one, "query"), [text_of(answer, "text") for answer in list_of(one, "answers")])
            for one in list_of(row, "qas")
        ]
    summary = passage.replace("\n@highlight\n", "\n- ")
    return [_record_item(summary, query, sorted(set(entities)), sorted(set(right))) for query, right in queries]


def passage_part(row: Fields, entity: Any) -> str:
    """The text of an entity that is given by its first and last character."""
    whole: str = row["passage"]["text"]
    try:
        return whole[entity["start"] : entity["end"] + 1]
    except (KeyError, TypeError) as error:
        raise DataError("an entity has no start and end", remedy="use ReCoRD's own form of rows") from error


def _record_item(passage: str, query: str, entities: list[str], right: list[str]) -> Item:
    before, blank, after = query.partition("@placeholder")
    known = [name for name in right if name in entities]
    if not blank or not known:
        raise DataError("a query has no @placeholder, or no answer among the entities", remedy="drop the row")
    lead, gap = (before.rstrip(), " ") if before.endswith(" ") else (before, "")
    choices = tuple(f"{gap}{name}{after}" for name in entities)
    prompt = f"{passage}\n{lead}" if lead else f"{passage}\n"
    return Item(prompt, choices[entities.index(known[0])], tuple(right), choices, tuple(entities))


def wic(row: Fields) -> list[Item]:
    """Both sentences, and whether a word means the same in them."""
    one, other, word = (text_of(row, key) for key in ("sentence1", "sentence2", "word"))
    return [choose(f'"{one}" / "{other}" Similar sense of "{word}"?', _yes_no(row), YES_NO)]


def wsc(row: Fields) -> list[Item]:
    """The text with the pronoun marked, and whether it refers to a noun."""
    text = text_of(row, "text")
    target: Any = row.get("target", row)
    noun, pronoun = text_of(target, "span1_text"), text_of(target, "span2_text")
    words, place = text.split(), target.get("span2_index")
    if isinstance(place, int) and 0 <= place < len(words):
        words[place] = f"*{words[place]}*"
    marked = " ".join(words)
    return [choose(f'{marked} The pronoun "*{pronoun}*" refers to "{noun}"?', _yes_no(row), YES_NO)]


def _any_entity(row: Fields) -> Fields:
    return {"answers": list_of(row, "entities")[:1]} if "query" in row else {}


LABELLED = fixed_fields(label=0)
SUPERGLUE = (
    Task("boolq", boolq, ("accuracy",), stand_in=LABELLED),
    Task("cb", cb, ("accuracy", "macro_f1"), stand_in=LABELLED),
    Task("copa", copa, ("accuracy",), stand_in=LABELLED),
    Task("multirc", multirc, ("f1a", "exact_match"), stand_in=LABELLED),
    Task("record", record, ("token_f1", "exact_match"), stand_in=_any_entity),
    Task("rte", rte, ("accuracy",), stand_in=LABELLED),
    Task("wic", wic, ("accuracy",), stand_in=LABELLED),
    Task("wsc", wsc, ("accuracy",), stand_in=LABELLED),
)
