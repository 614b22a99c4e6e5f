"""Lists of pictures and captions: JSONL, CSV and Parquet."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from soar_mega.data.errors import DataError
from soar_mega.data.prepare import tables
from soar_mega.data.prepare.run import prepare
from soar_mega.data.shards.index import MAX_CAPTION_BYTES
from tests.unit.test_data_index import picture
from tests.unit.test_data_prepare import expected, photos, put, refused, samples


@pytest.mark.parametrize("rooted", [False, True])
def test_jsonl_of_image_and_caption(tmp_path: Path, rooted: bool) -> None:
    table = tmp_path / ("lists" if rooted else "in") / "rows.jsonl"
    photos(tmp_path / "in", 4)
    rows = [{"image": f"{n % 2}/p{n:02d}.png", "caption": f"caption {n}"} for n in range(4)]
    put(table, "\n".join(map(json.dumps, rows)) + "\n\n")
    prepare([str(table)], tmp_path / "out", root=str(tmp_path / "in") if rooted else None)
    assert samples(tmp_path / "out") == expected(4)


def test_jsonl_of_hy_soar(tmp_path: Path) -> None:
    put(tmp_path / "a1.png", picture(0))
    put(tmp_path / "b2.webp", picture(1, kind="WEBP"))
    put(tmp_path.parent / "up.png", picture(2))
    rows = [
        {"md5": "a1", "caption_en": "first", "bw": 512, "bh": 512},
        {"md5": "b2", "caption_en": "second", "bw": 512, "bh": 512},
        {"md5": "c3", "caption_en": "nowhere"},
        {"md5": "../up", "caption_en": "outside"},
    ]
    table = put(tmp_path / "lists" / "soar.jsonl", "\n".join(map(json.dumps, rows)))
    prepare([str(table)], tmp_path / "out", root=str(tmp_path))
    wanted = [("first", picture(0)), ("second", picture(1, kind="WEBP"))]
    assert samples(tmp_path / "out") == wanted
    assert [(row["source"], row["reason"]) for row in refused(tmp_path / "out")] == [
        ("soar.jsonl:3", "no image"),
        ("soar.jsonl:4", "no image"),
    ]


def test_csv(tmp_path: Path) -> None:
    photos(tmp_path, 2)
    long = 'of "two", lines\n' + "x" * 200_000  # longer than the csv module's own limit
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [["n", "caption", "image"], [1, long, "0/p00.png"], [2, "b", "1/p01.png"], [3, "c"]]
        )
    before = csv.field_size_limit()
    prepare([str(tmp_path / "rows.csv")], tmp_path / "out")
    assert samples(tmp_path / "out") == [(long, picture(0)), ("b", picture(1))]
    assert [row["reason"] for row in refused(tmp_path / "out")] == ["no image"]
    assert csv.field_size_limit() == before


def test_refused_rows_of_a_jsonl(tmp_path: Path) -> None:
    put(tmp_path / "a.png", picture())
    rows = [
        b"{broken",
        b"[1]",
        b'{"image": "a.png"}',
        b'{"image": "a.png", "caption": 7}',
        b'{"image": "a.png", "caption": "caf\xe9"}',
        b'{"image": "a.png", "caption": "\\ud800"}',
        b'{"image": "none.png", "caption": "c"}',
        b'{"image": "a\\u0000.png", "caption": "c"}',
        b'{"caption": "c"}',
        b'{"image": "a.png", "caption": "good"}',
    ]
    put(tmp_path / "rows.jsonl", b"\n".join(rows))
    prepare([str(tmp_path / "rows.jsonl")], tmp_path / "out")
    assert samples(tmp_path / "out") == [("good", picture())]
    assert [(row["source"], row["reason"]) for row in refused(tmp_path / "out")] == [
        ("rows.jsonl:1", "unreadable row"),
        ("rows.jsonl:2", "unreadable row"),
        ("rows.jsonl:3", "no caption"),
        ("rows.jsonl:4", "no caption"),
        ("rows.jsonl:5", "caption not UTF-8"),
        ("rows.jsonl:6", "caption not UTF-8"),
        ("rows.jsonl:7", "no image"),
        ("rows.jsonl:8", "unreadable image"),
        ("rows.jsonl:9", "no image"),
    ]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_caption_too_long_costs_its_row_only(tmp_path: Path, kind: str) -> None:
    photos(tmp_path, 3)
    captions = ["caption 0", "x" * (MAX_CAPTION_BYTES + 1), "caption 2"]
    rows = [[f"{n % 2}/p{n:02d}.png", caption] for n, caption in enumerate(captions)]
    table = tmp_path / f"rows.{kind}"
    with open(table, "w", newline="") as file:
        if kind == "csv":
            csv.writer(file).writerows([["image", "caption"], *rows])
        else:
            file.writelines(json.dumps({"image": i, "caption": c}) + "\n" for i, c in rows)
    prepare([str(table)], tmp_path / "out")
    assert samples(tmp_path / "out") == [expected(3)[0], expected(3)[2]]
    line = 3 if kind == "csv" else 2
    assert [(row["source"], row["reason"]) for row in refused(tmp_path / "out")] == [
        (f"rows.{kind}:{line}", "caption too long")
    ]


def test_rows_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_ROW", 100)
    photos(tmp_path, 4)
    rows = [json.dumps({"image": f"{n % 2}/p{n:02d}.png", "caption": f"{n}"}) for n in range(4)]
    rows[1] = rows[1].ljust(100)  # as long as may be
    rows[2] = rows[2].ljust(351)
    put(tmp_path / "rows.jsonl", "\n".join(rows))
    prepare([str(tmp_path / "rows.jsonl")], tmp_path / "out")
    assert samples(tmp_path / "out") == [(f"{n}", picture(n)) for n in (0, 1, 3)]
    assert refused(tmp_path / "out") == [
        {
            "source": "rows.jsonl:3",
            "reason": "unreadable row",
            "detail": "longer than 100 characters",
        }
    ]
    put(tmp_path / "rows.csv", 'image,caption\n0/p00.png,a\n1/p01.png,"b\n' + "x\n" * 100)
    with pytest.raises(DataError, match=r"row that ends in line \d+ cannot.*quote.*not closed"):
        prepare([str(tmp_path / "rows.csv")], tmp_path / "out2")


def write_parquet(
    path: Path, columns: dict[str, list[Any]], types: dict[str, Any] | None = None, **how: Any
) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    arrays = {n: pyarrow.array(values, (types or {}).get(n)) for n, values in columns.items()}
    parquet.write_table(pyarrow.table(arrays), path, **how)
    return path


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    photos(tmp_path, 5)
    columns: dict[str, list[Any]] = {
        "n": list(range(8)),
        "caption": ["caption 0", "caption 1", None, "", "c", "c", "caption 3", "caption 4"],
        "image": [f"{n % 2}/p{n:02d}.png" for n in range(3)]
        + ["0/p02.png", None, "none.png", "1/p03.png", "0/p04.png"],
    }
    for number, types in enumerate(
        (
            {},
            {"image": pyarrow.large_string(), "caption": pyarrow.large_string()},
            {"image": pyarrow.dictionary(pyarrow.int32(), pyarrow.string())},
        )
    ):
        table = write_parquet(tmp_path / "rows.parquet", columns, types, row_group_size=3)
        out = tmp_path / f"out{number}"
        prepare([str(table)], out)
        assert samples(out) == [expected(5)[n] for n in (0, 1, 3, 4)]
        assert [(row["source"], row["reason"]) for row in refused(out)] == [
            ("rows.parquet:3", "no caption"),
            ("rows.parquet:4", "no caption"),
            ("rows.parquet:5", "no image"),
            ("rows.parquet:6", "no image"),
        ]


def test_parquet_of_hy_soar_and_of_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    put(tmp_path / "a1.png", picture(0))
    put(tmp_path / "b2.png", picture(1))
    columns = {"md5": ["a1", "b2", "c3"], "caption_en": ["first", "x", "y"], "bw": [1, 2, 3]}
    table = write_parquet(tmp_path / "soar.parquet", columns)
    from pyarrow import parquet

    broken = pyarrow.array([b"first", b"caf\xe9", b"y"], pyarrow.binary())
    view = pyarrow.Array.from_buffers(pyarrow.string(), 3, broken.buffers())
    whole = parquet.read_table(table).set_column(1, "caption_en", view)
    parquet.write_table(whole, table)
    prepare([str(table)], tmp_path / "out")
    assert samples(tmp_path / "out") == [("first", picture(0))]
    assert [row["reason"] for row in refused(tmp_path / "out")] == [
        "caption not UTF-8",
        "no image",
    ]


def test_parquet_is_read_by_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    count = 5000
    columns = {"image": ["a"] * count, "caption": [str(n) for n in range(count)]}
    columns["pixels"] = ["x" * 100] * count
    table = write_parquet(tmp_path / "rows.parquet", columns, row_group_size=1000)
    sizes: list[int] = []
    real = parquet.ParquetFile.iter_batches

    def noting(*arguments: Any, **named: Any) -> Any:
        for batch in real(*arguments, **named):
            sizes.append(batch.num_rows)
            assert set(batch.schema.names) == {"image", "caption"}
            yield batch

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", noting)
    rows = tables.table_rows(table)
    assert next(rows) == (1, {"image": "a", "caption": "0"}) and sum(sizes) <= 1024
    assert [row["caption"] for _, row in rows] == [str(n) for n in range(1, count)]  # type: ignore[index]


def test_parquet_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    cases: list[tuple[dict[str, list[Any]], str]] = [
        ({"url": ["u"], "caption": ["c"], "key": ["k"]}, "no column image or md5.*give the tars"),
        ({"image": ["a"], "text": ["c"]}, "no column caption or caption_en.*it has image, text"),
        ({"image": [b"x"], "caption": ["c"]}, "column image is of type binary.*path"),
        ({"image": [["x"]], "caption": ["c"]}, "column image is of type list"),
    ]
    for columns, words in cases:
        table = write_parquet(tmp_path / "rows.parquet", columns)
        with pytest.raises(DataError, match=words):
            prepare([str(table)], tmp_path / "out")
    put(tmp_path / "rows.parquet", b"PAR1 no parquet PAR1")
    with pytest.raises(DataError, match=r"rows\.parquet.*cannot be read"):
        prepare([str(tmp_path / "rows.parquet")], tmp_path / "out")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs pyarrow: pip install 'soar-mega\[parquet\]'"):
        prepare([str(tmp_path / "rows.parquet")], tmp_path / "out")
