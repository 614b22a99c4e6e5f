"""The frozen encoders against diffusers' own pipeline, on tiny models of the real classes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from soar_mega.data.buckets import Bucket
from soar_mega.data.decode.interface import View
from soar_mega.data.decode.model_range import to_model_range
from soar_mega.data.decode.pil import PilDecoder, decode_one
from soar_mega.data.encoders import FolderError, FrozenEncoders, check_folder, sample_latents
from soar_mega.data.loader import StepLoader
from soar_mega.data.model_folder import ModelFacts
from soar_mega.data.online import OnlineRows
from soar_mega.data.order import Order, OrderedSource
from soar_mega.data.plan import Planner
from soar_mega.data.shards.index import ShardIndex, build_index
from soar_mega.data.validation import load_validation
from soar_mega.parallel.mesh import Mesh
from soar_mega.rng import Purpose, normal
from tests.unit.test_data_index import write_shards

CLIP_LENGTH, T5_WIDTH = 12, 96
PROMPTS = [
    "the number 374 in red ink",
    "",
    "caption 7",
    "on yellow paper, top left, and so on until it does not fit into the window any more",
    "a",
    "caption 8 b",
    "red",
    "x y z",
]


def tiny_clip_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(33, 127)]
    words = [*letters, *(f"{x}</w>" for x in letters), "re", "red</w>"]
    vocabulary = {word: n for n, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=CLIP_LENGTH
    )


def tiny_t5_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram
    from tokenizers.pre_tokenizers import Metaspace
    from transformers import T5TokenizerFast

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *(chr(c) for c in range(33, 127)), "red"]
    tokenizer = Tokenizer(Unigram([(piece, -1.0 - len(piece) % 3) for piece in pieces], unk_id=2))
    tokenizer.pre_tokenizer = Metaspace()
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T5TokenizerFast", "extra_ids": 0})
    )
    return T5TokenizerFast.from_pretrained(folder)


def build_pipeline(folder: Path) -> Any:
    """A StableDiffusion3Pipeline of random tiny models, saved to ``folder / 'sd3'``."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    torch.manual_seed(0)
    clips = []
    for width in (32, 48):
        config = CLIPTextConfig(
            vocab_size=192,
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CLIP_LENGTH,
            projection_dim=width,
            bos_token_id=190,
            eos_token_id=191,
            pad_token_id=1,
        )
        clips.append(CLIPTextModelWithProjection(config).eval())
    t5 = T5EncoderModel(
        T5Config(vocab_size=100, d_model=T5_WIDTH, d_kv=16, d_ff=64, num_layers=2, num_heads=4)
    ).eval()
    vae = AutoencoderKL(
        latent_channels=16,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    ).eval()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=80,
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clips[0],
        text_encoder_2=clips[1],
        text_encoder_3=t5,
        tokenizer=tiny_clip_tokenizer(folder / "clip"),
        tokenizer_2=tiny_clip_tokenizer(folder / "clip2"),
        tokenizer_3=tiny_t5_tokenizer(folder / "t5"),
    )
    pipeline.save_pretrained(folder / "sd3")
    return pipeline


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, FrozenEncoders]:
    folder = tmp_path_factory.mktemp("tiny")
    pipeline = build_pipeline(folder)
    return pipeline, folder / "sd3", FrozenEncoders.load(folder / "sd3")


def pipeline_condition(pipeline: Any, prompts: list[str], length: int) -> tuple[Any, Any]:
    with torch.no_grad():
        text, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
    return text, pooled


@pytest.mark.parametrize("length", [5, 20])
def test_prompts_equal_the_pipelines_bit_for_bit(built: Any, length: int) -> None:
    pipeline, _, encoders = built
    text_BTE, pooled_BV = pipeline_condition(pipeline, PROMPTS, length)
    ours = encoders.encode_prompts(PROMPTS, length)
    assert ours.text_BTE.shape == (8, CLIP_LENGTH + length, T5_WIDTH)
    assert torch.equal(ours.text_BTE, text_BTE) and torch.equal(ours.pooled_BV, pooled_BV)
    assert len({tuple(row.tolist()) for row in ours.text_BTE.flatten(1)}) == len(PROMPTS)


def test_prompts_without_t5_equal_the_pipelines(built: Any, tmp_path: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    _, folder, _ = built
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        folder, text_encoder_3=None, tokenizer_3=None
    )
    pipeline.save_pretrained(tmp_path / "sd3")
    encoders = FrozenEncoders.load(tmp_path / "sd3")
    text_BTE, pooled_BV = pipeline_condition(pipeline, PROMPTS, 7)
    ours = encoders.encode_prompts(PROMPTS, 7)
    assert torch.equal(ours.text_BTE, text_BTE) and torch.equal(ours.pooled_BV, pooled_BV)
    assert torch.count_nonzero(ours.text_BTE[:, CLIP_LENGTH:]) == 0


