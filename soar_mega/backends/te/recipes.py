"""FP8 recipes by name, what they ask of shapes, and whether this GPU has them.

Facts of Transformer Engine 2.20: ``get_align_size_for_quantization`` and the checks of
``common/gemm/cublaslt_gemm.cu`` for shapes, ``common.recipe`` for the recipes. The weight
gradient's product has tokens as an inner dimension, which cuBLAS wants in sixteens, although
``assert_dim_for_fp8_exec`` asks for eights only.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal, get_args

RecipeName = Literal["current", "block", "delayed", "mxfp8"]
RECIPES: tuple[RecipeName, ...] = get_args(RecipeName)

# recipe -> class in transformer_engine.common.recipe, function in transformer_engine.pytorch that
# says whether the GPU can run it
_CLASSES = {
    "current": ("Float8CurrentScaling", "is_fp8_available"),
    "block": ("Float8BlockScaling", "is_fp8_block_scaling_available"),
    "delayed": ("DelayedScaling", "is_fp8_available"),
    "mxfp8": ("MXFP8BlockScaling", "is_mxfp8_available"),
}


def multiple_of(recipe: RecipeName | None) -> int:
    """What each rank's features and tokens of a linear layer must be a multiple of.

    Of tokens, whatever the samples of a pass: text of 154 becomes 160, of 333 336.
    """
    if recipe is None:
        return 1
    return 32 if recipe == "mxfp8" else 16


def make_recipe(recipe: RecipeName, *, reduce_amax: bool) -> Any:
    """Transformer Engine's recipe object.

    Args:
        recipe: Which.
        reduce_amax: Of delayed scaling: whether ``te.autocast`` is given a group. Without one
            Transformer Engine would reduce over all processes, stages of a pipeline included.
    """
    module = importlib.import_module("transformer_engine.common.recipe")
    more = {"reduce_amax": reduce_amax} if recipe == "delayed" else {}
    return getattr(module, _CLASSES[recipe][0])(**more)


def why_not(recipe: RecipeName) -> str | None:
    """Why this GPU cannot run a recipe, in Transformer Engine's words; None: it can."""
    te = importlib.import_module("transformer_engine.pytorch")
    available, reason = getattr(te, _CLASSES[recipe][1])(return_reason=True)
    return None if available else str(reason)
