"""OCR accuracy: can the text that a prompt asks for be read in the picture?

The number is Flow-GRPO's: both texts without spaces and in lower case; 1 if what is read holds what
is asked for, else 1 - min(edit distance, length) / length. Flow-GRPO and SOAR read with PaddleOCR
2.9 (0.59 for SD3.5-M on Flow-GRPO's test prompts), which needs PaddlePaddle; its successor in
transformers needs torchvision and OpenCV. This reads with GOT-OCR 2.0, which takes in a whole
picture at once and needs neither. A different reader makes different mistakes: compare numbers of
this scorer with each other, not with published ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from soar_mega.evaluation.interface import Prompt
from soar_mega.evaluation.scorers.clip import each
from soar_mega.evaluation.scorers.weights import Weights, load_model, load_part, pil_settings

READER = Weights(
    name="GOT-OCR-2.0-hf",
    repository="stepfun-ai/GOT-OCR-2.0-hf",
    needs=("config.json", "*.safetensors", "preprocessor_config.json", "tokenizer.json"),
    terms="Apache-2.0",
)
_MAX_TOKENS = 256  # a reader that sees no text may go on for ever


class Ocr:
    """Metric ``accuracy``, 0 to 1.

    Args:
        read: The text in a picture.
    """

    name = "ocr"
    citation = (
        "Liu et al. 2025, Flow-GRPO, arXiv 2505.05470 (the number); reader: Wei et al. 2024, "
        "GOT-OCR 2.0, arXiv 2409.01704, stepfun-ai/GOT-OCR-2.0-hf"
    )
    overall: Literal["pictures", "categories"] = "pictures"
    needs: tuple[Weights, ...] = (READER,)

    def __init__(self, read: Callable[[Image.Image], str]) -> None:
        self._read = read

    @classmethod
    def load(cls, folders: Mapping[str, Path], device: torch.device | str) -> Ocr:
        """From the folders of ``needs`` by name."""
        return cls(GotReader(folders[READER.name], device))

    def score(
        self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]
    ) -> list[dict[str, float]]:
        """As ``Scorer.score``; ``Prompt.truth`` must have the ``text`` to be read."""
        targets = {prompt.text: _target(prompt) for prompt in prompts}
        return each(
            "accuracy", pictures, prompts, lambda p, q: accuracy(self._read(p), targets[q.text])
        )


def _target(prompt: Prompt) -> str:
    text = prompt.truth.get("text")
    if not isinstance(text, str) or not _plain(text):
        raise ValueError(
            f"the prompt {prompt.text!r} says no text to be read: the scorer ocr needs a prompt "
            "set of the kind ocr"
        )
    return text


def accuracy(read: str, target: str) -> float:
    """Of what was read in a picture that should show ``target``, 0 to 1."""
    read, target = _plain(read), _plain(target)
    if target in read:
        return 1.0
    return 1.0 - min(edit_distance(read, target), len(target)) / len(target)


def _plain(text: str) -> str:
    return "".join(text.split()).lower()


def edit_distance(first: str, second: str) -> int:
    """The fewest insertions, deletions and replacements of a character (Levenshtein)."""
    row = list(range(len(second) + 1))
    for place, letter in enumerate(first, start=1):
        corner, row[0] = row[0], place
        for column, other in enumerate(second, start=1):
            corner, row[column] = (
                row[column],
                min(row[column] + 1, row[column - 1] + 1, corner + (letter != other)),
            )
    return row[-1]


class GotReader:
    """Reads pictures with GOT-OCR 2.0, greedily.

    Args:
        folder: Its model and processor.
        device: Where it runs.

    Raises:
        ScorerError: The folder cannot be read.
    """

    def __init__(self, folder: Path, device: torch.device | str) -> None:
        from transformers import (
            AutoImageProcessor,
            AutoTokenizer,
            GotOcr2ForConditionalGeneration,
            GotOcr2Processor,
        )

        self._model = load_model(GotOcr2ForConditionalGeneration, folder, device)
        self._processor: Any = GotOcr2Processor(
            load_part(AutoImageProcessor, folder, **pil_settings()),
            load_part(AutoTokenizer, folder),
        )
        vision = self._model.config.vision_config
        # Patches, merged two by two twice.
        self._tokens = (vision.image_size // vision.patch_size // 4) ** 2

    @torch.inference_mode()
    def __call__(self, picture: Image.Image) -> str:
        """All text in the picture."""
        inputs = self._processor(
            picture.convert("RGB"), num_image_tokens=self._tokens, return_tensors="pt"
        ).to(self._model.device)
        ids = self._model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            pixel_values=inputs["pixel_values"],
            do_sample=False,
            max_new_tokens=_MAX_TOKENS,
            tokenizer=self._processor.tokenizer,
            stop_strings="<|im_end|>",
            pad_token_id=self._processor.tokenizer.pad_token_id,
        )
        new = ids[0, inputs["input_ids"].shape[1] :]
        text: str = self._processor.tokenizer.decode(new, skip_special_tokens=True)
        return text.replace("<|im_end|>", "")