def test_bf16_text_encoders_and_fp32_vae(built: Any) -> None:
    _, folder, plain = built
    encoders = FrozenEncoders.load(folder, dtype=torch.bfloat16)
    text = encoders.encode_prompts(PROMPTS, 5)
    assert text.text_BTE.dtype == text.pooled_BV.dtype == torch.bfloat16
    reference = plain.encode_prompts(PROMPTS, 5).text_BTE
    torch.testing.assert_close(text.text_BTE.float(), reference, atol=0.1, rtol=0.1)
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(encoders.encode_images(pixels)[0], plain.encode_images(pixels)[0])


def test_bits_do_not_depend_on_the_company(built: Any) -> None:
    _, _, encoders = built
    prompts = [f"caption {n}" for n in range(11)]
    whole = encoders.encode_prompts(prompts, 9)
    pixels = torch.rand(11, 3, 16, 16) * 2 - 1
    mean, logvar = encoders.encode_images(pixels)
    for rows in ([3], [10, 2], [9, 0, 5, 1]):
        part = encoders.encode_prompts([prompts[row] for row in rows], 9)
        assert torch.equal(part.text_BTE, whole.text_BTE[rows])
        assert torch.equal(part.pooled_BV, whole.pooled_BV[rows])
        part_mean, part_logvar = encoders.encode_images(pixels[rows])
        assert torch.equal(part_mean, mean[rows]) and torch.equal(part_logvar, logvar[rows])


def test_images_equal_the_vaes_posterior_and_decode_inverts_the_scaling(built: Any) -> None:
    pipeline, _, encoders = built
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels).latent_dist
    mean, logvar = encoders.encode_images(pixels)
    assert mean.shape == (2, *encoders.latent_shape(32))
    torch.testing.assert_close(mean, posterior.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logvar, posterior.logvar, atol=1e-5, rtol=1e-5)
    noise = torch.randn_like(mean)
    drawn = sample_latents(mean, logvar, noise)
    torch.testing.assert_close(drawn, mean + logvar.exp().sqrt() * noise)
    latents = encoders.normalise(drawn)
    torch.testing.assert_close(latents, (drawn - 0.06) * 1.5)
    with torch.no_grad():
        expected = pipeline.vae.decode(drawn).sample.clamp(-1, 1)
    torch.testing.assert_close(encoders.decode(latents), expected, atol=1e-5, rtol=1e-5)
    assert encoders.shift == 3.0


def test_resolution_must_fit_the_vae(built: Any) -> None:
    with pytest.raises(ValueError, match=r"data\.resolution=60.*multiple of.* 8; the next is 64"):
        built[2].latent_shape(60)


@pytest.mark.parametrize(
    ("remove", "words"),
    [
        ("model_index.json", "no model_index.json"),
        ("vae", r"missing vae/\."),
        ("text_encoder_2/model.safetensors", r"missing text_encoder_2/\*\.safetensors"),
        ("tokenizer/tokenizer_config.json", "missing tokenizer/tokenizer_config.json"),
        ("scheduler/scheduler_config.json", "missing scheduler/scheduler_config.json"),
        ("transformer/config.json", "missing transformer/config.json"),
        ("text_encoder_3", r"missing text_encoder_3/\."),
    ],
)
def test_incomplete_folders_are_named(built: Any, tmp_path: Path, remove: str, words: str) -> None:
    folder = tmp_path / "sd3"
    shutil.copytree(built[1], folder)
    target = folder / remove
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(FolderError, match=rf"^model\.pretrained=.*{words}"):
        FrozenEncoders.load(folder)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="no such folder"):
        check_folder(tmp_path / "none")
    index = tmp_path / "model_index.json"
    index.write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(FolderError, match="names the pipeline 'FluxPipeline'"):
        check_folder(tmp_path)
    index.write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    with pytest.raises(FolderError, match=r"transformer \(not in model_index\.json\)"):
        check_folder(tmp_path)
    index.write_text("{")
    with pytest.raises(FolderError, match="cannot be read"):
        check_folder(tmp_path)


