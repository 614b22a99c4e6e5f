"""Reads the digit pictures of the tiny pipeline and compares them with their captions."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from soar_mega.data.tiny.digits import Scene, parse_caption
from soar_mega.evaluation.digits import Reading, load_reader
from soar_mega.evaluation.interface import Prompt


class DigitScorer:
    """What a classifier of real scans reads in 64 px pictures; prompts are captions of scenes."""

    name = "digits"
    citation = (
        "support vector machine on scans of the UCI handwritten digits (Alpaydin and Kaynak, 1998) "
        "that no generated picture was trained on"
    )

    def __init__(self) -> None:
        self._reader = load_reader()

    def score(
        self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]
    ) -> list[dict[str, float]]:
        """``number``, ``ink``, ``paper`` and ``position``: 1 where it is what the caption says.

        Raises:
            ValueError: A prompt is no caption of a scene, or a picture has another size.
        """
        scenes = [parse_caption(prompt.text) for prompt in prompts]
        readings = self._reader.read(pictures)
        return [_compare(*pair) for pair in zip(readings, scenes, strict=True)]


def _compare(reading: Reading, scene: Scene) -> dict[str, float]:
    names = ("number", "ink", "paper", "position")
    return {name: float(getattr(reading, name) == getattr(scene, name)) for name in names}
