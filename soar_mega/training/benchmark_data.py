"""Measures how fast pictures become batches: ours, plain webdataset and a DataLoader over files.

All sides read the same generated JPEGs, take turns in one process, and give batches of fp32 pixels
in [-1, 1] and their captions; on the host, or on the GPU if there is one and DALI decodes there.
The first round warms up and is not counted; in it every side's pixels are compared with plain
webdataset's, so that all measure the same work.

Legend: B pictures, H height, W width, C/3 channels.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from soar_mega.data.buckets import Bucket
from soar_mega.data.decode.handover import stack_pixels
from soar_mega.data.decode.interface import Decoder
from soar_mega.data.decode.make import make_decoder
from soar_mega.data.decode.model_range import to_model_range
from soar_mega.data.order import Order, OrderedSource, OrderState
from soar_mega.data.pictures import PictureReader
from soar_mega.data.plan import Planner, StepPlan
from soar_mega.data.prepare.run import prepare
from soar_mega.data.shards.index import build_index
from soar_mega.parallel.mesh import Mesh
from soar_mega.training.benchmark_turns import alternate, summary

PLAIN = "plain webdataset"
PIL = "ours, PIL"
_SHARDS = 4
_ALIKE = 0.05  # mean difference of 8 x 8 means, of a range of 2: filters differ by less

Batches = Iterator[tuple[Tensor, Sequence[str]]]


@dataclass(frozen=True)
class PictureCase:
    """What is measured; ``workers`` are threads of ours and processes of the others, 0: none."""

    pictures: int = 32
    batch: int = 8
    resolution: int = 512
    workers: int = 0


def measure_pictures(
    case: PictureCase, size: tuple[int, int], repeats: int, folder: Path
) -> dict[str, Any]:
    """All sides on pictures of ``size`` (width, height), which are made in ``folder``.

    Raises:
        RuntimeError: A side gave other samples or pixels than plain webdataset.
    """
    loose, shards = folder / "loose", folder / "shards"
    loose.mkdir(parents=True)
    for number in range(case.pictures):
        (loose / f"{number:06d}.jpg").write_bytes(photograph(*size, seed=number))
        (loose / f"{number:06d}.txt").write_text(f"picture {number}")
    prepare([str(loose)], shards, samples_per_shard=-(-case.pictures // _SHARDS))
    jpeg_bytes = sum(path.stat().st_size for path in loose.glob("*.jpg"))
    decoders = {PIL: make_decoder("pil", case.workers)}
    if find_spec("nvidia.dali") is None:
        print("DALI is not installed: it is left out")
    else:
        for name in ("lanczos", "triangular"):
            decoders[f"ours, DALI {name}"] = make_decoder("dali", case.workers, filter=name)
    readers = {name: _Ours(case, shards, decoder) for name, decoder in decoders.items()}
    if find_spec("nvidia.dali") is not None and torch.cuda.is_available():
        mixed = make_decoder("dali", case.workers, device_id=0)
        readers["ours, DALI mixed"] = _Ours(case, shards, mixed, torch.device("cuda", 0))
    sides: dict[str, Callable[[], Batches]] = {name: one.epoch for name, one in readers.items()}
    sides[PLAIN] = lambda: _webdataset(case, shards)
    sides["DataLoader over files"] = lambda: _dataloader(case, loose)
    _check_alike({name: _thumbnails(side()) for name, side in sides.items()}, case.pictures)
    runs = alternate({name: _through(side) for name, side in sides.items()}, repeats)
    for reader in readers.values():
        reader.close()
    median = summary(runs, case.pictures, PLAIN)
    return {
        "size": list(size),
        "jpeg_bytes": jpeg_bytes / case.pictures,
        "runs": {name: [run._asdict() for run in side] for name, side in runs.items()},
        "median": median,
        "per_core": per_core(median),
    }


def per_core(median: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """By side: pictures a second of one CPU core's time, and in units of ours with PIL."""
    spent = {name: one["cpu_ms_per_sample"] for name, one in median.items()}
    return {
        name: {"pictures_per_s": 1000 / ms, "times_one_core_of_pil": spent[PIL] / ms}
        for name, ms in spent.items()
    }


class _Ours:
    """Plans steps, reads, decodes and stacks, as training does before the VAE."""

    def __init__(
        self,
        case: PictureCase,
        shards: Path,
        decoder: Decoder,
        device: torch.device | None = None,
    ) -> None:
        self._case, self._device = case, device or torch.device("cpu")
        self._index = build_index(str(shards / "*.tar"))
        self._reader = PictureReader(self._index, decoder, case.workers)

    def epoch(self) -> Batches:
        bucket = Bucket(self._case.resolution, self._case.resolution)
        for plan in plans(self._index.counts, self._case.batch, bucket):
            fetched = self._reader.fetch(plan.pictures, slice(None))
            found = [fetched.pixels[picture] for picture in plan.pictures]
            pixels_BHW3 = stack_pixels(found, self._device)
            captions = [fetched.captions[picture] for picture in plan.pictures]
            yield to_model_range(pixels_BHW3), captions
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def close(self) -> None:
        self._reader.close()


