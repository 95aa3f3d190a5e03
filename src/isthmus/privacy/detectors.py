"""Detectors of identifiers in text: by pattern, and by checksum where the identifier has one.

A detector gives spans of the text. Detectors prefer recall to precision: a false positive gets more noise than it
needs, a false negative gets too little.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from importlib import import_module
from typing import Any

from phonenumbers import Leniency, PhoneNumberMatcher
from stdnum import iban, luhn

from isthmus.privacy.names import TextSpan, find_names

Detector = Callable[[str], Iterable[TextSpan]]
"""Gives the spans of a text that it detects, in any order; they may overlap."""

NATIONAL_IDS = (
    "au.tfn", "be.nn", "br.cpf", "ca.sin", "ch.ssn", "cn.ric", "de.idnr", "dk.cpr", "es.dni", "es.nie",
    "fi.hetu", "fr.nir", "gb.nhs", "in_.aadhaar", "it.codicefiscale", "kr.rrn", "nl.bsn", "no.fodselsnummer",
    "pl.pesel", "pt.cc", "se.personnummer", "tr.tckimlik", "us.itin", "us.ssn", "za.idnr",
)  # fmt: skip
"""Modules of python-stdnum. All but us.ssn and us.itin validate a checksum or a date."""

_EMAIL = re.compile(r"[\w.+%-]+@[\w-]+(?:\.[\w-]+)+")
_URL = re.compile(r"\b(?:https?://|ftp://|www\.)[^\s<>\"']*[^\s<>\"'.,;:!?)\]]", re.IGNORECASE)
_IP = re.compile(r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7})(?![\w:]|\.\d)")
_IBAN = re.compile(r"\b[A-Za-z]{2}\d{2}(?:[ -]?[A-Za-z0-9]){11,30}")
_CARD = re.compile(r"(?<![\d.-])[2-6]\d{3}(?:[ -]?\d){9,15}(?![\d])")
_PHONE = re.compile(r"[+(]?\d(?:[ ()./-]{0,3}\d){6,16}")
_GROUPS = re.compile(r"(?<![\w])[0-9A-Za-z]+(?:[ ./-][0-9A-Za-z]+)*")
_GROUP = re.compile(r"[0-9A-Za-z]+")
_RECORD = re.compile(
    r"\b(?:mrn|ehr|emr|(?:medical|patient|health|hospital|clinic|chart|encounter|admission|account|acct|case|claim|"
    r"insurance|policy|member|specimen|accession|order|unit|file|record)s?"
    r"(?:[ -](?:record|identification|chart|case|account|file))?"
    r"[ .]*(?:number|num|no|nr|id|identifier|#))"
    r"(?:[\s.:#=-]|\bis\b|\bof\b|\bnumber\b|\bno\b){0,6}"
    r"([A-Za-z]{0,4}[-/]?\d[\dA-Za-z]*(?:[-/.]?\d[\dA-Za-z]*)*)",
    re.IGNORECASE,
)

_MONTH = (
    r"(?:jan(?:uary|\.)?|feb(?:ruary|\.)?|mar(?:ch|\.)?|apr(?:il|\.)?|may|june?\.?|july?\.?|aug(?:ust|\.)?"
    r"|sept?(?:ember|\.)?|oct(?:ober|\.)?|nov(?:ember|\.)?|dec(?:ember|\.)?)"
)
_TEENS = r"ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen"
_UNITS = r"one|two|three|four|five|six|seven|eight|nine"
_TENS = r"twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"
_BELOW_100 = rf"(?:(?:{_TENS})(?:[ -](?:{_UNITS}))?|{_TEENS}|(?:oh[ -])?(?:{_UNITS}))"
_YEAR = rf"(?:'?\d\d(?:\d\d)?|two thousand(?: and)?(?: {_BELOW_100})?|(?:nineteen|twenty)[ -]{_BELOW_100})"
_ORDINAL = (
    r"(?:(?:twenty|thirty)[ -])?(?:first|second|third|fourth|fifth|sixth|seventh|eighth|ninth)|tenth|eleventh|twelfth"
    r"|(?:thir|four|fif|six|seven|eigh|nine)teenth|twentieth|thirtieth"
)
_DAY = rf"(?:(?:0?[1-9]|[12]\d|3[01])(?:st|nd|rd|th)?\b|(?:{_ORDINAL})\b)"
_DATES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?<!\d)(?:1[89]|20)\d\d([-/.])(?:0?[1-9]|1[0-2])\1(?:0?[1-9]|[12]\d|3[01])(?!\d)",
        r"(?<![\d/.-])(?:(?:0?[1-9]|1[0-2])([-/.])(?:0?[1-9]|[12]\d|3[01])|(?:0?[1-9]|[12]\d|3[01])([-/.])"
        r"(?:0?[1-9]|1[0-2]))(?:\1|\2)(?:(?:1[89]|20)\d\d|\d\d)(?![\d/])",
        r"(?<![\d/.-])(?:0?[1-9]|1[0-2])[/-](?:19|20)\d\d(?![\d/-])",
        rf"\b{_MONTH}\s+(?:the\s+)?{_DAY}(?:,?\s+(?:of\s+)?(?:in\s+)?{_YEAR}\b)?",
        rf"\b(?:the\s+)?{_DAY}\s+(?:of\s+|day of\s+)?{_MONTH}\b(?:,?\s+(?:of\s+)?{_YEAR}\b)?",
        rf"\b{_MONTH},?\s+(?:of\s+)?(?:(?:19|20)\d\d\b|'\d\d\b|two thousand(?: and)?(?: {_BELOW_100})?\b"
        rf"|(?:nineteen|twenty)[ -]{_BELOW_100}\b)",
    )
)
_MONTH_ALONE = re.compile(
    rf"\b(?:in|since|until|till|by|of|this|last|next|early|late|mid|from)[ -]({_MONTH})\b", re.IGNORECASE
)


def build(name: str, *, region: str, listed: Iterable[str]) -> Detector:
    """The detector with this name, one of ``KNOWN``.

    Args:
        region: two-letter code of the country whose phone numbers need no country code.
        listed: the silo's own list of names, for the ``name`` detector.
    """
    if name == "phone":
        return partial(_phones, region=region)
    if name == "name":
        return find_names(listed)
    return _PLAIN[name]


def _matches(pattern: re.Pattern[str], text: str) -> Iterator[TextSpan]:
    return (match.span() for match in pattern.finditer(text))


def _ips(text: str) -> Iterator[TextSpan]:
    for match in _IP.finditer(text):
        try:
            ipaddress.ip_address(match[0])
        except ValueError:
            continue
        if any(map(str.isdigit, match[0])):
            yield match.span()


def _ibans(text: str) -> Iterator[TextSpan]:
    """IBANs with a valid checksum (mod 97). A match may include text after it: its longest valid prefix counts."""
    for match in _IBAN.finditer(text):
        for end in range(match.end(), match.start() + 14, -1):
            candidate = text[match.start() : end]
            whole = end == len(text) or not (candidate[-1].isalnum() and text[end].isalnum())
            if whole and candidate[-1].isalnum() and iban.is_valid(candidate, check_country=False):
                yield match.start(), end
                break


def _cards(text: str) -> Iterator[TextSpan]:
    """Card numbers: 13 to 19 digits with a valid Luhn checksum. A match may include digits that follow, so its longest
    valid prefix counts."""
    for match in _CARD.finditer(text):
        for end in range(match.end(), match.start() + 12, -1):
            digits = re.sub(r"\D", "", text[match.start() : end])
            whole = end == len(text) or not text[end].isdigit()
            if whole and text[end - 1].isdigit() and 13 <= len(digits) <= 19 and luhn.is_valid(digits):
                yield match.start(), end
                break


def _phones(text: str, region: str) -> Iterator[TextSpan]:
    if _PHONE.search(text):
        for match in PhoneNumberMatcher(text, region, leniency=Leniency.POSSIBLE):
            yield match.start, match.end


@cache
def _id_modules() -> tuple[Any, ...]:
    return tuple(import_module(f"stdnum.{name}") for name in NATIONAL_IDS)


def _national_ids(text: str) -> Iterator[TextSpan]:
    """National ids: one to five groups of letters and digits with single separators, valid in some country."""
    for run in _GROUPS.finditer(text):
        groups = [group.span() for group in _GROUP.finditer(text, *run.span())]
        digits = [index for index, (start, end) in enumerate(groups) if any(map(str.isdigit, text[start:end]))]
        if not digits:
            continue
        for first in range(max(0, digits[0] - 4), digits[-1] + 1):
            for start, end in ((groups[first][0], last[1]) for last in groups[first : first + 5]):
                if _is_national_id(text[start:end]):
                    yield start, end


def _is_national_id(candidate: str) -> bool:
    digits = sum(map(str.isdigit, candidate))
    if digits < 7 or len(candidate) > 24:
        return False
    if re.fullmatch(r"\d{9}", candidate):  # nine digits alone: accept a valid checksum only
        return any(module.is_valid(candidate) for module in _id_modules() if ".us." not in module.__name__)
    return any(module.is_valid(candidate) for module in _id_modules())


def _record_numbers(text: str) -> Iterator[TextSpan]:
    for match in _RECORD.finditer(text):
        if sum(map(str.isdigit, match[1])) >= 3:
            yield match.span(1)


def _dates(text: str) -> Iterator[TextSpan]:
    for pattern in _DATES:
        yield from _matches(pattern, text)
    for match in _MONTH_ALONE.finditer(text):
        yield match.span(1)


_PLAIN: dict[str, Detector] = {
    "card": _cards,
    "date": _dates,
    "email": partial(_matches, _EMAIL),
    "iban": _ibans,
    "ip": _ips,
    "national-id": _national_ids,
    "record-number": _record_numbers,
    "url": partial(_matches, _URL),
}
KNOWN = frozenset({*_PLAIN, "name", "phone"})
"""Names of all detectors."""
