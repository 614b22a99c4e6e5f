"""ImageReward against an independent BLIP that reads the original's tensors under their names."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from soar_mega.evaluation.interface import Prompt
from soar_mega.evaluation.scorers.make import make_scorer
from soar_mega.evaluation.scorers.weights import ScorerError
from tests.tiny_scorers import SIZE, head_state, head_value, noise, normalised

State = dict[str, torch.Tensor]
V, T = "blip.visual_encoder.", "blip.text_encoder."
SEEN, READ, LAYERS, HEADS = 64, 24, 2, 2  # widths, blocks of both, heads of the text encoder
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "car", "cat", "##s"]
MED = {
    "vocab_size": len(WORDS),
    "hidden_size": READ,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 40,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "encoder_width": 768,  # as published; the original replaces it by the picture's width
    "add_cross_attention": True,
}


def original_state() -> State:
    """Random tensors under every key of ImageReward.pt."""
    generator = torch.Generator().manual_seed(7)
    state: State = {}

    def linear(name: str, out: int, into: int) -> None:
        state[f"{name}.weight"] = torch.randn(out, into, generator=generator) * 0.3
        state[f"{name}.bias"] = torch.randn(out, generator=generator) * 0.3

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + torch.randn(width, generator=generator) * 0.3
        state[f"{name}.bias"] = torch.randn(width, generator=generator) * 0.3

    state[V + "cls_token"] = torch.randn(1, 1, SEEN, generator=generator)
    state[V + "pos_embed"] = torch.randn(1, (SIZE // 8) ** 2 + 1, SEEN, generator=generator)
    state[V + "patch_embed.proj.weight"] = torch.randn(SEEN, 3, 8, 8, generator=generator) * 0.1
    state[V + "patch_embed.proj.bias"] = torch.randn(SEEN, generator=generator)
    for n in range(LAYERS):
        block = f"{V}blocks.{n}."
        norm(block + "norm1", SEEN)
        norm(block + "norm2", SEEN)
        linear(block + "attn.qkv", 3 * SEEN, SEEN)
        linear(block + "attn.proj", SEEN, SEEN)
        linear(block + "mlp.fc1", 2 * SEEN, SEEN)
        linear(block + "mlp.fc2", SEEN, 2 * SEEN)
    norm(V + "norm", SEEN)
    state[T + "embeddings.position_ids"] = torch.arange(40)[None]
    state[T + "embeddings.word_embeddings.weight"] = torch.randn(10, READ, generator=generator)
    state[T + "embeddings.position_embeddings.weight"] = torch.randn(40, READ, generator=generator)
    norm(T + "embeddings.LayerNorm", READ)
    for n in range(LAYERS):
        layer = f"{T}encoder.layer.{n}."
        for kind, into in (("attention", READ), ("crossattention", SEEN)):
            linear(f"{layer}{kind}.self.query", READ, READ)
            linear(f"{layer}{kind}.self.key", READ, into)
            linear(f"{layer}{kind}.self.value", READ, into)
            linear(f"{layer}{kind}.output.dense", READ, READ)
            norm(f"{layer}{kind}.output.LayerNorm", READ)
        linear(layer + "intermediate.dense", 40, READ)
        linear(layer + "output.dense", READ, 40)
        norm(layer + "output.LayerNorm", READ)
    linear("blip.vision_proj", 8, SEEN)
    linear("blip.text_proj", 8, READ)
    return state | head_state(READ, "mlp.layers.")


def lin(s: State, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, s[f"{name}.weight"], s[f"{name}.bias"])


def nrm(s: State, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], eps)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """Of (length, width) tensors, head by head."""
    parts = zip(*(x.chunk(heads, -1) for x in (q, k, v)), strict=True)
    weights = [((a @ b.T / math.sqrt(a.shape[1])).softmax(-1), c) for a, b, c in parts]
    return torch.cat([w @ c for w, c in weights], -1)


def expected_reward(s: State, pixels: torch.Tensor, ids: list[int]) -> float:
    x = F.conv2d(pixels, s[V + "patch_embed.proj.weight"], s[V + "patch_embed.proj.bias"], 8)
    x = torch.cat([s[V + "cls_token"][0], x[0].flatten(1).T]) + s[V + "pos_embed"][0]
    for n in range(LAYERS):
        b = f"{V}blocks.{n}."
        q, k, v = lin(s, b + "attn.qkv", nrm(s, b + "norm1", x, 1e-6)).chunk(3, -1)
        x = x + lin(s, b + "attn.proj", attend(q, k, v, SEEN // 64))
        y = lin(s, b + "mlp.fc1", nrm(s, b + "norm2", x, 1e-6))
        x = x + lin(s, b + "mlp.fc2", F.gelu(y))
    seen = nrm(s, V + "norm", x, 1e-6)
    # Without padding: what is masked must not matter.
    t = s[T + "embeddings.word_embeddings.weight"][ids]
    t = t + s[T + "embeddings.position_embeddings.weight"][: len(ids)]
    t = nrm(s, T + "embeddings.LayerNorm", t, 1e-12)
    for n in range(LAYERS):
        layer = f"{T}encoder.layer.{n}."
        for kind in ("attention", "crossattention"):
            name, source = f"{layer}{kind}.", t if kind == "attention" else seen
            q = lin(s, name + "self.query", t)
            k, v = (lin(s, f"{name}self.{part}", source) for part in ("key", "value"))
            y = lin(s, name + "output.dense", attend(q, k, v, HEADS))
            t = nrm(s, name + "output.LayerNorm", t + y, 1e-12)
        y = F.gelu(lin(s, layer + "intermediate.dense", t))
        t = nrm(s, layer + "output.LayerNorm", t + lin(s, layer + "output.dense", y), 1e-12)
    value = head_value(s, "mlp.layers.", t[0])
    return (value - 0.16717362830052426) / 1.0333394966054072


def folders(root: Path, state: State) -> None:
    from transformers import BertTokenizer

    (root / "ImageReward").mkdir()
    torch.save(state, root / "ImageReward" / "ImageReward.pt")
    (root / "ImageReward" / "med_config.json").write_text(json.dumps(MED))
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    BertTokenizer(vocab=vocabulary).save_pretrained(root / "bert-base-uncased")


def test_reward_is_that_of_the_original_layout(tmp_path: Path) -> None:
    state = original_state()
    folders(tmp_path, state)
    scorer = make_scorer("imagereward", tmp_path)
    pictures = [noise(1), noise(2), noise(3)]
    prompts = [Prompt("A red car"), Prompt("cats"), Prompt("a " * 60)]
    ids = [[2, 5, 6, 7, 3], [2, 8, 9, 3], [2, *[5] * 33, 3]]
    expected = [
        expected_reward(state, normalised(picture), row)
        for picture, row in zip(pictures, ids, strict=True)
    ]
    together = scorer.score(pictures, prompts)
    assert [s["reward"] for s in together] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    alone = [scorer.score([p], [q])[0] for p, q in zip(pictures, prompts, strict=True)]
    assert together == alone
    # Both the picture and the prompt matter.
    other = scorer.score([pictures[1], pictures[0]], [prompts[0], prompts[1]])
    assert abs(other[0]["reward"] - expected[0]) > 1e-3
    assert abs(other[0]["reward"] - expected[1]) > 1e-3


@pytest.mark.parametrize(
    ("key", "told"),
    [
        (V + "patch_embed.proj.weight", "is no ImageReward"),
        (V + "blocks.1.norm2.bias", "does not fit BlipVisionModel"),
        (T + "encoder.layer.0.crossattention.self.key.weight", "does not fit BlipTextModel"),
        ("mlp.layers.7.bias", "has no mlp.layers.7.bias"),
    ],
)
def test_a_missing_tensor_is_noticed(tmp_path: Path, key: str, told: str) -> None:
    state = original_state()
    del state[key]
    folders(tmp_path, state)
    with pytest.raises(ScorerError, match=told):
        make_scorer("imagereward", tmp_path)


def test_a_wrong_text_configuration_is_told(tmp_path: Path) -> None:
    folders(tmp_path, original_state())
    (tmp_path / "ImageReward" / "med_config.json").write_text('{"vocab_size": 10}')
    with pytest.raises(ScorerError, match=r"med_config\.json is no configuration"):
        make_scorer("imagereward", tmp_path)
