"""GenEval: are the objects there that a prompt asks for, in number, colour and place?

Written from the definition (Ghosh et al. 2023) and its published numbers:
- A detector finds COCO's 80 classes. Detections count from confidence 0.3, in the category
  ``counting`` from 0.9; at most 16 a class, the most confident first. (The original has a
  suppression of overlaps, switched off by its own default; so it is here: ``max_overlap = 1``.)
- An object asked for with a count needs that many detections; colour and place are judged on the
  most confident ones. More than asked for is wrong only where a prompt excludes it, as ``counting``
  does.
- A colour is the one of ten that CLIP finds nearest to the detection's crop, all else grey.
- A is left of B if the offset of their boxes' centres, less a tenth of the boxes' summed sizes on
  each axis, points more than half leftward; all pairs must.

A picture is correct or not; a set's number is the mean of its six categories' means, not of its
pictures (0.63 for SD3.5-M).

What differs from the original: the detector is the authors' own Mask2Former Swin-S through
transformers, where GenEval takes mmdetection's retrained copy; CLIP ViT-L/14 runs through
transformers. Numbers can differ slightly; by how much is not measured.

Legend: D detections, C colours, E dimensions of the embedding, H/W the picture in px.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from soar_mega.evaluation.interface import Prompt
from soar_mega.evaluation.scorers.clip import Clip, each
from soar_mega.evaluation.scorers.geneval_detector import DETECTOR, Detection, Mask2Former
from soar_mega.evaluation.scorers.geneval_words import COLORS
from soar_mega.evaluation.scorers.weights import CLIP_L, Weights

_TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
_GREY = (0x99, 0x99, 0x99)


@dataclass(frozen=True)
class Rules:
    """GenEval's numbers.

    Attributes:
        confidence: Below or at it a detection does not count.
        counting_confidence: The same in the category ``counting``.
        max_objects: Detections kept a class, before overlaps are dropped.
        max_overlap: A detection whose box overlaps a more confident one of its class by this much
            (intersection over union) is dropped; 1: none is.
        position_margin: What part of the boxes' summed sizes an offset must exceed.
    """

    confidence: float = 0.3
    counting_confidence: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_margin: float = 0.1


class GenEval:
    """Metric ``correct``, 0 or 1.

    Args:
        detect: All detections in a picture.
        name_color: The colour of a detection of a class in a picture.
        rules: GenEval's numbers.
    """

    name = "geneval"
    citation = (
        "Ghosh et al. 2023, GenEval, arXiv 2310.11513; detector: Cheng et al. 2022, Mask2Former, "
        "arXiv 2112.01527, facebook/mask2former-swin-small-coco-instance; colours: "
        "openai/clip-vit-large-patch14"
    )
    overall: Literal["pictures", "categories"] = "categories"
    needs: tuple[Weights, ...] = (DETECTOR, CLIP_L)

    def __init__(
        self,
        detect: Callable[[Image.Image], list[Detection]],
        name_color: Callable[[Image.Image, Detection], str],
        rules: Rules | None = None,
    ) -> None:
        self._detect, self._name_color = detect, name_color
        self.rules = rules or Rules()

    @classmethod
    def load(cls, folders: Mapping[str, Path], device: torch.device | str) -> GenEval:
        """From the folders of ``needs`` by name."""
        detector = Mask2Former.load(folders[DETECTOR.name], device)
        return cls(detector, ColorNamer(Clip.load(folders[CLIP_L.name], device)))

    def score(
        self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]
    ) -> list[dict[str, float]]:
        """As ``Scorer.score``; ``Prompt.truth`` must have GenEval's ``include``."""
        for prompt in prompts:
            if not prompt.truth.get("include"):
                raise ValueError(
                    f"the prompt {prompt.text!r} says no objects: the scorer geneval needs a "
                    "prompt set of the kind geneval"
                )
        return each("correct", pictures, prompts, lambda p, q: float(not self.faults(p, q)))

    def faults(self, picture: Image.Image, prompt: Prompt) -> list[str]:
        """What is wrong with a picture, in words; nothing where it is correct."""
        picture = picture.convert("RGB")
        found = kept(self._detect(picture), self.rules, counting=prompt.category == "counting")
        faults: list[str] = []
        judged: list[list[Detection]] = []  # of each clause; empty where it failed
        for clause in prompt.truth["include"]:
            objects = found.get(clause["class"], [])[: clause["count"]]
            fault = self._fault(picture, clause, objects, judged)
            judged.append([] if fault else objects)
            faults += [fault] if fault else []
        for clause in prompt.truth.get("exclude", ()):
            number = len(found.get(clause["class"], []))
            if number >= clause["count"]:
                faults.append(f"{number} {clause['class']}, fewer than {clause['count']} wanted")
        return faults

    def _fault(
        self,
        picture: Image.Image,
        clause: Mapping[str, Any],
        objects: list[Detection],
        judged: list[list[Detection]],
    ) -> str:
        kind, count = clause["class"], clause["count"]
        if len(objects) < count:
            return f"{len(objects)} {kind}, {count} wanted"
        if "color" in clause:
            colors = [self._name_color(picture, one) for one in objects]
            if colors.count(clause["color"]) < count:
                return f"{kind} is {', '.join(colors)}, {clause['color']} wanted"
        if "position" in clause:
            relation, other = clause["position"]
            if not judged[other]:
                return f"nothing that {kind} could be {relation}"
            for one in objects:
                for target in judged[other]:
                    if relation not in relations(one.box, target.box, self.rules.position_margin):
                        return f"{kind} is not {relation} its target"
        return ""


