"""Digit pictures: captions, splits, determinism, and that a picture shows what its scene says."""

from __future__ import annotations

import numpy as np
import pytest

from soar_mega.data.tiny import digits


def test_a_caption_tells_the_whole_scene() -> None:
    scene = digits.Scene("374", "red", "yellow", "top left")
    assert scene.caption == "the number 374 in red ink on yellow paper, top left"
    for scene in digits.training_scenes(200, seed=1) + digits.held_out_scenes(200, seed=1):
        assert digits.parse_caption(scene.caption) == scene


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a cat",
        "the number 1234 in red ink on yellow paper, top left",
        "the number 12 in yellow ink on yellow paper, top left",
        "the number 12 in red ink on yellow paper, in the middle",
        "the number 12 in red ink on yellow paper, top left, twice",
    ],
)
def test_other_text_is_no_caption(caption: str) -> None:
    with pytest.raises(ValueError, match="Not a caption"):
        digits.parse_caption(caption)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("number", ("", "red", "white", "top left")),
        ("number", ("1234", "red", "white", "top left")),
        ("number", ("١٢", "red", "white", "top left")),
        ("ink", ("12", "white", "white", "top left")),
        ("paper", ("12", "red", "red", "top left")),
        ("position", ("12", "red", "white", "left")),
    ],
)
def test_a_wrong_scene_names_the_attribute(name: str, values: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=rf"Scene\.{name}="):
        digits.Scene(*values)


def test_scans_are_split_without_overlap_and_completely() -> None:
    roles: tuple[digits.ScanRole, ...] = ("generator", "reader", "held_out")
    indices = [digits.load_scans(role).indices_N for role in roles]
    together = np.concatenate(indices)
    assert len(together) == len(set(together.tolist())) == 1797
    assert [len(part) for part in indices] == [898, 720, 179]
    for role in roles:
        scans = digits.load_scans(role)
        assert all(len(of_digit) >= 15 for of_digit in scans.by_digit)
        for digit, of_digit in enumerate(scans.by_digit):
            assert (scans.labels_N[of_digit] == digit).all()


def test_the_same_handwriting_never_appears_in_two_roles() -> None:
    glyphs = {
        role: {glyph.tobytes() for glyph in digits.load_scans(role).glyphs_NGQ}
        for role in ("generator", "reader", "held_out")
    }
    assert not glyphs["generator"] & glyphs["reader"]
    assert not glyphs["generator"] & glyphs["held_out"]
    assert not glyphs["reader"] & glyphs["held_out"]


def test_numbers_are_split() -> None:
    trained = {scene.number for scene in digits.training_scenes(5000, seed=3)}
    held_out = {scene.number for scene in digits.held_out_scenes(2000, seed=3)}
    assert not trained & held_out
    assert held_out <= digits.held_out_numbers()
    assert {len(number) for number in trained} == {1, 2, 3}
    assert {len(number) for number in held_out} == {2, 3}
    assert set("".join(held_out)) == set("0123456789")
    shares = [sum(len(n) == length for n in digits.held_out_numbers()) for length in (2, 3)]
    assert shares == [18, 180]


def test_scenes_cover_every_attribute_and_follow_the_seed() -> None:
    scenes = digits.training_scenes(500, seed=0)
    assert {scene.ink for scene in scenes} == set(digits.INKS)
    assert {scene.paper for scene in scenes} == set(digits.PAPERS)
    assert {scene.position for scene in scenes} == set(digits.POSITIONS)
    assert scenes == digits.training_scenes(500, seed=0)
    assert scenes != digits.training_scenes(500, seed=1)
    assert digits.training_scenes(500, seed=[1, 2]) != digits.training_scenes(500, seed=[1, 3])


def test_drawing_follows_the_generator() -> None:
    scene, scans = digits.Scene("85", "blue", "pink", "bottom right"), digits.load_scans("reader")
    first, same, other = (
        digits.draw_array(scene, scans, np.random.default_rng(seed)) for seed in (0, 0, 1)
    )
    assert first.shape == (64, 64, 3) and first.dtype == np.uint8
    assert (first == same).all() and (first != other).any()
    picture = digits.draw(scene, scans, np.random.default_rng(0))
    assert picture.mode == "RGB" and picture.size == (64, 64)
    assert (np.asarray(picture) == first).all()
    many = digits.draw_many([scene, scene], scans, seed=4)
    assert many.shape == (2, 64, 64, 3)
    assert (many == digits.draw_many([scene, scene], scans, seed=4)).all()


@pytest.mark.parametrize("position", digits.POSITIONS)
@pytest.mark.parametrize("number", ["7", "20", "374"])
def test_ink_lies_where_the_scene_says(number: str, position: str) -> None:
    scene = digits.Scene(number, "black", "white", position)
    picture = digits.draw_array(scene, digits.load_scans("generator"), np.random.default_rng(5))
    has_ink = (picture != np.array(digits.PAPERS["white"])).any(-1)
    inked = {
        (row, column)
        for row in range(digits.GRID)
        for column in range(digits.GRID)
        if has_ink[16 * row : 16 * row + 16, 16 * column : 16 * column + 16].any()
    }
    assert inked == set(scene.cells())
    vertical, horizontal = position.split()
    assert {row for row, _ in inked} == {0 if vertical == "top" else 3}
    columns = [column for _, column in scene.cells()]
    assert columns == sorted(columns)
    assert (columns[0] == 0) if horizontal == "left" else (columns[-1] == 3)


def test_every_ink_is_readable_on_every_paper() -> None:
    def luminance(colour: tuple[int, int, int]) -> float:
        channels = [c / 255 for c in colour]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for paper in digits.PAPERS.values():
        for ink in digits.INKS.values():
            # WCAG's contrast ratio; 3 is its limit for large print.
            assert (luminance(paper) + 0.05) / (luminance(ink) + 0.05) > 3.0


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(ValueError, match="role='writer'"):
        digits.load_scans("writer")
