"""Files cut into pieces that travel one by one, and joined again.

Pieces lie in numbered folders, none above a size, so that each folder is one upload. Every folder
has the manifest of all: each file's name, size and sha256, and those of its pieces in order.
Nothing but Python is needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

MANIFEST = "manifest.json"
_BLOCK = 2**20


class PiecesError(Exception):
    """Pieces are missing or damaged; the message names them."""


@dataclass(frozen=True)
class Piece:
    """Part of a file, or all of it.

    Attributes:
        folder: Its number's folder, as ``03``.
        name: In it.
        bytes, sha256: Of the piece.
    """

    folder: str
    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Cut:
    """A file and its pieces in order."""

    name: str
    bytes: int
    sha256: str
    pieces: tuple[Piece, ...]


def cut(files: Iterable[Path], out: Path, piece_bytes: int) -> list[Cut]:
    """Cut files, in the order of their names, into folders of ``out``.

    Args:
        files: With names that differ.
        out: New or empty.
        piece_bytes: Of a folder's pieces together, at most.

    Raises:
        ValueError: A size below 1, a folder that is not empty, or a name that is there twice.
    """
    if piece_bytes < 1:
        raise ValueError(f"piece size = {piece_bytes} must be at least 1 byte")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} must be empty or not there: name another folder, or empty it")
    ordered = sorted(files, key=lambda path: path.name)
    if len({path.name for path in ordered}) < len(ordered):
        raise ValueError("two files have one name: pieces are told apart by it")
    filled: list[int] = []  # bytes of each folder
    found = []
    for path in ordered:
        data, pieces = path.read_bytes(), []
        parts = [data[at : at + piece_bytes] for at in range(0, len(data), piece_bytes)] or [b""]
        for number, part in enumerate(parts, 1):
            place = next((n for n, s in enumerate(filled) if s + len(part) <= piece_bytes), None)
            if place is None:
                place = len(filled)
                filled.append(0)
            filled[place] += len(part)
            name = path.name if len(parts) == 1 else f"{path.name}.{number:03d}-of-{len(parts):03d}"
            folder = out / f"{place + 1:02d}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(part)
            pieces.append(Piece(folder.name, name, len(part), hashlib.sha256(part).hexdigest()))
        found.append(Cut(path.name, len(data), hashlib.sha256(data).hexdigest(), tuple(pieces)))
    manifest = json.dumps({"files": [asdict(one) for one in found]}, indent=1) + "\n"
    for number in range(len(filled)):
        (out / f"{number + 1:02d}" / MANIFEST).write_text(manifest)
    return found


def read_manifest(folders: Sequence[Path]) -> list[Cut]:
    """Of what was cut, from any folder at or below ``folders``.

    Raises:
        PiecesError: There is none, or there are two that differ.
    """
    texts = {path.read_text(): path for root in folders for path in sorted(root.rglob(MANIFEST))}
    if len(texts) != 1:
        listed = ", ".join(str(path) for path in texts.values())
        raise PiecesError(
            f"manifests below {', '.join(map(str, folders))}: there must be one, or several alike; "
            + (f"these differ: {listed}: unpack what was packed at once" if texts else "none found")
        )
    try:
        files = json.loads(next(iter(texts)))["files"]
        return [Cut(**{**one, "pieces": tuple(Piece(**p) for p in one["pieces"])}) for one in files]
    except (ValueError, TypeError, KeyError) as error:
        path = next(iter(texts.values()))
        raise PiecesError(f"{path}: damaged ({error}): copy its folder again") from error


def join(
    folders: Sequence[Path], into: Path, *, partial: bool = False
) -> tuple[list[Path], list[str]]:
    """Join the files whose pieces are there.

    Args:
        folders: Where pieces are, at any depth.
        into: Where files go; made if missing.
        partial: Join what is whole and tell the rest, instead of refusing.

    Returns:
        The files, and in words what was missing or damaged.

    Raises:
        PiecesError: Something is, and ``partial`` is false; all of it is named.
    """
    cuts = read_manifest(folders)
    there: dict[str, list[Path]] = {}
    for root in folders:
        for path in sorted(root.rglob("*")):
            if path.is_file():
                there.setdefault(path.name, []).append(path)
    wrong = [text for one in cuts for text in _wrong_pieces(one, there)]
    if wrong and not partial:
        raise PiecesError(
            "\n".join(wrong) + "\ncopy the folders named here again, or go on with the files that "
            "are whole (--partial)"
        )
    into.mkdir(parents=True, exist_ok=True)
    made = []
    for one in cuts:
        if any(True for _ in _wrong_pieces(one, there)):
            continue
        if Path(one.name).name != one.name:
            raise PiecesError(f"manifest: file {one.name!r} must be a plain name")
        target = into / one.name
        with target.open("wb") as file:
            for piece in one.pieces:
                file.write(_good(piece, there).read_bytes())
        if _sha256(target) != one.sha256:
            target.unlink()
            wrong.append(f"{one.name}: its pieces are whole and it is not: pack it again")
            if not partial:
                raise PiecesError(wrong[-1])
            continue
        made.append(target)
    return made, wrong


def _wrong_pieces(one: Cut, there: Mapping[str, list[Path]]) -> Iterable[str]:
    for piece in one.pieces:
        where = f"{piece.folder}/{piece.name}"
        if piece.name not in there:
            yield f"missing: {where} ({piece.bytes} bytes of {one.name})"
        elif not any(_sha256(path) == piece.sha256 for path in there[piece.name]):
            sizes = ", ".join(f"{path.stat().st_size} bytes" for path in there[piece.name])
            yield f"damaged: {where} ({sizes}; it must have {piece.bytes} and another sha256)"


def _good(piece: Piece, there: Mapping[str, list[Path]]) -> Path:
    return next(path for path in there[piece.name] if _sha256(path) == piece.sha256)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
