"""The step benchmark on a GPU: sides take turns in one process and leave nothing behind."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pydantic", reason="pydantic is not installed")

from soar_mega.training.benchmark import Case
from soar_mega.training.benchmark_step.compare import Plan
from soar_mega.training.benchmark_step.load import Load
from soar_mega.training.benchmark_step.measure import Failure, Measured, here
from soar_mega.training.benchmark_step.record import measure_all
from soar_mega.training.benchmark_step.variants import Variant

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CASE = Case(layers=4, batch=3)
LOAD = Load("small", CASE.architecture(), "soar", latent_size=32)


def test_a_comparison_on_the_gpu() -> None:
    plan = Plan((LOAD,), (Variant(),), (2,), repeats=2, steps=2)
    record = measure_all(plan)
    assert record["hardware"]["gpu"] == torch.cuda.get_device_name()
    assert record["hardware"]["driver"] and record["matrix_tflops"] > 1
    (table,) = record["tables"]
    published, plain, ours = table["sides"]
    assert not [side for side in table["sides"] if "failed" in side]
    growth = [s["median"]["peak_growth_bytes"] for s in (ours, published, plain)]
    assert 0 < growth[0] < growth[2] and 0 < growth[1] < growth[2]


def test_running_out_of_memory_is_an_outcome_and_leaves_nothing_behind() -> None:
    variant = Variant(micro_batch_size=2)
    assert isinstance(here(LOAD, variant, 1, 1), Measured)
    before = torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction(1e-3)
    try:
        outcome = here(LOAD, variant, 1, 1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert isinstance(outcome, Failure) and "out of memory" in outcome.reason
    assert torch.cuda.memory_allocated() == before
    assert isinstance(here(LOAD, variant, 1, 1), Measured)
