"""Layers cut into stages: the best cut there is, the published figures, what is refused."""

from __future__ import annotations

from itertools import combinations, pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soar_mega.pipeline.stages import cut_layers, given_layout, stage_cost
from soar_mega.telemetry.flops import block_flops, embedding_flops, forward_flops, head_flops

COMMON = {"attention_head_dim": 64, "patch_size": 2, "in_channels": 16, "out_channels": 16}
COMMON |= {"joint_attention_dim": 4096, "pooled_projection_dim": 2048}
MEDIUM = SimpleNamespace(
    num_layers=24, num_attention_heads=24, dual_attention_layers=tuple(range(13)), **COMMON
)
LARGE = SimpleNamespace(num_layers=38, num_attention_heads=38, dual_attention_layers=(), **COMMON)
TOKENS = (1024, 154)  # 512 px


def every_cut(layers: int, stages: int) -> list[tuple[range, ...]]:
    return [
        tuple(range(*ends) for ends in pairwise((0, *inner, layers)))
        for inner in combinations(range(1, layers), stages - 1)
    ]


def block_costs(model: SimpleNamespace) -> list[float]:
    return [block_flops(model, layer, *TOKENS) for layer in range(model.num_layers)]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[float], float, float, int]:
    cost = draw(st.sampled_from([st.integers(0, 6), st.integers(1, 10**14)]))
    costs: list[float] = draw(st.lists(cost, min_size=1, max_size=9))
    return costs, draw(cost), draw(cost), draw(st.integers(1, len(costs)))


@given(problems())
@settings(deadline=None)
def test_cut_is_the_best_of_all_cuts(problem: tuple[list[float], float, float, int]) -> None:
    costs, first, last, stages = problem

    def rank(cut: tuple[range, ...]) -> tuple[float, float, list[int]]:
        each = [stage_cost(layers, costs, first, last) for layers in cut]
        return max(each), sum(c**2 for c in each), [len(layers) for layers in cut]

    assert cut_layers(costs, first, last, stages) == min(every_cut(len(costs), stages), key=rank)


@given(st.lists(st.floats(0.001, 10), min_size=2, max_size=8), st.data())
@settings(deadline=None)
def test_measured_costs_are_cut_as_well(costs: list[float], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    extras = data.draw(st.tuples(st.floats(0, 3), st.floats(0, 3)))
    slowest = [
        max(stage_cost(layers, costs, *extras) for layers in cut)
        for cut in [cut_layers(costs, *extras, stages), *every_cut(len(costs), stages)]
    ]
    assert slowest[0] == min(slowest[1:])


@pytest.mark.parametrize(
    ("model", "stages", "counts", "imbalance"),
    [
        (MEDIUM, 2, [11, 13], 1.041),
        (MEDIUM, 4, [5, 5, 6, 8], 1.116),
        (MEDIUM, 8, None, 1.136),
        (LARGE, 2, [19, 19], 1.002),
        (LARGE, 4, [9, 9, 10, 10], 1.055),
        (LARGE, 8, None, 1.055),
    ],
)
def test_balance_of_the_published_models_by_blocks_alone(
    model: SimpleNamespace, stages: int, counts: list[int] | None, imbalance: float
) -> None:
    costs = block_costs(model)
    cut = cut_layers(costs, 0, 0, stages)
    if counts is not None:
        assert [len(layers) for layers in cut] == counts
    slowest = max(stage_cost(layers, costs, 0, 0) for layers in cut)
    assert round(slowest * stages / sum(costs), 3) == imbalance


def test_embeddings_and_head_count() -> None:
    costs = block_costs(MEDIUM)
    extras = embedding_flops(MEDIUM, *TOKENS), head_flops(MEDIUM, TOKENS[0])
    whole = (range(24),)
    assert stage_cost(*whole, costs, *extras) == forward_flops(MEDIUM, *TOKENS)
    assert cut_layers(costs, *extras, 1) == whole
    assert cut_layers([1] * 6, 0, 0, 2) == (range(3), range(3, 6))
    assert cut_layers([1] * 6, 2, 0, 2) == (range(2), range(2, 6))
    assert cut_layers([1] * 6, 0, 2, 2) == (range(4), range(4, 6))


def test_equal_cuts_give_the_earlier_stages_fewer_layers() -> None:
    assert cut_layers([1] * 7, 0, 0, 4) == (range(1), range(1, 3), range(3, 5), range(5, 7))


def test_even_cut_wins_where_the_slowest_stage_is_the_same() -> None:
    # The first layer decides the slowest stage; the other six are shared out evenly all the same.
    assert [len(layers) for layers in cut_layers([9, 1, 1, 1, 1, 1, 1], 0, 0, 3)] == [1, 3, 3]


def test_given_layout_is_taken_as_it_is() -> None:
    assert given_layout([2, 1, 3], 6, 3) == (range(2), range(2, 3), range(3, 6))


@pytest.mark.parametrize(
    ("counts", "rule"),
    [
        ([3, 3], "the pipeline has 4 stages (2 virtual ones a rank) and needs a number for each"),
        ([], "the pipeline has 4 stages (2 virtual ones a rank) and needs a number for each"),
        ([0, 2, 2, 2], "every stage needs at least one layer"),
        ([4, 4, -1, -1], "every stage needs at least one layer"),
        ([1, 1, 2, 3], "its sum is 7 and the model has 6 layers"),
    ],
)
def test_layout_that_does_not_fit_is_refused(counts: list[int], rule: str) -> None:
    with pytest.raises(ValueError) as error:
        given_layout(counts, 6, 4, virtual=2)
    assert str(error.value) == (
        f"parallel.pipeline_layout is {counts}, but {rule}: give 4 numbers with the sum 6, such "
        "as [1, 1, 2, 2], or leave it out to cut by cost"
    )


@pytest.mark.parametrize("virtual", [1, 2, 3])
def test_more_stages_than_layers_are_refused(virtual: int) -> None:
    stages = 9 * virtual
    for refused in (
        lambda: cut_layers([1.0] * 8, 0, 0, stages, virtual=virtual),
        lambda: given_layout([1] * stages, 8, stages, virtual=virtual),
    ):
        with pytest.raises(ValueError) as error:
            refused()
        message = str(error.value)
        assert message.startswith("parallel.pipeline_model_parallel_size is 9, which makes ")
        assert "the model has 8 layers and every stage needs at least one" in message
        assert message.endswith(f"set it to at most {8 // virtual}")
        nearest = 8 // virtual * virtual
        assert len(cut_layers([1.0] * 8, 0, 0, nearest, virtual=virtual)) == nearest


def test_more_virtual_stages_than_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="a schedule with at most 1 virtual stages"):
        cut_layers([1.0], 0, 0, 2, virtual=2)
