"""Tokenizers and text encoders of the tiny pipeline: real classes, made for the captions.

The encoders stay frozen in training, so what they say about a caption is all the transformer will
ever know. A short training with linear heads makes them tell: the pooled embeddings the whole
scene, every token of the number its digit and its place, every other token its word. Weights of the
default sizes are shipped under ``assets/`` (``tools/train_tiny_parts.py text`` makes them); other
sizes are trained when asked for, which takes a minute.

Legend: B captions, T tokens, E embedding width, K classes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from soar_mega.data.tiny import digits

_START, _END = "<|startoftext|>", "<|endoftext|>"
SHIPPED_WEIGHTS = Path(__file__).resolve().parents[3] / "assets" / "tiny_text.safetensors"
_CAPTION_SEED = 0  # Not the user's seed: token numbers must fit the shipped weights.
_FALLBACK_SCORE = -20.0  # Log probability of a lone character: any whole word is better.


@dataclass(frozen=True)
class TextSizes:
    """Sizes of the three text encoders.

    Attributes:
        text_length: Tokens of each tokenizer; the longest caption needs 16, ends included.
        clip_width: Hidden and projection width of each CLIP; twice this must not exceed t5_width.
        clip_layers: At least 2: Stable Diffusion 3 reads the last but one.
        clip_heads: Attention heads of each CLIP.
        t5_width: Width of the T5 encoder, and of the text the transformer sees.
        t5_layers: Layers of the T5 encoder.
        t5_heads: Attention heads of the T5 encoder.
        training_steps: Steps of the short training of the encoders.
        batch_size: Captions in such a step.
    """

    text_length: int = 16
    clip_width: int = 32
    clip_layers: int = 3
    clip_heads: int = 4
    t5_width: int = 64
    t5_layers: int = 2
    t5_heads: int = 4
    training_steps: int = 250
    batch_size: int = 64


def make_clip_tokenizer(captions: Sequence[str], text_length: int, pad_token: str = _END) -> Any:
    """A CLIP tokenizer whose merges are learned from captions; any other text still tokenizes."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    splitter = CLIPTokenizer().backend_tokenizer.pre_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    learner.pre_tokenizer = splitter
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=2,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        continuing_subword_prefix="",
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in _merges(learner)]
    # CLIP's own order: bytes, bytes that end a word, merges, special tokens. "!" is number 0, the
    # padding of the second CLIP.
    alphabet.sort(key=lambda symbol: (symbol != "!", symbol))
    pieces = alphabet + [symbol + "</w>" for symbol in alphabet] + [a + b for a, b in merges]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, _START, _END]))}
    return CLIPTokenizer(
        vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=text_length
    )


def _merges(tokenizer: Any) -> list[list[str]]:
    import json

    merges: list[Any] = json.loads(tokenizer.to_str())["model"]["merges"]
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]


def make_t5_tokenizer(captions: Sequence[str], text_length: int) -> Any:
    """A T5 (unigram) tokenizer: words by their frequency, digits and odd characters one by one."""
    from transformers import T5TokenizerFast

    counts: Counter[str] = Counter()
    for caption in captions:
        for word in caption.split():
            comma = word.endswith(",")
            stem = word.removesuffix(",")
            counts.update(["▁" + stem[0], *stem[1:]] if stem.isdigit() else ["▁" + stem])
            counts.update([","] if comma else [])
    total = sum(counts.values())
    scores = {piece: math.log(count / total) for piece, count in sorted(counts.items())}
    printable = [chr(code) for code in range(33, 127)]
    for piece in ["▁", *printable, *("▁" + digit for digit in "0123456789")]:
        scores.setdefault(piece, _FALLBACK_SCORE)
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5TokenizerFast(
        vocab=special + list(scores.items()), extra_ids=0, model_max_length=text_length
    )


def _make_clip(tokenizer: Any, sizes: TextSizes) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.clip_width,
            intermediate_size=4 * sizes.clip_width,
            projection_dim=sizes.clip_width,
            num_hidden_layers=sizes.clip_layers,
            num_attention_heads=sizes.clip_heads,
            max_position_embeddings=sizes.text_length,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _make_t5(tokenizer: Any, sizes: TextSizes) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=sizes.t5_width,
            d_kv=sizes.t5_width // sizes.t5_heads,
            d_ff=2 * sizes.t5_width,
            num_layers=sizes.t5_layers,
            num_heads=sizes.t5_heads,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def start_weights(module: Any) -> None:
    """Unit-scale embeddings and weights that keep a signal's scale, so tokens start far apart."""
    for name, parameter in module.named_parameters():
        if "relative_attention_bias" in name:
            nn.init.normal_(parameter, std=2.0)  # Sharp enough to tell neighbours apart.
        elif "position_embedding" in name:
            nn.init.normal_(parameter, std=0.7)
        elif "embedding" in name or "embed_tokens" in name or name == "shared.weight":
            nn.init.normal_(parameter, std=1.0)
        elif parameter.dim() == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    if hasattr(module, "shared"):
        for name, parameter in module.named_parameters():
            if name.endswith("SelfAttention.q.weight"):
                # T5 does not divide scores by the root of the head's width.
                parameter.data.mul_(float(module.config.d_kv) ** -0.5)


