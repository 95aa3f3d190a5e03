"""Tasks whose answers are written: summaries, and answers to questions in a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isthmus.errors import DataError
from isthmus.tasks.task import Fields, Item, Task, fixed_fields, list_of, text_of


def _summary(row: Fields, source: str, instruction: str, *right: str) -> list[Item]:
    return [Item(f"{instruction}\n\n{source}\n\nSummary:", f" {right[0]}", right)]


def xsum(row: Fields) -> list[Item]:
    """A document, and one sentence that says what it is about."""
    source, right = text_of(row, "document"), text_of(row, "summary")
    return _summary(row, source, "Summarize the following article in one sentence.", right)


def cnn_dailymail(row: Fields) -> list[Item]:
    """An article and its highlights."""
    article, highlights = ("article", "highlights") if "article" in row else ("document", "summary")
    source, right = text_of(row, article), text_of(row, highlights)
    return _summary(row, source, "Summarize the following article in a few sentences.", right)


def scitldr(row: Fields) -> list[Item]:
    """A paper's abstract and summaries of one sentence each; an answer is measured by the best of them."""
    source = " ".join(str(one).strip() for one in list_of(row, "source"))
    right = [str(one).strip() for one in list_of(row, "target")]
    return _summary(row, source, "Summarize the following abstract of a paper in one sentence.", *right)


def mts_dialog(row: Fields) -> list[Item]:
    """A conversation of doctor and patient, and a section of the note that the doctor writes."""
    dialogue, section = text_of(row, "dialogue"), text_of(row, "section_header")
    instruction = f"Write the section {section} of the clinical note on the following conversation."
    right = text_of(row, "section_text")
    return [Item(f"{instruction}\n\n{dialogue}\n\nNote:", f" {right}", (right,))]


def coqa(row: Fields) -> list[Item]:
    """A story, and one item for each turn of a conversation about it, after the turns before (Reddy et al. 2019).

    Questions and answers may be lists of texts or of ``{"input_text": …}``, as in CoQA's own files; answers may be a
    mapping with such a list, as in the ``coqa`` data set.
    """
    story = text_of(row, "story")
    questions = [_said(one) for one in list_of(row, "questions")]
    own = row.get("answers")
    answers = [_said(one) for one in list_of(own if isinstance(own, Mapping) else row, *_answers(own))]
    if len(answers) != len(questions):
        raise DataError(
            f"a row has {len(questions)} questions and {len(answers)} answers", remedy="give each its answer"
        )
    further: Any = row.get("additional_answers")
    more = list(further.values()) if isinstance(further, Mapping) else []
    items, history = [], ""
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        right = (answer, *(_said(one[number]) for one in more if len(one) == len(answers)))
        prompt = f"Answer the question about the story.\n\n{story}\n{history}\nQ: {question}\nA:"
        items.append(Item(prompt, f" {answer}", tuple(dict.fromkeys(right))))
        history += f"\nQ: {question}\nA: {answer}"
    return items


def _answers(own: Any) -> tuple[str, ...]:
    return ("input_text",) if isinstance(own, Mapping) else ("answers",)


def _said(one: Any) -> str:
    said = one.get("input_text") if isinstance(one, Mapping) else one
    if not isinstance(said, str) or not said.strip():
        raise DataError(f"a turn of a conversation is {one!r}", remedy="give each turn its text")
    return said.strip()


def canard(row: Fields) -> list[Item]:
    """A subject, the turns before (questions and answers by turns), a question and its answer (QuAC, as in CANARD)."""
    history = [_said(one) for one in row.get("history") or ()]
    title, question, right = (text_of(row, key) for key in ("title", "question", "answer"))
    section = row.get("section")
    subject = f"{title}, {section.strip()}" if isinstance(section, str) and section.strip() else title
    turns = "".join(f"\n{'QA'[number % 2]}: {one}" for number, one in enumerate(history))
    prompt = f"Answer the question in a conversation about {subject}.\n{turns}\nQ: {question}\nA:"
    return [Item(prompt, f" {right}", (right,))]


ROUGE = ("rouge1", "rouge2", "rougeL")
WRITING = (
    Task("xsum", xsum, ROUGE, longest=64, stop=("\n",), stand_in=fixed_fields(summary="-")),
    Task("cnn_dailymail", cnn_dailymail, ROUGE, longest=160, stand_in=fixed_fields(highlights="-", summary="-")),
    Task("scitldr", scitldr, ROUGE, longest=64, stop=("\n",), stand_in=fixed_fields(target=["-"])),
    Task("mts_dialog", mts_dialog, ROUGE, longest=200, stand_in=fixed_fields(section_text="-")),
    Task("coqa", coqa, ("token_f1", "exact_match"), longest=32, stop=("\n",)),
    Task("canard", canard, ("token_f1", "exact_match"), longest=64, stop=("\n",), stand_in=fixed_fields(answer="-")),
)
