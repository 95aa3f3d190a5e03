"""The detector of people's names: after titles and phrases, by common given names, by capitals, and from a list.

Rules only, no language model: a surname alone at the start of a sentence is missed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

TextSpan = tuple[int, int]
"""Start and end of a span of text in characters, end exclusive."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


GIVEN = _words(
    """Aaron Abigail Adam Adrian Ahmed Aisha Alan Albert Alejandro Alex Alexander Alexandra Alfred Ali Alice Alicia
    Alison Allen Amanda Amber Amy Ana Andrea Andreas Andrew Andy Angela Anita Ann Anna Anne Annie Anthony Antonio Arthur
    Ashley Audrey Barbara Beatrice Ben Benjamin Bernard Bernd Beth Betty Beverly Bob Bobby Bonnie Bradley Brandon
    Brenda Brian Bruce Bryan Caitlin Cameron Carl Carla Carlos Carol Caroline Carolyn Catherine Cathy Charles Charlie
    Charlotte Cheryl Chloe Chris Christian Christina Christine Christopher Cindy Claire Clara Claudia Connie Craig
    Crystal Cynthia Daniel Daniela Danielle Danny Darren David Deborah Debra Denise Dennis Derek Diana Diane Diego
    Donald Donna Doris Dorothy Doug Douglas Dylan Eddie Edgar Edith Eduardo Edward Edwin Eileen Elaine Eleanor Elena
    Elizabeth Ella Ellen Emily Emma Eric Erica Erik Ernest Esther Ethan Eugene Eva Evelyn Fatima Felix Fernando
    Florence Frances Francesca Francis Francisco Frank Franz Fred Frederick Gabriel Gabriela Gary George Georgia Gerald
    Gina Giovanni Giulia Gladys Gloria Gordon Grant Greg Gregory Hans Hannah Harold Harry Hassan Heather Hector Helen
    Henry Herbert Howard Hugh Hussein Ian Ingrid Irene Isaac Isabel Isabella Jack Jacob Jacqueline Jaime James Jamie
    Jan Jane Janet Janice Jason Javier Jay Jean Jeff Jeffrey Jennifer Jenny Jeremy Jerry Jesse Jessica Jesus Jill Jim
    Jimmy Joan Joanna Joe Joel Johan John Johnny Jon Jonathan Jordan Jorge Jose Joseph Josh Joshua Joyce Juan Juanita
    Judith Judy Julia Julian Julie Justin Karen Karl Kate Katherine Kathleen Kathryn Kathy Katie Keith Kelly Ken
    Kenneth Kevin Kim Kimberly Klaus Kristen Kurt Kyle Larry Laura Lauren Laurence Lawrence Leah Lee Leo Leon Leonard
    Leslie Liam Linda Lisa Lloyd Lois Lorenzo Lori Louis Louise Lucas Lucia Lucy Luis Luke Lynn Madison Manuel Marco
    Marcus Margaret Maria Marie Marilyn Mario Marion Martha Martin Mary Mason Matthew Maureen Megan Melanie Melissa
    Mia Michael Michele Michelle Miguel Mike Mildred Mohamed Mohammad Mohammed Monica Muhammad Nancy Natalie Nathan
    Neil Nicholas Nicole Nina Noah Nora Norma Norman Olga Olivia Omar Oscar Otto Pablo Pamela Patricia Patrick Paul
    Paula Pauline Pedro Peggy Peter Philip Phillip Phyllis Pierre Rachel Rafael Ralph Ramon Randy Raymond Rebecca
    Regina Ricardo Richard Rick Rita Robert Roberto Robin Rodney Roger Roland Ronald Rosa Rosemary Roy Russell Ruth
    Ryan Sally Sam Samantha Samuel Sandra Sara Sarah Scott Sean Sebastian Sergio Seth Sharon Shawn Sheila Shirley
    Simon Sofia Sophia Sophie Stanley Stefan Stephanie Stephen Steve Steven Stuart Susan Suzanne Sylvia Tamara Tammy
    Tanya Teresa Terry Theodore Theresa Thomas Tiffany Tim Timothy Tina Todd Tom Tommy Tony Tracy Travis Tyler Ursula
    Valerie Vanessa Vera Veronica Victor Victoria Vincent Viola Virginia Vivian Walter Wanda Warren Wayne Wendy
    Wilhelm William Willie Wolfgang Yolanda Yusuf Yvonne Zachary Zoe"""
)
"""Given names that are common in America and Europe and rarely ordinary words."""
AMBIGUOUS = _words(
    """April August Bill Chase Dawn Drew Faith Grace Hope Ivy Joy June Lance Mark Max May Pat Pearl Rich Rose Rusty Sue
    Summer Violet Will"""
)
"""Given names that are also ordinary words; they count only before another capitalized word."""
TITLES = _words(
    """Dr Doctor Doctors Drs Mr Mrs Ms Miss Misses Mister Prof Professor Nurse Sir Madam Sister Herr Frau Monsieur
    Madame Señor Señora Sra"""
)
"""Titles that precede a name."""
STOP = _words(
    """Monday Tuesday Wednesday Thursday Friday Saturday Sunday January February March April May June July August
    September October November December Doctor Patient Nurse Guest Clinician Family I I'm I've I'll I'd The A An And But
    Or If In On At To For Of With From By As He She It They We You His Her Its Their My Our Your This That These Those
    There Then When Where Who What Why How Yes No Not So Also After Before Since During Upon While Well Okay Oh Um Uh
    Hi Hello Thanks Thank Please Good Great Right Left Past Medical Surgical Social Family History Review Systems
    Physical Therapy Exam Examination Chief Complaint Present Illness Medications Allergies Assessment Plan Diagnosis
    Emergency Room Department Hospital Clinic Center Centre University School Street Avenue Road Type Stage Grade Class
    General Primary Care Intensive Unit State States United North South East West New York City County Christmas Easter
    Thanksgiving English American African Caucasian Hispanic Asian European Indian Mexican Spanish Chinese Blood
    Pressure Heart Lung Neuro Ent Heent
    Do Don't Does Did He's She's That's How's What's It's There's Let's Can't Didn't
    Disease Syndrome Services Home Drive Day Disorder Test Scale Score Store"""
)
"""Capitalized words that are not part of a name."""
_WORD = re.compile(r"[^\W\d_](?:[\w'’]*[^\W_])?(?:-[^\W\d_][\w'’]*)*")
_LEAD = re.compile(
    r"(?:\b(?:[Nn]ame(?:'s|’s)?(?: is| was)?|[Nn]amed|[Cc]alled|I am|I'm|I’m|[Tt]his is|[Ss]igned by|[Rr]eferred by)"
    r"\s*:?\s+)$"
)
_TITLE = re.compile(r"\b(?:doctors?|dr|mister|mr|mrs|miss|ms|professor|nurse|sister)\.?\s+$")
_SENTENCE_END = re.compile(r"(?:^|[.!?:;]|[\n\r])[\s\"'“”‘(\[*-]*$")
LONGEST_NAME = 4
"""Largest number of words in a name."""


