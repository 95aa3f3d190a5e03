"""Tasks whose answers are classes: sentiment, and questions about papers."""

from __future__ import annotations

from isthmus.tasks.task import Fields, Item, Task, choose, fixed_fields, label_of, list_of, text_of


def sentiment(row: Fields) -> list[Item]:
    """A text that is negative or positive; by a label, or by the sign of a score."""
    score, names = row.get("score"), ("negative", "positive")
    known = row if "label" in row or not isinstance(score, int | float) else {"label": int(score > 0)}
    prompt = f"{text_of(row, 'text')}\nSentiment (positive or negative):"
    return [choose(prompt, label_of(known, names), {name: f" {name}" for name in names})]


def pubmedqa(row: Fields) -> list[Item]:
    """Parts of an abstract, and a question that they answer with yes, no or maybe (Jin et al. 2019)."""
    names = ("yes", "no", "maybe")
    contexts = "\n".join(str(one) for one in list_of(row, *_contexts(row)))
    prompt = f"{contexts}\nQuestion: {text_of(row, 'question')}\nAnswer (yes, no or maybe):"
    right = label_of(row, names, "final_decision" if "final_decision" in row else "label")
    return [choose(prompt, right, {name: f" {name}" for name in names})]


def _contexts(row: Fields) -> tuple[str, ...]:
    return ("contexts",) if "contexts" in row else ("context", "contexts")


CLASSIFICATION = (
    Task("sentiment", sentiment, ("accuracy", "macro_f1"), stand_in=fixed_fields(label=0)),
    Task("pubmedqa", pubmedqa, ("accuracy", "macro_f1"), stand_in=fixed_fields(label=0, final_decision=0)),
)
