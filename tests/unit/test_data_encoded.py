"""Encoded sets hold what online encoding gives, whoever makes them, and refuse other models."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from soar_mega.data.buckets import Bucket, bucket_of, make_buckets
from soar_mega.data.decode.interface import DecodeJob, View
from soar_mega.data.decode.make import make_decoder
from soar_mega.data.decode.model_range import to_model_range
from soar_mega.data.encoded import run as encoded_run
from soar_mega.data.encoded.fingerprint import encoder_fingerprint
from soar_mega.data.encoded.format import DESCRIPTOR, EMPTY, Descriptor, EncodedBatch
from soar_mega.data.encoded.read import DAMAGED, EncodedSet
from soar_mega.data.encoded.run import EncodeProcess, EncodeSettings, encode
from soar_mega.data.encoders import FrozenEncoders
from soar_mega.data.errors import BadSampleError, DataError
from soar_mega.data.prepare.run import prepare
from soar_mega.data.shards.index import ShardIndex, build_index
from soar_mega.passes import TextCondition
from tests.unit.test_data_encoders import build_pipeline
from tests.unit.test_data_index import picture, write_tar
from tools import encode_data

# Pictures of 64 px are brought to 32, so that resizing is part of the comparison.
SETTINGS = EncodeSettings(
    resolution=32, max_sequence_length=9, samples_per_shard=4, dtype="fp32", max_aspect_ratio=1.0
)
SQUARE = Bucket(32, 32)


def photo(number: int, size: tuple[int, int] = (64, 64)) -> bytes:
    """A noisy picture."""
    width, height = size
    coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def members(number: int) -> list[tuple[str, bytes]]:
    return [(f"s{number}.png", photo(number)), (f"s{number}.txt", f"red {number}\n".encode())]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Widths differ everywhere: CLIP 32 + 48, T5 96."""
    folder = tmp_path_factory.mktemp("model")
    build_pipeline(folder)
    return folder / "sd3"


@pytest.fixture(scope="module")
def encoders(model: Path) -> FrozenEncoders:
    return FrozenEncoders.load(model)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """10 samples in two shards."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, numbers in (("a", range(6)), ("b", range(6, 10))):
        write_tar(folder / f"{name}.tar", [m for n in numbers for m in members(n)])
    return build_index(str(folder / "*.tar"))


@pytest.fixture(scope="module")
def made(model: Path, pictures: ShardIndex, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set of ``pictures``; nobody writes into it."""
    out = tmp_path_factory.mktemp("made") / "set"
    encode(pictures, model, out, SETTINGS, EncodeProcess(batch_size=3))
    return out


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def contents(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir()}


def open_set(*folders: Path) -> tuple[ShardIndex, EncodedSet]:
    index = build_index([str(folder / "*.tar") for folder in folders])
    return index, EncodedSet.open(index, num_threads=2)


def read(opened: EncodedSet, samples: list[int], bucket: Bucket = SQUARE) -> EncodedBatch:
    rows = opened.new_rows(bucket, len(samples))
    assert opened.read(samples, rows) == [None] * len(samples)
    batch = opened.unpack(rows, bucket, torch.float32)
    rows.fill_(255)  # the batch must not refer to it
    return batch


def online(
    index: ShardIndex, sample: int, encoders: FrozenEncoders, bucket: Bucket
) -> tuple[Tensor, ...]:
    """Mean, log-variance, text and pooled of one sample as training without a set encodes it."""
    decoder = make_decoder("pil", 1)
    job = DecodeJob(index.read_image(sample), View(bucket.height, bucket.width), "")
    (pixels,) = decoder.decode([job])
    decoder.close()
    assert isinstance(pixels, np.ndarray)
    mean, logvar = encoders.encode_images(to_model_range(torch.tensor(pixels[None])))
    text = encoders.encode_prompts([index.read_caption(sample)], 9)
    return mean[0], logvar[0], text.text_BTE[0], text.pooled_BV[0]


def assert_rows(batch: EncodedBatch, row: int, expected: tuple[Tensor, ...]) -> None:
    found = (batch.mean_BCHW, batch.logvar_BCHW, batch.text.text_BTE, batch.text.pooled_BV)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours[row], theirs.bfloat16().float())


# --- what is in it -----------------------------------------------------------------------------


