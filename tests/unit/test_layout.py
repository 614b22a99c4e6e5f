"""The stages of a configuration, and the layouts that are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from soar_mega.config import Config, ConfigError
from soar_mega.model.config import MMDiTConfig
from soar_mega.telemetry.flops import block_flops
from soar_mega.training.layout import check_layout, cut_model

# SD3.5-Medium: 13 of 24 layers are dual, so equal numbers of layers are no equal stages.
MEDIUM = MMDiTConfig(
    num_layers=24,
    num_attention_heads=24,
    caption_projection_dim=1536,
    dual_attention_layers=tuple(range(13)),
    qk_norm="rms_norm",
)
SHALLOW = MMDiTConfig(
    num_layers=8, num_attention_heads=1, caption_projection_dim=64, joint_attention_dim=1
)


def config(batch: int = 8, **parallel: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"dir": "nowhere"},
            "model": {"pretrained": "nowhere"},
            "objective": {"name": "soar"},
            "data": {"shards": "none"},
            "train": {"max_train_steps": 1, "micro_batch_size": 1, "global_batch_size": batch},
            "parallel": parallel,
        }
    )


def test_cut_balances_flops() -> None:
    stages = cut_model(config(pipeline_model_parallel_size=2), MEDIUM, 1024, 154)
    assert [len(stage) for stage in stages] == [11, 13]
    costs = [block_flops(MEDIUM, layer, 1024, 154) for layer in range(24)]
    halves = [sum(costs[s.start : s.stop]) for s in stages]
    assert max(halves) < max(sum(costs[:12]), sum(costs[12:]))


def test_embeddings_and_head_count() -> None:
    def lengths(**changes: int) -> list[int]:
        asked = config(pipeline_model_parallel_size=2)
        return [len(x) for x in cut_model(asked, replace(SHALLOW, **changes), 64, 64)]

    # One layer less for the stage with half a layer's FLOPs more.
    assert lengths(joint_attention_dim=64 * 64) == [3, 5]
    assert lengths(out_channels=16 * 64) == [5, 3]


def test_stages_are_ranks_times_virtual_ones() -> None:
    for schedule, virtual, count in (("zero_bubble_v", None, 8), ("interleaved_1f1b", 3, 12)):
        asked = config(
            pipeline_model_parallel_size=4,
            pipeline_schedule=schedule,
            virtual_pipeline_model_parallel_size=virtual,
        )
        stages = cut_model(asked, MEDIUM, 1024, 154)
        assert len(stages) == count
        assert [layer for stage in stages for layer in stage] == list(range(24))


def test_given_layout_is_taken() -> None:
    asked = config(pipeline_model_parallel_size=2, pipeline_layout=[20, 4])
    assert cut_model(asked, MEDIUM, 1024, 154) == (range(20), range(20, 24))


def test_data_size_is_what_is_left() -> None:
    asked = config(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    assert check_layout(asked, MEDIUM, 8) == 2


@pytest.mark.parametrize(
    ("parallel", "world", "words"),
    [
        ({"pipeline_model_parallel_size": 3}, 8, "must divide the number of processes"),
        ({"tensor_model_parallel_size": 5}, 5, "must divide the model's width"),
        ({"pipeline_model_parallel_size": 32}, 32, "at most 24"),
        ({"virtual_pipeline_model_parallel_size": 2}, 8, "which takes 1"),
        (
            {"pipeline_schedule": "zero_bubble_v", "virtual_pipeline_model_parallel_size": 3},
            8,
            "which takes 2",
        ),
        (
            {"pipeline_model_parallel_size": 2, "pipeline_layout": [12, 11]},
            8,
            "its sum is 23 and the model has 24 layers",
        ),
        ({"pipeline_layout": [12, 12]}, 8, "needs a number for each"),
    ],
)
def test_impossible_layouts_are_refused(parallel: Any, world: int, words: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=words):
        check_layout(config(batch=2 * 3 * 5 * 32, **parallel), MEDIUM, world)
