"""Losses, gradient norms, weights and draws of a run depend on neither layout nor microbatches.

One spawn of a number of processes runs all its cases, because starting processes costs more than
the cases. The single process with one microbatch of the whole batch is the reference.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from soar_mega.config import Config
from soar_mega.objectives.flow_matching import FlowMatching
from soar_mega.objectives.soar import SoarState
from soar_mega.passes import MicroBatch
from soar_mega.training.setup import Run
from tests.distributed.harness import run_ranks
from tests.runs import FEW, OBJECTIVES, Tiny, checkpoint, start, state

if TYPE_CHECKING:
    from tests.distributed.test_padded_heads import OnFour

STEPS, GLOBAL_BATCH = 5, 8
COMPARED = ("train/loss", "train/loss_base", "train/loss_aux", "optim/grad_norm", "optim/lr")


@dataclass(frozen=True)
class Case:
    """A layout; what is not tensor parallel is data parallel."""

    objective: str
    tensor: int = 1
    sequence: bool = False
    micro: int = GLOBAL_BATCH
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Also the run folder's."""
        sequence = "-sequence" if self.sequence else ""
        return "-".join(
            [f"{self.objective}-tensor{self.tensor}{sequence}-micro{self.micro}", *self.overrides]
        )

    def config(self, tiny: Tiny, folder: Path) -> Config:
        """Of the run in ``folder / name``."""
        return tiny.config(
            self.objective,
            folder / self.name,
            f"parallel.tensor_model_parallel_size={self.tensor}",
            f"parallel.sequence_parallel={str(self.sequence).lower()}",
            f"train.micro_batch_size={self.micro}",
            f"train.global_batch_size={GLOBAL_BATCH}",
            f"train.max_train_steps={STEPS}",
            "objective.cond_dropout_rate=0.3",
            *self.overrides,
        )


# Slot of the global batch -> name of a draw -> its bits.
Draws = dict[tuple[int, int], dict[str, bytes]]


@dataclass
class Result:
    """What one rank saw of one case."""

    data_rank: int
    metrics: list[dict[str, float]]
    draws: Draws


def bits(tensor: Tensor) -> bytes:
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return raw if len(raw) <= 64 else hashlib.sha256(raw).digest()


def draws_of(objective: Any, micro: MicroBatch) -> Draws:
    """Everything random about a microbatch, and which sample it is, by slot."""
    assert isinstance(objective, FlowMatching)
    begun = objective.begin(micro)
    # t before it is put on the table of sigmas, where two slots may meet.
    t0_B = objective.draw_t0(micro.step, micro.slots_B)
    found: Draws = {}
    for row, slot in enumerate(micro.slots_B.tolist()):
        found[micro.step, slot] = {
            "t0": bits(t0_B[row]),
            "z1": bits(begun.noise_BCHW[row]),
            "dropout": bits(begun.empty_prompt_B[row]),
            "latents": bits(micro.clean_BCHW[row]),
            "prompt": bits(micro.prompt.text_BTE[row]) + bits(micro.prompt.pooled_BV[row]),
        }
        if isinstance(begun, SoarState):
            found[micro.step, slot]["aux_sigma"] = bits(begun.sigma_KB[:, row])
    return found


def train_case(tiny: Tiny, folder: Path, case: Case) -> Result:
    return train_run(start(case.config(tiny, folder)))


def train_run(run: Run) -> Result:
    """All its steps, and a checkpoint after them."""
    result = Result(run.mesh.data_rank, [], {})
    for step in range(STEPS):
        microbatches = run.feed.load(step)
        for micro in microbatches:
            result.draws |= draws_of(run.stepper.objective, micro)
        result.metrics.append(run.stepper.run(step, microbatches))
    run.saver.save(STEPS)
    run.saver.finish()
    run.feed.close()
    return result


def train_cases(tiny: Tiny, folder: Path, cases: list[Case]) -> list[Result]:
    return [train_case(tiny, folder, case) for case in cases]


@pytest.fixture(scope="module")
def reference(
    tiny: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Result, Path]]:
    """Objective -> what the single process did, and its last checkpoint."""
    folder = tmp_path_factory.mktemp("reference")

    @cache
    def made(objective: str) -> tuple[Result, Path]:
        case = Case(objective)
        return train_case(tiny, folder, case), checkpoint(folder / case.name, STEPS)

    return made


