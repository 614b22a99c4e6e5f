"""Whether a page is what its caption asked for: exact rules, one kind of caption at a time."""

from __future__ import annotations

from collections import Counter

from soar_mega.data.tiny.pages import Page
from soar_mega.evaluation.handwriting.reader import Reading


def verify(page: Page, reading: Reading) -> dict[str, float]:
    """1 or 0 for each rule, and for all of them.

    ``correct`` asks for everything the caption says: paper, every digit with its ink, no digit more
    or less, and for ``number`` the reading order, for ``position`` the cells. ``digits`` asks for
    the numerals alone, ``ink`` for the inks alone, ``count`` for how many, ``paper`` for the paper.
    """
    asked, seen = page.marks, reading.marks
    numerals, inks = [m.digit for m in asked], [m.ink for m in asked]
    read_numerals, read_inks = [m.digit for m in seen], [m.ink for m in seen]
    same_count = len(asked) == len(seen)
    if page.kind == "number":
        right_digits = numerals == read_numerals
        whole = right_digits and inks == read_inks
    else:
        right_digits = Counter(numerals) == Counter(read_numerals)
        where = page.kind == "position"
        whole = Counter((m.digit, m.ink, m.cell if where else None) for m in asked) == Counter(
            (m.digit, m.ink, m.cell if where else None) for m in seen
        )
    paper = reading.paper == page.paper
    return {
        "correct": float(whole and paper),
        "digits": float(right_digits),
        "ink": float(Counter(inks) == Counter(read_inks)),
        "count": float(same_count),
        "paper": float(paper),
    }
