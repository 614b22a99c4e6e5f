"""Tokenizers and text encoders for the captions of ``pages``: real classes, made for them.

The encoders stay frozen, so they must tell what a caption says without knowing its grammar: a short
training makes every token's embedding tell its own word and its neighbours', and the pooled ones
which words there are. Which word belongs to which is left for the transformer to learn.

Legend: B captions, T tokens, E embedding width, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from soar_mega.data.tiny import pages
from soar_mega.data.tiny import text as tiny_text

SHIPPED_WEIGHTS = Path(__file__).resolve().parents[3] / "assets" / "handwriting_text.safetensors"
TEXT_LENGTH = 14  # the longest captions, three digits in three squares, have 12 to 14 tokens
SIZES = tiny_text.TextSizes(text_length=TEXT_LENGTH)
_CAPTIONS = 4000  # enough to show every word
_SEED = 0  # Not the user's seed: token numbers must fit the shipped weights.


def make_tokenizers() -> dict[str, Any]:
    """The three tokenizers under the names of the pipeline's parts, the same for every seed."""
    captions = [page.caption for page in pages.make_pages(_CAPTIONS, _SEED, held_out=False)]
    return {
        "tokenizer": tiny_text.make_clip_tokenizer(captions, TEXT_LENGTH),
        "tokenizer_2": tiny_text.make_clip_tokenizer(captions, TEXT_LENGTH, pad_token="!"),
        "tokenizer_3": tiny_text.make_t5_tokenizer(captions, TEXT_LENGTH),
    }


class _Questions(nn.Module):
    """Linear heads over one encoder's embeddings: the loss that teaches it."""

    def __init__(self, encoder: nn.Module, width: int, vocabulary: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.before, self.own, self.after = (nn.Linear(width, vocabulary) for _ in range(3))
        self.words = nn.Linear(width, vocabulary)

    def forward(self, token_ids_BT: Tensor, *, clip: bool) -> Tensor:
        if clip:
            output = self.encoder(token_ids_BT, output_hidden_states=True)
            states_BTE, pooled_BE = output.hidden_states[-2], output.text_embeds
        else:
            states_BTE = self.encoder(token_ids_BT)[0]
            pooled_BE = states_BTE.mean(1)
        loss = _told(self.own, states_BTE, token_ids_BT)
        loss = loss + _told(self.before, states_BTE[:, 1:], token_ids_BT[:, :-1])
        if not clip:  # a CLIP is causal: it has not seen the next word
            loss = loss + _told(self.after, states_BTE[:, :-1], token_ids_BT[:, 1:])
        logits_BV = self.words(pooled_BE)
        there_BV = torch.zeros_like(logits_BV).scatter_(1, token_ids_BT, 1.0)
        loss = loss + 10 * nn.functional.binary_cross_entropy_with_logits(logits_BV, there_BV)
        spread = tiny_text.unit_scale(states_BTE)
        return loss + spread + (tiny_text.unit_scale(pooled_BE) if clip else 0.0)


def _told(head: nn.Module, states_BTE: Tensor, token_ids_BT: Tensor) -> Tensor:
    return nn.functional.cross_entropy(head(states_BTE).transpose(1, 2), token_ids_BT)


def train_text_parts(seed: int = 0) -> dict[str, Any]:
    """Tokenizers and freshly trained encoders under the names of the pipeline's parts."""
    tokenizers = make_tokenizers()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoders = tiny_text.make_encoders(tokenizers, SIZES)
        for tokenizer, encoder in zip(tokenizers.values(), encoders.values(), strict=True):
            tiny_text.start_weights(encoder)
            _teach(encoder, tokenizer, seed)
    return tokenizers | encoders


def _teach(encoder: Any, tokenizer: Any, seed: int) -> None:
    """Trains one encoder with linear heads, which are thrown away."""
    clip = hasattr(encoder, "text_projection")
    width = SIZES.clip_width if clip else SIZES.t5_width
    questions = _Questions(encoder.train(), width, len(tokenizer))

    def loss(step: int) -> Tensor:
        some = pages.make_pages(SIZES.batch_size, [seed, step], held_out=False)
        token_ids_BT = tiny_text.tokenize(tokenizer, [page.caption for page in some])
        answer: Tensor = questions(token_ids_BT, clip=clip)
        return answer

    tiny_text.descend(questions, loss, SIZES.training_steps)
    encoder.eval().requires_grad_(False)


def load_text_parts(path: Path = SHIPPED_WEIGHTS) -> dict[str, Any]:
    """Tokenizers and trained fp32 encoders under the names of the pipeline's parts.

    Raises:
        FileNotFoundError: If the weights are not there.
    """
    return tiny_text.load_encoders(make_tokenizers(), SIZES, path, "page-text")
