"""Reading and judging pages: real ones pass, wrong ones fail for the right reason."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from soar_mega.data.tiny import digits, pages
from soar_mega.evaluation.handwriting.frechet import feature_spaces, frechet_distance
from soar_mega.evaluation.handwriting.reader import Reading, read_pages
from soar_mega.evaluation.handwriting.scorers import HandwritingFrechet, HandwritingScorer
from soar_mega.evaluation.handwriting.verify import verify
from soar_mega.evaluation.interface import Prompt

COUNT = 160


def drawn(some: list[pages.Page], role: digits.ScanRole, seed: int = 1, *, raw: bool = False):  # type: ignore[no-untyped-def]
    scans = digits.load_scans(role)
    return [Image.fromarray(p) for p in pages.draw_pages(some, scans, seed, raw=raw)]


PAGES = pages.make_pages(COUNT, 7, held_out=True)
PROMPTS = [Prompt(page.caption, page.kind) for page in PAGES]


def test_held_out_scans_are_read_nearly_always_and_colours_always() -> None:
    verdicts = HandwritingScorer().score(drawn(PAGES, "held_out"), PROMPTS)
    shares = {key: float(np.mean([v[key] for v in verdicts])) for key in verdicts[0]}
    assert shares["correct"] == shares["digits"] > 0.88  # 94 %: 98.3 % of the digits
    assert shares["ink"] == shares["count"] == shares["paper"] == 1


def test_wrong_captions_are_found() -> None:
    """A picture of one page judged by the caption of another of its kind."""
    shifted = PROMPTS[4:] + PROMPTS[:4]
    verdicts = HandwritingScorer().score(drawn(PAGES, "generator"), shifted)
    assert np.mean([v["correct"] for v in verdicts]) < 0.02
    assert 0.1 < np.mean([v["paper"] for v in verdicts]) < 0.4


def reading(page: pages.Page, **changes: object) -> Reading:
    marks = tuple(
        replace(mark, cell=number if mark.cell is None else mark.cell)
        for number, mark in enumerate(page.marks)
    )
    whole = Reading(marks, page.paper, np.zeros((0, 64)))
    return replace(whole, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("page", PAGES[:16], ids=lambda page: page.caption)
def test_each_rule_sees_its_own_fault(page: pages.Page) -> None:
    right = reading(page)
    assert set(verify(page, right).values()) == {1.0}
    first, *rest = right.marks
    other_ink = replace(first, ink=next(i for i in digits.INKS if i != first.ink))
    other_digit = replace(first, digit=(first.digit + 1) % 10)
    free = next(cell for cell in range(16) if cell not in {mark.cell for mark in right.marks})
    cases = {
        "paper": reading(page, paper=next(p for p in digits.PAPERS if p != page.paper)),
        "ink": reading(page, marks=(other_ink, *rest)),
        "count": reading(page, marks=(*right.marks, replace(first, cell=free))),
    }
    for rule, wrong in cases.items():
        verdict = verify(page, wrong)
        assert verdict[rule] == verdict["correct"] == 0, rule
    wrong = verify(page, reading(page, marks=(other_digit, *rest)))
    assert (wrong["correct"], wrong["digits"], wrong["ink"], wrong["count"]) == (0, 0, 1, 1)
    moved = verify(page, reading(page, marks=(replace(first, cell=free), *rest)))
    assert moved["correct"] == (page.kind != "position") and moved["digits"] == 1
    assert verify(page, reading(page, marks=()))["correct"] == 0


def test_inks_must_belong_to_their_digits() -> None:
    page = pages.parse_caption("red 3 blue 5 on white")
    three, five = reading(page).marks
    swapped = (replace(three, ink="blue"), replace(five, ink="red"))
    verdict = verify(page, reading(page, marks=swapped))
    assert verdict == {"correct": 0, "digits": 1, "ink": 1, "count": 1, "paper": 1}


def test_a_number_is_read_in_order() -> None:
    page = pages.parse_caption("red 407 on white")
    a, b, c = page.marks
    turned = (replace(a, digit=7), b, replace(c, digit=4))
    assert verify(page, reading(page, marks=turned))["correct"] == 0


def test_blank_and_noisy_pictures_are_nothing_right() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    blank = np.full((64, 64, 3), 255, np.uint8)
    for verdict in HandwritingScorer().score(
        [Image.fromarray(noise), Image.fromarray(blank)], PROMPTS[:2]
    ):
        assert verdict["correct"] == 0
    with pytest.raises(ValueError, match="64x64"):
        read_pages([Image.new("RGB", (32, 32))])


def test_a_picture_is_judged_alone() -> None:
    pictures = drawn(PAGES[:12], "held_out")
    together = HandwritingScorer().score(pictures, PROMPTS[:12])
    alone = [
        HandwritingScorer().score([picture], [prompt])[0]
        for picture, prompt in zip(pictures, PROMPTS[:12], strict=True)
    ]
    assert together == alone


def test_frechet_distance_of_known_gaussians() -> None:
    rng = np.random.default_rng(0)
    scale = np.array([1.0, 2.0, 3.0])
    first, second = rng.normal(size=(2, 40000, 3))
    assert abs(frechet_distance(first, first)) < 1e-9
    expected = 4.0 + ((scale - 1) ** 2).sum()
    shift = np.array([0.0, 2.0, 0.0])
    assert frechet_distance(first, second * scale + shift) == pytest.approx(expected, rel=0.02)
    with pytest.raises(ValueError, match="at least two"):
        frechet_distance(first[:1], second)


def test_other_hands_are_near_and_damage_is_far() -> None:
    score = HandwritingFrechet().score_set
    near = score(drawn(PAGES, "generator"), PROMPTS)
    # Heavy blur: strokes run together.
    blurred = [
        p.resize((16, 16), Image.Resampling.BOX).resize((64, 64)) for p in drawn(PAGES, "generator")
    ]
    far = score(blurred, PROMPTS)
    assert near.keys() == far.keys() == {"pixels", "reader"}
    for space in near:
        assert 0 < near[space] < far[space] / 4, space
    nothing = score([Image.new("RGB", (64, 64), "white")] * 2, PROMPTS[:2])
    assert np.isnan(nothing["pixels"])


def test_feature_spaces_have_one_row_a_digit() -> None:
    features = read_pages(drawn(PAGES[:4], "held_out"))[0].features_NF
    spaces = feature_spaces(features)
    assert spaces["pixels"].shape == (len(PAGES[0].marks), 64)
    assert spaces["reader"].shape == (len(PAGES[0].marks), 10)