def scene_labels(scenes: Sequence[digits.Scene]) -> Tensor:
    """Classes of a scene, int64 (B, 4 + 3): ink, paper, position, digit count, then the digits;
    a place without a digit has class 10."""
    inks, papers, places = list(digits.INKS), list(digits.PAPERS), list(digits.POSITIONS)
    rows = []
    for scene in scenes:
        numerals = [int(digit) for digit in scene.number]
        rows.append(
            [
                inks.index(scene.ink),
                papers.index(scene.paper),
                places.index(scene.position),
                len(numerals) - 1,
                *numerals,
                *[10] * (digits.MAX_DIGITS - len(numerals)),
            ]
        )
    return torch.tensor(rows)


SCENE_CLASSES = (len(digits.INKS), len(digits.PAPERS), len(digits.POSITIONS), digits.MAX_DIGITS) + (
    11,
) * digits.MAX_DIGITS
_CELL_CLASSES = (10, digits.GRID, digits.GRID)


def _cell_labels(scenes: Sequence[digits.Scene]) -> tuple[Tensor, Tensor]:
    """Of every digit: its (caption, place) and its classes digit, row, column; both int64."""
    where, classes = [], []
    for number, scene in enumerate(scenes):
        for place, (row, column) in enumerate(scene.cells()):
            where.append((number, place))
            classes.append((int(scene.number[place]), row, column))
    return torch.tensor(where), torch.tensor(classes)


