"""GenEval's detector: Mask2Former, trained on COCO, as Cheng et al. use it for instances.

A picture is resized as mmdetection tests it: shortest edge 800, longest at most 1333. Each of 100
queries gives a mask and a probability of each class; of all pairs of query and class the 100
likeliest are detections. A detection's confidence is that probability times its mask's mean
certainty, its box the mask's extent.

Legend: Q queries, K classes, D detections, h/w the mask's own size, H/W the picture in px.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from soar_mega.evaluation.scorers.geneval_words import CLASSES
from soar_mega.evaluation.scorers.weights import (
    ScorerError,
    Weights,
    load_model,
    load_part,
    pil_settings,
)

DETECTOR = Weights(
    name="mask2former-swin-small-coco-instance",
    repository="facebook/mask2former-swin-small-coco-instance",
    needs=("config.json", "*.safetensors", "preprocessor_config.json"),
    terms="MIT (code); the model card says 'other'",
)
_EDGES = {"shortest_edge": 800, "longest_edge": 1333}
_MOST = 100
# transformers 5 gives the backbone a last norm that only its unused last output passes through; the
# published file is older.
_UNUSED = (".encoder.swin.layernorm.weight", ".encoder.swin.layernorm.bias")


@dataclass(frozen=True)
class Detection:
    """An object in a picture.

    Attributes:
        label: One of ``CLASSES``.
        confidence: 0 to 1.
        box: Left, top, right, bottom in px; right and bottom lie just outside.
        mask_HW: Its pixels (H, W), bool.
    """

    label: str
    confidence: float
    box: tuple[float, float, float, float]
    mask_HW: np.ndarray


class Mask2Former:
    """Finds objects of ``CLASSES``, one picture at a time.

    Args:
        model: ``Mask2FormerForUniversalSegmentation`` with COCO's 80 classes.
        processor: Its image processor.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self._model, self._processor = model, processor

    @classmethod
    def load(
        cls, folder: Path, device: torch.device | str, edges: dict[str, int] | None = None
    ) -> Mask2Former:
        """From a folder; ``edges`` are other limits of a resized picture.

        Raises:
            ScorerError: The folder cannot be read, or detects other classes.
        """
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        model = load_model(Mask2FormerForUniversalSegmentation, folder, device, unused=_UNUSED)
        if model.config.num_labels != len(CLASSES):
            raise ScorerError(
                f"{folder} detects {model.config.num_labels} classes, GenEval needs COCO's "
                f"{len(CLASSES)}: {DETECTOR.advice(folder)}"
            )
        settings = {"size": edges or _EDGES, **pil_settings()}
        return cls(model, load_part(AutoImageProcessor, folder, **settings))

    @torch.inference_mode()
    def __call__(self, picture: Image.Image) -> list[Detection]:
        """All detections, however unsure, the likeliest first."""
        inputs = self._processor(images=picture.convert("RGB"), return_tensors="pt")
        seen = self._model(**inputs.to(self._model.device))
        mask = inputs["pixel_mask"][0]  # 0 on the padding, which lies right and below
        return detections(
            seen.class_queries_logits[0],
            seen.masks_queries_logits[0],
            padded=(int(mask.shape[0]), int(mask.shape[1])),
            resized=(int(mask[:, 0].sum()), int(mask[0].sum())),
            size=(picture.height, picture.width),
        )


def detections(
    class_logits_QK: torch.Tensor,
    mask_logits_Qhw: torch.Tensor,
    *,
    padded: tuple[int, int],
    resized: tuple[int, int],
    size: tuple[int, int],
) -> list[Detection]:
    """What the detector's outputs say.

    Args:
        class_logits_QK: With "nothing" as the last class.
        mask_logits_Qhw: Of the padded picture.
        padded: Its height and width.
        resized: Those of its part that is the picture.
        size: Those of the picture before resizing.
    """
    likely_QK = class_logits_QK.softmax(-1)[:, :-1]
    classes = likely_QK.shape[1]
    # Stable: equal probabilities come in the queries' order on every machine.
    likely_D, pair_D = likely_QK.flatten().sort(descending=True, stable=True)
    found = []
    for likely, pair in zip(likely_D[:_MOST].tolist(), pair_D[:_MOST].tolist(), strict=True):
        mask_11hw = mask_logits_Qhw[pair // classes][None, None]
        mask_11hw = F.interpolate(mask_11hw, padded, mode="bilinear", align_corners=False)
        mask_11hw = mask_11hw[..., : resized[0], : resized[1]]
        mask_HW = F.interpolate(mask_11hw, size, mode="bilinear", align_corners=False)[0, 0]
        inside_HW = mask_HW > 0
        if not inside_HW.any():
            continue
        certainty = float(mask_HW[inside_HW].sigmoid().mean())
        rows, columns = (inside_HW.any(1 - axis).nonzero()[:, 0] for axis in (0, 1))
        box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        left, top, right, bottom = (float(edge) for edge in box)
        found.append(
            Detection(
                label=CLASSES[pair % classes],
                confidence=likely * certainty,
                box=(left, top, right, bottom),
                mask_HW=inside_HW.cpu().numpy(),
            )
        )
    return found
