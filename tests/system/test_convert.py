"""Checkpoint to diffusers and pictures: what diffusers opens equals what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image

from soar_mega.backends.torch import TorchBackend
from soar_mega.checkpoint import store
from soar_mega.checkpoint.boxes import BoxedTensor
from soar_mega.checkpoint.errors import CheckpointError
from soar_mega.checkpoint.exporter import export
from soar_mega.checkpoint.importer import load_diffusers_transformer, load_weights
from soar_mega.checkpoint.weight_sources import ancestors, read_transformer_config
from soar_mega.data.tiny.pipeline import TinySizes, make_transformer
from soar_mega.data.tiny.text import load_text_parts
from soar_mega.data.tiny.vae import make_vae
from soar_mega.model.config import MMDiTConfig
from soar_mega.model.stage import MMDiTStage
from soar_mega.parallel.mesh import Mesh
from soar_mega.parallel.sharded import ShardedParameters
from soar_mega.passes import TextCondition
from soar_mega.sampling.generate import generate, one_by_one, start_noise
from soar_mega.sampling.pictures import grid, to_pictures
from tools import convert_to_diffusers
from tools import generate as generate_tool

SIZES = TinySizes(num_layers=3, attention_head_dim=8, dual_attention_layers=(0,))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline folder; the VAE is untrained."""
    folder = tmp_path_factory.mktemp("base") / "sd35"
    pipeline = StableDiffusion3Pipeline(
        transformer=make_transformer(SIZES, seed=1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_vae(1.3, 0.1).to(memory_format=torch.contiguous_format),
        **load_text_parts(SIZES.text),
    )
    pipeline.save_pretrained(folder)
    (folder / "original_weights_nobody_asked_for.safetensors").write_bytes(b"x")
    return folder


def new_stage(folder: Path) -> MMDiTStage:
    config = MMDiTConfig.from_diffusers(read_transformer_config(folder))
    return MMDiTStage(config, Mesh.single(), TorchBackend())


def as_tensors(stage: MMDiTStage, mesh: Mesh) -> dict[str, BoxedTensor]:
    """A training state: plain weights as they are, an EMA one higher."""
    sharded = ShardedParameters([stage], mesh)
    average = sharded.master_shard + 1
    tensors = {store.MODEL + "patch_embed.position": BoxedTensor.whole(stage.patch_embed.position)}
    for piece in sharded.fragments():
        own = slice(piece.shard_start, piece.shard_start + piece.stop - piece.start)
        for prefix, values in ((store.MODEL, sharded.master_shard), (store.EMA, average)):
            tensors[prefix + piece.name] = BoxedTensor.from_range(
                piece.layout, mesh, piece.start, piece.stop, values[own]
            )
    return tensors


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint."""
    mesh = Mesh.single()
    stage = new_stage(base)
    load_diffusers_transformer(base, [stage], mesh)
    extra = {
        "model": {"pretrained": str(base), "transformer": stage.config.to_diffusers()},
        "lineage": {
            "run": "tiny-sft",
            "step": 5,
            "objective": "flow_matching",
            "parents": [{"run": "tiny-pretrain", "step": 9, "hash": "x"}, {"pretrained": "tiny"}],
        },
    }
    folder = tmp_path_factory.mktemp("run")
    store.save(folder / "checkpoints", 5, as_tensors(stage, mesh), extra, mesh)
    return folder


def state(folder: Path) -> dict[str, torch.Tensor]:
    model = SD3Transformer2DModel.from_pretrained(folder)
    return dict(model.state_dict())


def test_export_opens_in_diffusers_and_equals_what_was_saved(
    base: Path, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "export"
    out.mkdir()
    convert_to_diffusers.main([str(run), str(out), "--weights", "plain"])
    pipeline = StableDiffusion3Pipeline.from_pretrained(out)
    theirs, ours = state(base / "transformer"), dict(pipeline.transformer.state_dict())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)

    # What save_pretrained writes, file by file and byte by byte, but for the README.
    def files(folder: Path) -> set[str]:
        return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}

    assert files(out) == files(base) - {"original_weights_nobody_asked_for.safetensors"} | {
        "README.md",
        "transformer/soar_mega_lineage.json",
    }
    for name in files(base) & files(out):
        if not name.startswith("transformer/diffusion"):
            assert (out / name).read_text("latin-1") == (base / name).read_text("latin-1"), name
    card = (out / "README.md").read_text()
    assert "| objective | flow_matching |" in card and "| checkpoint | step-00000005 |" in card
    assert "| **ancestor 1** | |\n| run | tiny-pretrain |\n| step | 9 |" in card
    assert "| **ancestor 2** | |\n| pretrained | tiny |" in card and "parents" not in card
    # A run that starts from the export knows them all.
    newest, *older = ancestors(out)
    assert (newest["run"], newest["step"], newest["weights"]) == ("tiny-sft", 5, "plain")
    assert newest["hash"] == store.identity(run / "checkpoints" / "step-00000005")
    assert [one.get("run") for one in older] == ["tiny-pretrain", None]
    assert not list(tmp_path.glob(".export*"))


def test_ema_shards_and_dtype(base: Path, run: Path, tmp_path: Path) -> None:
    out = export(run, tmp_path / "t", transformer_only=True, dtype="BF16", max_shard_bytes=60_000)
    index = json.loads((out / "diffusion_pytorch_model.safetensors.index.json").read_text())
    names = {p.name for p in out.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == names and len(names) > 1
    theirs = state(base / "transformer")
    model = SD3Transformer2DModel.from_pretrained(out, torch_dtype=torch.bfloat16)
    for key, value in model.state_dict().items():
        # diffusers keeps its table in fp32 whatever torch_dtype says.
        expected = (
            theirs[key] if key == "pos_embed.pos_embed" else (theirs[key] + 1).to(torch.bfloat16)
        )
        assert torch.equal(value, expected.to(value.dtype)), key


def test_position_table_is_not_rounded(base: Path, run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    out = export(run, tmp_path / "t", transformer_only=True, dtype="F16")
    written = load_file(out / "diffusion_pytorch_model.safetensors")
    table = state(base / "transformer")["pos_embed.pos_embed"]
    assert torch.equal(written["pos_embed.pos_embed"], table)
    assert written["proj_out.weight"].dtype == torch.float16


def test_weights_come_back_from_run_checkpoint_and_export(
    base: Path, run: Path, tmp_path: Path
) -> None:
    mesh = Mesh.single()
    alone = export(run, tmp_path / "alone", transformer_only=True)
    stages: list[dict[str, torch.Tensor]] = []
    for source in (run, run / "checkpoints" / "step-00000005", alone):
        stage = new_stage(base)
        record = load_weights(source, [stage], mesh, "ema")
        assert ("pretrained" in record[0]) == (source == alone)
        stages.append(stage.state_dict())
    for other in stages[1:]:
        assert all(torch.equal(stages[0][key], other[key]) for key in stages[0])
    plain = new_stage(base)
    load_weights(run, [plain], mesh, "plain")
    assert torch.equal(
        plain.state_dict()["head.projection.bias"] + 1, stages[0]["head.projection.bias"]
    )


def test_export_refuses_and_leaves_nothing(base: Path, run: Path, tmp_path: Path) -> None:
    def refused(*args: Any, **kwargs: Any) -> str:
        with pytest.raises(CheckpointError) as error:
            export(*args, **kwargs)
        return str(error.value)

    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("")
    assert "is not empty" in refused(run, full)
    assert "--transformer-only" in refused(run, tmp_path / "out", base=full)
    assert "does not exist" in refused(tmp_path / "absent", tmp_path / "out")
    broken = tmp_path / "base"
    broken.mkdir()
    (broken / "model_index.json").write_text((base / "model_index.json").read_text())
    assert str(broken / "vae") in refused(run, tmp_path / "out", base=broken)
    mesh = Mesh.single()
    extra = {"model": {"pretrained": str(base), "transformer": read_transformer_config(base)}}
    bare = store.save(tmp_path / "c", 1, {"x": BoxedTensor.whole(torch.ones(1))}, extra, mesh).path
    assert "ema.proj" not in refused(bare, tmp_path / "out")
    assert "ema.blocks.2.image_mlp.down.bias" in refused(bare, tmp_path / "out")
    with pytest.raises(SystemExit, match=r"error: .* is not empty"):
        convert_to_diffusers.main([str(run), str(full)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "c", "full"]


@pytest.mark.parametrize("guidance", [4.5, 1.0])
def test_latents_equal_the_pipelines(base: Path, guidance: float) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    text, no_text, pooled, no_pooled = pipeline.encode_prompt(
        prompt=(words := ["a red 3", "374 on yellow paper", "top left"]),
        prompt_2=words,
        prompt_3=words,
        max_sequence_length=12,
    )
    latents = start_noise([5, 6, 7], (16, 8, 12))
    expected = pipeline(
        prompt_embeds=text,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=no_text,
        negative_pooled_prompt_embeds=no_pooled,
        latents=latents.clone(),
        height=64,
        width=96,
        num_inference_steps=6,
        guidance_scale=guidance,
        output_type="latent",
    ).images
    stage = new_stage(base)
    load_diffusers_transformer(base, [stage], Mesh.single())
    for batch in (None, 2):
        ours = generate(
            one_by_one(stage),
            TextCondition(text, pooled),
            TextCondition(no_text[:1], no_pooled[:1]),
            base / "scheduler",
            latents_BCHW=latents,
            num_inference_steps=6,
            guidance_scale=guidance,
            batch_size=batch,
        )
        assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tool would draw in bf16 on the GPU")
def test_the_tool_draws_what_the_exported_pipeline_draws(run: Path, tmp_path: Path) -> None:
    prompts = ["the number 3 in red ink", "the number 74 in blue ink", "12"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n\n")
    common = ["--steps", "3", "--seed", "8", "--batch", "2", "--max-sequence-length", "12"]
    asked = ["--prompts-file", str(tmp_path / "prompts.txt"), *common]
    generate_tool.main([str(run), *asked, "--out", str(tmp_path / "ours")])
    exported = export(run, tmp_path / "export")
    pipeline = StableDiffusion3Pipeline.from_pretrained(exported)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        prompts,
        latents=start_noise([8, 9, 10], (16, 8, 8)),
        num_inference_steps=3,
        guidance_scale=4.5,
        max_sequence_length=12,
    ).images
    for number, picture in enumerate(pictures):
        drawn = np.asarray(Image.open(tmp_path / "ours" / f"{number:04d}.png"), dtype=int)
        assert drawn.shape == (64, 64, 3) and drawn.std() > 1
        assert np.abs(drawn - np.asarray(picture, dtype=int)).max() <= 1
    listed = json.loads((tmp_path / "ours" / "pictures.json").read_text())
    assert [(x["prompt"], x["seed"]) for x in listed] == list(zip(prompts, (8, 9, 10), strict=True))
    assert Image.open(tmp_path / "ours" / "grid.png").size == (130, 130)
    # The exported folder itself, and a folder that is neither.
    generate_tool.main([str(exported), *asked, "--out", str(tmp_path / "again")])
    for number in range(3):
        first, second = (tmp_path / d / f"{number:04d}.png" for d in ("ours", "again"))
        assert first.read_bytes() == second.read_bytes()
    with pytest.raises(SystemExit, match="is not empty"):
        generate_tool.main([str(run), "--prompt", "x", "--out", str(tmp_path / "ours")])
    with pytest.raises(SystemExit, match="no committed checkpoint"):
        generate_tool.main([str(tmp_path), "--prompt", "x", "--out", str(tmp_path / "new")])


def test_start_noise_belongs_to_the_seed() -> None:
    together, alone = start_noise([3, 9], (16, 4, 6)), start_noise([9], (16, 4, 6))
    assert torch.equal(together[1:], alone)
    assert not torch.equal(together[:1], alone)


def test_grid_shows_every_picture() -> None:
    pixels = torch.stack([torch.full((3, 4, 6), value) for value in (-1.0, 0.0, 1.5)])
    pictures = to_pictures(pixels)
    assert [p.getpixel((0, 0))[0] for p in pictures] == [0, 128, 255]  # type: ignore[index]
    sheet = grid(pictures, columns=2)
    assert sheet.size == (14, 10)
    assert sheet.getpixel((8, 0)) == (128, 128, 128)
