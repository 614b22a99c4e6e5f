"""Sets that hold every kind of odd sample, and what training made of them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from soar_mega.config import Config, ConfigError
from soar_mega.data.errors import DataError
from soar_mega.launch.signals import Signals
from soar_mega.passes import LossTerms, MicroBatch
from soar_mega.training import step as step_module
from soar_mega.training import trainer
from tests.runs import place, train
from tests.unit.decode_cases import encoded, exif_of, photo, png_bomb
from tests.unit.test_data_index import write_tar

SIDE = 64


class Case(NamedTuple):
    """A sample as it is, and its twin: what a picture and caption without fault would be.

    Attributes:
        image: File extension and bytes; the twin's are ``plain``.
        caption: None where there is no member.
        kind: Of the fault; empty where the sample is odd but good, and means the same as its twin.
    """

    image: tuple[str, bytes]
    plain: tuple[str, bytes]
    caption: bytes | None = b"a picture"
    kind: str = ""


def corpus() -> dict[str, Case]:
    """By key. The last are plain JPEGs that must be resized, so that a decoder has some work."""
    sources = iter(photo(SIDE, SIDE, seed) for seed in range(100))

    def bad(image: tuple[str, bytes] | None, kind: str, caption: bytes | None = b"x") -> Case:
        plain = ("png", encoded(next(sources)))
        return Case(image or plain, plain, caption, kind)

    def odd(extension: str, data: bytes, pixels: Any) -> Case:
        return Case((extension, data), ("png", encoded(pixels)))

    jpeg = encoded(next(sources), "JPEG")
    other = Image.fromarray(next(sources))
    cases = {
        "nothing": bad(("jpg", b""), "not an image"),
        "cut": bad(("jpg", jpeg[: len(jpeg) // 2]), "truncated or damaged image"),
        "text": bad(("jpg", b"no picture at all"), "not an image"),
        "gif": bad(("png", encoded(other, "GIF")), "not an image"),
        "bomb": bad(("png", png_bomb(60_000, 60_000)), "too many pixels"),
        "mute": bad(None, "no caption", None),
        "latin": bad(None, "caption not UTF-8", "caf\xe9".encode("latin-1")),
    }
    cmyk = encoded(Image.fromarray(next(sources)).convert("CMYK"), "JPEG")
    grey = next(sources)[..., 0]
    clear = np.dstack([next(sources), next(sources)[..., 1]])
    white = Image.new("RGBA", (SIDE, SIDE), "white")
    frames = [Image.fromarray(next(sources)) for _ in range(2)]
    moving = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    misnamed, turned = next(sources), next(sources)
    cases |= {
        "cmyk": odd("jpg", cmyk, Image.open(io.BytesIO(cmyk)).convert("RGB")),
        "grey16": odd("png", encoded(grey.astype(np.uint16) * 257), grey),
        "clear": odd(
            "png",
            encoded(clear),
            Image.alpha_composite(white, Image.fromarray(clear)).convert("RGB"),
        ),
        "moving": odd("webp", moving, frames[0]),
        "misnamed": odd("jpg", encoded(misnamed), misnamed),
        "turned": odd("png", encoded(turned, exif=exif_of(6)), np.rot90(turned, -1).copy()),
    }
    for number in range(7):
        plain = ("jpg", encoded(photo(80, 96, 200 + number), "JPEG"))
        cases[f"plain{number}"] = Case(plain, plain)
    return cases


def write_cases(path: Path, cases: dict[str, Case], *, whole: bool = False) -> Path:
    """A tar of the cases; ``whole``: of their twins."""
    members = []
    for key, case in cases.items():
        extension, data = case.plain if whole else case.image
        members.append((f"{key}.{extension}", data))
        caption = b"a picture" if whole else case.caption
        if caption is not None:
            members.append((f"{key}.txt", caption))
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_tar(path, members)


def plain_cases(count: int, first: int = 0) -> dict[str, Case]:
    """Samples without fault."""
    cases = {}
    for number in range(first, first + count):
        image = ("png", encoded(photo(SIDE, SIDE, number)))
        cases[f"s{number:03d}"] = Case(image, image, f"caption {number}".encode())
    return cases


class Slot(NamedTuple):
    """What a slot of a step came to."""

    clean_CHW: Tensor
    weight: float
    loss: float
    counted: float


@contextmanager
def recorded() -> Iterator[list[dict[int, Slot]]]:
    """The slots of this process's part of each step that runs inside."""
    steps: list[dict[int, Slot]] = []
    original = step_module.loss_metrics

    def recording(
        terms: Sequence[LossTerms], microbatches: Sequence[MicroBatch], *rest: Any
    ) -> dict[str, float]:
        slots = {}
        for term, micro in zip(terms, microbatches, strict=True):
            for row, slot in enumerate(micro.slots_B.tolist()):
                numbers = (micro.weight_B[row], term.base_B[row], term.base_counted_B[row])
                slots[slot] = Slot(micro.clean_BCHW[row].clone(), *map(float, numbers))
        steps.append(slots)
        return original(terms, microbatches, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "loss_metrics", recording)
        yield steps


def bad_lines(run_dir: Path) -> list[tuple[int, str, str]]:
    """Step, key and kind of everything that the ranks listed, sorted; twice if listed twice."""
    records = [
        json.loads(line)
        for path in run_dir.glob("bad_samples/rank-*.jsonl")
        for line in path.read_text().splitlines()
    ]
    return sorted((record["step"], record["key"], record["kind"]) for record in records)


def keys_of(run_dir: Path) -> dict[int, dict[int, str]]:
    """Step -> slot -> key; the shards' names are left out. Needs logging.sample_ids."""
    found: dict[int, dict[int, str]] = {}
    for path in run_dir.glob("sample_ids/rank-*.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            slots = found.setdefault(record["step"], {})
            slots.update({slot: key for slot, _, _, key in record["samples"]})
    return found


def refusal(config: Config) -> str:
    """The message that ends a run; empty where it goes to its end."""
    try:
        train(config)
    except (ConfigError, DataError) as error:
        return str(error)
    return ""


def refusal_at_start(config: Config) -> str:
    """As the command meets it, with what ranks agree on; on the processes of the default group."""

    class Environment:
        @staticmethod
        def read(variables: object) -> Any:
            return place()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "start_processes", lambda *arguments: None)
        patch.setattr(trainer, "ProcessEnvironment", Environment)
        with pytest.raises(ConfigError) as caught:
            trainer.train(config, Signals())
    return str(caught.value)


def only_differ_in(one: dict[int, Slot], other: dict[int, Slot], slots: set[int]) -> None:
    """Every other slot has the same latents, weight and loss, bit for bit."""
    assert one.keys() == other.keys()
    for slot in one.keys() - slots:
        left, right = one[slot], other[slot]
        assert torch.equal(left.clean_CHW, right.clean_CHW), slot
        assert left[1:] == right[1:], slot