def test_rows_are_the_online_ones_rounded_to_bf16(
    made: Path, pictures: ShardIndex, encoders: FrozenEncoders
) -> None:
    index, opened = open_set(made)
    assert index.counts == [3, 3, 4]
    order = [7, 2, 9, 0, 1]
    batch = read(opened, order)
    for row, sample in enumerate(order):
        assert_rows(batch, row, online(pictures, sample, encoders, SQUARE))
        assert index.read_caption(sample) == f"red {sample}"
        assert index.key(sample) == f"{sample:08d}-s{sample}"
    assert len({row.sum().item() for row in batch.mean_BCHW}) == len(order)
    empty = encoders.encode_prompts([""], 9)
    assert torch.equal(opened.empty.text_BTE, empty.text_BTE.bfloat16())
    assert torch.equal(opened.empty.pooled_BV, empty.pooled_BV.bfloat16())
    halves = opened.unpack(opened.new_rows(SQUARE, 1).fill_(0), SQUARE, torch.bfloat16)
    assert halves.text.text_BTE.dtype == halves.text.pooled_BV.dtype == torch.bfloat16
    opened.close()


def test_payloads_have_no_padding(made: Path, model: Path) -> None:
    descriptor = Descriptor.from_json((made / DESCRIPTOR).read_bytes())
    assert (descriptor.samples, descriptor.shards, descriptor.refused) == (10, 3, {})
    numbers = 2 * 16 * 4 * 4 + 12 * 80 + 9 * 96 + 80
    assert descriptor.payload.size(SQUARE) == 2 * numbers
    index = json.loads((made / "encoded-000000.tar.index.json").read_text())
    whole = (made / "encoded-000000.tar").read_bytes()
    assert (index["kind"], index["size"]) == ("encoded", len(whole))
    for number, row in enumerate(index["samples"]):
        assert row["payload"][1] == 2 * numbers and (row["width"], row["height"]) == (32, 32)
        assert row["source"] == f"a.tar:s{number}"
    record = json.loads((made / DESCRIPTOR).read_text())
    assert record["components"] == encoder_fingerprint(model)


def test_a_set_without_t5(
    model: Path, pictures: ShardIndex, made: Path, encoders: FrozenEncoders, tmp_path: Path
) -> None:
    bare = Path(shutil.copytree(model, tmp_path / "bare"))
    record = json.loads((bare / "model_index.json").read_text())
    record["text_encoder_3"] = record["tokenizer_3"] = [None, None]
    (bare / "model_index.json").write_text(json.dumps(record))
    encode(pictures, bare, tmp_path / "out", SETTINGS, EncodeProcess())
    _, opened = open_set(tmp_path / "out")
    _, whole = open_set(made)
    less = whole.descriptor.payload.size(SQUARE) - opened.descriptor.payload.size(SQUARE)
    assert less == 2 * 9 * 96
    mean, logvar, text, pooled = online(pictures, 4, encoders, SQUARE)
    text[12:] = 0
    assert_rows(read(opened, [4]), 0, (mean, logvar, text, pooled))
    assert opened.empty.text_BTE.shape == (1, 21, 96) and not opened.empty.text_BTE[:, 12:].any()


def test_aspect_buckets(model: Path, encoders: FrozenEncoders, tmp_path: Path) -> None:
    sizes = [(96, 64), (64, 96), (64, 64), (70, 60), (200, 60), (90, 64), (64, 64)]
    (tmp_path / "in").mkdir()
    for number, size in enumerate(sizes):
        (tmp_path / "in" / f"{number}.png").write_bytes(photo(number, size))
        (tmp_path / "in" / f"{number}.txt").write_text(f"red {number}")
    prepare([str(tmp_path / "in")], tmp_path / "shards")
    pictures = build_index(str(tmp_path / "shards" / "*.tar"))
    settings = dataclasses.replace(SETTINGS, max_aspect_ratio=2.0, resolution=64)
    encode(pictures, model, tmp_path / "out", settings, EncodeProcess(batch_size=3))
    buckets = make_buckets(64, 2.0)
    wanted = bucket_of(buckets, pictures.sizes())
    assert len(set(wanted.tolist())) > 2
    index, opened = open_set(tmp_path / "out")
    assert opened.buckets == buckets
    order = [int(index.key(sample)[:8]) for sample in range(len(index))]
    assert sorted(order) == list(range(7))
    assert opened.buckets_N.tolist() == [wanted[number] for number in order]
    for place, bucket in enumerate(buckets):
        samples = np.flatnonzero(opened.buckets_N == place).tolist()
        batch = read(opened, samples, bucket)
        for row, sample in enumerate(samples):
            assert_rows(batch, row, online(pictures, order[sample], encoders, bucket))
            assert index.read_caption(sample) == f"red {order[sample]}"


