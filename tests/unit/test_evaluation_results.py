"""Means, intervals, tables and pages of an evaluation, from made-up scores."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from soar_mega.config import ConfigError
from soar_mega.evaluation.html_report import html_report
from soar_mega.evaluation.interface import Prompt
from soar_mega.evaluation.plan import cut, label_models
from soar_mega.evaluation.results import of_set, summarise
from soar_mega.evaluation.scoring import (
    ScoringError,
    parse_scorers,
    score_chunks,
    score_set,
    try_out,
)
from soar_mega.evaluation.sheet import contact_sheet
from soar_mega.evaluation.table import cell, table
from soar_mega.parallel.mesh import Mesh


def scores_of(
    values: list[list[float]], metric: str = "m"
) -> dict[tuple[int, int], dict[str, float]]:
    """One list a prompt, of one value a picture."""
    return {(n, r): {metric: v} for n, row in enumerate(values) for r, v in enumerate(row)}


def overall(values: list[list[float]], **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = summarise(scores_of(values), [""] * len(values), **more)["m"]["overall"]
    return found


def test_mean_and_counts() -> None:
    found = overall([[1, 0], [1, 1], [0, 0]])
    assert found["value"] == 0.5 and (found["prompts"], found["pictures"]) == (3, 6)
    assert found["low"] <= 0.5 <= found["high"]


def test_the_interval_is_the_normal_one_for_many_prompts() -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(5, 2, 2000)
    found = overall([[v] for v in values.tolist()])
    half = 1.96 * values.std() / len(values) ** 0.5
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_more_pictures_of_a_prompt_narrow_nothing_if_they_agree() -> None:
    values = [[float(n % 3)] for n in range(60)]
    once, again = overall(values), overall([row * 4 for row in values])
    assert (again["low"], again["high"]) == (once["low"], once["high"])
    assert (again["prompts"], again["pictures"]) == (60, 240)


def test_the_interval_covers_the_truth() -> None:
    """19 of 20 times, about; prompts differ, and each has several pictures."""
    rng, covered = np.random.default_rng(7), 0
    for _ in range(200):
        chances = rng.uniform(size=40)
        found = overall([(rng.uniform(size=4) < p).astype(float).tolist() for p in chances])
        covered += found["low"] <= 0.5 <= found["high"]
    assert 0.88 <= covered / 200 <= 0.99


def test_all_or_nothing_has_wilsons_interval() -> None:
    found = overall([[1.0]] * 10)
    assert found["high"] == 1 and found["low"] == pytest.approx(0.7225, abs=1e-4)
    found = overall([[0.0, 0.0]] * 10)
    assert found["low"] == 0 and found["high"] == pytest.approx(0.2775, abs=1e-4)
    assert overall([[0.3, 0.4]])["low"] is None


def test_categories_and_their_mean() -> None:
    scores = scores_of([[1.0]] * 6 + [[0.0]] * 2)
    categories = ["many"] * 6 + ["few"] * 2
    plain = summarise(scores, categories)["m"]
    even = summarise(scores, categories, overall="categories")["m"]
    assert plain["overall"]["value"] == 0.75 and even["overall"]["value"] == 0.5
    assert even["categories"] == plain["categories"]
    assert {k: v["value"] for k, v in plain["categories"].items()} == {"many": 1.0, "few": 0.0}
    assert plain["categories"]["few"]["prompts"] == 2


def test_a_metric_that_some_pictures_lack() -> None:
    scores = scores_of([[1.0, 3.0], [5.0, 5.0]])
    del scores[1, 0]["m"], scores[1, 1]["m"]
    found = summarise(scores, ["a", "b"])["m"]
    assert found["overall"]["value"] == 2.0 and found["overall"]["prompts"] == 1
    assert list(found["categories"]) == ["a"]


def test_order_of_scores_and_draws_is_fixed() -> None:
    scores = scores_of([[0.1 * n, 1.0] for n in range(9)])
    backwards = dict(sorted(scores.items(), reverse=True))
    categories = list("abcabcabc")
    first = summarise(dict(sorted(backwards.items())), categories)
    assert json.dumps(first) == json.dumps(summarise(scores, categories))


# --- table, page, sheet ---------------------------------------------------------------------------

PROMPTS = [Prompt('a <b>"red"</b> fox & more', "colour"), Prompt("two cats " * 30, "count")]


def results() -> dict[str, Any]:
    scores = scores_of([[1.0], [0.0]], "correct")
    found = summarise(scores, [prompt.category for prompt in PROMPTS])
    distance = of_set({"fid": 123.456, "none": float("nan")}, 2, 2)
    return {
        "prompts": {"file": "prompts.txt"},
        "settings": {"steps": 2},
        "models": {"sft": {"given": "runs/sft", "step": 3, "size": 64}, "so&ar": {"given": "x"}},
        "scorers": {
            "judge": {"citation": "A & B", "models": {"sft": found, "so&ar": found}},
            "fid": {
                "citation": "C",
                "models": {"sft": distance, "so&ar": {}},
            },
        },
    }


def test_table() -> None:
    lines = table(results()).splitlines()
    assert lines[0].split() == ["sft", "so&ar"]
    assert lines[1].startswith("judge/correct  0.500 [0.000, 1.000]")
    assert [line.split()[0] for line in lines[2:]] == ["colour", "count", "fid/fid", "fid/none"]
    assert lines[4].split() == ["fid/fid", "123.5", "-"]
    assert lines[5].split() == ["fid/none", "-", "-"]
    assert len({len(line) for line in lines}) == 1
    assert cell(None) == "-"


class Page(HTMLParser):
    """Open tags, sources of pictures, and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.sources += [value or "" for name, value in attrs if name == "src"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page() -> None:
    page = Page()
    page.feed(
        html_report(
            results(),
            PROMPTS,
            2,
            lambda label, picture: f"pictures/{label}/{picture[0]}_{picture[1]}.png",
            lambda label, picture: {"judge/correct": 0.5},
        )
    )
    assert not page.open and not page.tags & {"script", "link"}
    assert PROMPTS[0].text in page.text and "judge/correct 0.5" in page.text
    assert "A & B" in page.text and "0.500 [0.000, 1.000]" in page.text
    assert len(page.sources) == 2 * 2 * 2
    assert page.sources[0] == "pictures/sft/0_0.png" and "pictures/so%26ar/1_1.png" in page.sources


def test_sheet_of_any_size_and_text() -> None:
    def picture(label: str, which: tuple[int, int]) -> Image.Image:
        return Image.new("RGB", (300, 20) if label == "a" else (64, 64), "red")

    sheet = contact_sheet(
        [*PROMPTS, Prompt("x" * 500)],
        ["a", "b" * 200],
        picture,
        lambda label, which: {f"metric{n}": 1.0 for n in range(9)},
    )
    pixels = np.asarray(sheet)
    reds = (pixels == (255, 0, 0)).all(-1).sum()
    assert reds == 3 * (254 * 17 + 254 * 254)  # a frame is drawn over their edges


# --- scorers --------------------------------------------------------------------------------------


class Judge:
    """Returns what it is made with."""

    name, citation = "judge", "nobody"

    def __init__(self, *values: float, error: Exception | None = None) -> None:
        self._values, self._error = values, error

    def score(self, pictures: list[Image.Image], prompts: list[Prompt]) -> list[dict[str, float]]:
        if self._error is not None:
            raise self._error
        return [{"m": value} for value in self._values]

    def score_set(self, pictures: Any, prompts: Any) -> dict[str, float]:
        return {"count": float(len(pictures))}


def blank(_: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", (8, 8))


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        (Judge(1.0), "1 scores for 2 pictures"),
        (Judge(1.0, float("nan")), "judge/m of a picture is nan"),
        (Judge(error=ValueError("no truth")), "no truth"),
        (Judge(error=RuntimeError("broken")), "RuntimeError"),
    ],
)
def test_a_scorer_that_fails(judge: Judge, words: str) -> None:
    with pytest.raises(ScoringError, match=words):
        score_chunks(judge, cut(2, 1, 2), PROMPTS, blank, lambda n: True, Mesh.single())


