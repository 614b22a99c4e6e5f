"""Cuts a model's layers into pipeline stages.

A step runs at the pace of its slowest stage, so the automatic cut makes the costliest stage as
cheap as whole layers allow. Costs are forward FLOPs or measured times, in any one unit; that every
backward costs the same multiple of its forward is all the cut needs. Stages are in the order a
microbatch visits them, whatever rank they are placed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache


def stage_cost(
    layers: range, costs_of_layers: Sequence[float], first_extra: float, last_extra: float
) -> float:
    """Cost of the stage that owns ``layers``; see ``cut_layers``."""
    cost = sum(costs_of_layers[layers.start : layers.stop])
    cost += first_extra if layers.start == 0 else 0
    return cost + (last_extra if layers.stop == len(costs_of_layers) else 0)


def cut_layers(
    costs_of_layers: Sequence[float],
    first_extra: float,
    last_extra: float,
    stages: int,
    *,
    virtual: int = 1,
) -> tuple[range, ...]:
    """The cut whose costliest stage is cheapest; of those the most even (least sum of squares).

    Where cuts are still equal, the earlier stages have fewer layers: they keep the activations of
    more microbatches.

    Args:
        costs_of_layers: Cost of each layer.
        first_extra: Cost of what the first stage does besides: the embeddings.
        last_extra: Cost of what the last stage does besides: the head.
        stages: Number of stages, over all virtual ones.
        virtual: How many of them a pipeline rank owns (for the error message).

    Raises:
        ValueError: There are more stages than layers.
    """
    total = len(costs_of_layers)
    check_stages(total, stages, virtual)

    @cache
    def cost(start: int, stop: int) -> float:
        return stage_cost(range(start, stop), costs_of_layers, first_extra, last_extra)

    def stops(start: int, left: int) -> range:
        """Where a stage from ``start`` may end so that ``left`` more have a layer each."""
        return range(start + 1, total - left + 1) if left else range(total, total + 1)

    @cache
    def slowest(start: int, left: int) -> float:
        """Least possible cost of the costliest of the stages from ``start``, ``left`` + 1."""
        if left == 0:
            return cost(start, total)
        return min(max(cost(start, at), slowest(at, left - 1)) for at in stops(start, left))

    limit = slowest(0, stages - 1)

    @cache
    def evenest(start: int, left: int) -> tuple[float, tuple[int, ...]]:
        """Least sum of squares within ``limit``, and the ends that give it; inf where none does."""
        best: tuple[float, tuple[int, ...]] = (float("inf"), ())
        for at in stops(start, left):
            if cost(start, at) > limit:
                continue
            squares, ends = evenest(at, left - 1) if left else (0, ())
            squares += cost(start, at) ** 2
            if squares < best[0]:
                best = squares, (at, *ends)
        return best

    return _ranges(evenest(0, stages - 1)[1])


def given_layout(
    counts: Sequence[int], num_layers: int, stages: int, *, virtual: int = 1
) -> tuple[range, ...]:
    """The cut that ``parallel.pipeline_layout`` asks for: its numbers of layers, stage by stage.

    Args:
        counts: Layers of each stage.
        num_layers: Layers of the model.
        stages, virtual: See ``cut_layers``.

    Raises:
        ValueError: The layout does not fit the model or the number of stages.
    """
    check_stages(num_layers, stages, virtual)
    even, more = divmod(num_layers, stages)
    example = [even] * (stages - more) + [even + 1] * more
    rule = None
    if len(counts) != stages:
        rule = f"the pipeline has {_stages(stages, virtual)} and needs a number for each"
    elif min(counts) < 1:
        rule = "every stage needs at least one layer"
    elif sum(counts) != num_layers:
        rule = f"its sum is {sum(counts)} and the model has {num_layers} layers"
    if rule is not None:
        raise ValueError(
            f"parallel.pipeline_layout is {list(counts)}, but {rule}: give {stages} numbers with "
            f"the sum {num_layers}, such as {example}, or leave it out to cut by cost"
        )
    return _ranges([sum(counts[: index + 1]) for index in range(stages)])


def check_stages(num_layers: int, stages: int, virtual: int = 1) -> None:
    """Refuse more stages than layers.

    Raises:
        ValueError: Names the settings, the rule and the largest pipeline that works.
    """
    if 1 <= stages <= num_layers:
        return
    if num_layers >= virtual:
        fix = f"set it to at most {num_layers // virtual}"
    else:
        fix = f"choose a schedule with at most {num_layers} virtual stages"
    raise ValueError(
        f"parallel.pipeline_model_parallel_size is {stages // virtual}, which makes "
        f"{_stages(stages, virtual)}, but the model has {num_layers} layers and every stage needs "
        f"at least one: {fix}"
    )


def _stages(stages: int, virtual: int) -> str:
    return (
        f"{stages} stages" if virtual == 1 else f"{stages} stages ({virtual} virtual ones a rank)"
    )


def _ranges(ends: Sequence[int]) -> tuple[range, ...]:
    return tuple(range(start, stop) for start, stop in zip([0, *ends], ends, strict=False))
