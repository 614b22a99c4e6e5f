"""A run saved in one layout goes on in any other as if it had never stopped.

Layout A trains, saves and goes on for two steps; layout B loads what was saved and does the same
two steps. What B loads has A's bits; what both come to is compared in these norms:

- losses and gradient norms: within 1e-5 of A's value;
- weights, their average and Adam's moments, as global tensors: the 2-norm of the difference is
  within 1e-5 of the tensor's.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor

from soar_mega.config import Config
from soar_mega.parallel.layout import local_slice, real_part
from soar_mega.pipeline.schedules import SCHEDULES
from soar_mega.training.setup import Run
from tests.distributed.harness import run_ranks
from tests.runs import (
    SIZES,
    Tiny,
    assert_weights,
    checkpoint,
    make_small_tiny,
    metrics,
    state,
    train,
)

MOST_PROCESSES, MORE_STEPS = 8, 2
# Eight heads: three tensor ranks have padding, two and four have none.
LAYERS, HEADS, HEAD_DIM = 8, 8, 6
RELATIVE = 1e-5
COMPARED = {"train/loss", "train/loss_base", "train/loss_aux", "optim/grad_norm", "optim/lr"}


@dataclass(frozen=True)
class Layout:
    """A layout of processes, and what else need not stay as it was."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    schedule: str = "1f1b"
    virtual: int = 1
    sequence: bool = False
    micro: int = 4

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def overrides(self) -> list[str]:
        return [
            f"parallel.tensor_model_parallel_size={self.tensor}",
            f"parallel.pipeline_model_parallel_size={self.pipeline}",
            f"parallel.virtual_pipeline_model_parallel_size={self.virtual}",
            f"parallel.pipeline_schedule={self.schedule}",
            f"parallel.sequence_parallel={str(self.sequence).lower()}",
            f"train.micro_batch_size={self.micro}",
        ]


@dataclass(frozen=True)
class Case:
    """From ``a`` to ``b`` after ``saved`` steps."""

    a: Layout
    b: Layout
    objective: str = "sft"
    batch: int = 8
    saved: int = 1

    def config(self, tiny: Tiny, layout: Layout, run_dir: Path, *more: str) -> Config:
        return tiny.config(
            self.objective,
            run_dir,
            *layout.overrides,
            f"train.global_batch_size={self.batch}",
            f"train.max_train_steps={self.saved + MORE_STEPS}",
            f"checkpoint.checkpointing_steps={self.saved}",
            "checkpoint.checkpoints_total_limit=null",
            "optimizer.learning_rate=1e-3",
            "optimizer.lr_warmup_steps=0",
            "optimizer.lr_scheduler=cosine",
            "objective.cond_dropout_rate=0.3",
            *more,
        )


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny folder whose model has enough layers for 4 ranks of 2 stages."""
    sizes = replace(
        SIZES, num_layers=LAYERS, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM
    )
    return make_small_tiny(tmp_path_factory.mktemp("deep"), sizes)


def go_on(config: Config, done_steps: int, tensors: Path) -> None:
    """One rank's part; ``tensors`` has what was saved, read once for all ranks."""

    def begun(run: Run) -> None:
        assert run.done_steps == run.stepper.optimizer.step == done_steps
        assert_loaded(run, torch.load(tensors))

    train(config, begun)


def assert_loaded(run: Run, tensors: dict[str, Tensor]) -> None:
    """This rank computes with these global tensors and holds its share of each, bit for bit."""
    stepper, mesh = run.stepper, run.mesh
    assert_weights(run, tensors, "model")
    shards = {
        "model": stepper.parameters.master_shard,
        "ema": stepper.ema.shard,
        "optimizer.exp_avg": stepper.optimizer.exp_avg,
        "optimizer.exp_avg_sq": stepper.optimizer.exp_avg_sq,
    }
    for piece in stepper.parameters.fragments():
        own = slice(piece.shard_start, piece.shard_start + piece.stop - piece.start)
        for kind, shard in shards.items():
            local = torch.zeros(piece.layout.local_shape(mesh.tensor_size))
            saved = tensors[f"{kind}.{piece.name}"][local_slice(piece.layout, mesh)]
            real_part(local, piece.layout, mesh).copy_(saved)
            expected = local.view(-1)[piece.start : piece.stop]
            assert torch.equal(shard[own], expected), (kind, piece.name)


