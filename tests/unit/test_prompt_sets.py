"""Prompt sets as published, and what a broken one is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from soar_mega.evaluation.interface import Prompt
from soar_mega.evaluation.prompt_sets import KINDS, PromptError, read_prompts
from soar_mega.evaluation.scorers.geneval_words import CLASSES

GENEVAL: list[dict[str, Any]] = [
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
    {
        "tag": "position",
        "include": [
            {"class": "teddy bear", "count": 1},
            {"class": "dog", "count": 1, "position": ["right of", 0]},
        ],
        "prompt": "a photo of a dog right of a teddy bear",
    },
    {
        "tag": "colors",
        "include": [{"class": "tv remote", "count": 1, "color": "pink"}],
        "prompt": "a photo of a pink tv remote",
    },
]


def write(folder: Path, text: str | bytes, name: str = "prompts") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_geneval(tmp_path: Path) -> None:
    lines = "".join(json.dumps(entry) + "\n" for entry in GENEVAL)
    prompts = read_prompts(write(tmp_path, lines), "geneval")
    assert [prompt.category for prompt in prompts] == ["counting", "position", "colors"]
    assert prompts[0] == Prompt(
        "a photo of two clocks",
        "counting",
        {"include": GENEVAL[0]["include"], "exclude": GENEVAL[0]["exclude"]},
    )
    assert prompts[1].truth == {"include": GENEVAL[1]["include"]}


def test_genevals_classes_are_cocos() -> None:
    assert len(set(CLASSES)) == len(CLASSES) == 80
    # COCO's places of what GenEval renames and of the last class.
    names = {64: "computer mouse", 65: "tv remote", 66: "computer keyboard", 79: "toothbrush"}
    assert {place: CLASSES[place] for place in names} == names


def test_ocr_takes_the_first_quoted_text(tmp_path: Path) -> None:
    text = 'A wall with "Art Is Free" and "no".\na mug: "Hi"\n\n'
    prompts = read_prompts(write(tmp_path, text), "ocr")
    assert [prompt.truth["text"] for prompt in prompts] == ["Art Is Free", "Hi"]
    assert prompts[0].text == 'A wall with "Art Is Free" and "no".'


@pytest.mark.parametrize("separator", ["\t", ","])
def test_drawbench_tables(tmp_path: Path, separator: str) -> None:
    rows = [
        ("Prompts", "Category"),
        ("A red car.", "Colors"),
        ('"One cat, two dogs"', "Counting"),
    ]
    text = "\ufeff" + "\r\n".join(separator.join(row) for row in rows) + "\r\n"
    prompts = read_prompts(write(tmp_path, text), "drawbench")
    assert prompts == [Prompt("A red car.", "Colors"), Prompt("One cat, two dogs", "Counting")]


@pytest.mark.parametrize("kind", ["drawbench", "pickscore", "lines"])
def test_plain_lines(tmp_path: Path, kind: str) -> None:
    prompts = read_prompts(write(tmp_path, "a cat, sitting\n a dog \n"), kind)
    assert prompts == [Prompt("a cat, sitting"), Prompt("a dog")]


def broken(**changes: Any) -> str:
    entry = json.loads(json.dumps(GENEVAL[1]))
    for path, value in changes.items():
        if path in entry:
            entry[path] = value
        else:
            entry["include"][1][path] = value
    return json.dumps(GENEVAL[0]) + "\n" + json.dumps(entry) + "\n"


@pytest.mark.parametrize(
    ("kind", "text", "told"),
    [
        ("geneval", json.dumps(GENEVAL[0]) + "\n{", ["line 2", "not JSON"]),
        ("geneval", broken(tag=""), ["line 2", "tag is ''"]),
        ("geneval", broken(include=[]), ["line 2", "include is []", "class and count"]),
        ("geneval", broken(**{"class": "mouse"}), ["line 2", "include[1]", "'mouse'", "80"]),
        ("geneval", broken(count=0), ["line 2", "count is 0", "1 or more"]),
        ("geneval", broken(color="mauve"), ["line 2", "'mauve'", "red, orange"]),
        ("geneval", broken(position=["near", 0]), ["line 2", "'near'", "left of"]),
        ("geneval", broken(position=["above", 1]), ["line 2", "earlier object"]),
        ("ocr", 'a "b"\na sign\n', ["line 2", "double quotes", '"OPEN"']),
        ("ocr", 'a ""', ["line 1", "double quotes"]),
        ("lines", "a\n\nb\n", ["line 2", "empty", "remove it"]),
        ("lines", b"a\nb\xff\n", ["line 2", "UTF-8"]),
        ("lines", "\n \n", ["is empty"]),
        (
            "drawbench",
            "Prompts,Category\na cat, red,Colors\n",
            ["line 2", "Prompts, Category, no more", "quotes"],
        ),
        ("drawbench", "Prompts\tCategory\n\tColors\n", ["line 2", "must have a prompt"]),
        ("drawbench", "Prompt,Category\na,b\n", ["line 1", "'Prompts'"]),
        ("tables", "a", ["'tables'", *KINDS]),
    ],
)
def test_broken_sets_are_told_where_and_why(
    tmp_path: Path, kind: str, text: str | bytes, told: list[str]
) -> None:
    with pytest.raises(PromptError) as caught:
        read_prompts(write(tmp_path, text), kind)
    for part in told:
        assert part in str(caught.value)
    if kind in KINDS:
        assert str(tmp_path / "prompts") in str(caught.value)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"absent\.txt cannot be read: No such file"):
        read_prompts(tmp_path / "absent.txt", "lines")


def test_captions_of_pages_have_their_kind(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("red 40718 on white\nfive red 3 on pink\n")
    found = read_prompts(path, "handwriting")
    assert [(p.text, p.category) for p in found] == [
        ("red 40718 on white", "number"),
        ("five red 3 on pink", "count"),
    ]
    path.write_text("red 40718 on white\na cat\n")
    with pytest.raises(PromptError, match="line 2: Not a caption of a page"):
        read_prompts(path, "handwriting")