def test_aspect_buckets_need_the_sizes(model: Path, pictures: ShardIndex, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, max_aspect_ratio=2.0, resolution=64)
    with pytest.raises(DataError, match=r"--max-aspect-ratio=2\.0: needs the pictures' sizes"):
        encode(pictures, model, tmp_path / "out", settings, EncodeProcess())


def test_bad_samples_are_left_out_and_listed(
    model: Path, encoders: FrozenEncoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = [("x1.png", photo(0)[:-24]), ("x1.txt", b"c"), ("x2.jpg", b"no"), ("x2.txt", b"c")]
    bad += [("x3.png", photo(0)), ("x4.png", photo(0)), ("x4.txt", b"caf\xe9")]
    bad += [("x5.png", photo(5)), ("x5.txt", b"too bright")]
    inside = [*members(0), *bad, *members(1)]
    pictures = build_index(str(write_tar(tmp_path / "in.tar", inside)))
    real = FrozenEncoders.encode_prompts

    def overflowing(self: FrozenEncoders, prompts: list[str], length: int) -> TextCondition:
        text = real(self, prompts, length)
        for row, prompt in enumerate(prompts):
            if prompt == "too bright":
                text.text_BTE[row, 3, 5] = float("inf")
        return text

    monkeypatch.setattr(FrozenEncoders, "encode_prompts", overflowing)
    report = encode(pictures, model, tmp_path / "out", SETTINGS, EncodeProcess())
    lines = (tmp_path / "out" / "refused.jsonl").read_text().splitlines()
    found = {(row := json.loads(line))["source"]: row["reason"] for line in lines}
    assert found.keys() == {f"in.tar:x{n}" for n in range(1, 6)}
    kinds = [found[f"in.tar:x{n}"] for n in range(1, 6)]
    assert kinds[2:] == ["no caption", "caption not UTF-8", "not finite"]
    assert report.refused.total() == 5 and report.samples == 2
    assert "5 refused" in str(report) and "1 not finite" in str(report)
    index, opened = open_set(tmp_path / "out")
    assert [index.read_caption(sample) for sample in range(2)] == ["red 0", "red 1"]
    assert opened.descriptor.refused == dict(report.refused)
    assert_rows(read(opened, [1]), 0, online(pictures, 6, encoders, SQUARE))


def test_no_sample_is_an_error(model: Path, tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "in.tar", [("x.png", b"no"), ("x.txt", b"c")])
    with pytest.raises(DataError, match="none of 1 samples can be used"):
        encode(build_index(str(tar)), model, tmp_path / "out", SETTINGS, EncodeProcess())
    assert not (tmp_path / "out" / DESCRIPTOR).exists()


# --- whoever makes it --------------------------------------------------------------------------


def test_same_bytes_for_any_batch_and_any_ranks(
    model: Path, pictures: ShardIndex, made: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    last = []
    for rank in (2, 0, 1):
        assert not (out / DESCRIPTOR).exists()
        process = EncodeProcess(rank, 3, batch_size=4, num_decode_threads=1)
        last.append(encode(pictures, model, out, SETTINGS, process))
    assert [report.missing for report in last] == [2, 1, 0]
    assert "with other ranks" in str(last[0]) and "10 samples in 3 shards (1 new)" in str(last[2])
    assert contents(out) == contents(made)


def test_goes_on_and_leaves_alone_what_is_there(
    model: Path, pictures: ShardIndex, made: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = copy / "encoded-000000.tar"
    cut.write_bytes(cut.read_bytes()[:-1])
    (copy / "encoded-000001.tar.index.json").unlink()
    (copy / DESCRIPTOR).unlink()
    (copy / EMPTY).unlink()
    for writer in (0, 7):  # 7: a rank that is not there this time
        (copy / f".encoded-000001.tar.{writer}.partial").write_bytes(b"x")
    lines: list[str] = []
    kept = (copy / "encoded-000002.tar").stat().st_mtime_ns
    report = encode(pictures, model, copy, SETTINGS, EncodeProcess(tell=lines.append))
    assert report.written == len(lines) == 2
    assert lines[1].startswith("encoded-000001.tar (2 of 2): 3 samples, 0 refused, ")
    assert (copy / "encoded-000002.tar").stat().st_mtime_ns == kept
    assert contents(copy) == contents(made)
    (copy / EMPTY).unlink()
    assert encode(pictures, model, copy, SETTINGS, EncodeProcess()).written == 0
    assert contents(copy) == contents(made)
    # Of a finished set the models are not even loaded.
    monkeypatch.setattr(FrozenEncoders, "load", None)
    assert encode(pictures, model, copy, SETTINGS, EncodeProcess()).written == 0


def test_partials_of_other_ranks_stay(model: Path, pictures: ShardIndex, copy: Path) -> None:
    partial = copy / ".encoded-000001.tar.1.partial"
    partial.write_bytes(b"x")
    encode(pictures, model, copy, SETTINGS, EncodeProcess(0, 2))
    assert partial.exists()
    encode(pictures, model, copy, SETTINGS, EncodeProcess(1, 2))
    assert not partial.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"resolution": 64}, "other --resolution"),
        ({"max_sequence_length": 8, "dtype": "bf16"}, "other --max-sequence-length, --dtype"),
        ({"samples_per_shard": 5}, "other --samples-per-shard"),
    ],
)
def test_another_set_in_the_folder_is_refused(
    model: Path, pictures: ShardIndex, copy: Path, change: dict[str, Any], words: str
) -> None:
    before = contents(copy)
    with pytest.raises(DataError, match=rf"plan\.json is of another set: {words}\. "):
        settings = dataclasses.replace(SETTINGS, **change)
        encode(pictures, model, copy, settings, EncodeProcess())
    part = ShardIndex(pictures.shards[:1], pictures.files)
    with pytest.raises(DataError, match="other SHARDS"):
        encode(part, model, copy, SETTINGS, EncodeProcess())
    assert contents(copy) == before
    (copy / "plan.json").unlink()
    with pytest.raises(DataError, match=r"has shards but no plan\.json"):
        encode(pictures, model, copy, SETTINGS, EncodeProcess())


