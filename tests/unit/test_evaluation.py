"""The digit reader reads real pictures, does not read what is not there, and reports faithfully."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from soar_mega.data.tiny import digits
from soar_mega.evaluation.digits import DigitReader, Reading, load_reader, score_readings
from soar_mega.evaluation.report import picture_grid, table, write_report

ATTRIBUTES = ("count_accuracy", "ink_accuracy", "paper_accuracy", "position_accuracy")


@pytest.fixture(scope="module")
def reader() -> DigitReader:
    return load_reader()


def held_out(count: int, seed: int = 5) -> tuple[list[digits.Scene], np.ndarray]:
    scenes = digits.held_out_scenes(count, seed)
    return scenes, digits.draw_many(scenes, digits.load_scans("held_out"), seed)


def test_unseen_handwriting_is_read(reader: DigitReader) -> None:
    scenes, pictures = held_out(200)
    scores = reader.score(list(pictures), scenes)
    assert scores["per_digit_accuracy"] >= 0.95
    assert scores["exact_number_accuracy"] >= 0.9
    assert all(scores[name] >= 0.995 for name in ATTRIBUTES)
    assert scores["pictures"] == 200
    assert scores["digits"] == sum(len(scene.number) for scene in scenes)


def test_one_digit_pictures_and_pil_images_are_read(reader: DigitReader) -> None:
    scenes = [scene for scene in digits.training_scenes(300, 8) if len(scene.number) == 1]
    pictures = digits.draw_many(scenes, digits.load_scans("held_out"), 8)
    images = [Image.fromarray(picture) for picture in pictures]
    scores = reader.score(images, scenes)
    assert scores["per_digit_accuracy"] >= 0.95
    assert all(scores[name] >= 0.995 for name in ATTRIBUTES)
    assert reader.read(images) == reader.read(list(pictures))


def test_small_flaws_are_forgiven(reader: DigitReader) -> None:
    scenes, pictures = held_out(100)
    rng = np.random.default_rng(0)
    noisy = (pictures + rng.normal(0, 15, pictures.shape)).clip(0, 255).astype(np.uint8)
    scores = reader.score(list(np.roll(noisy, 1, axis=1)), scenes)
    assert scores["per_digit_accuracy"] >= 0.9
    assert all(scores[name] >= 0.97 for name in ATTRIBUTES)


def test_pictures_of_other_scenes_score_at_chance(reader: DigitReader) -> None:
    _, pictures = held_out(300)
    scores = reader.score(list(pictures), digits.held_out_scenes(300, seed=6))
    assert scores["per_digit_accuracy"] < 0.25
    assert scores["exact_number_accuracy"] < 0.05
    assert scores["ink_accuracy"] < 0.4
    assert scores["position_accuracy"] < 0.45


@pytest.mark.parametrize("level", [0, 128, 255])
def test_nothing_is_read_from_a_blank_picture(reader: DigitReader, level: int) -> None:
    blank = np.full((64, 64, 3), level, np.uint8)
    (reading,) = reader.read([blank])
    assert (reading.number, reading.ink, reading.position) == ("", "", "")
    assert reading.paper == ("white" if level == 255 else "")
    assert reader.score([blank], digits.held_out_scenes(1, 0))["per_digit_accuracy"] == 0.0


def test_noise_is_not_read(reader: DigitReader) -> None:
    scenes = digits.held_out_scenes(64, 2)
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 64, 3), dtype=np.uint8)
    scores = reader.score(list(noise), scenes)
    assert scores["per_digit_accuracy"] < 0.25
    assert scores["exact_number_accuracy"] == 0.0
    assert scores["count_accuracy"] < 0.1
    assert scores["paper_accuracy"] < 0.1


def test_no_pictures_no_readings(reader: DigitReader) -> None:
    assert reader.read([]) == []


def test_another_size_is_refused(reader: DigitReader) -> None:
    with pytest.raises(ValueError, match=r"\(64, 64, 3\).*\(32, 32, 3\)"):
        reader.read([np.zeros((32, 32, 3), np.uint8)])


def test_scores_count_as_documented() -> None:
    scenes = [
        digits.Scene("123", "red", "white", "top left"),
        digits.Scene("45", "blue", "pink", "top right"),
    ]
    readings = [
        Reading("12", "red", "white", ""),  # One digit is missing: 2 of 3.
        Reading("455", "black", "pink", "top right"),  # One too many: 2 of 2, not exact.
    ]
    assert score_readings(readings, scenes) == {
        "per_digit_accuracy": 4 / 5,
        "exact_number_accuracy": 0.0,
        "count_accuracy": 0.0,
        "ink_accuracy": 0.5,
        "paper_accuracy": 1.0,
        "position_accuracy": 0.5,
        "pictures": 2,
        "digits": 5,
    }
    with pytest.raises(ValueError, match="1 pictures for 2 scenes"):
        score_readings(readings[:1], scenes)


def test_the_report_holds_scores_readings_and_a_grid(reader: DigitReader, tmp_path: Path) -> None:
    scenes, pictures = held_out(6)
    blank = np.full_like(pictures, 255)
    shown = {"before": list(blank), "after": list(pictures)}
    scores = write_report(tmp_path / "new", scenes, shown, reader, notes={"steps": 7})
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert report["scores"] == scores
    assert report["notes"] == {"steps": 7}
    assert report["pictures"][0]["asked_for"]["caption"] == scenes[0].caption
    assert report["pictures"][0]["before"]["number"] == ""
    assert report["pictures"][0]["after"]["paper"] == scenes[0].paper
    with Image.open(tmp_path / "new" / "before_after.png") as grid:
        assert grid.width > 6 * 128 and grid.height > 2 * 128
    text = table(scores)
    assert text.splitlines()[0].split() == ["before", "after"]
    assert "0.0 %" in text and "digits read right" in text
    assert len({len(line) for line in text.splitlines()}) == 1


def test_the_grid_marks_right_words_green_and_wrong_ones_red() -> None:
    scene = digits.Scene("12", "red", "white", "top left")
    picture = digits.draw_many([scene], digits.load_scans("held_out"), 0)[0]

    def colours(reading: Reading) -> set[tuple[int, ...]]:
        grid = picture_grid([scene], {"a": [picture]}, {"a": [reading]})
        verdict = np.asarray(grid)[-3 * 15 - 10 :]
        return {tuple(pixel) for pixel in verdict.reshape(-1, 3).tolist()}

    green, red = (0, 112, 48), (192, 16, 32)
    right = colours(Reading("12", "red", "white", "top left"))
    assert green in right and red not in right
    wrong = colours(Reading("13", "blue", "pink", "top right"))
    assert red in wrong
    with pytest.raises(ValueError, match="fewer pictures"):
        picture_grid([scene, scene], {"a": [picture]}, {"a": []})