def kept(
    detections: Sequence[Detection], rules: Rules, *, counting: bool
) -> dict[str, list[Detection]]:
    """The detections that count by class, the most confident first."""
    threshold = rules.counting_confidence if counting else rules.confidence
    by_class: dict[str, list[Detection]] = {}
    for one in sorted(detections, key=lambda d: -d.confidence):
        group = by_class.setdefault(one.label, [])
        if one.confidence > threshold and len(group) < rules.max_objects:
            group.append(one)
    for label, group in by_class.items():
        apart: list[Detection] = []
        for one in group:
            overlaps = (overlap(one.box, other.box) for other in apart)
            if rules.max_overlap >= 1 or all(part < rules.max_overlap for part in overlaps):
                apart.append(one)
        by_class[label] = apart
    return by_class


def overlap(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of boxes whose last pixels belong to them, as GenEval counts."""

    def area(left: float, top: float, right: float, bottom: float) -> float:
        return max(right - left + 1, 0.0) * max(bottom - top + 1, 0.0)

    low = [max(a, b) for a, b in zip(first[:2], second[:2], strict=True)]
    high = [min(a, b) for a, b in zip(first[2:], second[2:], strict=True)]
    shared = area(low[0], low[1], high[0], high[1])
    union = area(*first) + area(*second) - shared
    return shared / union if union else 0.0


def relations(first: Sequence[float], second: Sequence[float], margin: float) -> set[str]:
    """Where the first box lies relative to the second: one word, two at 45 degrees, or none."""
    one, other = np.array(first).reshape(2, 2), np.array(second).reshape(2, 2)
    offset = one.mean(0) - other.mean(0)
    slack = margin * (np.abs(one[1] - one[0]) + np.abs(other[1] - other[0]))
    beyond = np.maximum(np.abs(offset) - slack, 0.0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    right, down = beyond / np.linalg.norm(offset)
    held = {"left of": -right, "right of": right, "above": -down, "below": down}
    return {relation for relation, part in held.items() if part > 0.5}


class ColorNamer:
    """Which of ten colours CLIP finds nearest to a detection."""

    def __init__(self, clip: Clip) -> None:
        self._clip = clip
        self._texts_CE: dict[str, torch.Tensor] = {}

    def __call__(self, picture: Image.Image, detection: Detection) -> str:
        """The name of the colour."""
        mask = Image.fromarray(detection.mask_HW)
        alone = Image.composite(picture, Image.new("RGB", picture.size, _GREY), mask)
        left, top, right, bottom = detection.box
        crop_E = self._clip.picture(alone.crop((left, top, right, bottom)))
        return COLORS[int((self._texts(detection.label) @ crop_E).argmax())]

    def _texts(self, label: str) -> torch.Tensor:
        """(C, E): each colour's mean over the templates, of length 1."""
        if label not in self._texts_CE:
            means_CE = torch.stack(
                [
                    torch.stack([self._clip.text(t.format(c, label)) for t in _TEMPLATES]).mean(0)
                    for c in COLORS
                ]
            )
            self._texts_CE[label] = means_CE / means_CE.norm(dim=-1, keepdim=True)
        return self._texts_CE[label]
