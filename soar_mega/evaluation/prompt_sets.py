"""Prompt sets as they are published: GenEval's, Flow-GRPO's OCR prompts, DrawBench, plain lines."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from soar_mega.data.tiny.pages import parse_caption
from soar_mega.evaluation.interface import Prompt
from soar_mega.evaluation.scorers.geneval_words import CLASSES, COLORS, RELATIONS


class PromptError(ValueError):
    """A prompt set cannot be used; the message names file, line, rule and fix."""


def read_prompts(path: str | Path, kind: str) -> list[Prompt]:
    """All prompts of a file, in its order.

    Args:
        path: The file, UTF-8.
        kind: One of ``KINDS``. ``geneval``: JSON lines, GenEval's ``evaluation_metadata.jsonl``.
            ``ocr``: a prompt a line, the text to be drawn in double quotes, Flow-GRPO's
            ``ocr/test.txt``. ``drawbench``: a table with the columns ``Prompts`` and ``Category``,
            separated by tabs or commas, or a prompt a line. ``handwriting``: captions of pages
            (``data.tiny.pages``), one a line. ``pickscore`` and ``lines``: a prompt a line.

    Returns:
        GenEval's have their tag as category and ``include`` and ``exclude`` as truth, OCR's their
        ``text`` as truth, a DrawBench table's their category, captions of pages their kind.

    Raises:
        PromptError: No such file or kind, or a line breaks the rules of its kind.
    """
    path = Path(path)
    if kind not in _READERS:
        raise PromptError(f"no kind of prompt set {kind!r}: there are {', '.join(KINDS)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise PromptError(f"the prompt set {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise PromptError(f"{path}, line {line}: not UTF-8. Save the file as UTF-8") from error
    prompts: list[Prompt] = []
    try:
        prompts += _READERS[kind](text)
    except _LineError as error:
        raise PromptError(f"{path}, line {error.line}: {error}") from error
    if not prompts:
        raise PromptError(f"the prompt set {path} is empty: name one with a prompt a line")
    return prompts


class _LineError(Exception):
    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Number and content of each line; only the last may be empty, so that nothing shifts."""
    # Not splitlines, which cuts at more than line ends.
    lines = text.rstrip().split("\n") if text.strip() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise _LineError(number, "the line is empty, and each must hold a prompt: remove it")
        yield number, line.strip()


def _plain(text: str) -> Iterator[Prompt]:
    for _, line in _lines(text):
        yield Prompt(line)


def _handwriting(text: str) -> Iterator[Prompt]:
    for number, line in _lines(text):
        try:
            yield Prompt(line, parse_caption(line).kind)
        except ValueError as error:
            raise _LineError(number, str(error)) from error


def _ocr(text: str) -> Iterator[Prompt]:
    for number, line in _lines(text):
        parts = line.split('"')
        if len(parts) < 3 or not parts[1].strip():
            raise _LineError(
                number,
                f"{line!r} has no text in double quotes, and that is what the picture is checked "
                'for: write it as in a sign that says "OPEN"',
            )
        yield Prompt(line, truth={"text": parts[1]})


def _drawbench(text: str) -> Iterator[Prompt]:
    header = text.partition("\n")[0]
    separator = "\t" if "\t" in header else ","
    columns = [name.strip().strip('"') for name in header.split(separator)]
    if "Prompts" not in columns:
        if "Category" in columns:
            raise _LineError(1, f"the columns are {columns}: the one of prompts must be 'Prompts'")
        yield from _plain(text)
        return
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    table.fieldnames = columns
    next(table.reader)  # the header, whose names are cleaned above
    try:
        for row in table:
            prompt = (row["Prompts"] or "").strip()
            if None in row or None in row.values() or not prompt:
                raise _LineError(
                    table.line_num,
                    f"the row must have a prompt and the columns {', '.join(columns)}, no more: "
                    "put a prompt that holds the separator in double quotes",
                )
            yield Prompt(prompt, category=(row.get("Category") or "").strip())
    except csv.Error as error:
        raise _LineError(table.line_num, f"no table: {error}") from error


def _geneval(text: str) -> Iterator[Prompt]:
    for number, line in _lines(text):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise _LineError(number, f"not JSON: {error}. Each line must be one object") from error
        fault = _entry_fault(entry)
        if fault:
            raise _LineError(number, f"{fault}; GenEval's evaluation_metadata.jsonl is the model")
        truth = {name: entry[name] for name in ("include", "exclude") if name in entry}
        yield Prompt(entry["prompt"], category=entry["tag"], truth=truth)


def _entry_fault(entry: Any) -> str:
    if not isinstance(entry, dict):
        return "the line must be an object with tag, include and prompt"
    for name in ("tag", "prompt"):
        if not isinstance(entry.get(name), str) or not entry[name].strip():
            return f"{name} is {entry.get(name)!r}, and must be text"
    for name in ("include", "exclude"):
        clauses = entry.get(name, [])
        if not isinstance(clauses, list) or (name == "include" and not clauses):
            return f"{name} is {clauses!r}, and must be a list of objects with class and count"
        for place, clause in enumerate(clauses):
            fault = _clause_fault(clause, place)
            if fault:
                return f"{name}[{place}]: {fault}"
    return ""


def _clause_fault(clause: Any, place: int) -> str:
    if not isinstance(clause, dict):
        return f"{clause!r} must be an object with class and count"
    if clause.get("class") not in CLASSES:
        return f"class is {clause.get('class')!r}, and must be one of GenEval's 80 (COCO's)"
    count = clause.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        return f"count is {count!r}, and must be 1 or more"
    if "color" in clause and clause["color"] not in COLORS:
        return f"color is {clause['color']!r}, and must be one of {', '.join(COLORS)}"
    if "position" in clause:
        match clause["position"]:
            case [str(relation), int(other)] if relation in RELATIONS and 0 <= other < place:
                pass
            case other:
                return (
                    f"position is {other!r}, and must be one of {', '.join(RELATIONS)} and the "
                    "place of an earlier object in include"
                )
    return ""


_READERS: dict[str, Callable[[str], Iterator[Prompt]]] = {
    "geneval": _geneval,
    "ocr": _ocr,
    "drawbench": _drawbench,
    "handwriting": _handwriting,
    "pickscore": _plain,
    "lines": _plain,
}
KINDS = tuple(_READERS)