def _split_loss(logits: Tensor, labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Sum of the cross-entropies of several questions answered by one head."""
    parts = logits.split(list(classes), dim=-1)
    losses = [nn.functional.cross_entropy(part, labels[:, i]) for i, part in enumerate(parts)]
    return torch.stack(losses).sum()


def unit_scale(states_BTE: Tensor) -> Tensor:
    """How far the components are from mean 0 and variance 1 over captions and tokens."""
    flat = states_BTE.flatten(0, -2)
    return flat.mean(0).square().mean() + (flat.std(0) - 1.0).square().mean()


# The number follows the start token, "the" and "number"; T5 has no start token.
CLIP_FIRST_DIGIT, T5_FIRST_DIGIT = 3, 2


class _Questions(nn.Module):
    """Linear heads over one encoder's embeddings: the loss that teaches it."""

    def __init__(self, encoder: nn.Module, width: int, vocabulary: int, first_digit: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.first_digit = first_digit
        self.words = nn.Linear(width, vocabulary)
        self.cells = nn.Linear(width, sum(_CELL_CLASSES))
        self.scene = nn.Linear(width, sum(SCENE_CLASSES))

    def forward(self, token_ids_BT: Tensor, scenes: Sequence[digits.Scene], clip: bool) -> Tensor:
        if clip:
            output = self.encoder(token_ids_BT, output_hidden_states=True)
            states_BTE, pooled_BE = output.hidden_states[-2], output.text_embeds
            # A CLIP is causal: at a digit it knows the digit, not yet where the number goes.
            questions = 1
        else:
            states_BTE = self.encoder(token_ids_BT)[0]
            pooled_BE = states_BTE.mean(1)
            questions = len(_CELL_CLASSES)
        loss = nn.functional.cross_entropy(self.words(states_BTE).transpose(1, 2), token_ids_BT)
        where, classes = _cell_labels(scenes)
        at_digits = self.cells(states_BTE[where[:, 0], where[:, 1] + self.first_digit])
        used = _CELL_CLASSES[:questions]
        loss = loss + _split_loss(at_digits[:, : sum(used)], classes[:, :questions], used)
        loss = loss + _split_loss(self.scene(pooled_BE), scene_labels(scenes), SCENE_CLASSES)
        return loss + unit_scale(states_BTE) + (unit_scale(pooled_BE) if clip else 0.0)


def tokenize(tokenizer: Any, captions: Sequence[str]) -> Tensor:
    """Token numbers as the pipeline makes them, int64 (B, T), padded and cut to the full length."""
    return tokenizer(
        list(captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def make_tokenizers(text_length: int) -> dict[str, Any]:
    """The three tokenizers under the names of the pipeline's parts, the same for every seed.

    Raises:
        ValueError: If the texts are too short for the captions.
    """
    captions = [scene.caption for scene in digits.training_scenes(2000, _CAPTION_SEED)]
    tokenizers = {
        "tokenizer": make_clip_tokenizer(captions, text_length),
        "tokenizer_2": make_clip_tokenizer(captions, text_length, pad_token="!"),
        "tokenizer_3": make_t5_tokenizer(captions, text_length),
    }
    longest = max(digits.training_scenes(200, _CAPTION_SEED), key=lambda scene: len(scene.number))
    needed = max(len(each(longest.caption).input_ids) for each in tokenizers.values())
    if needed > text_length:
        raise ValueError(
            f"text_length={text_length}: the longest caption has {needed} tokens; "
            f"set it to at least {needed}."
        )
    return tokenizers


def make_encoders(tokenizers: dict[str, Any], sizes: TextSizes) -> dict[str, Any]:
    """Untrained text encoders under the names of the pipeline's parts.

    Raises:
        ValueError: If the CLIPs together are wider than the T5 (the pipeline could not pad them).
    """
    if 2 * sizes.clip_width > sizes.t5_width:
        raise ValueError(
            f"2 * clip_width={2 * sizes.clip_width} must not exceed t5_width={sizes.t5_width}."
        )
    return {
        "text_encoder": _make_clip(tokenizers["tokenizer"], sizes),
        "text_encoder_2": _make_clip(tokenizers["tokenizer_2"], sizes),
        "text_encoder_3": _make_t5(tokenizers["tokenizer_3"], sizes),
    }


def train_text_parts(sizes: TextSizes, seed: int) -> dict[str, Any]:
    """Tokenizers and freshly trained encoders under the names of the pipeline's parts."""
    tokenizers = make_tokenizers(sizes.text_length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoders = make_encoders(tokenizers, sizes)
        for tokenizer, encoder in zip(tokenizers.values(), encoders.values(), strict=True):
            start_weights(encoder)
            _teach(encoder, tokenizer, sizes, seed)
    return tokenizers | encoders


def save_encoders(parts: dict[str, Any], path: Path) -> None:
    """Writes the weights of the three encoders into one fp16 file."""
    from safetensors.torch import save_model

    path.parent.mkdir(parents=True, exist_ok=True)
    encoders = {name: part for name, part in parts.items() if name.startswith("text_encoder")}
    save_model(nn.ModuleDict(encoders).half(), str(path))
    nn.ModuleDict(encoders).float()


def load_text_parts(sizes: TextSizes, path: Path = SHIPPED_WEIGHTS) -> dict[str, Any]:
    """Tokenizers and trained fp32 encoders under the names of the pipeline's parts.

    Raises:
        FileNotFoundError: If the weights are not there.
    """
    return load_encoders(make_tokenizers(sizes.text_length), sizes, path, "text")


def load_encoders(
    tokenizers: dict[str, Any], sizes: TextSizes, path: Path, part: str
) -> dict[str, Any]:
    """Trained fp32 encoders that fit some tokenizers, and those.

    Args:
        tokenizers: As ``make_tokenizers`` gives them.
        sizes: Of the encoders.
        path: Of the weights.
        part: What ``tools/train_tiny_parts.py`` calls them.

    Raises:
        FileNotFoundError: If the weights are not there.
    """
    from safetensors.torch import load_model

    if not path.is_file():
        raise FileNotFoundError(
            f"No text encoder weights at {path}. "
            f"Make them: python tools/train_tiny_parts.py {part} --out {path}"
        )
    encoders = make_encoders(tokenizers, sizes)
    load_model(nn.ModuleDict(encoders).half(), str(path))
    for encoder in encoders.values():
        encoder.float().eval().requires_grad_(False)
    return tokenizers | encoders


def _teach(encoder: Any, tokenizer: Any, sizes: TextSizes, seed: int) -> None:
    """Trains one encoder with linear heads, which are thrown away."""
    clip = hasattr(encoder, "text_projection")
    width = sizes.clip_width if clip else sizes.t5_width
    first = CLIP_FIRST_DIGIT if clip else T5_FIRST_DIGIT
    questions = _Questions(encoder.train(), width, len(tokenizer), first)

    def loss(step: int) -> Tensor:
        scenes = digits.training_scenes(sizes.batch_size, seed=[seed, step])
        token_ids_BT = tokenize(tokenizer, [scene.caption for scene in scenes])
        answer: Tensor = questions(token_ids_BT, scenes, clip)
        return answer

    descend(questions, loss, sizes.training_steps)
    encoder.eval().requires_grad_(False)


def descend(questions: nn.Module, loss: Callable[[int], Tensor], steps: int) -> None:
    """Short training of encoder and heads on ``loss(step)``: warm-up, then a cosine to zero."""
    optimizer = torch.optim.AdamW(questions.parameters(), lr=1.0, betas=(0.9, 0.98))
    for step in range(steps):
        falling = 0.5 * (1.0 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1.0, (step + 1) / 30) * falling
        optimizer.zero_grad(set_to_none=True)
        loss(step).backward()
        nn.utils.clip_grad_norm_(questions.parameters(), 1.0)
        optimizer.step()