def test_what_a_scorer_cannot_judge_is_told_before() -> None:
    try_out([Judge(1.0, 2.0)], PROMPTS, 64, "--scorers")
    with pytest.raises(ConfigError, match=r"--scorers judge cannot judge 64 px .* no truth"):
        try_out([Judge(error=ValueError("no truth"))], PROMPTS, 64, "--scorers")


def test_scores_of_a_set() -> None:
    pictures = [blank((0, 0))] * 3
    assert score_set(Judge(), pictures, PROMPTS, Mesh.single()) == {"count": 3.0}
    with pytest.raises(ScoringError, match="at least two"):
        score_set(Judge(), pictures[:1], PROMPTS, Mesh.single())


def test_scorers_by_name() -> None:
    assert parse_scorers(["clip=a=b", "ocr"], "--scorers") == {"clip": "a=b", "ocr": None}
    for wrong in (["ocr", "ocr=x"], ["=x"]):
        with pytest.raises(ConfigError, match="--scorers"):
            parse_scorers(wrong, "--scorers")


# --- chunks and labels ----------------------------------------------------------------------------


def test_chunks_do_not_change_with_repeats_and_prompts() -> None:
    few, many = cut(8, 1, 4), cut(10, 2, 4)
    assert few == many[:2]
    assert sorted(p for chunk in many for p in chunk.pictures) == [
        (n, r) for n in range(10) for r in range(2)
    ]


def test_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    commit = "0" * 40
    given = ["runs/sft", "x=runs/soar", f"o/name@{commit}", "a=b", "r/checkpoints/step-00000003"]
    assert label_models(given) == {
        "sft": "runs/sft",
        "x": "runs/soar",
        "name": f"o/name@{commit}",
        "a_b": "a=b",
        "r-step-00000003": "r/checkpoints/step-00000003",
    }
    with pytest.raises(ConfigError, match="has the label sft, too"):
        label_models(["a/sft", "b/sft"])
    with pytest.raises(ConfigError, match="folder of pictures"):
        label_models([".hidden=x"])
