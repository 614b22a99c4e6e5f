"""GenEval's rules on crafted detections, and its detector and colours through the real classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from soar_mega.evaluation.interface import Prompt
from soar_mega.evaluation.scorers.clip import Clip
from soar_mega.evaluation.scorers.geneval import ColorNamer, GenEval, Rules, overlap, relations
from soar_mega.evaluation.scorers.geneval_detector import Detection, Mask2Former, detections
from soar_mega.evaluation.scorers.geneval_words import COLORS
from soar_mega.evaluation.scorers.make import make_scorer
from soar_mega.evaluation.scorers.weights import ScorerError
from tests.tiny_scorers import clip_folder, detector_folder, noise

PICTURE = Image.new("RGB", (100, 100))


def seen(
    label: str, confidence: float = 0.95, box: Sequence[float] = (10, 10, 30, 30)
) -> Detection:
    left, top, right, bottom = map(int, box)
    mask = np.zeros((100, 100), bool)
    mask[top:bottom, left:right] = True
    return Detection(label, confidence, box, mask)


def asked(tag: str, *include: dict[str, Any], exclude: Sequence[dict[str, Any]] = ()) -> Prompt:
    return Prompt(f"a {tag}", tag, {"include": list(include), "exclude": list(exclude)})


def clause(kind: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": kind, "count": count, **more}


ONE = asked("single_object", clause("cat"))
TWO = asked("two_object", clause("cat"), clause("dog"))
THREE_CATS = asked("counting", clause("cat", 3), exclude=[clause("cat", 4)])
RED_CAR = asked("colors", clause("car", color="red"))
DOG_RIGHT_OF_CAT = asked("position", clause("cat"), clause("dog", position=["right of", 0]))
RED_CAR_BLUE_DOG = asked("color_attr", clause("car", color="red"), clause("dog", color="blue"))
LEFT, RIGHT, BELOW = (0, 40, 20, 60), (70, 40, 90, 60), (0, 75, 20, 95)
# In this test a detection's colour is written on its left edge: red from 0, blue from 50.
CASES: list[tuple[str, Prompt, list[Detection], bool]] = [
    ("one", ONE, [seen("cat", 0.31)], True),
    ("too unsure", ONE, [seen("cat", 0.3)], False),
    ("another", ONE, [seen("dog")], False),
    ("more do no harm", ONE, [seen("cat"), seen("cat"), seen("dog")], True),
    ("both", TWO, [seen("dog"), seen("cat")], True),
    ("one of two", TWO, [seen("dog")], False),
    ("three", THREE_CATS, [seen("cat", 0.91)] * 3, True),
    ("two", THREE_CATS, [seen("cat")] * 2, False),
    ("four", THREE_CATS, [seen("cat")] * 4, False),
    ("counting is stricter", THREE_CATS, [*[seen("cat")] * 3, seen("cat", 0.9)], True),
    ("and needs the sure", THREE_CATS, [*[seen("cat")] * 2, seen("cat", 0.9)], False),
    ("red", RED_CAR, [seen("car", box=LEFT)], True),
    ("blue", RED_CAR, [seen("car", box=RIGHT)], False),
    ("the surest counts", RED_CAR, [seen("car", 0.5, LEFT), seen("car", 0.9, RIGHT)], False),
    ("right of", DOG_RIGHT_OF_CAT, [seen("cat", box=LEFT), seen("dog", box=RIGHT)], True),
    ("left of", DOG_RIGHT_OF_CAT, [seen("cat", box=RIGHT), seen("dog", box=LEFT)], False),
    ("below", DOG_RIGHT_OF_CAT, [seen("cat", box=LEFT), seen("dog", box=BELOW)], False),
    ("the same place", DOG_RIGHT_OF_CAT, [seen("cat", box=LEFT), seen("dog", box=LEFT)], False),
    ("no target", DOG_RIGHT_OF_CAT, [seen("dog", box=RIGHT)], False),
    ("both colours", RED_CAR_BLUE_DOG, [seen("car", box=LEFT), seen("dog", box=RIGHT)], True),
    ("swapped", RED_CAR_BLUE_DOG, [seen("car", box=RIGHT), seen("dog", box=LEFT)], False),
    ("one colour", RED_CAR_BLUE_DOG, [seen("car", box=LEFT), seen("dog", box=LEFT)], False),
]


def scorer(found: list[Detection], rules: Rules | None = None) -> GenEval:
    return GenEval(
        lambda picture: found, lambda picture, d: "red" if d.box[0] < 50 else "blue", rules
    )


@pytest.mark.parametrize(
    ("prompt", "found", "correct"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_rules(prompt: Prompt, found: list[Detection], correct: bool) -> None:
    assert scorer(found).score([PICTURE], [prompt]) == [{"correct": float(correct)}]
    faults = scorer(found).faults(PICTURE, prompt)
    assert bool(faults) is not correct
    # The order in which a detector tells them plays no part.
    assert scorer(found[::-1]).score([PICTURE], [prompt]) == [{"correct": float(correct)}]


def test_faults_are_told_in_words() -> None:
    found = [seen("car", box=RIGHT), seen("dog", box=RIGHT)]
    assert scorer(found).faults(PICTURE, RED_CAR_BLUE_DOG) == ["car is blue, red wanted"]
    assert scorer([seen("cat")] * 4).faults(PICTURE, THREE_CATS) == ["4 cat, fewer than 4 wanted"]


def test_overlapping_detections_are_dropped_where_asked() -> None:
    found = [seen("cat", 0.99), seen("cat", 0.95, (11, 10, 31, 30)), seen("cat", 0.93, LEFT)]
    two = asked("counting", clause("cat", 2), exclude=[clause("cat", 3)])
    assert scorer(found).score([PICTURE], [two]) == [{"correct": 0.0}]  # the published default
    strict = Rules(max_overlap=0.5)
    assert scorer(found, strict).score([PICTURE], [two]) == [{"correct": 1.0}]


def test_at_most_sixteen_of_a_class() -> None:
    prompt = asked("counting", clause("cat", 16), exclude=[clause("cat", 17)])
    assert scorer([seen("cat")] * 20).score([PICTURE], [prompt]) == [{"correct": 1.0}]


def test_overlap_counts_the_last_pixel() -> None:
    assert overlap((0, 0, 9, 9), (0, 0, 9, 9)) == 1.0
    assert overlap((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(50 / 150)
    assert overlap((0, 0, 9, 9), (20, 20, 29, 29)) == 0.0


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ((60, 40, 80, 60), {"right of"}),
        ((20, 40, 40, 60), {"left of"}),
        ((40, 0, 60, 20), {"above"}),
        ((40, 80, 60, 100), {"below"}),
        ((80, 80, 100, 100), {"right of", "below"}),
        ((43, 40, 63, 60), set()),  # within a tenth of 20 + 20
        ((50, 40, 70, 60), {"right of"}),  # 6 of 10 lie beyond
        ((47, 40, 67, 60), set()),  # 3 of 7 do
    ],
)
def test_relations_to_a_box_in_the_middle(first: Any, expected: set[str]) -> None:
    assert relations(first, (40, 40, 60, 60), 0.1) == expected


def test_a_prompt_of_another_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'a cat' says no objects.*kind geneval"):
        scorer([]).score([PICTURE], [Prompt("a cat")])


def test_the_number_of_a_set_is_over_categories() -> None:
    assert GenEval.overall == "categories"


# --- the detector ------------------------------------------------------------------------------


def test_detections_from_crafted_outputs() -> None:
    logits = torch.full((2, 81), -20.0)
    logits[0, 15], logits[0, 80] = 0.0, 0.0  # a cat or nothing, evenly
    logits[1, 2] = 0.0  # a car for sure
    masks = torch.full((2, 16, 16), -8.0)
    masks[0, 4:8, 2:10] = 8.0
    masks[1, 10:12, 4:8] = 0.5
    found = detections(logits, masks, padded=(16, 16), resized=(12, 16), size=(24, 32))
    car, cat = found[:2]
    assert (car.label, cat.label) == ("car", "cat")
    # Twice the size. Bilinear edges lie between pixels; the car's faint mask shrinks.
    assert cat.box == (4, 8, 20, 16)
    assert car.box[1] >= 20
    assert cat.mask_HW.shape == (24, 32)
    assert 100 < cat.mask_HW.sum() <= 8 * 16  # bilinear corners are round
    assert 0.45 < cat.confidence < 0.5  # one half, times nearly 1
    assert 0.5 < car.confidence < torch.tensor(0.5).sigmoid()
    assert all(one.confidence < 1e-6 for one in found[2:])


def test_the_detector_through_its_real_class(tmp_path: Path) -> None:
    folder = tmp_path / "mask2former-swin-small-coco-instance"
    model = detector_folder(folder)
    picture = noise(1, 90, 60)
    small = Mask2Former.load(folder, "cpu", {"shortest_edge": 64, "longest_edge": 128})
    found = small(picture)
    # By hand: 90x60 becomes 96x64, then /255, ImageNet's colours; 64 and 96 divide by 32.
    resized = picture.resize((96, 64), Image.Resampling.BILINEAR)
    pixels = np.asarray(resized, np.float32) / 255
    pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        out = model(torch.from_numpy(pixels).float().permute(2, 0, 1)[None])
    likely = float(out.class_queries_logits[0].softmax(-1)[0, 15])
    by_hand = []
    for mask in out.masks_queries_logits[0]:
        big = torch.nn.functional.interpolate(mask[None, None], (64, 96), mode="bilinear")
        big = torch.nn.functional.interpolate(big, (60, 90), mode="bilinear")[0, 0]
        if (big > 0).any():
            rows, columns = (big > 0).nonzero(as_tuple=True)
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            by_hand.append((likely * float(big[big > 0].sigmoid().mean()), tuple(map(float, box))))
    cats = [(one.confidence, one.box) for one in found if one.label == "cat"]
    assert len(cats) == len(by_hand) > 0
    for (confidence, box), (expected, expected_box) in zip(
        sorted(cats), sorted(by_hand), strict=True
    ):
        assert confidence == pytest.approx(expected, abs=1e-4)
        assert np.allclose(box, expected_box, atol=1)


def test_a_file_from_before_the_backbones_last_norm_loads(tmp_path: Path) -> None:
    model = detector_folder(tmp_path)
    edges, picture = {"shortest_edge": 64, "longest_edge": 128}, noise(1, 90, 60)
    expected = Mask2Former.load(tmp_path, "cpu", edges)(picture)
    own = dict(model.named_parameters())
    norms = [name for name in own if name.endswith("encoder.swin.layernorm.weight")]
    with torch.no_grad():
        for name in norms:
            own[name].fill_(float("nan"))  # no output depends on it
    model.save_pretrained(tmp_path)
    found = Mask2Former.load(tmp_path, "cpu", edges)(picture)
    assert [one.confidence for one in found] == [one.confidence for one in expected]
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "swin.layernorm" not in name}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    found = Mask2Former.load(tmp_path, "cpu", edges)(picture)
    assert [one.confidence for one in found] == [one.confidence for one in expected]
    kept.popitem()
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ScorerError, match="lacks 1 tensors"):
        Mask2Former.load(tmp_path, "cpu", edges)


def test_a_detector_of_other_classes_is_refused(tmp_path: Path) -> None:
    detector_folder(tmp_path, classes=20)
    with pytest.raises(ScorerError, match="detects 20 classes, GenEval needs COCO's 80"):
        Mask2Former.load(tmp_path, "cpu")


def test_geneval_from_folders(tmp_path: Path) -> None:
    detector_folder(tmp_path / "mask2former-swin-small-coco-instance")
    clip_folder(tmp_path / "clip-vit-large-patch14")
    made = make_scorer("geneval", tmp_path)
    dog = asked("single_object", clause("dog"))
    assert made.score([noise(1)] * 2, [ONE, dog]) == [{"correct": 1.0}, {"correct": 0.0}]
    color = asked("colors", clause("cat", color="red"))
    assert made.score([noise(1)], [color])[0]["correct"] in (0.0, 1.0)


# --- colours -----------------------------------------------------------------------------------


class ByPixels:
    """Stands for CLIP: sees how red and how blue a crop is, grey left out."""

    def picture(self, picture: Image.Image) -> torch.Tensor:
        pixels = np.asarray(picture, np.float32).reshape(-1, 3)
        pixels = pixels[(pixels != 0x99).any(1)]
        mean = pixels.mean(0)
        return torch.from_numpy(mean[[0, 2]]) / 255

    def text(self, text: str) -> torch.Tensor:
        assert "cat" in text or "object" in text
        return torch.tensor([float(" red" in text), float(" blue" in text)]) + 1e-3


def test_a_colour_is_that_of_the_mask_alone() -> None:
    pixels = np.zeros((100, 100, 3), np.uint8)
    pixels[..., 2] = 255  # a blue picture
    pixels[40:60, 40:60] = (255, 0, 0)  # with a red thing in it
    thing = seen("cat", box=(40, 40, 60, 60))
    boxed = Detection("cat", 1.0, (10, 10, 90, 90), thing.mask_HW)
    name = ColorNamer(ByPixels())  # type: ignore[arg-type]
    assert name(Image.fromarray(pixels), thing) == "red"
    assert name(Image.fromarray(pixels), boxed) == "red"  # the rest of its box is grey
    everything = Detection("cat", 1.0, (10, 10, 90, 90), np.ones((100, 100), bool))
    assert name(Image.fromarray(pixels), everything) == "blue"


def test_colours_by_clip(tmp_path: Path) -> None:
    clip_folder(tmp_path)
    clip = Clip.load(tmp_path, "cpu")
    name, picture = ColorNamer(clip), noise(5, 100, 100)
    boxes = [(0, 0, 32, 32), (40, 8, 72, 40), (64, 64, 96, 96)]
    for box in boxes:
        crop = picture.crop(box)
        scores = []
        for color in COLORS:
            texts = [f"a photo of a {color} cat", f"a photo of a {color}-colored cat"]
            texts.append(f"a photo of a {color} object")
            mean = sum(clip.text(text) for text in texts)
            scores.append(float(clip.picture(crop) @ mean / mean.norm()))  # type: ignore[union-attr]
        assert name(picture, seen("cat", box=box)) == COLORS[int(np.argmax(scores))]
