"""The folder of the benchmark ``handwriting``: a tiny pipeline, raw and curated pages, prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from soar_mega.data.libraries import quiet_libraries
from soar_mega.data.tiny import digits, page_text, pages
from soar_mega.data.tiny import vae as tiny_vae
from soar_mega.data.tiny.pipeline import (
    TinySizes,
    make_transformer,
    save_pipeline,
    write_shards,
)

_ASSETS = Path(__file__).resolve().parents[3] / "assets"
SHIPPED_VAE = _ASSETS / "handwriting_vae.safetensors"
SHIPPED_BASE = _ASSETS / "handwriting_base.safetensors"
_CALIBRATION_PICTURES = 256
SIZES = TinySizes(num_layers=8, dual_attention_layers=(), text=page_text.SIZES)


def train_vae(
    *,
    seed: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    report: Callable[[int, float, float], None],
) -> Any:
    """The VAE of single-ink pictures, trained on: pages of several inks, half of them raw.

    Without this it gives all digits of a page one ink.
    """
    scans = digits.load_scans("generator")

    def pictures(step: int) -> np.ndarray:
        some = pages.make_pages(batch_size, [seed, step], held_out=False)
        half = batch_size // 2
        raw = pages.draw_pages(some[half:], scans, step, raw=True)
        return np.concatenate([pages.draw_pages(some[:half], scans, step), raw])

    return tiny_vae.descend(tiny_vae.load_vae(), pictures, seed, steps, learning_rate, report)


def make_pipeline() -> Any:
    """A ``StableDiffusion3Pipeline`` for pages, pretrained on raw ones.

    Raises:
        FileNotFoundError: Shipped weights are missing.
    """
    quiet_libraries()
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from safetensors.torch import load_file

    vae = tiny_vae.load_vae(SHIPPED_VAE)
    some = pages.make_pages(_CALIBRATION_PICTURES, 0, held_out=False)
    tiny_vae.calibrate(vae, pages.draw_pages(some, digits.load_scans("generator"), 0))
    if not SHIPPED_BASE.is_file():
        raise FileNotFoundError(
            f"No pretrained transformer at {SHIPPED_BASE}. assets/README.md says how it is made."
        )
    transformer = make_transformer(SIZES, seed=0)
    weights = {name: value.float() for name, value in load_file(SHIPPED_BASE).items()}
    transformer.load_state_dict(weights)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        **page_text.load_text_parts(),
    )


def make_handwriting(
    out: Path,
    *,
    seed: int = 0,
    raw_pages: int = 24576,
    curated_pages: int = 4096,
    held_out_pages: int = 512,
) -> None:
    """Writes the pipeline, three sets of shards and the prompts of the benchmark.

    ``out/sd35`` is the pipeline. ``out/shards/raw-*.tar`` (with seed 0) are what it was pretrained
    on, ``curated-*.tar`` are for SFT and SOAR. ``heldout-*.tar`` hold combinations neither has, in
    scans that neither the training pages nor the digit reader saw; ``out/prompts.txt`` are the
    captions of the latter.

    Args:
        out: Folder to write into; files of an earlier call are replaced.
        seed: Of pages and scans; the splits do not depend on it.
        raw_pages, curated_pages, held_out_pages: Pictures in each set; 0: it is not written.

    Raises:
        ValueError: A count is negative.
    """
    counts = {"raw_pages": raw_pages, "curated_pages": curated_pages}
    for name, count in (counts | {"held_out_pages": held_out_pages}).items():
        if count < 0:
            raise ValueError(f"{name}={count}: must be at least 0.")
    save_pipeline(make_pipeline(), out / "sd35")
    generator, held_out = digits.load_scans("generator"), digits.load_scans("held_out")
    for place, (name, count, scans) in enumerate(
        (
            ("raw", raw_pages, generator),
            ("curated", curated_pages, generator),
            ("heldout", held_out_pages, held_out),
        )
    ):
        if count == 0:
            continue
        some = pages.make_pages(count, [seed, place], held_out=name == "heldout")
        pictures = pages.draw_pages(some, scans, 3 * seed + place, raw=name == "raw")
        write_shards(out / "shards", name, some, np.asarray(pictures))
        if name == "heldout":
            lines = [page.caption + "\n" for page in some]
            (out / "prompts.txt").write_text("".join(lines), encoding="utf-8")