def test_a_component_that_does_not_load_is_named(built: Any, tmp_path: Path) -> None:
    folder = tmp_path / "sd3"
    shutil.copytree(built[1], folder)
    config = folder / "text_encoder" / "config.json"
    record = json.loads(config.read_text())
    config.write_text(json.dumps({**record, "num_attention_heads": 5}))
    with pytest.raises(FolderError, match="text_encoder does not load as CLIPText"):
        FrozenEncoders.load(folder)
    config.write_text("{")
    with pytest.raises(FolderError, match=r"text_encoder/config\.json cannot be read"):
        FrozenEncoders.load(folder)
    del record["hidden_size"]
    config.write_text(json.dumps(record))
    with pytest.raises(FolderError, match=r"text_encoder/config\.json has no 'hidden_size'"):
        ModelFacts.read(folder)


def test_facts_of_the_json_are_those_of_the_models(built: Any) -> None:
    pipeline, folder, encoders = built
    facts = ModelFacts.read(folder)
    config = pipeline.vae.config
    assert facts.latent_channels == config.latent_channels
    assert facts.downsampling == pipeline.vae_scale_factor
    assert (facts.scaling_factor, facts.shift_factor) == (1.5, 0.06)
    assert facts.shift == pipeline.scheduler.config.shift
    assert facts.latent_shape(32) == tuple(
        encoders.encode_images(torch.zeros(1, 3, 32, 32))[0][0].shape
    )
    condition = encoders.encode_prompts(["a"], 9)
    assert condition.text_BTE.shape[1:] == (facts.text_tokens(9), facts.text_width)
    assert condition.pooled_BV.shape[1] == facts.pooled_width
    clips = condition.text_BTE[:, : facts.clip_tokens]
    assert not clips[..., facts.clip_width :].any() and clips[..., facts.clip_width - 1].all()
    assert facts.has_t5 and vars(facts).items() <= vars(encoders).items()


def pixels_of(index: ShardIndex, samples: Iterable[int]) -> torch.Tensor:
    decoded = [decode_one(index.read_image(s), View(32, 32), index.where(s)) for s in samples]
    return to_model_range(torch.stack([torch.from_numpy(pixels) for pixels in decoded]))


def test_loader_and_validation_with_the_real_classes(built: Any, tmp_path: Path) -> None:
    """The whole chain: tar, picture, VAE, posterior noise by the contract, text."""
    _, _, encoders = built
    index = build_index(str(write_shards(tmp_path, [5]) / "*.tar"))
    order = Order([OrderedSource(index.counts)], 3)
    planner = Planner(order, [Bucket(32, 32)], Mesh.single(), seed=3, global_batch_size=4)
    rows = OnlineRows(
        index,
        encoders,
        Mesh.single(),
        PilDecoder(),
        micro_batch_size=2,
        max_sequence_length=9,
        cache=True,
    )
    loader = StepLoader(planner, rows, encoders, Mesh.single(), seed=3, micro_batch_size=2)
    loader.load(0)
    batch = loader.load(1).microbatches
    loader.close()
    samples = [draw.sample for draw in order.take(order.start, 8)[0][4:]]
    for micro, part in zip(batch, (samples[:2], samples[2:]), strict=True):
        pixels = pixels_of(index, part)
        mean, logvar = encoders.encode_images(pixels)
        noise = normal(3, Purpose.VAE_POSTERIOR, 1, micro.slots_B, mean[0].numel())
        expected = (mean + torch.exp(0.5 * logvar) * noise.view_as(mean) - 0.06) * 1.5
        torch.testing.assert_close(micro.clean_BCHW, expected, atol=1e-6, rtol=1e-6)
        text = encoders.encode_prompts([index.read_caption(s) for s in part], 9)
        assert torch.equal(micro.prompt.text_BTE, text.text_BTE)
        assert torch.equal(micro.prompt.pooled_BV, text.pooled_BV)
        assert torch.equal(micro.empty.text_BTE, encoders.encode_prompts([""], 9).text_BTE)
        assert torch.equal(micro.weight_B, torch.ones(2))
        # Training uses them in graphs: inference tensors would fail there.
        weight = torch.ones(1, requires_grad=True)
        (micro.clean_BCHW * weight).sum().backward()
    latents, condition = load_validation(index, encoders, 3, resolution=32, max_sequence_length=9)
    pixels = pixels_of(index, range(3))
    assert torch.equal(latents, encoders.normalise(encoders.encode_images(pixels)[0]))
    assert condition.text_BTE.shape[0] == 3
    with pytest.raises(ValueError, match=r"validation\.num_samples=6: must be 1 to 5"):
        load_validation(index, encoders, 6, resolution=32, max_sequence_length=9)
