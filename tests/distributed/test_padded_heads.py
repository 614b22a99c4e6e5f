"""Training with heads that the tensor size does not divide equals one process, and padding stays
exactly zero in weights, averages and moments; checkpoints and exports hold nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from soar_mega.backends.torch import TorchBackend
from soar_mega.checkpoint import store
from soar_mega.checkpoint.diffusers_map import mapping
from soar_mega.checkpoint.exporter import export
from soar_mega.checkpoint.importer import load_checkpoint_weights
from soar_mega.checkpoint.torch_arrays import as_array, as_tensor
from soar_mega.checkpoint.weight_sources import Weights
from soar_mega.model.config import MMDiTConfig
from soar_mega.model.stage import MMDiTStage
from soar_mega.parallel.layout import layout_of, real_part
from soar_mega.parallel.mesh import Mesh
from soar_mega.training.setup import Run
from tests.distributed import test_training_layouts
from tests.distributed.harness import run_ranks
from tests.distributed.test_training_layouts import (
    GLOBAL_BATCH,
    SOME,
    STEPS,
    Case,
    Reference,
    Result,
    compare,
    train_case,
    train_run,
)
from tests.runs import SIZES, Tiny, assert_weights, checkpoint, make_small_tiny, start, state

# Seven heads of 8 are padded at 2 and 4, fifteen at 2, 4 and 8.
TENSOR_4 = Case("sft", 4, True)
OF_FOUR = [
    Case("soar", 4, True, 4),
    Case("pretrain", 4),
    Case("pretrain", 2, True, 2),
    Case("soar", 2, micro=4),
]
OF_EIGHT = [
    Case("soar", 8, True, 4),
    Case("soar", 8, micro=8),
    Case("soar", 4, True, 4),
    Case("soar", 2, micro=2),
]


@dataclass
class Rank:
    """What one rank saw of one case.

    Attributes:
        padding: Padded elements in its shares of weights, average and moments.
        disturbed: Those of them that are not exactly zero.
        local: Kind of weights -> parameter -> its local tensor, where a rank has it whole.
    """

    result: Result
    padding: int
    disturbed: int
    local: dict[str, dict[str, Tensor]]


def padding_of(run: Run) -> tuple[int, int]:
    """Numbers of padded elements, and of those that are not zero."""
    stepper = run.stepper
    shards = (
        stepper.parameters.master_shard,
        stepper.ema.shard,
        stepper.optimizer.exp_avg,
        stepper.optimizer.exp_avg_sq,
    )
    padding = disturbed = 0
    for piece in stepper.parameters.fragments():
        padded = torch.ones(piece.layout.local_shape(run.mesh.tensor_size), dtype=torch.bool)
        real_part(padded, piece.layout, run.mesh).fill_(False)
        own = padded.view(-1)[piece.start : piece.stop]
        for shard in shards:
            values = shard[piece.shard_start :][: piece.stop - piece.start][own]
            padding += values.numel()
            disturbed += int(values.ne(0).sum())  # not a number counts
    return padding, disturbed


def local_tensors(run: Run) -> dict[str, dict[str, Tensor]]:
    parameters = run.stepper.parameters
    shards = {"plain": parameters.master_shard, "ema": run.stepper.ema.shard}
    return {
        kind: {
            piece.name: shard[piece.shard_start :][: piece.stop].clone()
            for piece in parameters.fragments()
        }
        for kind, shard in shards.items()
        if run.mesh.data_size == 1
    }


def train_cases(tiny: Tiny, folder: Path, cases: list[Case]) -> list[Rank]:
    # Fills new memory with what is no number, so that forgotten padding shows.
    torch.use_deterministic_algorithms(True)
    ranks = []
    for case in cases:
        run = start(case.config(tiny, folder))
        result = train_run(run)
        ranks.append(Rank(result, *padding_of(run), local_tensors(run)))
    return ranks


@dataclass
class RankOfFour:
    """What one of four ranks did.

    Attributes:
        layouts: ``SOME[4]`` of test_training_layouts.
        padded: ``TENSOR_4``.
        resumed: ``padding_of`` where two tensor ranks went on from its checkpoint.
    """

    layouts: list[Result]
    padded: Rank
    resumed: tuple[int, int]


@dataclass
class OnFour:
    """What the spawn of four processes left: see the fixture."""

    folder: Path
    seven: Tiny
    ranks: list[RankOfFour]


def work_on_four(tiny: Tiny, seven: Tiny, folder: Path) -> RankOfFour:
    layouts = test_training_layouts.train_cases(tiny, folder, SOME[4])
    padded = train_cases(seven, folder / "padded", [TENSOR_4])[0]
    path = checkpoint(folder / "padded" / TENSOR_4.name, STEPS)
    run = start(
        seven.config(
            "sft",
            folder / "resumed",
            "parallel.tensor_model_parallel_size=2",
            f"train.global_batch_size={GLOBAL_BATCH}",
            f"train.micro_batch_size={GLOBAL_BATCH // 2}",
            f"checkpoint.resume={path}",
        )
    )
    run.feed.close()
    assert_weights(run, state(path), "model")
    return RankOfFour(layouts, padded, padding_of(run))


def reference_of(tiny: Tiny, folder: Path) -> Reference:
    @cache
    def made(objective: str) -> tuple[Result, Path]:
        case = Case(objective)
        return train_case(tiny, folder, case), checkpoint(folder / case.name, STEPS)

    return made


def assert_padding(numbers: list[tuple[int, int]]) -> None:
    assert sum(padding for padding, _ in numbers) > 0
    assert sum(disturbed for _, disturbed in numbers) == 0


def compare_ranks(
    ranks: list[list[Rank]], cases: list[Case], folder: Path, reference: Reference
) -> None:
    results = [[seen.result for seen in rank] for rank in ranks]
    compare(results, cases, folder, reference)
    for number in range(len(cases)):
        assert_padding([(r[number].padding, r[number].disturbed) for r in ranks])


def test_training_equals_one_process_and_padding_stays_zero(
    on_four: OnFour, tmp_path: Path
) -> None:
    ranks = [[rank.padded] for rank in on_four.ranks]
    reference = reference_of(on_four.seven, tmp_path)
    compare_ranks(ranks, [TENSOR_4], on_four.folder / "padded", reference)


def test_padding_is_zero_after_going_on_in_another_layout(on_four: OnFour) -> None:
    assert_padding([rank.resumed for rank in on_four.ranks])


def joined(ranks: list[Rank], weights: Weights, stage: MMDiTStage) -> dict[str, Tensor]:
    """Global tensors put together from local ones: side by side, cut where padding begins."""
    whole = {}
    for name, parameter in stage.named_parameters():
        layout = layout_of(parameter)
        parts = [r.local[weights][name].view(layout.local_shape(len(ranks))) for r in ranks]
        dim = layout.tensor_dim
        whole[name] = (
            parts[0]
            if dim is None
            else torch.cat(parts, dim).narrow(dim, 0, layout.global_shape[dim])
        )
    return whole


@pytest.mark.parametrize("weights", ["ema", "plain"])
def test_checkpoint_and_export_hold_the_weights_without_padding(
    weights: Weights, on_four: OnFour, tmp_path: Path
) -> None:
    from diffusers import SD3Transformer2DModel

    path = checkpoint(on_four.folder / "padded" / TENSOR_4.name, STEPS)
    config = MMDiTConfig.from_diffusers(store.read_extra(path)["model"]["transformer"])
    stage = MMDiTStage(config, Mesh.single(), TorchBackend())
    expected = joined([rank.padded for rank in on_four.ranks], weights, stage)
    load_checkpoint_weights(path, [stage], Mesh.single(), weights)
    for name, parameter in stage.named_parameters():
        assert torch.equal(parameter.detach().view(expected[name].shape), expected[name]), name
    export(path, tmp_path / "out", weights=weights, transformer_only=True)
    theirs = SD3Transformer2DModel.from_pretrained(tmp_path / "out").state_dict()
    table = mapping(config)
    for name, tensor in expected.items():
        for key, part in table[name].to_diffusers(as_array(tensor)):
            assert torch.equal(theirs[key], as_tensor(part)), key


@pytest.mark.full
@pytest.mark.parametrize(("heads", "world", "cases"), [(7, 4, OF_FOUR), (15, 8, OF_EIGHT)])
def test_more_layouts(heads: int, world: int, cases: list[Case], tmp_path: Path) -> None:
    tiny = make_small_tiny(tmp_path / "tiny", replace(SIZES, num_attention_heads=heads))
    ranks = run_ranks(world, train_cases, tiny, tmp_path, cases)
    compare_ranks(ranks, cases, tmp_path, reference_of(tiny, tmp_path))
