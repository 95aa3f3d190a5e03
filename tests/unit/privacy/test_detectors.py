"""Detectors find identifiers as they are written, and by their checksums not what only looks like one."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from stdnum import iban, luhn
from stdnum.gb import nhs
from stdnum.iso7064 import mod_97_10

from isthmus.privacy import detectors
from isthmus.recipe.sections.sensitivity import DETECTORS

AROUND = st.sampled_from(["", "see ", "Ref. ", "(", "paid to: ", "né ", "患者 "])
AFTER = st.sampled_from(["", ".", ", thanks", ")", " and 3 more", "\n"])


def digits(least: int, most: int) -> st.SearchStrategy[str]:
    return st.text("0123456789", min_size=least, max_size=most)


def found(name: str, text: str, listed: tuple[str, ...] = ()) -> set[str]:
    return {text[start:end] for start, end in detectors.build(name, region="US", listed=listed)(text)}


def grouped(number: str, size: int, separator: str) -> str:
    return separator.join(number[start : start + size] for start in range(0, len(number), size))


def test_the_recipe_knows_the_same_detectors() -> None:
    assert set(DETECTORS) == detectors.KNOWN


@settings(derandomize=True, deadline=None)
@given(st.sampled_from([("DE", 18), ("AT", 16), ("PL", 24)]), digits(24, 24), st.sampled_from(["", " "]), AROUND, AFTER)
def test_iban(kind: tuple[str, int], account: str, separator: str, before: str, after: str) -> None:
    country, account = kind[0], account[: kind[1]]
    check = mod_97_10.calc_check_digits(account + country)
    right = country + check + account
    wrong = country + f"{(int(check) + 1) % 97:02}" + account
    assert iban.is_valid(right, check_country=False)
    written = grouped(right, 4, separator)
    assert any(one.startswith(written) for one in found("iban", f"{before}{written}{after}"))
    assert grouped(wrong, 4, separator) not in found("iban", f"{before}{grouped(wrong, 4, separator)}")


@settings(derandomize=True, deadline=None)
@given(st.sampled_from("3456"), digits(14, 14), st.sampled_from(["", " ", "-"]), AROUND, AFTER)
def test_card(first: str, rest: str, separator: str, before: str, after: str) -> None:
    number = first + rest
    right = number + luhn.calc_check_digit(number)
    wrong = number + str((int(right[-1]) + 1) % 10)
    assert any(
        one.startswith(grouped(right, 4, separator))
        for one in found("card", before + grouped(right, 4, separator) + after)
    )
    assert grouped(wrong, 4, separator) not in found("card", before + grouped(wrong, 4, separator))


@settings(derandomize=True, deadline=None)
@given(digits(9, 9), st.sampled_from(["", " "]), AROUND)
def test_national_id_with_a_checksum(number: str, separator: str, before: str) -> None:
    whole = next((number + check for check in "0123456789" if nhs.is_valid(number + check)), None)
    assume(whole is not None)
    assert whole is not None
    written = separator.join((whole[:3], whole[3:6], whole[6:]))
    assert written in found("national-id", f"{before}{written}")


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("943 476 5919", "943 476 5918"),
        ("12345678Z", "12345678A"),
        ("RSSMRA80A01H501U", "RSSMRA80A01H501X"),
        ("530.610.290-47", "530.610.290-40"),
        ("078-05-1121", "000-05-1121"),
    ],
)
def test_national_ids_of_several_countries(good: str, bad: str) -> None:
    assert good in found("national-id", f"The number is {good}, I think.")
    assert bad not in found("national-id", f"The number is {bad}, I think.")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("email", "write to a.b+c@mail.example.org.", {"a.b+c@mail.example.org"}),
        ("email", "the score was 3 @ 4", set()),
        ("url", "see https://example.org/a?b=1, or www.example.com.", {"https://example.org/a?b=1", "www.example.com"}),
        ("ip", "from 192.168.0.12 and fe80::1, not 300.1.1.1 nor 12:30", {"192.168.0.12", "fe80::1"}),
        ("phone", "call (212) 555-0123 or +49 30 901820", {"(212) 555-0123", "+49 30 901820"}),
        ("phone", "pressure 120/80, pulse 72, in 2008", set()),
        ("record-number", "MRN: 00-12345; medical record number is A778899", {"00-12345", "A778899"}),
        ("record-number", "in order of 12345 and record 3", set()),
    ],
)
def test_patterns(name: str, text: str, expected: set[str]) -> None:
    assert found(name, text) == expected


@pytest.mark.parametrize(
    "date",
    [
        "2009-01-10", "01/10/09", "10.1.2009", "January 10, 2009", "Jan. 10th", "10 January 2009", "the 10th of May",
        "August 2008", "August of two thousand eight", "January tenth two thousand nine", "June twenty first", "7/2007",
        "October of nineteen ninety two", "Sept 3rd, 1999",
        "last May", "early March",
    ],
)  # fmt: skip
def test_dates(date: str) -> None:
    words = date.removeprefix("last ").removeprefix("early ")
    assert words in found("date", f"It began on {date}.") & found("date", f"It began on {date}, she said")


@pytest.mark.parametrize(
    "text", ["You may go in 3 days", "120/80", "13/13/2009", "version 1.2.3.4", "march on", "1/2 of 3"]
)
def test_what_is_no_date(text: str) -> None:
    assert found("date", text) == set()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Dr. John A. Smith saw Mrs. Miller.", {"John A. Smith", "Miller"}),
        ("I saw Doctor X on Monday.", {"X"}),
        ("Doctor: Hello. Patient: Yes, Doctor.", set()),
        ("My name is Ivo Andrić, hello.", {"Ivo Andrić"}),
        ("Then Mary-Ann O'Neil called. Maria agreed.", {"Mary-Ann O'Neil", "Maria"}),
        ("We asked Jürgen Weiß about it.", {"Jürgen Weiß"}),
        ("It is in the Emergency Room. May I? The Heart is fine. CT Scan and MRI.", set()),
        ("How are you, Miss A? Mister X. Don't go.", {"A", "X"}),
        ("I told mister Jones and doctor X Y Z.", {"Jones", "X Y Z"}),
        ("I hope so, Will said. Will Turner came.", {"Will Turner"}),
    ],
)
def test_names(text: str, expected: set[str]) -> None:
    assert found("name", text) == expected


def test_listed_names_are_found_in_any_case_and_as_whole_words() -> None:
    assert found("name", "met o'brien (li), not liable", listed=("O'Brien", " li ", "")) == {"o'brien", "li"}


@pytest.mark.parametrize("name", DETECTORS)
@settings(derandomize=True, deadline=None)
@given(text=st.text(max_size=200) | st.text("0123456789 .-/:@AbcDr'", max_size=300))
def test_any_text_gives_stretches_within_it(name: str, text: str) -> None:
    for start, end in detectors.build(name, region="US", listed=("a",))(text):
        assert 0 <= start < end <= len(text)
        assert re.search(r"\w", text[start:end])