def plans(counts: Sequence[int], batch: int, bucket: Bucket) -> Iterator[StepPlan]:
    """The whole steps of an epoch in training's order."""
    order = Order([OrderedSource(counts)], seed=0)
    planner = Planner(order, [bucket], Mesh.single(), seed=0, global_batch_size=batch)
    for _ in range(sum(counts) // batch):
        yield planner.next()


def _webdataset(case: PictureCase, shards: Path) -> Batches:
    import webdataset

    data = (
        webdataset.WebDataset(_tars(shards), shardshuffle=_SHARDS)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map_tuple(_Transform(case.resolution), str)
        .batched(case.batch)
    )
    return iter(webdataset.WebLoader(data, batch_size=None, num_workers=case.workers))


def _tars(shards: Path) -> list[str]:
    return sorted(map(str, shards.glob("*.tar")))


class _LooseFiles(torch.utils.data.Dataset[tuple[Tensor, str]]):
    """As HY-SOAR's: a list of paths and captions; each picture is opened by its path."""

    def __init__(self, folder: Path, transform: _Transform) -> None:
        self._paths, self._transform = sorted(folder.glob("*.jpg")), transform
        self._captions = [path.with_suffix(".txt").read_text() for path in self._paths]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> tuple[Tensor, str]:
        with Image.open(self._paths[number]) as picture:
            return self._transform(picture.convert("RGB")), self._captions[number]


def _dataloader(case: PictureCase, loose: Path) -> Batches:
    data = _LooseFiles(loose, _Transform(case.resolution))
    return iter(
        torch.utils.data.DataLoader(data, case.batch, shuffle=True, num_workers=case.workers)
    )


@dataclass(frozen=True)
class _Transform:
    """As torchvision's Resize (Lanczos), CenterCrop, ToTensor and Normalize do it."""

    resolution: int

    def __call__(self, picture: Image.Image) -> Tensor:
        side = self.resolution
        scale = side / min(picture.size)
        if scale != 1:
            width, height = (round(edge * scale) for edge in picture.size)
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
        pixels_HW3 = torch.from_numpy(np.array(picture))
        pixels_3HW = pixels_HW3.permute(2, 0, 1).contiguous().float().div(255)
        return pixels_3HW.sub_(0.5).div_(0.5)


def _through(side: Callable[[], Batches]) -> Callable[[], None]:
    def run() -> None:
        for _ in side():
            pass

    return run


def _thumbnails(batches: Batches) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for pixels_B3HW, captions in batches:
        assert pixels_B3HW.dtype == torch.float32 and pixels_B3HW.is_contiguous()
        found.update(zip(captions, adaptive_avg_pool2d(pixels_B3HW, 8).cpu(), strict=True))
    return found


def _check_alike(found: dict[str, dict[str, Tensor]], count: int) -> None:
    plain = found[PLAIN]
    for name, pictures in found.items():
        if len(pictures) != count or pictures.keys() != plain.keys():
            raise RuntimeError(f"{name}: {len(pictures)} pictures of {count}")
        apart = max((pictures[key] - plain[key]).abs().mean().item() for key in plain)
        if apart > _ALIKE:
            raise RuntimeError(f"{name}: pixels differ from those of {PLAIN} by {apart:.3f}")


def photograph(width: int, height: int, seed: int) -> bytes:
    """A JPEG (quality 90, 4:2:0) of shades, texture at several scales, edges and noise."""
    random = np.random.default_rng(seed)
    y_HW, x_HW = np.mgrid[:height, :width].astype(np.float32)
    turns = random.uniform(3, 9, 2)
    shade_HW = np.sin(x_HW / width * turns[0]) * np.cos(y_HW / height * turns[1])
    pixels_HW3 = 127 + 90 * np.stack([shade_HW, -shade_HW, np.roll(shade_HW, height // 3, 0)], -1)
    for cell in (64, 16, 4):
        shape = (height // cell + 2, width // cell + 2)
        coarse = (Image.fromarray(c) for c in random.normal(0, 12, (3, *shape)).astype(np.float32))
        layers = [np.asarray(c.resize((width, height), Image.Resampling.BICUBIC)) for c in coarse]
        pixels_HW3 += np.stack(layers, -1)
    for _ in range(20):
        top, left = random.integers(height), random.integers(width)
        box = (slice(top, top + height // 6), slice(left, left + width // 6))
        pixels_HW3[box] = 0.4 * pixels_HW3[box] + 0.6 * random.integers(0, 256, 3)
    pixels_HW3 += random.normal(0, 3, pixels_HW3.shape)
    out = io.BytesIO()
    picture = Image.fromarray(pixels_HW3.clip(0, 255).astype(np.uint8))
    picture.save(out, "JPEG", quality=90, subsampling="4:2:0")
    return out.getvalue()


def measure_order(samples: int, shards: int, batch: int, repeats: int) -> dict[str, Any]:
    """Seconds to make an order and take a step: at an epoch's start, in its last whole step, and in
    the one that goes on into the next epoch."""
    counts = [samples * (n + 1) // shards - samples * n // shards for n in range(shards)]
    places = {"start": 0, "end": samples - batch, "across": samples - batch // 2}

    def resume(draws: int) -> Callable[[], object]:
        return lambda: Order([OrderedSource(counts)], 0, window=shards // 20 or 1).take(
            OrderState((draws,)), batch
        )

    runs = alternate({name: resume(draws) for name, draws in places.items()}, repeats)
    return {
        "samples": samples,
        "shards": shards,
        "seconds": {name: [run.seconds for run in side] for name, side in runs.items()},
        "median": {
            name: statistics.median(run.seconds for run in side) for name, side in runs.items()
        },
    }