def assert_goes_on(case: Case, tiny: Tiny, folder: Path) -> None:
    one, other = folder / "a", folder / "b"
    run_ranks(case.a.world, train, case.config(tiny, case.a, one))
    saved, last = (checkpoint(one, step) for step in (case.saved, case.saved + MORE_STEPS))
    config = case.config(tiny, case.b, other, f"checkpoint.resume={saved}")
    tensors = folder / "saved.pt"
    torch.save(state(saved), tensors)
    run_ranks(case.b.world, go_on, config, case.saved, tensors)
    assert_same_metrics(metrics(other), metrics(one)[case.saved :])
    assert_same_state(state(checkpoint(other, case.saved + MORE_STEPS)), state(last))


def assert_same_metrics(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    assert len(wanted) == MORE_STEPS
    for one, other in zip(found, wanted, strict=True):
        for name in COMPARED.intersection(other):
            right = pytest.approx(other[name], rel=RELATIVE, abs=0)
            assert one[name] == right, (other["step"], name)


def assert_same_state(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    apart = [
        name
        for name, tensor in wanted.items()
        if not (found[name] - tensor).norm() <= RELATIVE * tensor.norm()  # no number is apart
    ]
    assert not apart


# Between them tensor, pipeline, virtual stages, data, padding, order and microbatches change.
SOME = [
    Case(
        Layout(tensor=3, sequence=True),
        Layout(pipeline=4, schedule="interleaved_1f1b", virtual=2, micro=2),
    ),
    Case(
        Layout(tensor=2, pipeline=2, schedule="zero_bubble_v", virtual=2, micro=8),
        Layout(micro=2),
        objective="soar",
        saved=2,
    ),
    Case(
        Layout(data=3, micro=2),
        Layout(tensor=3, pipeline=2, schedule="zero_bubble", micro=6),
        batch=12,
    ),
    Case(
        Layout(),
        Layout(pipeline=2, data=2, schedule="interleaved_1f1b", virtual=4, micro=1),
        objective="soar",
    ),
    Case(
        Layout(pipeline=2, data=2, schedule="sequential", micro=2),
        Layout(tensor=4, sequence=True),
        saved=2,
    ),
]


@pytest.mark.parametrize("case", SOME, ids=range(len(SOME)))
def test_some_layouts(case: Case, deep: Tiny, tmp_path: Path) -> None:
    assert_goes_on(case, deep, tmp_path)


def test_bf16_weights_are_those_of_the_masters(deep: Tiny, tmp_path: Path) -> None:
    """In fp32 a lone data rank computes with the master weights' own memory; in bf16 not, so what
    is loaded must reach the weights too. Layouts are compared in fp32: bf16 rounds them apart."""
    case, bf16 = Case(Layout(), Layout()), "precision.compute_dtype=bf16"
    train(case.config(deep, Layout(), tmp_path / "a", bf16))
    saved = checkpoint(tmp_path / "a", case.saved)
    resume = f"checkpoint.resume={saved}"
    tensors = state(saved)
    train(
        case.config(deep, Layout(micro=2), tmp_path / "b", bf16, resume),
        lambda run: assert_loaded(run, tensors),
    )


def divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


@st.composite
def layouts(draw: st.DrawFn, batch: int) -> Layout:
    tensor = draw(st.sampled_from([1, 2, 3, 4]))
    pipeline = draw(st.sampled_from([n for n in (1, 2, 4) if n * tensor <= MOST_PROCESSES]))
    data = draw(st.sampled_from(divisors(batch, MOST_PROCESSES // (tensor * pipeline))))
    schedule = draw(st.sampled_from(SCHEDULES))
    virtual = 2 if schedule == "zero_bubble_v" else 1
    if schedule == "interleaved_1f1b":
        virtual = draw(st.integers(2, LAYERS // pipeline))
    sequence = tensor > 1 and draw(st.booleans())
    micro = draw(st.sampled_from(divisors(batch // data, batch)))
    return Layout(tensor, pipeline, data, schedule, virtual, sequence, micro)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch = draw(st.sampled_from([8, 12]))
    a, b = draw(layouts(batch)), draw(layouts(batch))
    return Case(a, b, draw(st.sampled_from(["sft", "soar"])), batch, draw(st.integers(1, 2)))


@pytest.mark.full
@settings(
    max_examples=40,
    deadline=None,
    print_blob=True,
    # Shrinking would try hundreds of layouts; one that fails is small enough to read.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
@given(case=cases())
def test_any_layouts(case: Case, deep: Tiny) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert_goes_on(case, deep, Path(folder))