# --- fingerprints ------------------------------------------------------------------------------


def flip_weight(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def other_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer_2" / "tokenizer.json"
    path.write_text(path.read_text().replace('"red</w>"', '"rde</w>"'))


def other_config(folder: Path) -> None:
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scaling_factor": 1.25}))


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "vae": (lambda f: flip_weight(f / "vae" / "diffusion_pytorch_model.safetensors"), "vae"),
    "vae config": (other_config, "vae"),
    "clip": (lambda f: flip_weight(f / "text_encoder_2" / "model.safetensors"), "text_encoder_2"),
    "t5": (lambda f: flip_weight(f / "text_encoder_3" / "model.safetensors"), "text_encoder_3"),
    "tokenizer": (other_tokenizer, "tokenizer_2"),
}


def check(opened: EncodedSet, model: Path, **change: Any) -> None:
    wanted = {"resolution": 32, "max_sequence_length": 9, "buckets": make_buckets(32, 1.0)}
    opened.check(model, **{**wanted, **change})


@pytest.mark.parametrize("name", CHANGES)
def test_another_model_is_refused(model: Path, made: Path, tmp_path: Path, name: str) -> None:
    change, part = CHANGES[name]
    other = Path(shutil.copytree(model, tmp_path / "other"))
    _, opened = open_set(made)
    check(opened, other)
    change(other)
    with pytest.raises(DataError) as caught:
        check(opened, other)
    message = str(caught.value)
    assert f"other {part} (" in message and "tools/encode_data.py" in message
    assert repr(str(model)) in message and repr(str(other)) in message
    for folder in (model, other):
        assert encoder_fingerprint(folder)[part][:8] in message


