"""The embedded default: a tiny Stable Diffusion 3.5 pipeline and shards of digit pictures.

The pipeline folder has the layout and the classes of the published ones, so whatever works on it
works on them. Its VAE and text encoders come trained; its transformer starts from random weights.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from soar_mega.data.libraries import quiet_libraries
from soar_mega.data.tiny import digits
from soar_mega.data.tiny import text as tiny_text
from soar_mega.data.tiny import vae as tiny_vae

SHARD_PICTURES = 1000
_CALIBRATION_PICTURES = 256


@dataclass(frozen=True)
class TinySizes:
    """Sizes of the tiny pipeline; the VAE's are fixed by its trained weights.

    Attributes:
        num_layers: Blocks of the transformer.
        num_attention_heads: Heads of its attention; its width is this times the head's.
        attention_head_dim: Width of a head.
        dual_attention_layers: Blocks with a second, image-only attention.
        pos_embed_max_size: Side of the stored position table, in image tokens. A token's step is
            4 / this: 16 tells the four columns of a picture so weakly apart that the same
            training reads 41 % of its digits, against 76 % with 8.
        text: Sizes of the text encoders; other than the defaults are trained when made.
    """

    num_layers: int = 8
    num_attention_heads: int = 4
    attention_head_dim: int = 24
    dual_attention_layers: tuple[int, ...] = (0, 1, 2, 3)
    pos_embed_max_size: int = 8
    text: tiny_text.TextSizes = field(default_factory=tiny_text.TextSizes)

    def __post_init__(self) -> None:
        outside = [block for block in self.dual_attention_layers if block >= self.num_layers]
        if outside:
            raise ValueError(
                f"dual_attention_layers={self.dual_attention_layers}: block {outside[0]} is not "
                f"among num_layers={self.num_layers}; blocks count from 0."
            )


def make_transformer(sizes: TinySizes, seed: int) -> Any:
    """An SD3 transformer with random weights, none of them zero or exactly one.

    Nothing is at its usual neutral start (closed gates, zero output, norm weights of one), because
    comparisons of two implementations start from these weights and shall see every path.
    """
    from diffusers import SD3Transformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=digits.PICTURE_SIZE // 8,
            patch_size=2,
            in_channels=tiny_vae.LATENT_CHANNELS,
            out_channels=tiny_vae.LATENT_CHANNELS,
            num_layers=sizes.num_layers,
            attention_head_dim=sizes.attention_head_dim,
            num_attention_heads=sizes.num_attention_heads,
            joint_attention_dim=sizes.text.t5_width,
            caption_projection_dim=sizes.num_attention_heads * sizes.attention_head_dim,
            pooled_projection_dim=2 * sizes.text.clip_width,
            pos_embed_max_size=sizes.pos_embed_max_size,
            dual_attention_layers=sizes.dual_attention_layers,
            qk_norm="rms_norm",
        )
        for name, parameter in transformer.named_parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                torch.nn.init.normal_(parameter, std=fan_in**-0.5)
            elif ".norm_" in name and name.endswith("weight"):
                torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
            else:
                torch.nn.init.normal_(parameter, std=0.05)
    return transformer.eval()


def make_pipeline(sizes: TinySizes, seed: int) -> Any:
    """A ``StableDiffusion3Pipeline`` whose VAE and text encoders are trained.

    Raises:
        ValueError: If the sizes do not fit together.
        FileNotFoundError: If the shipped weights are missing.
    """
    quiet_libraries()
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    if sizes.text == tiny_text.TextSizes():
        text_parts = tiny_text.load_text_parts(sizes.text)
    else:
        text_parts = tiny_text.train_text_parts(sizes.text, seed)
    vae = tiny_vae.load_vae()
    scenes = digits.training_scenes(_CALIBRATION_PICTURES, seed)
    tiny_vae.calibrate(vae, digits.draw_many(scenes, digits.load_scans("generator"), seed))
    return StableDiffusion3Pipeline(
        transformer=make_transformer(sizes, seed),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        **text_parts,
    )


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """Writes a pipeline folder that ``StableDiffusion3Pipeline.from_pretrained`` opens."""
    pipeline.vae.to(memory_format=torch.contiguous_format)
    pipeline.save_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2"):
        # Also in CLIP's old form, vocab.json and merges.txt, for readers that know no other.
        getattr(pipeline, name).backend_tokenizer.model.save(str(folder / name))


class Captioned(Protocol):
    """What a picture shows, in words and as plain values."""

    @property
    def caption(self) -> str:
        """The sentence."""

    def to_json(self) -> dict[str, Any]:
        """The truth behind it."""


def write_shards(
    folder: Path,
    prefix: str,
    scenes: Sequence[Captioned],
    pictures_BHWC: np.ndarray,
    pictures_per_shard: int = SHARD_PICTURES,
) -> list[Path]:
    """Writes ``folder/prefix-000000.tar`` and so on; older shards of that prefix are removed.

    A sample has the members KEY.png, KEY.txt (the caption) and KEY.json (caption and truth). The
    bytes depend on nothing but the arguments.

    Returns:
        The shards, in order.
    """
    import webdataset

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{prefix}-*.tar"):
        old.unlink()
    pattern = str(folder / f"{prefix}-%06d.tar").replace("\\", "/")
    with webdataset.ShardWriter(
        pattern, maxcount=pictures_per_shard, verbose=0, mtime=0, user="soar", group="soar"
    ) as writer:
        for number, (scene, picture) in enumerate(zip(scenes, pictures_BHWC, strict=True)):
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, format="PNG")
            writer.write(
                {
                    "__key__": f"{prefix}{number:06d}",
                    "png": buffer.getvalue(),
                    "json": scene.to_json(),
                    "txt": scene.caption,
                }
            )
    return sorted(folder.glob(f"{prefix}-*.tar"))


def make_tiny(
    out: Path,
    *,
    seed: int = 0,
    train_pictures: int = 4096,
    held_out_pictures: int = 256,
    sizes: TinySizes | None = None,
) -> None:
    """Writes the pipeline, the shards and the held-out prompts.

    ``out/sd35`` is the pipeline; ``out/shards/train-*.tar`` show numbers and scans for training;
    ``out/shards/heldout-*.tar`` show held-out numbers in scans seen by neither the training set nor
    the digit reader; ``out/held_out_prompts.txt`` and ``.json`` are the captions of the latter.

    Args:
        out: Folder to write into; files of an earlier call are replaced.
        seed: Of scenes, choice of scans and transformer weights; the splits do not depend on it.
        train_pictures: Pictures in the training shards.
        held_out_pictures: Pictures in the held-out shards, and held-out prompts.
        sizes: Of the pipeline; default ``TinySizes()``.

    Raises:
        ValueError: If a count is not positive, the sizes do not fit together, or ``out/shards``
            holds tars of another making.
    """
    for name, count in (
        ("train_pictures", train_pictures),
        ("held_out_pictures", held_out_pictures),
    ):
        if count < 1:
            raise ValueError(f"{name}={count}: must be at least 1.")
    if any((out / "shards").glob("*.tar")) and not (out / "held_out_prompts.json").exists():
        raise ValueError(
            f"{out / 'shards'} holds tars that this tool did not make: choose another."
        )
    save_pipeline(make_pipeline(sizes or TinySizes(), seed), out / "sd35")

    train = digits.training_scenes(train_pictures, seed)
    held_out = digits.held_out_scenes(held_out_pictures, seed)
    # A seed of its own, or the n-th picture of both sets would choose scans alike.
    for prefix, scenes, role, picture_seed in (
        ("train", train, "generator", 2 * seed),
        ("heldout", held_out, "held_out", 2 * seed + 1),
    ):
        pictures = digits.draw_many(scenes, digits.load_scans(role), picture_seed)
        write_shards(out / "shards", prefix, scenes, pictures)
    lines = [scene.caption + "\n" for scene in held_out]
    (out / "held_out_prompts.txt").write_text("".join(lines), encoding="utf-8")
    truth = json.dumps([scene.to_json() for scene in held_out], indent=1)
    (out / "held_out_prompts.json").write_text(truth + "\n", encoding="utf-8")