def find_names(listed: Iterable[str] = ()) -> Callable[[str], Iterable[TextSpan]]:
    """The detector of people's names.

    Args:
        listed: further names, found anywhere and in any case.
    """
    known = sorted({name.strip() for name in listed if name.strip()}, key=len, reverse=True)
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, known))})(?!\w)", re.IGNORECASE) if known else None

    def detect(text: str) -> Iterator[TextSpan]:
        if pattern is not None:
            yield from (match.span() for match in pattern.finditer(text))
        yield from _by_looks(text)

    return detect


def _by_looks(text: str) -> Iterator[TextSpan]:
    words = list(_WORD.finditer(text))
    small = {word[0] for word in words if word[0][0].islower()}
    index = 0
    while index < len(words):
        end = _run(text, words, index)
        first = _name_within(text, words[index:end], small)
        if first is not None:
            yield words[index + first].start(), words[end - 1].end()
        index = max(end, index + 1)


def _run(text: str, words: list[re.Match[str]], first: int) -> int:
    """The end (exclusive) of the run of capitalized words that starts at word ``first``; at least ``first + 1``."""
    end = first
    while end < len(words) and end - first < LONGEST_NAME + 1 and words[end][0][0].isupper():
        if end > first:
            between = text[words[end - 1].end() : words[end].start()]
            abbreviated = len(words[end - 1][0]) == 1 or words[end - 1][0] in TITLES | {"St"}
            if between not in (" ", "  ", "-") and not (between.startswith(".") and abbreviated):
                break
            dotted = text[words[end].start() : words[end].end() + 1] == f"{words[end][0][0]}."
            initial = dotted or (len(words[end][0]) == 1 and words[end - 1][0] in TITLES)
            if words[end][0] in STOP - AMBIGUOUS and not initial:
                break
        end += 1
        if end - first == 1 and words[first][0] in STOP - TITLES - AMBIGUOUS:
            break
    return max(end, first + 1)


def _name_within(text: str, run: list[re.Match[str]], small: set[str]) -> int | None:
    """The index of a name's first word within a run of capitalized words; None: the run holds no name.

    Args:
        small: all words of the text that begin with a lower-case letter.
    """
    words = [word[0] for word in run]
    if not words[0][0].isupper():
        return None
    for place, word in enumerate(words):
        if word in TITLES and place + 1 < len(words):
            return place + 1
    if words[0] in TITLES or words[0] in STOP - AMBIGUOUS:
        return None
    for place, word in enumerate(words):
        if word in GIVEN or (word in AMBIGUOUS and place + 1 < len(words)):
            return place
    before = text[max(0, run[0].start() - 24) : run[0].start()]
    if _TITLE.search(before) or (_LEAD.search(before) and not words[0].isupper()):
        return 0
    ordinary = all(len(word) == 1 for word in words) or any(
        word.lower() in small or (word.isupper() and len(word) > 1) for word in words
    )
    starts = bool(_SENTENCE_END.search(before))
    if len(words) - starts >= 2 and not ordinary and words[-1] not in STOP:
        return 0
    return None
