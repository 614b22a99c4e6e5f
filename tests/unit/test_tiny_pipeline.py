"""The tiny pipeline folder and its shards: real classes, trained parts, the same bytes again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from soar_mega.data.tiny import digits
from soar_mega.data.tiny import text as tiny_text
from soar_mega.data.tiny import vae as tiny_vae
from soar_mega.data.tiny.pipeline import TinySizes, make_tiny, make_transformer, write_shards
from soar_mega.evaluation.digits import load_reader

TRAIN, HELD_OUT = 70, 24
LONGEST = "the number 374 in purple ink on yellow paper, bottom right"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny")
    make_tiny(out, seed=3, train_pictures=TRAIN, held_out_pictures=HELD_OUT)
    return out


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    from diffusers import StableDiffusion3Pipeline

    loaded = StableDiffusion3Pipeline.from_pretrained(folder / "sd35", local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def read_shards(folder: Path, prefix: str) -> list[dict[str, Any]]:
    urls = [str(path) for path in sorted((folder / "shards").glob(f"{prefix}-*.tar"))]
    data = webdataset.WebDataset(urls, shardshuffle=False).decode("pil")
    return list(data)


def test_the_folder_holds_the_real_classes(folder: Path, pipeline: Any) -> None:
    index = json.loads((folder / "sd35" / "model_index.json").read_text())
    classes = {name: value[1] for name, value in index.items() if isinstance(value, list)}
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    assert classes["transformer"] == "SD3Transformer2DModel"
    assert classes["vae"] == "AutoencoderKL"
    assert classes["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    assert classes["text_encoder"] == classes["text_encoder_2"] == "CLIPTextModelWithProjection"
    assert classes["text_encoder_3"] == "T5EncoderModel"
    assert classes["tokenizer"].startswith("CLIPTokenizer")
    assert classes["tokenizer_3"].startswith("T5Tokenizer")
    assert pipeline.scheduler.config.shift == 3.0
    assert pipeline.vae_scale_factor == 8
    assert pipeline.vae.config.latent_channels == 16
    config = pipeline.transformer.config
    assert config.num_layers >= 8 and config.num_attention_heads % 4 == 0
    assert tuple(config.dual_attention_layers) == (0, 1, 2, 3)
    assert config.qk_norm == "rms_norm"
    assert (folder / "sd35" / "tokenizer" / "merges.txt").is_file()


def test_the_pipeline_draws(pipeline: Any) -> None:
    def pictures(prompt: str) -> np.ndarray:
        out = pipeline(
            prompt,
            height=64,
            width=64,
            num_inference_steps=2,
            guidance_scale=4.5,
            max_sequence_length=pipeline.tokenizer_3.model_max_length,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        )
        return np.asarray(out.images)

    first, same, other = (pictures(text) for text in (LONGEST, LONGEST, "the number 1"))
    assert first.shape == (1, 64, 64, 3) and np.isfinite(first).all()
    assert (first == same).all() and (first != other).any()


def test_no_weight_of_the_transformer_is_neutral(pipeline: Any) -> None:
    for name, parameter in pipeline.transformer.named_parameters():
        assert float(parameter.detach().abs().max()) > 0.01, name
        assert bool((parameter != 1.0).all()), name
        assert float(parameter.detach().std()) > 0.01, name


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2", "tokenizer_3"])
def test_digits_are_single_tokens_and_nothing_is_unknown(pipeline: Any, name: str) -> None:
    tokenizer = getattr(pipeline, name)
    ends = 1 if name == "tokenizer_3" else 2
    for scene in digits.training_scenes(100, 4) + digits.held_out_scenes(100, 4):
        token_ids = tokenizer(scene.caption).input_ids
        words = len(scene.caption.replace(",", " ,").split())
        assert len(token_ids) == words - 1 + len(scene.number) + ends
        assert len(token_ids) <= tokenizer.model_max_length
        pieces = [
            piece.strip("▁").removesuffix("</w>") for piece in tokenizer.tokenize(scene.caption)
        ]
        assert [piece for piece in pieces if piece.isdigit()] == list(scene.number)
        if name == "tokenizer_3":
            assert tokenizer.unk_token_id not in token_ids
        else:
            assert token_ids.count(tokenizer.eos_token_id) == 1
    other = tokenizer("Hello world: is 12 > 3?", add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in other


def test_padding_is_deterministic(pipeline: Any) -> None:
    for name, pad in (
        ("tokenizer", "<|endoftext|>"),
        ("tokenizer_2", "!"),
        ("tokenizer_3", "<pad>"),
    ):
        tokenizer = getattr(pipeline, name)
        assert tokenizer.pad_token == pad
        token_ids_BT = tiny_text.tokenize(tokenizer, ["", "the number 7", LONGEST + " and more"])
        assert token_ids_BT.shape == (3, tokenizer.model_max_length)
        padding = token_ids_BT[0, 2:] if name != "tokenizer_3" else token_ids_BT[0, 1:]
        assert (padding == tokenizer.pad_token_id).all()


def encode_text(pipeline: Any, scenes: list[digits.Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        text_BTE, _, pooled_BV, _ = pipeline.encode_prompt(
            [scene.caption for scene in scenes],
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=pipeline.tokenizer_3.model_max_length,
        )
    return text_BTE, pooled_BV


def test_text_embeddings_tell_the_scene_linearly(pipeline: Any) -> None:
    from sklearn.linear_model import RidgeClassifier

    train, test = digits.training_scenes(900, 5), digits.held_out_scenes(300, 5)
    (text_train, pooled_train), (text_test, pooled_test) = (
        encode_text(pipeline, scenes) for scenes in (train, test)
    )
    assert 0.5 < float(text_train.std()) < 2.0 and 0.5 < float(pooled_train.std()) < 2.5
    labels_train, labels_test = tiny_text.scene_labels(train), tiny_text.scene_labels(test)

    def probe(features: torch.Tensor, others: torch.Tensor, column: int) -> float:
        seen = RidgeClassifier().fit(features, labels_train[:, column])
        return float(seen.score(others, labels_test[:, column]))

    for column in range(len(tiny_text.SCENE_CLASSES)):
        assert probe(pooled_train, pooled_test, column) > 0.95, column
    t5_start = pipeline.tokenizer.model_max_length + tiny_text.T5_FIRST_DIGIT
    for start in (tiny_text.CLIP_FIRST_DIGIT, t5_start):
        for place in range(2):
            token = start + place
            score = probe(text_train[:, token], text_test[:, token], 4 + place)
            assert score > 0.95, (start, place)


@pytest.fixture(scope="module")
def unseen() -> tuple[list[digits.Scene], np.ndarray]:
    scenes = digits.held_out_scenes(128, 6)
    return scenes, digits.draw_many(scenes, digits.load_scans("held_out"), 6)


def test_the_vae_reconstructs(pipeline: Any, unseen: tuple[list[digits.Scene], np.ndarray]) -> None:
    scenes, pictures = unseen
    latents = tiny_vae.encode(pipeline.vae, pictures)
    again = tiny_vae.decode(pipeline.vae, latents)
    assert tiny_vae.psnr(pictures, again) > 28.0
    scores = load_reader().score(list(again), scenes)
    assert scores["per_digit_accuracy"] > 0.93
    assert scores["count_accuracy"] > 0.98
    assert scores["ink_accuracy"] > 0.98
    assert scores["paper_accuracy"] > 0.98


def test_latents_are_normal_and_survive_noise(
    pipeline: Any, unseen: tuple[list[digits.Scene], np.ndarray]
) -> None:
    scenes, pictures = unseen
    config = pipeline.vae.config
    with torch.no_grad():
        posterior = pipeline.vae.encode(tiny_vae.to_tensor(pictures)).latent_dist
    assert torch.allclose(posterior.std, torch.tensor(tiny_vae.POSTERIOR_STD), rtol=0.01)
    assert config.scaling_factor > 1.3  # Forgetting it must show.
    normal = (posterior.mean - config.shift_factor) * config.scaling_factor
    assert abs(float(normal.mean())) < 0.1
    assert 0.85 < float(normal.std()) < 1.15
    noise = torch.randn(normal.shape, generator=torch.Generator().manual_seed(0))
    noisy = (normal + 0.1 * noise) / config.scaling_factor + config.shift_factor
    again = tiny_vae.decode(pipeline.vae, noisy)
    assert load_reader().score(list(again), scenes)["per_digit_accuracy"] > 0.9


def test_shards_are_readable_and_true(folder: Path) -> None:
    for prefix, count in (("train", TRAIN), ("heldout", HELD_OUT)):
        samples = read_shards(folder, prefix)
        assert len(samples) == count
        assert len({sample["__key__"] for sample in samples}) == count
        for sample in samples:
            assert isinstance(sample["png"], Image.Image) and sample["png"].size == (64, 64)
            scene = digits.parse_caption(sample["txt"])
            assert sample["json"] == scene.to_json()
            assert (scene.number in digits.held_out_numbers()) == (prefix == "heldout")
    scenes = [digits.parse_caption(sample["txt"]) for sample in read_shards(folder, "train")]
    images = [sample["png"] for sample in read_shards(folder, "train")]
    assert load_reader().score(images, scenes)["exact_number_accuracy"] > 0.85


def test_held_out_prompts_are_those_of_the_held_out_shards(folder: Path) -> None:
    prompts = (folder / "held_out_prompts.txt").read_text().splitlines()
    truth = json.loads((folder / "held_out_prompts.json").read_text())
    samples = read_shards(folder, "heldout")
    assert prompts == [sample["txt"] for sample in samples] == [each["caption"] for each in truth]


def test_shards_are_cut_and_old_ones_removed(tmp_path: Path) -> None:
    scenes = digits.training_scenes(5, 0)
    pictures = digits.draw_many(scenes, digits.load_scans("generator"), 0)
    shards = write_shards(tmp_path, "train", scenes, pictures, pictures_per_shard=2)
    assert [path.name for path in shards] == [f"train-{number:06d}.tar" for number in range(3)]
    shards = write_shards(tmp_path, "train", scenes, pictures)
    assert [path.name for path in shards] == ["train-000000.tar"]
    assert list(tmp_path.iterdir()) == shards


def test_the_same_seed_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    make_tiny(tmp_path, seed=3, train_pictures=TRAIN, held_out_pictures=HELD_OUT)

    def checksums(root: Path) -> dict[str, str]:
        files = (path for path in sorted(root.rglob("*")) if path.is_file())
        return {
            str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
        }

    assert checksums(tmp_path) == checksums(folder)


def test_seeds_differ() -> None:
    sizes = TinySizes(num_layers=1, dual_attention_layers=(0,))
    weights = [make_transformer(sizes, seed).proj_out.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_bad_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_pictures=0"):
        make_tiny(tmp_path, train_pictures=0)
    with pytest.raises(ValueError, match="block 3 is not among num_layers=3"):
        TinySizes(num_layers=3)
    with pytest.raises(ValueError, match="t5_width=32"):
        tiny_text.make_encoders({}, tiny_text.TextSizes(t5_width=32))
    with pytest.raises(ValueError, match="text_length=12"):
        tiny_text.make_tokenizers(12)
    with pytest.raises(FileNotFoundError, match=r"train_tiny_parts\.py vae"):
        tiny_vae.load_vae(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match=r"train_tiny_parts\.py text"):
        tiny_text.load_text_parts(tiny_text.TextSizes(), tmp_path / "none.safetensors")


def test_another_text_size_is_trained_on_the_spot() -> None:
    sizes = tiny_text.TextSizes(text_length=20, training_steps=2, batch_size=8)
    parts = tiny_text.train_text_parts(sizes, seed=0)
    token_ids_BT = tiny_text.tokenize(parts["tokenizer"], [LONGEST])
    assert token_ids_BT.shape == (1, 20)
    assert torch.isfinite(parts["text_encoder"](token_ids_BT).text_embeds).all()
    assert not any(p.requires_grad for p in parts["text_encoder_3"].parameters())
