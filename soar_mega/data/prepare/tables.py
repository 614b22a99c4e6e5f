"""Reads the rows of JSONL, CSV and Parquet lists, one at a time."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from soar_mega.data.errors import DataError
from soar_mega.data.shards.index import MAX_CAPTION_BYTES

Row = Mapping[str, Any] | str  # the fields, or what is wrong with the row
MAX_ROW = (
    8 * MAX_CAPTION_BYTES
)  # characters of a row, or of a field of a CSV; far above any caption
_PARQUET_ROWS = 1024  # turned into Python objects at a time
# Bytes that are no UTF-8 become surrogates, so that the row they are in is refused, not the table.
_LOSSLESS = "surrogateescape"
_NAMES = {"picture": ("image", "md5"), "caption": ("caption", "caption_en")}


def table_rows(table: Path) -> Iterator[tuple[int, Row]]:
    """Each row with its number: of its (last) line, in Parquet of the row, from 1.

    Raises:
        DataError: The table cannot be read, or lacks a column.
    """
    try:
        yield from TABLES[table.suffix](table)
    except (OSError, csv.Error) as error:
        raise DataError(f"INPUT={str(table)!r}: cannot be read: {error}. Correct it.") from error


def _json_rows(table: Path) -> Iterator[tuple[int, Row]]:
    with open(table, encoding="utf-8-sig", errors=_LOSSLESS, newline="\n") as file:
        line = 0
        while text := file.readline(MAX_ROW + 1):
            line += 1
            if len(text) > MAX_ROW and not text.endswith("\n"):
                _skip_line(file, text)
                yield line, f"longer than {MAX_ROW} characters"
                continue
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                yield line, f"no json: {error}"
                continue
            yield line, row if isinstance(row, dict) else "the json is no object"


def _skip_line(file: TextIO, text: str) -> None:
    while text and not text.endswith("\n"):
        text = file.readline(MAX_ROW)


def _csv_rows(table: Path) -> Iterator[tuple[int, Row]]:
    before = csv.field_size_limit(MAX_ROW)  # a caption too long is one row's fault
    try:
        with open(table, encoding="utf-8-sig", errors=_LOSSLESS, newline="") as file:
            reader = csv.DictReader(file)
            missing = {"image", "caption"} - set(reader.fieldnames or ())
            if missing:
                raise DataError(
                    f"INPUT={str(table)!r}: no column {' or '.join(sorted(missing))} in its first "
                    "line; it must name the columns image and caption. Add it."
                )
            try:
                for row in reader:
                    yield reader.line_num, row
            except csv.Error as error:
                # Where a quote is not closed the rest of the table is one field.
                raise DataError(
                    f"INPUT={str(table)!r}: the row that ends in line {reader.line_num} cannot be "
                    f"read: {error}. Look for a quote that is not closed before it."
                ) from error
    finally:
        csv.field_size_limit(before)


def _parquet_rows(table: Path) -> Iterator[tuple[int, Row]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"INPUT={str(table)!r}: reading Parquet needs pyarrow: pip install 'soar-mega[parquet]'"
        ) from error
    try:
        with parquet.ParquetFile(table) as file:
            columns = _parquet_columns(table, file.schema_arrow)
            number = 0
            for batch in file.iter_batches(_PARQUET_ROWS, columns=columns):
                # As bytes: pyarrow would stop at the first string that is no UTF-8.
                fields = [
                    column.cast(pyarrow.large_string(), safe=False)
                    .cast(pyarrow.large_binary())
                    .to_pylist()
                    for column in batch.columns
                ]
                for values in zip(*fields, strict=True):
                    number += 1
                    pairs = zip(batch.schema.names, values, strict=True)
                    yield number, {n: v and v.decode(errors=_LOSSLESS) for n, v in pairs}
    except pyarrow.ArrowException as error:
        raise DataError(f"INPUT={str(table)!r}: cannot be read: {error}. Correct it.") from error


def _parquet_columns(table: Path, schema: Any) -> list[str]:
    """The wanted columns; DataError where they are missing or hold no strings."""
    from pyarrow import types

    columns = []
    for what, names in _NAMES.items():
        found = [name for name in names if name in schema.names]
        if not found:
            raise DataError(
                f"INPUT={str(table)!r}: no column {' or '.join(names)}, which names the {what}; it "
                f"has {', '.join(schema.names)}. Rename one. (The tables that img2dataset writes "
                "beside its tars name no pictures: give the tars.)"
            )
        columns += found
    for name in columns:
        kind = schema.field(name).type
        plain = kind.value_type if types.is_dictionary(kind) else kind
        if not (types.is_string(plain) or types.is_large_string(plain)):
            raise DataError(
                f"INPUT={str(table)!r}: column {name} is of type {kind}; it must hold strings: the "
                "path of a picture, or a caption. Write pictures to files first."
            )
    return columns


TABLES = {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
