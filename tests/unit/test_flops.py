"""Model FLOPs, training factor and MFU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from soar_mega.config import FlowMatchingConfig, SoarConfig
from soar_mega.telemetry.flops import (
    forward_flops,
    known_peak_tflops,
    model_flops_utilisation,
    training_factor,
)


def shape(layers: int, heads: int, dual: range = range(0)) -> SimpleNamespace:
    return SimpleNamespace(
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=64,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        dual_attention_layers=tuple(dual),
    )


SD35_MEDIUM = shape(24, 24, range(13))
SD35_LARGE = shape(38, 38)


@pytest.mark.parametrize(
    ("model", "image", "text", "tflop"),
    [
        (SD35_MEDIUM, 1024, 154, 2.138),
        (SD35_LARGE, 1024, 154, 6.860),
        (SD35_MEDIUM, 1024, 333, 2.443),
        (SD35_LARGE, 1024, 333, 7.978),
        (SD35_MEDIUM, 4096, 154, 10.78),
        (SD35_LARGE, 4096, 154, 29.6),
    ],
)
def test_forward_flops_of_the_published_models(
    model: Any, image: int, text: int, tflop: float
) -> None:
    digits = len(str(tflop).split(".")[1])
    assert round(forward_flops(model, image, text) / 1e12, digits) == pytest.approx(tflop)


def test_forward_flops_of_a_model_counted_by_hand() -> None:
    model = shape(1, 1, range(1))  # one block: dual and last, width 64
    d, image, text = 64, 3, 5
    linear = 24 * image * d**2 + 8 * image * d**2 + 6 * text * d**2
    attention = 4 * (image + text) ** 2 * d + 4 * image**2 * d
    modulation = 2 * (9 + 2) * d**2
    ends = 2 * image * 64 * d + 2 * text * 4096 * d + 2 * (256 + d + 2048 + d) * d
    ends += 4 * d**2 + 2 * image * 64 * d
    assert forward_flops(model, image, text) == linear + attention + modulation + ends


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({}, 22),
        ({"reuse_base_forward": False}, 23),
        ({"num_rollout_paths": 3}, 58),
        ({"cfg_scale_sampling": 1.0}, 21),
        ({"cfg_scale_sampling": 1.0, "reuse_base_forward": False}, 22),
        ({"cfg_scale_sampling": 0.0}, 22),
        ({"lambda_aux": 0.0}, 3),
        ({"trajectory_length": 0}, 3),
    ],
)
def test_training_factor_of_soar(changes: dict[str, Any], factor: int) -> None:
    assert training_factor(SoarConfig(name="soar", **changes)) == factor


def test_training_factor_of_flow_matching_and_utilisation() -> None:
    assert training_factor(FlowMatchingConfig(name="flow_matching")) == 3
    # 16.8 samples/s of SOAR on SD3.5-Medium are the bound at 790 TFLOP/s.
    share = model_flops_utilisation(8 * 16.8, 22 * 2.138e12, devices=8, peak_tflops=790)
    assert share == pytest.approx(1.0, abs=2e-3)


def test_peaks_of_known_devices() -> None:
    assert known_peak_tflops("NVIDIA H100 80GB HBM3") == 989
    assert known_peak_tflops("NVIDIA H100 PCIe") == 756
    assert known_peak_tflops("NVIDIA GeForce GTX 1080") is None
