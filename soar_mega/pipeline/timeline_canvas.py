"""Two things to draw on, SVG and PNG, behind one small interface. Lengths are in points."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol
from xml.sax.saxutils import escape

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Anchor = Literal["left", "middle", "right"]

# Mean width of a letter over its size, near enough for both canvases' fonts.
LETTER = 0.54


class Canvas(Protocol):
    """Draws shapes; y goes down, text is centred on its y."""

    def rect(self, x: float, y: float, width: float, height: float, fill: Colour) -> None:
        """A filled rectangle from its upper left corner."""

    def polygon(self, points: Sequence[tuple[float, float]], fill: Colour) -> None:
        """A filled polygon."""

    def line(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        """A line one point wide."""

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        colour: Colour,
        anchor: Anchor = "left",
    ) -> None:
        """A line of text."""

    def save(self, path: Path) -> None:
        """Write the file."""


class SvgCanvas:
    """Collects SVG elements.

    Args:
        width: Of the picture.
        height: Of the picture.
    """

    def __init__(self, width: float, height: float) -> None:
        self.elements = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_n(width)} {_n(height)}" '
            f'width="{_n(width)}" height="{_n(height)}" '
            'font-family="Helvetica, Arial, sans-serif" shape-rendering="crispEdges">',
            f'<rect width="{_n(width)}" height="{_n(height)}" fill="#ffffff"/>',
        ]

    def rect(self, x: float, y: float, width: float, height: float, fill: Colour) -> None:
        self.elements.append(
            f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" '
            f'fill="{_hex(fill)}"/>'
        )

    def polygon(self, points: Sequence[tuple[float, float]], fill: Colour) -> None:
        corners = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        self.elements.append(f'<polygon points="{corners}" fill="{_hex(fill)}"/>')

    def line(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        self.elements.append(
            f'<line x1="{_n(x0)}" y1="{_n(y0)}" x2="{_n(x1)}" y2="{_n(y1)}" '
            f'stroke="{_hex(colour)}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        colour: Colour,
        anchor: Anchor = "left",
    ) -> None:
        where = {"left": "start", "middle": "middle", "right": "end"}[anchor]
        # Not every viewer knows dominant-baseline: move the base line by hand.
        self.elements.append(
            f'<text x="{_n(x)}" y="{_n(y + 0.35 * size)}" font-size="{_n(size)}" '
            f'fill="{_hex(colour)}" text-anchor="{where}">{escape(text)}</text>'
        )

    def save(self, path: Path) -> None:
        path.write_text("\n".join([*self.elements, "</svg>\n"]), encoding="utf-8")


class PngCanvas:
    """Draws with Pillow.

    Args:
        width: Of the picture.
        height: Of the picture.
        scale: Pixels a point.
    """

    def __init__(self, width: float, height: float, scale: int = 2) -> None:
        self.scale = scale
        size = (round(width * scale), round(height * scale))
        self.image = Image.new("RGB", size, (255, 255, 255))
        self.draw = ImageDraw.Draw(self.image)
        self.fonts: dict[float, ImageFont.FreeTypeFont | ImageFont.ImageFont] = {}

    def rect(self, x: float, y: float, width: float, height: float, fill: Colour) -> None:
        left, top, right, bottom = (round(v * self.scale) for v in (x, y, x + width, y + height))
        # Pillow's corners are inclusive.
        self.draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), fill=fill)

    def polygon(self, points: Sequence[tuple[float, float]], fill: Colour) -> None:
        self.draw.polygon([(x * self.scale, y * self.scale) for x, y in points], fill=fill)

    def line(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        ends = tuple(v * self.scale for v in (x0, y0, x1, y1))
        self.draw.line(ends, fill=colour, width=self.scale)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        colour: Colour,
        anchor: Anchor = "left",
    ) -> None:
        if size not in self.fonts:
            self.fonts[size] = ImageFont.load_default(size * self.scale)
        where = {"left": "lm", "middle": "mm", "right": "rm"}[anchor]
        self.draw.text(
            (x * self.scale, y * self.scale), text, colour, self.fonts[size], anchor=where
        )

    def save(self, path: Path) -> None:
        self.image.save(path, optimize=True)


def make_canvas(path: Path, width: float, height: float) -> Canvas:
    """The canvas for a file's ending.

    Raises:
        ValueError: Neither ``.png`` nor ``.svg``.
    """
    if path.suffix == ".svg":
        return SvgCanvas(width, height)
    if path.suffix == ".png":
        return PngCanvas(width, height)
    raise ValueError(f"{path}: a picture's name must end in .png or .svg")


def mix(colour: Colour, other: Colour, share: float) -> Colour:
    """``share`` of ``other`` in ``colour``."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(colour, other, strict=True))
    return red, green, blue


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _hex(colour: Colour) -> str:
    return "#" + "".join(f"{part:02x}" for part in colour)
