"""Scores that CLIP gives, against its own forward pass and an independent open_clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from soar_mega.evaluation.interface import Prompt
from soar_mega.evaluation.scorers.make import make_scorer
from soar_mega.evaluation.scorers.weights import ScorerError
from tests.tiny_scorers import SIZE, clip_folder, head_state, head_value, noise, normalised

PICTURES = [noise(1), noise(2), noise(3)]
PROMPTS = [Prompt("a red car"), Prompt("two cats"), Prompt("a photo of a dog " * 20)]
AESTHETIC = "improved-aesthetic-predictor/sac+logos+ava1-l14-linearMSE.pth"


def cosines(model: Any, folder: Path) -> list[float]:
    """CLIPModel's own forward pass, padded text with its mask and all."""
    from transformers import AutoTokenizer

    tokenizer, found = AutoTokenizer.from_pretrained(folder), []
    for picture, prompt in zip(PICTURES, PROMPTS, strict=True):
        text = tokenizer(prompt.text, truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            logits = model(**text, pixel_values=normalised(picture)).logits_per_image
        found.append(float((logits / model.logit_scale.exp()).detach()))
    return found


def test_clipscore_is_the_cosine(tmp_path: Path) -> None:
    folder = tmp_path / "clip-vit-large-patch14"
    expected = cosines(clip_folder(folder), folder)
    got = make_scorer("clipscore", tmp_path).score(PICTURES, PROMPTS)
    assert [s["cosine"] for s in got] == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.05  # not all alike


def test_pickscore_is_the_logit(tmp_path: Path) -> None:
    folder = tmp_path / "PickScore_v1"
    expected = cosines(clip_folder(folder), folder)
    got = make_scorer("pickscore", tmp_path).score(PICTURES, PROMPTS)
    assert [s["logit"] for s in got] == pytest.approx([100 * c for c in expected], abs=1e-3)


@pytest.mark.parametrize("name", ["clipscore", "aesthetic"])
def test_a_score_does_not_depend_on_the_others(tmp_path: Path, name: str) -> None:
    clip_folder(tmp_path / "clip-vit-large-patch14")
    path = tmp_path / AESTHETIC
    path.parent.mkdir()
    torch.save(head_state(20, "layers."), path)
    scorer = make_scorer(name, tmp_path)
    together = scorer.score(PICTURES, PROMPTS)
    alone = [scorer.score([p], [q])[0] for p, q in zip(PICTURES, PROMPTS, strict=True)]
    backwards = scorer.score(PICTURES[::-1], PROMPTS[::-1])[::-1]
    assert together == alone == backwards  # to the last bit
    with pytest.raises(ValueError):
        scorer.score(PICTURES, PROMPTS[:2])


def test_other_sizes_are_resized_and_cropped(tmp_path: Path) -> None:
    folder = tmp_path / "clip-vit-large-patch14"
    clip_folder(folder)
    scorer = make_scorer("clipscore", tmp_path)
    wide = noise(4, 2 * SIZE, SIZE)
    middle = wide.crop((SIZE // 2, 0, SIZE // 2 + SIZE, SIZE))
    assert scorer.score([wide], PROMPTS[:1]) == scorer.score([middle], PROMPTS[:1])


def test_aesthetic_is_its_head_on_the_normalised_embedding(tmp_path: Path) -> None:
    model = clip_folder(tmp_path / "clip-vit-large-patch14")
    state = head_state(20, "layers.")
    (tmp_path / AESTHETIC).parent.mkdir()
    torch.save(state, tmp_path / AESTHETIC)
    with torch.no_grad():
        features = model.get_image_features(pixel_values=normalised(PICTURES[0]))
    features = getattr(features, "pooler_output", features)[0]
    expected = head_value(state, "layers.", features / features.norm())
    (got,) = make_scorer("aesthetic", tmp_path).score(PICTURES[:1], PROMPTS[:1])
    assert got["rating"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("state", "told"),
    [
        (head_state(19, "layers."), "embeddings of 19 numbers, CLIP's have 20"),
        (head_state(20, "other."), "has no layers.0.weight"),
        ({**head_state(20, "layers."), "layers.9.bias": torch.ones(1)}, "unknown layers.9.bias"),
        ({"model": Path("code")}, "others may run code"),
        ({"a": "text"}, "no state dict"),
    ],
)
def test_other_heads_are_refused(tmp_path: Path, state: Any, told: str) -> None:
    clip_folder(tmp_path / "clip-vit-large-patch14")
    (tmp_path / AESTHETIC).parent.mkdir()
    torch.save(state, tmp_path / AESTHETIC)
    with pytest.raises(ScorerError, match=told):
        make_scorer("aesthetic", tmp_path)


# --- HPS v2.1: open_clip's own layout ----------------------------------------------------------


class Block(nn.Module):
    """A transformer block under open_clip's names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Module()
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class Tower(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width, 2) for _ in range(layers)])

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, width: int, patch: int, layers: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((SIZE // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Tower(width, layers)
        self.proj = nn.Parameter(torch.randn(width, out))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(1, 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """What an open_clip checkpoint computes, written from its layout."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.visual = Visual(24, 8, 3, 20)
        self.transformer = Tower(16, 3)
        self.token_embedding = nn.Embedding(vocabulary, 16)
        self.positional_embedding = nn.Parameter(torch.randn(16, 16))
        self.ln_final = nn.LayerNorm(16)
        self.text_projection = nn.Parameter(torch.randn(16, 20))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def cosine(self, pixels: torch.Tensor, ids: torch.Tensor, end: int) -> float:
        length = ids.shape[1]
        x = self.token_embedding(ids) + self.positional_embedding[:length]
        causal = torch.full((length, length), float("-inf")).triu(1)
        x = self.ln_final(self.transformer(x, causal))
        place = int((ids[0] == end).nonzero()[0])
        return float(F.cosine_similarity(self.visual(pixels), x[:, place] @ self.text_projection))


def hps_folders(root: Path) -> OpenClip:
    model = clip_folder(root / "CLIP-ViT-H-14-laion2B-s32B-b79K", layers=3, act="gelu")
    torch.manual_seed(5)
    original = OpenClip(model.config.text_config.vocab_size).eval()
    (root / "HPSv2").mkdir()
    held = {"epoch": 3, "state_dict": original.state_dict()}
    torch.save(held, root / "HPSv2" / "HPS_v2.1_compressed.pt")
    return original


def test_hpsv2_computes_what_open_clip_does(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    original = hps_folders(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "CLIP-ViT-H-14-laion2B-s32B-b79K")
    expected = []
    for picture, prompt in zip(PICTURES, PROMPTS, strict=True):
        ids = tokenizer(prompt.text, truncation=True, max_length=16, return_tensors="pt").input_ids
        with torch.no_grad():
            expected.append(original.cosine(normalised(picture), ids, tokenizer.eos_token_id))
    got = make_scorer("hpsv2", tmp_path).score(PICTURES, PROMPTS)
    assert [s["cosine"] for s in got] == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.05


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("visual.extra", torch.ones(2), "'visual.extra', which open_clip's ViT-H-14 has not"),
        ("visual.proj", None, "does not fit CLIPModel.*visual_projection"),
        ("visual.proj", torch.ones(2, 3), "does not fit CLIPModel.*visual_projection"),
    ],
)
def test_other_checkpoints_are_not_taken_for_hps(
    tmp_path: Path, key: str, value: torch.Tensor | None, told: str
) -> None:
    state = hps_folders(tmp_path).state_dict()
    state.pop(key, None)
    if value is not None:
        state[key] = value
    torch.save({"state_dict": state}, tmp_path / "HPSv2" / "HPS_v2.1_compressed.pt")
    with pytest.raises(ScorerError, match=f"(?s){told}"):
        make_scorer("hpsv2", tmp_path)
