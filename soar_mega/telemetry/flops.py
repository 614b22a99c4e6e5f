"""Model FLOPs of an MMDiT and model-FLOPs utilisation; a multiply-add counts 2.

What counts is what the model needs, never recomputation. Each token sees the weights of its own
stream only, and the adaLN weights act once per sample, so ``6 * parameters * tokens`` would be far
too much. Element-wise work (norms, activations, residuals) is left out, as is customary.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

# Width of the sinusoidal embedding in front of the timestep MLP; fixed in this family.
TIMESTEP_CHANNELS = 256


class ModelShape(Protocol):
    """The numbers of an MMDiT, under diffusers' names."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def attention_head_dim(self) -> int: ...
    @property
    def patch_size(self) -> int: ...
    @property
    def in_channels(self) -> int: ...
    @property
    def out_channels(self) -> int: ...
    @property
    def joint_attention_dim(self) -> int: ...
    @property
    def pooled_projection_dim(self) -> int: ...
    @property
    def dual_attention_layers(self) -> Collection[int]: ...


def forward_flops(model: ModelShape, image_tokens: int, text_tokens: int) -> int:
    """FLOPs of one forward of one sample.

    Args:
        model: Shape of the model.
        image_tokens: Latent patches, for example 1024 for 512 px.
        text_tokens: CLIP and T5 tokens together, for example 154.
    """
    blocks = sum(
        block_flops(model, layer, image_tokens, text_tokens) for layer in range(model.num_layers)
    )
    return (
        embedding_flops(model, image_tokens, text_tokens) + blocks + head_flops(model, image_tokens)
    )


def layer_costs(
    model: ModelShape, image_tokens: int, text_tokens: int
) -> tuple[list[int], int, int]:
    """Forward FLOPs of one sample: of each block, of the embeddings, of the head."""
    tokens = image_tokens, text_tokens
    return (
        [block_flops(model, layer, *tokens) for layer in range(model.num_layers)],
        embedding_flops(model, *tokens),
        head_flops(model, image_tokens),
    )


def embedding_flops(model: ModelShape, image_tokens: int, text_tokens: int) -> int:
    """FLOPs of one forward of one sample before the first block."""
    width = model.num_attention_heads * model.attention_head_dim
    embed = 2 * image_tokens * model.patch_size**2 * model.in_channels * width
    embed += 2 * text_tokens * model.joint_attention_dim * width
    return embed + 2 * (TIMESTEP_CHANNELS + width + model.pooled_projection_dim + width) * width


def head_flops(model: ModelShape, image_tokens: int) -> int:
    """FLOPs of one forward of one sample after the last block."""
    width = model.num_attention_heads * model.attention_head_dim
    return 4 * width**2 + 2 * image_tokens * width * model.patch_size**2 * model.out_channels


def block_flops(model: ModelShape, layer: int, image_tokens: int, text_tokens: int) -> int:
    """FLOPs of one forward of one sample through block ``layer``."""
    square = (model.num_attention_heads * model.attention_head_dim) ** 2
    width = model.num_attention_heads * model.attention_head_dim
    last, dual = layer == model.num_layers - 1, layer in model.dual_attention_layers
    # Query, key, value 6, out 2, MLP 16; the last block drops its text after the attention.
    linear = 24 * image_tokens * square + (6 if last else 24) * text_tokens * square
    attention = 4 * (image_tokens + text_tokens) ** 2 * width
    modulation = 2 * square * ((9 if dual else 6) + (2 if last else 6))
    if dual:
        linear += 8 * image_tokens * square
        attention += 4 * image_tokens**2 * width
    return linear + attention + modulation


def training_factor(objective: object) -> int:
    """Forward equivalents of one training sample (a backward counts 2).

    Flow matching is 3. SOAR with M paths of N auxiliary states adds 3 M N, and its rollout 1 for
    each half of the guidance that is not at hand: the conditional one unless
    ``reuse_base_forward``, the unconditional one unless ``cfg_scale_sampling`` is 1. Without
    auxiliary states (``lambda_aux`` 0 or N = 0), or with ``aux_states`` that are not rolled out,
    there is no rollout.

    Args:
        objective: The ``objective`` section of a configuration.
    """
    states = getattr(objective, "num_rollout_paths", 0) * getattr(objective, "trajectory_length", 0)
    if not states or getattr(objective, "lambda_aux", 0) == 0:
        return 3
    if getattr(objective, "aux_states", "rollout") != "rollout":
        return 3 + 3 * states
    unconditional = getattr(objective, "cfg_scale_sampling", None) != 1
    conditional = not getattr(objective, "reuse_base_forward", False)
    return 3 + unconditional + conditional + 3 * states


def model_flops_utilisation(
    samples_per_s: float, flops_per_sample: float, devices: int, peak_tflops: float
) -> float:
    """Share of the devices' peak that the model's own FLOPs use, 0 to 1.

    Args:
        samples_per_s: Samples a second over all devices.
        flops_per_sample: ``training_factor(objective) * forward_flops(...)``.
        devices: Number of devices.
        peak_tflops: Peak TFLOP/s of one device.
    """
    return samples_per_s * flops_per_sample / (devices * peak_tflops * 1e12)


# Dense bf16 peak of one device in TFLOP/s, from NVIDIA's data sheets; the first name that matches.
_PEAKS = (("H100 PCIe", 756.0), ("H100", 989.0), ("H200", 989.0), ("B200", 2250.0), ("A100", 312.0))


def known_peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak TFLOP/s of a device by its name; None for one not in the table."""
    return next((peak for name, peak in _PEAKS if name in device_name), None)