def test_what_a_library_writes_beside_the_weights_does_not_matter(
    model: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    for path in (other / "vae" / "config.json", other / "text_encoder" / "config.json"):
        record = json.loads(path.read_text())
        record |= {"_diffusers_version": "9", "transformers_version": "9", "dtype": "float16"}
        path.write_text(json.dumps(record, indent=7))
    (other / "text_encoder" / "model.fp16.safetensors").write_bytes(b"x")
    (other / "transformer" / "more.safetensors").write_bytes(b"x")
    assert encoder_fingerprint(other) == encoder_fingerprint(model)
    # Weights in several files, as T5's.
    whole = other / "text_encoder_3" / "model.safetensors"
    whole.rename(whole.with_name("model-1.safetensors"))
    index = {"weight_map": {"x": "model-1.safetensors"}}
    whole.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    before = encoder_fingerprint(other)
    flip_weight(whole.with_name("model-1.safetensors"))
    assert encoder_fingerprint(other)["text_encoder_3"] != before["text_encoder_3"]


@pytest.mark.parametrize("place", [0, 9, 10**6, 10**7 // 2, 10**7 - 1])
def test_large_files_are_sampled_all_over(model: Path, tmp_path: Path, place: int) -> None:
    """A run of 200 KB that differs is seen wherever it lies; other lengths too."""
    other = Path(shutil.copytree(model, tmp_path / "other"))
    path = other / "vae" / "diffusion_pytorch_model.safetensors"
    data = np.zeros(10**7, dtype=np.uint8)
    data[:8] = np.frombuffer((8).to_bytes(8, "little"), dtype=np.uint8)
    path.write_bytes(data.tobytes())
    before = encoder_fingerprint(other)["vae"]
    changed = data.copy()
    changed[max(place - 200_000, 0) : place + 1] = 1
    path.write_bytes(changed.tobytes())
    assert encoder_fingerprint(other)["vae"] != before
    path.write_bytes(data.tobytes() + b"\0")
    assert encoder_fingerprint(other)["vae"] != before


def test_another_preprocessing_is_refused(model: Path, made: Path) -> None:
    _, opened = open_set(made)
    for change, words in (
        ({"resolution": 64}, r"data\.resolution=64: data\.shards were encoded with 32"),
        ({"max_sequence_length": 8}, r"data\.max_sequence_length=8: .* with 9\. Set it to 9"),
        ({"buckets": make_buckets(64, 2.0)}, r"data\.max_aspect_ratio: "),
    ):
        with pytest.raises(DataError, match=words):
            check(opened, model, **change)


def test_sets_must_be_made_alike(
    model: Path, pictures: ShardIndex, made: Path, copy: Path, tmp_path: Path
) -> None:
    index, opened = open_set(made, copy)
    batch = read(opened, [1, 11])
    assert len(index) == 20 and torch.equal(batch.mean_BCHW[0], batch.mean_BCHW[1])
    settings = dataclasses.replace(SETTINGS, max_sequence_length=8)
    encode(pictures, model, tmp_path / "out", settings, EncodeProcess())
    with pytest.raises(DataError, match=r"not made alike: they differ in max_sequence_length"):
        open_set(made, tmp_path / "out")
    descriptor = Descriptor.from_json((copy / DESCRIPTOR).read_bytes())
    other = {**descriptor.components, "vae": "0" * 64}
    descriptor = dataclasses.replace(descriptor, components=other)
    (copy / DESCRIPTOR).write_bytes(descriptor.to_json())
    with pytest.raises(DataError, match=r"not made alike: they differ in vae\. "):
        open_set(made, copy)


# --- damage ------------------------------------------------------------------------------------


def test_unfinished_and_damaged_sets_are_refused(copy: Path) -> None:
    empty, descriptor = copy / EMPTY, copy / DESCRIPTOR
    whole = empty.read_bytes()
    for damage, words in (
        (lambda: empty.unlink(), "empty prompt's embeddings cannot be read"),
        (lambda: empty.write_bytes(whole[:-1]), "empty prompt's embeddings cannot be read"),
        (lambda: empty.write_bytes(whole[:-2] + b"\xff\xff"), "damaged"),
    ):
        damage()
        with pytest.raises(DataError, match=rf"^data\.shards: .*{EMPTY}: .*{words}"):
            open_set(copy)
    empty.write_bytes(whole)
    text = descriptor.read_text()
    for other, words in (
        (text.replace('"version": 1', '"version": 2'), "version 2; this is version 1"),
        (text.replace('"filter": "lanczos"', '"filter": "box"'), "changed after it was written"),
        (text[:-9], "Encode the set again"),
        ("[]", "damaged"),
    ):
        descriptor.write_text(other)
        with pytest.raises(DataError, match=rf"{DESCRIPTOR}: .*{words}"):
            open_set(copy)
    descriptor.unlink()
    with pytest.raises(DataError, match="The set is not finished"):
        open_set(copy)


def test_sizes_that_are_no_bucket_are_refused(copy: Path) -> None:
    path = copy / "encoded-000001.tar.index.json"
    path.write_text(path.read_text().replace('"width":32', '"width":48', 1))
    with pytest.raises(DataError, match=r"encoded-000001\.tar, key '00000003-s3': .*buckets"):
        open_set(copy)


@pytest.fixture
def damaged(copy: Path) -> Iterator[tuple[EncodedSet, dict[int, str]]]:
    """A set with bad samples, and their kinds; the last shard is cut when it is open."""
    first = copy / "encoded-000000.tar"
    index = json.loads((copy / "encoded-000000.tar.index.json").read_text())
    index["samples"][1]["payload"][1] -= 2
    (copy / "encoded-000000.tar.index.json").write_text(json.dumps(index))
    data = bytearray(first.read_bytes())
    start, size = index["samples"][2]["payload"]
    data[start + size - 2 : start + size] = np.array([0xFF80], "<u2").tobytes()  # -inf
    first.write_bytes(bytes(data))
    second = copy / "encoded-000001.tar"
    index = json.loads((copy / "encoded-000001.tar.index.json").read_text())
    data = bytearray(second.read_bytes())
    for row, bits in ((0, 0x7FC0), (1, 0x7F80), (2, 0xFF7F)):  # NaN, inf, the lowest finite number
        start, _ = index["samples"][row]["payload"]
        data[start : start + 2] = np.array([bits], "<u2").tobytes()
    second.write_bytes(bytes(data))
    _, opened = open_set(copy)
    third = copy / "encoded-000002.tar"
    index = json.loads((copy / "encoded-000002.tar.index.json").read_text())
    third.write_bytes(third.read_bytes()[: index["samples"][2]["payload"][0] + 100])
    yield (
        opened,
        {
            **dict.fromkeys((1, 2, 3, 4), DAMAGED),
            **dict.fromkeys((8, 9), "unreadable"),
        },
    )
    opened.close()


def test_bad_payloads_are_flagged_and_zero(
    damaged: tuple[EncodedSet, dict[int, str]], made: Path
) -> None:
    opened, kinds = damaged
    rows = opened.new_rows(SQUARE, 10).fill_(255)
    numbers = list(range(10))
    unread, infinite = opened.read(numbers, rows), opened.check_finite(numbers, rows)
    errors = [before or after for before, after in zip(unread, infinite, strict=True)]
    assert {n: e.kind for n, e in enumerate(errors) if e is not None} == kinds
    assert all(isinstance(error, BadSampleError) for error in errors if error is not None)
    assert "encoded-000000.tar, key '00000001-s1'" in str(errors[1])
    _, whole = open_set(made)
    good = whole.new_rows(SQUARE, 10)
    whole.read(list(range(10)), good)
    for sample in range(10):
        if sample in kinds:
            assert not rows[sample].any()
        elif sample != 5:
            assert torch.equal(rows[sample], good[sample])


# --- the command -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resolution=60"], "--resolution=60: must be a multiple of 16"),
        (["--max-sequence-length=0"], "--max-sequence-length=0: must be 1 to 512"),
        (["--max-aspect-ratio=0.5"], "--max-aspect-ratio=0.5: must be at least 1"),
        (["--samples-per-shard=0"], "--samples-per-shard=0"),
        (["--batch-size=0"], "--batch-size=0"),
        (["--num-decode-threads=0"], "--num-decode-threads=0"),
        (["--pretrained=none"], "model.pretrained='none': no such folder"),
        (["none*.tar"], "SHARDS='none*.tar'"),
    ],
)
def test_settings_that_cannot_be(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: Path,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(Path("in.tar"), [("a.png", picture()), ("a.txt", b"c")])
    given = ["in.tar"] if not arguments[0].endswith(".tar") else []
    line = ["--pretrained", str(model), "--out=out", "--resolution=32", *given, *arguments]
    assert encode_data.main(line) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and words in printed.err
    assert not Path("out").exists()


def test_encoded_shards_are_no_input(model: Path, made: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="encoded already"):
        index = build_index(str(made / "*.tar"))
        encode(index, model, tmp_path / "out", SETTINGS, EncodeProcess())


def test_dtypes_are_those_of_training() -> None:
    from soar_mega.training.setup import DTYPES

    assert encoded_run.DTYPES == DTYPES
