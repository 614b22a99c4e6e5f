"""The folder of a model's pictures: what is there is kept, what is missing is drawn.

``<out>/pictures/<label>/drawn.json`` says what the pictures follow from; a folder that says
something else is refused. Every file appears whole, by a rename, so a drawing that was killed goes
on with what is missing.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from PIL import Image

from soar_mega.checkpoint.agree import gather, on_rank_0
from soar_mega.config import ConfigError
from soar_mega.evaluation.painter import Painter
from soar_mega.evaluation.plan import Chunk, Plan
from soar_mega.parallel.mesh import Mesh
from soar_mega.telemetry.files import write_whole

# How long a file that another machine wrote may take to show up here (NFS caches listings).
_PATIENCE_S = 20.0
_MANIFEST = "drawn.json"


@dataclass(frozen=True)
class Gallery:
    """One model's folder.

    Attributes:
        out: Folder of the evaluation.
        label: Of the model.
    """

    out: Path
    label: str

    @property
    def folder(self) -> Path:
        """Where the pictures lie."""
        return self.out / "pictures" / self.label

    def file(self, picture: tuple[int, int]) -> Path:
        """The file of (prompt, repeat)."""
        return self.folder / f"{picture[0]:05d}_{picture[1]}.png"

    def relative(self, picture: tuple[int, int]) -> str:
        """The same, from ``out``."""
        return self.file(picture).relative_to(self.out).as_posix()

    def open(self, picture: tuple[int, int]) -> Image.Image:
        """RGB.

        Raises:
            OSError: The file does not show up, or is damaged.
        """
        path, until = self.file(picture), time.monotonic() + _PATIENCE_S
        while not path.exists() and time.monotonic() < until:
            time.sleep(0.2)
        with Image.open(path) as image:
            return image.convert("RGB")

    def save(self, picture: tuple[int, int], image: Image.Image) -> None:
        """Write the file, whole or not at all.

        Raises:
            OSError: The disk is full or the folder cannot be written.
        """
        data, path = io.BytesIO(), self.file(picture)
        image.save(data, "PNG")
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(data.getvalue())
        os.replace(partial, path)

    def claim(self, drawn_from: Mapping[str, Any]) -> str | None:
        """Make the folder one of pictures that follow from this; what speaks against it, if it is
        another's already.

        Raises:
            OSError: It cannot be written.
        """
        file = self.folder / _MANIFEST
        self.folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            if any(self.folder.glob("*.png")):
                return (
                    f"{self.folder} holds pictures, but no {_MANIFEST} that says of what: " + _FIX
                )
            write_whole(file, json.dumps(drawn_from, indent=1) + "\n")
            return None
        try:
            before = json.loads(file.read_text())
            other = [
                f"{key} {_shown(before.get(key))}, now {_shown(value)}"
                for key, value in drawn_from.items()
                if before.get(key) != value
            ]
        except (ValueError, AttributeError) as error:
            return f"{file} is damaged ({error}): {_FIX}"
        if other:
            return f"{self.folder} holds pictures of other settings ({'; '.join(other)}): {_FIX}"
        return None

    def missing(self, chunks: Sequence[Chunk]) -> list[int]:
        """Numbers of the chunks of which not all pictures are there."""
        there = {entry.name for entry in os.scandir(self.folder)}
        return [
            number
            for number, chunk in enumerate(chunks)
            if any(self.file(picture).name not in there for picture in chunk.pictures)
        ]


_FIX = "choose another --out or label, or remove that folder"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 400 else text[:397] + "..."


class Pictures(Sequence[Image.Image]):
    """Pictures of a gallery, opened when they are looked at."""

    def __init__(self, gallery: Gallery, pictures: Sequence[tuple[int, int]]) -> None:
        self._gallery, self._pictures = gallery, pictures

    def __len__(self) -> int:
        return len(self._pictures)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> Pictures: ...
    def __getitem__(self, index: int | slice) -> Image.Image | Pictures:
        if isinstance(index, slice):
            return Pictures(self._gallery, self._pictures[index])
        return self._gallery.open(self._pictures[index])


@dataclass(frozen=True)
class Drawn:
    """What a drawing took.

    Attributes:
        pictures: New ones, over all processes.
        kept: Those that were there.
        seconds: On rank 0, without loading the model.
    """

    pictures: int
    kept: int
    seconds: float


def draw_missing(
    plan: Plan,
    gallery: Gallery,
    drawn_from: Mapping[str, Any],
    make_painter: Callable[[], Painter],
    mesh: Mesh,
    tell: Callable[[str], None],
) -> Drawn:
    """Draw what is missing in the gallery; every rank calls it.

    Chunk k is the work of data rank k modulo their number. The composition of a chunk follows from
    the plan alone, so the pictures are the same for any number of data ranks.

    Args:
        plan: The same on every rank.
        gallery: On storage that all ranks share.
        drawn_from: What its pictures follow from.
        make_painter: Loads the model, where anything is missing.
        mesh: This process.
        tell: Takes lines for a person, on rank 0.

    Raises:
        ConfigError: On every rank: the folder holds other pictures.
        OSError: A picture cannot be written.
    """
    chunks = plan.chunks()

    def look() -> tuple[str | None, list[int]]:
        problem = gallery.claim(drawn_from)
        return problem, [] if problem else gallery.missing(chunks)

    problem, missing = on_rank_0(mesh, look, f"--out = {gallery.out} cannot be used")
    if problem is not None:
        raise ConfigError(f"--out = {gallery.out}: {problem}")
    total = sum(len(chunk.prompts) for chunk in chunks)
    left = sum(len(chunks[number].prompts) for number in missing)
    if not missing:
        tell(f"{gallery.label}: all {total} pictures are there")
        return Drawn(0, total, 0.0)
    tell(f"{gallery.label}: {left} of {total} pictures to draw")
    painter = make_painter()
    began, done = time.monotonic(), 0
    own = [chunks[number] for number in missing if number % mesh.data_size == mesh.data_rank]
    # As many at once as there are pipeline ranks, so that all of them have something to do.
    for start in range(0, len(own), mesh.pipeline_size):
        part = own[start : start + mesh.pipeline_size]
        drawn = painter.draw([plan.batch(chunk) for chunk in part])
        for chunk, images in zip(part, drawn, strict=True):
            if images:
                _save_new(gallery, chunk, images)
            done += len(images)
        tell(
            f"{gallery.label}: {done} pictures drawn by this process, "
            f"{(time.monotonic() - began) / max(done, 1):.2f} s each"
        )
    gather(None, mesh)  # all pictures are there
    return Drawn(left, total - left, time.monotonic() - began)


def _save_new(gallery: Gallery, chunk: Chunk, images: Sequence[Image.Image]) -> None:
    """A picture that was there is left alone: somebody may be looking at it."""
    for picture, image in zip(chunk.pictures, images, strict=True):
        if not gallery.file(picture).exists():
            gallery.save(picture, image)