def every(world: int) -> list[Case]:
    """All layouts of a number of processes, each objective, the microbatch size varying."""
    cases: list[Case] = []
    for objective, tensor, sequence in product(OBJECTIVES, (1, 2, 4), (False, True)):
        if world % tensor or (tensor == 1 and sequence) or GLOBAL_BATCH % (world // tensor):
            continue
        share = GLOBAL_BATCH * tensor // world
        micros = [n for n in (1, 2, 4, 8) if n <= share]
        cases.append(Case(objective, tensor, sequence, micros[len(cases) % len(micros)]))
    return cases


SOME = {
    1: [Case("pretrain", micro=2), Case("sft", micro=1), Case("soar", micro=4)],
    2: [
        Case("pretrain", 2, micro=8),
        Case("sft", 2, True, micro=2),
        Case("soar", 2, True, micro=4),
        Case("soar", 1, micro=2),
        Case("sft", 1, micro=4),
    ],
    4: [
        Case("pretrain", 2, True, micro=2),
        Case("soar", 2, True, micro=4),
        Case("soar", 4, micro=4),
        Case("sft", 4, True, micro=8),
        Case("pretrain", 1, micro=1),
    ],
}


def zero_aux(tensor: int) -> Case:
    """SOAR without auxiliary terms in the layout of an SFT case of two processes."""
    like = next(c for c in SOME[2] if c.objective == "sft" and c.tensor == tensor)
    return replace(like, objective="soar", overrides=("objective.lambda_aux=0",))


def like_sft(case: Case) -> Case:
    return replace(case, objective="sft", overrides=())


CASES_ON_TWO = [*SOME[2], zero_aux(1), zero_aux(2)]
WATCHED = [
    Case("soar", 2, True, 4),
    Case("soar", 1, False, 2, ("objective.reuse_base_forward=false",)),
]


@dataclass
class RankOfTwo:
    """What one of two ranks did."""

    results: list[Result]
    changes: list[dict[str, list[str]]]


@dataclass
class OnTwo:
    """What the spawn of two processes left."""

    folder: Path
    ranks: list[RankOfTwo]


def work_on_two(tiny: Tiny, folder: Path) -> RankOfTwo:
    changes = [watch_rollouts(tiny, folder / "watched", case) for case in WATCHED]
    return RankOfTwo(train_cases(tiny, folder, CASES_ON_TWO), changes)


@pytest.fixture(scope="module")
def on_two(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> OnTwo:
    folder = tmp_path_factory.mktemp("on_two")
    return OnTwo(folder, run_ranks(2, work_on_two, tiny, folder))


Reference = Callable[[str], tuple[Result, Path]]


def test_some_layouts_of_two(on_two: OnTwo, reference: Reference) -> None:
    ranks = [rank.results[: len(SOME[2])] for rank in on_two.ranks]
    compare(ranks, SOME[2], on_two.folder, reference)


def test_some_layouts_of_one(tiny: Tiny, tmp_path: Path, reference: Reference) -> None:
    compare([train_cases(tiny, tmp_path, SOME[1])], SOME[1], tmp_path, reference)


def test_some_layouts_of_four(on_four: OnFour, reference: Reference) -> None:
    compare([rank.layouts for rank in on_four.ranks], SOME[4], on_four.folder, reference)


@pytest.mark.full
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_every_layout(
    world: int, objective: str, tiny: Tiny, tmp_path: Path, reference: Reference
) -> None:
    cases = [case for case in every(world) if case.objective == objective]
    if world == 1:
        cases = [replace(cases[0], micro=micro) for micro in (1, 2, 4)]
    compare(run_ranks(world, train_cases, tiny, tmp_path, cases), cases, tmp_path, reference)


def compare(
    ranks: list[list[Result]], cases: list[Case], folder: Path, reference: Reference
) -> None:
    for number, case in enumerate(cases):
        expected, expected_path = reference(case.objective)
        results = [rank[number] for rank in ranks]
        for result in results:
            assert len(result.metrics) == STEPS
            for step, (found, wanted) in enumerate(
                zip(result.metrics, expected.metrics, strict=True)
            ):
                assert found.keys() == wanted.keys()
                for name in COMPARED:
                    if name in wanted:
                        assert found[name] == pytest.approx(wanted[name], rel=1e-5, abs=0), (
                            case,
                            step,
                            name,
                        )
        compare_draws(case, results, expected.draws)
        way = sum(wanted["optim/lr"] for wanted in expected.metrics)
        compare_weights(case, checkpoint(folder / case.name, STEPS), expected_path, way)


def compare_draws(case: Case, results: list[Result], expected: Draws) -> None:
    """Data ranks share out the slots, tensor peers agree, every slot's draws are the same bits."""
    union: Draws = {}
    for peers in (results[i : i + case.tensor] for i in range(0, len(results), case.tensor)):
        for peer in peers[1:]:
            assert peer.draws == peers[0].draws, case
        assert not union.keys() & peers[0].draws.keys(), case
        union |= peers[0].draws
    assert union.keys() == expected.keys()
    different = {
        name
        for slot, draws in union.items()
        for name in draws
        if draws[name] != expected[slot][name]
    }
    assert not different, case


def compare_weights(case: Case, path: Path, expected_path: Path, way: float) -> None:
    """Adam divides a gradient by its own size, so where that is all rounding so is the update: the
    bound is a thousandth of ``way``, which a weight can go in these steps."""
    found, wanted = state(path), state(expected_path)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if name.startswith(("model.", "ema.")):
            bound = 1e-3 * way * tensor.numel() ** 0.5
            assert (found[name] - tensor).norm().item() <= bound, (case, name)


def test_draws_are_distinct(reference: Reference) -> None:
    """Over slots and steps: what data ranks own differs, and no step repeats another."""
    draws = reference("soar")[0].draws
    assert len(draws) == STEPS * GLOBAL_BATCH
    for name in ("t0", "z1", "latents", "aux_sigma"):
        assert len({slot[name] for slot in draws.values()}) == len(draws), name
    assert len({slot["dropout"] for slot in draws.values()}) == 2


def test_a_sample_is_encoded_anew_each_epoch(tiny: Tiny, tmp_path: Path) -> None:
    """Posterior noise belongs to the step and slot: the same picture gives other latents later."""
    run = start(tiny.config("sft", tmp_path, f"data.shards={tiny.shards('few')}"))
    order = run.checked.data.order
    draws, _ = order.take(order.start, STEPS * GLOBAL_BATCH)
    latents: dict[int, list[Tensor]] = {}
    for step in range(STEPS):
        own = draws[step * GLOBAL_BATCH :]
        clean = torch.cat([micro.clean_BCHW for micro in run.feed.load(step)])
        for draw, latent in zip(own, clean, strict=False):
            latents.setdefault(draw.sample, []).append(latent)
    run.feed.close()
    assert sorted(latents) == list(range(FEW))
    for first, second in latents.values():
        assert not torch.equal(first, second)
        assert (first - second).abs().mean() < 0.5 * first.abs().mean()


def snapshot(run: Run) -> dict[str, Tensor]:
    stepper = run.stepper
    kept = {
        "gradients": stepper.parameters.flat_grad,
        "weights": stepper.parameters.flat,
        "master": stepper.parameters.master_shard,
        "ema": stepper.ema.shard,
        "exp_avg": stepper.optimizer.exp_avg,
        "exp_avg_sq": stepper.optimizer.exp_avg_sq,
        "random state": torch.get_rng_state(),
    }
    return {name: tensor.clone() for name, tensor in kept.items()}


def graph_nodes() -> int:
    gc.collect()
    return sum(1 for item in gc.get_objects() if type(item) is Tensor and item.grad_fn is not None)


def watch_rollouts(tiny: Tiny, folder: Path, case: Case) -> dict[str, list[str]]:
    """The first microbatch of a second step, pass by pass: what each kind of pass changed."""
    run = start(case.config(tiny, folder))
    run.stepper.run(0, run.feed.load(0))
    run.stepper.parameters.zero_gradients()
    objective, stage = run.stepper.objective, run.stepper.stages[0]
    changes: dict[str, list[str]] = {}
    micro = run.feed.load(1)[0]
    begun = objective.begin(micro)
    for p in objective.passes():
        before, nodes = snapshot(run), 0 if p.grad else graph_nodes()
        with torch.set_grad_enabled(p.grad):
            out = stage(objective.make_input(p, begun))
            loss = objective.take_output(p, begun, out, torch.tensor(16.0))
        if p.grad:
            assert loss is not None
            loss.backward()
        else:
            assert loss is None and not out.requires_grad
        del out, loss
        after = snapshot(run)
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        if not p.grad and graph_nodes() > nodes:
            changed.append("graph")
        changes.setdefault(p.kind, []).extend(changed)
    run.feed.close()
    return changes


def test_rollout_leaves_no_trace(on_two: OnTwo) -> None:
    """Gradients of the base pass lie there while it runs, and nothing moves."""
    for rank in on_two.ranks:
        for changes in rank.changes:
            assert changes["rollout"] == []
            assert set(changes["base"]) == {"gradients"} == set(changes["aux"])


def test_lambda_zero_is_sft(on_two: OnTwo) -> None:
    for tensor in (1, 2):
        case = zero_aux(tensor)
        for rank in on_two.ranks:
            soar, sft = (rank.results[CASES_ON_TWO.index(c)] for c in (case, like_sft(case)))
            assert soar.metrics == sft.metrics
            assert soar.draws == sft.draws
        soar_end, sft_end = (
            state(checkpoint(on_two.folder / c.name, STEPS)) for c in (case, like_sft(case))
        )
        assert all(torch.equal(soar_end[name], sft_end[name]) for name in sft_end)
