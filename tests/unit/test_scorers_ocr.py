"""OCR accuracy by its definition, and the reader through its real class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from soar_mega.evaluation.interface import Prompt
from soar_mega.evaluation.scorers import ocr
from soar_mega.evaluation.scorers.make import make_scorer
from tests.tiny_scorers import noise, reader_folder


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_edit_distance(first: str, second: str, distance: int) -> None:
    assert ocr.edit_distance(first, second) == ocr.edit_distance(second, first) == distance


@pytest.mark.parametrize(
    ("read", "target", "accuracy"),
    [
        ("Hello\nWorld", "hello world", 1.0),
        ("xx HELLO WORLD yy", "Hello World", 1.0),  # held by what is read
        ("hell", "hello", 0.8),
        ("helo world", "Hello World", 0.9),
        ("", "Hi", 0.0),
        ("quite other words", "Hi", 0.0),  # never below 0
    ],
)
def test_accuracy(read: str, target: str, accuracy: float) -> None:
    assert ocr.accuracy(read, target) == pytest.approx(accuracy)


def test_each_picture_is_read_against_its_own_prompt() -> None:
    sizes = {10: "OPEN", 20: "shut"}

    def read(picture: Image.Image) -> str:
        return sizes[picture.width]

    pictures = [Image.new("RGB", (width, 8)) for width in (10, 20, 10)]
    prompts = [Prompt(f'a sign "{t}"', truth={"text": t}) for t in ("open", "shut", "shut")]
    scores = ocr.Ocr(read).score(pictures, prompts)
    assert [score["accuracy"] for score in scores] == [1.0, 1.0, 0.0]


def test_a_prompt_without_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'a cat' says no text.*kind ocr"):
        ocr.Ocr(lambda picture: "").score([noise(1)], [Prompt("a cat")])


def greedy(model: Any, folder: Path, picture: Image.Image, steps: int) -> str:
    """What the model writes, token by token without generate()."""
    from transformers import AutoImageProcessor, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    # (128 / 16 / 4) squared places of the picture.
    text = (
        "<|im_start|>system\nYou should follow the instructions carefully and explain your answers "
        f"in detail.<|im_end|><|im_start|>user\n<img>{'<imgpad>' * 4}</img>\n OCR: <|im_end|>"
        "<|im_start|>assistant\n"
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    pixels = AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt").pixel_values
    start, stop = ids.shape[1], tokenizer.convert_tokens_to_ids("<|im_end|>")
    for _ in range(steps):
        with torch.no_grad():
            token = model(input_ids=ids, pixel_values=pixels).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, token], 1)
        if int(token) in (stop, tokenizer.eos_token_id):
            break
    return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True))


def test_the_reader_writes_what_its_model_finds_likeliest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ocr, "_MAX_TOKENS", 6)
    folder = tmp_path / "GOT-OCR-2.0-hf"
    model = reader_folder(folder)
    read = ocr.GotReader(folder, "cpu")
    pictures = [noise(n, 128, 128) for n in range(3)]
    expected = [greedy(model, folder, picture, 6) for picture in pictures]
    assert [read(picture) for picture in pictures] == expected
    assert all(expected)
    scorer = make_scorer("ocr", tmp_path)
    wanted = Prompt("", truth={"text": expected[0]})
    assert scorer.score(pictures[:1], [wanted]) == [{"accuracy": 1.0}]
