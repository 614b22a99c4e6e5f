"""Lists what folders, tables and tars offer as samples, without opening a picture.

The order is fixed by the input alone: folders and tars by sorted path, rows and tar members as they
stand. Every file, row and key is listed, those that can be no sample with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from soar_mega.data.errors import DataError
from soar_mega.data.prepare.tables import TABLES, table_rows
from soar_mega.data.shards.patterns import find_shards
from soar_mega.data.shards.remote import is_remote
from soar_mega.data.shards.scan import CAPTION_EXTENSIONS, CUT, IMAGE_EXTENSIONS, scan_tar


@dataclass(frozen=True)
class Part:
    """``size`` bytes at ``offset`` of a file; ``extension`` tells a caption's kind."""

    path: str
    offset: int
    size: int
    extension: str


@dataclass(frozen=True)
class Candidate:
    """What may become a sample.

    Attributes:
        source: Its place in the input, for people: relative path, ``TABLE:LINE`` or ``TAR:KEY``.
        name: What its key is made from.
        image: Where its image lies.
        caption: Where its caption lies, or the caption.
        refused: Why it can be no sample; empty where it may be one.
        detail: More about that.
    """

    source: str
    name: str = ""
    image: Part | None = None
    caption: Part | str | None = None
    refused: str = ""
    detail: str = ""


def list_candidates(inputs: Sequence[str], root: str | None = None) -> list[Candidate]:
    """Everything that the inputs offer.

    Args:
        inputs: Folders, ``.jsonl``, ``.csv`` or ``.parquet`` files, tars or patterns of tars, in
            any mixture.
        root: Folder that paths in tables are relative to; None for the table's own.

    Raises:
        DataError: An input is missing, of no known kind, or not readable as its kind.
        OSError: A folder cannot be read.
    """
    found: list[Candidate] = []
    tars = [item for item in inputs if item.endswith(".tar")]
    for item in sorted(set(inputs) - set(tars)):
        path = Path(item)
        if path.is_dir():
            found += _in_folder(path)
        elif path.suffix not in TABLES:
            raise DataError(
                f"INPUT={item!r}: no folder, and no file ending in {', '.join(TABLES)} or .tar. "
                "Give one."
            )
        else:
            found += _in_table(path, Path(root) if root is not None else path.parent)
    for tar in sorted(find_shards(tars, setting="INPUT")) if tars else []:
        if is_remote(tar):
            raise DataError(f"INPUT={tar!r}: inputs must be local files. Copy it here.")
        found += _in_tar(tar)
    return found


def _in_folder(folder: Path) -> Iterator[Candidate]:
    def fail(error: OSError) -> None:
        raise error  # os.walk would leave the folder out

    paths = []
    for parent, folders, names in os.walk(folder, onerror=fail):
        paths += [Path(parent, name) for name in names]
        paths += [path for name in folders if (path := Path(parent, name)).is_symlink()]
    present = set(paths)
    used: set[Path] = set()
    waiting: list[Path] = []
    for path in sorted(paths):
        extension = path.suffix[1:].lower()
        source = path.relative_to(folder).as_posix()
        if path.is_dir():
            yield Candidate(source, refused="other file", detail="a link to a folder")
        elif extension in IMAGE_EXTENSIONS:
            beside = [path.with_suffix(f".{kind}") for kind in CAPTION_EXTENSIONS]
            used.update(beside)
            caption = next((file for file in beside if file in present), None)
            yield _from_file(source, path, _part(caption) if caption else None)
        elif path.suffix[1:] in CAPTION_EXTENSIONS:
            waiting.append(path)
        else:
            yield Candidate(source, refused="other file", detail=f"extension {path.suffix!r}")
    for path in waiting:
        if path not in used:
            why = "no image" if path.suffix == ".txt" else "other file"
            yield Candidate(path.relative_to(folder).as_posix(), refused=why)


def _in_table(table: Path, root: Path) -> Iterator[Candidate]:
    for line, row in table_rows(table):
        source = f"{table.name}:{line}"
        if isinstance(row, str):
            yield Candidate(source, refused="unreadable row", detail=row)
            continue
        caption = row.get("caption", row.get("caption_en"))
        image = row.get("image")
        if image is None and isinstance(row.get("md5"), str):
            image = _named_by_md5(root, row["md5"])
        if not isinstance(image, str) or not image:
            detail = f"md5 {row['md5']!r}" if "md5" in row else "no field 'image' or 'md5'"
            yield Candidate(source, refused="no image", detail=detail)
        else:
            text = caption if isinstance(caption, str) else None
            yield _from_file(source, root / image, text)


def _named_by_md5(root: Path, md5: str) -> str | None:
    """HY-SOAR's lists name the picture by its md5 alone."""
    if not md5.isalnum():
        return None
    names = (f"{md5}.{extension}" for extension in IMAGE_EXTENSIONS)
    return next((name for name in names if (root / name).is_file()), None)


def _in_tar(tar: str) -> Iterator[Candidate]:
    scanned = scan_tar(tar)
    name = os.path.basename(tar)
    for key, kinds in scanned.members.items():
        source = f"{name}:{key}"
        parts = {extension: Part(tar, *place, extension) for extension, place in kinds.items()}
        image = next((parts[e] for e in IMAGE_EXTENSIONS if e in parts), None)
        caption = next((parts[e] for e in CAPTION_EXTENSIONS if e in parts), None)
        if image is None:
            yield Candidate(source, refused="no image")
        else:
            yield _candidate(source, key, image, caption)
    for reason, number in sorted(scanned.ignored.items()):
        if reason == CUT:
            yield Candidate(name, refused=CUT, detail="what came after is lost")
        else:
            yield Candidate(name, refused="other file", detail=f"{number} members: {reason}")


def _from_file(source: str, image: Path, caption: Part | str | None) -> Candidate:
    try:
        return _candidate(source, image.stem, _part(image), caption)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        kind = "no image" if isinstance(error, FileNotFoundError) else "unreadable image"
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return Candidate(source, refused=kind, detail=f"{image.name}: {reason}")


def _candidate(source: str, name: str, image: Part, caption: Part | str | None) -> Candidate:
    if caption is None:
        return Candidate(source, refused="no caption")
    return Candidate(source, os.path.basename(name), image, caption)


def _part(path: Path) -> Part:
    return Part(str(path), 0, path.stat().st_size, path.suffix[1:].lower())
