"""Measures a SOAR step against the same step written plainly on diffusers' own model.

The plain step is what one writes first: every state's graph is kept until one backward at the end,
and the rollout runs with a graph that is thrown away. Each measurement is a fresh process; the two
sides alternate, and medians are compared within one call.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soar_mega.backends.torch import TorchBackend
from soar_mega.config import SoarConfig
from soar_mega.model.config import MMDiTConfig
from soar_mega.model.init import initialise
from soar_mega.model.stage import MMDiTStage
from soar_mega.objectives import make_objective
from soar_mega.parallel.layout import parameter_layouts
from soar_mega.parallel.mesh import Mesh
from soar_mega.parallel.sharded import ShardedParameters
from soar_mega.passes import MicroBatch, TextCondition
from soar_mega.pipeline.engine import Pipeline
from soar_mega.pipeline.schedules import build_schedule


@dataclass(frozen=True)
class Case:
    """What is measured; the defaults are a 24M-parameter SD3.5-Medium-like model."""

    layers: int = 10
    heads: int = 4
    head_dim: int = 64
    dual_layers: int = 4
    batch: int = 4
    latent_size: int = 32
    text_tokens: int = 154
    trajectory_length: int = 6
    aux_group_size: int = 1
    threads: int = 2

    def architecture(self) -> MMDiTConfig:
        return MMDiTConfig(
            sample_size=self.latent_size,
            num_layers=self.layers,
            attention_head_dim=self.head_dim,
            num_attention_heads=self.heads,
            joint_attention_dim=256,
            caption_projection_dim=self.heads * self.head_dim,
            pooled_projection_dim=128,
            pos_embed_max_size=self.latent_size,
            dual_attention_layers=tuple(range(self.dual_layers)),
            qk_norm="rms_norm",
        )

    def microbatch(self) -> MicroBatch:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        size, config = self.latent_size, self.architecture()
        return MicroBatch(
            step=0,
            slots_B=torch.arange(self.batch),
            clean_BCHW=draw(self.batch, 16, size, size),
            prompt=TextCondition(
                draw(self.batch, self.text_tokens, config.joint_attention_dim),
                draw(self.batch, config.pooled_projection_dim),
            ),
            empty=TextCondition(
                draw(1, self.text_tokens, config.joint_attention_dim),
                draw(1, config.pooled_projection_dim),
            ),
            weight_B=torch.ones(self.batch),
        )


def _ours(case: Case) -> Callable[[], None]:
    mesh = Mesh.single()
    stage = MMDiTStage(case.architecture(), mesh, TorchBackend())
    initialise(stage, 0)
    _shake(stage)
    parameters = ShardedParameters([stage], mesh)
    settings = SoarConfig(
        name="soar",
        trajectory_length=case.trajectory_length,
        aux_group_size=case.aux_group_size,
    )
    objective = make_objective(settings, shift=3.0, seed=0)
    schedule = build_schedule("1f1b", objective.passes(), ranks=1, microbatches=1)
    pipeline = Pipeline([stage], mesh, schedule)
    micro = case.microbatch()

    def step() -> None:
        parameters.zero_gradients()
        normaliser = objective.normaliser(objective.count(micro))
        pipeline.train_step(objective, [micro], normaliser)

    return step


def _plain(case: Case) -> Callable[[], None]:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(**case.architecture().to_diffusers())
    _shake(model)
    for parameter in model.parameters():  # as many gradient buffers as the other side has
        parameter.grad = torch.zeros_like(parameter)
    micro = case.microbatch()
    B, N, guidance = case.batch, case.trajectory_length, 4.5

    def velocity(z: Tensor, sigma: Tensor, text: TextCondition) -> Tensor:
        out: Tensor = model(
            z, text.text_BTE, text.pooled_BV, 1000 * sigma.view(-1), return_dict=False
        )[0]
        return out

    def step() -> None:
        model.zero_grad(set_to_none=False)
        z0, z1 = micro.clean_BCHW, torch.randn_like(micro.clean_BCHW)
        t0 = torch.sigmoid(torch.randn(B, 1, 1, 1))
        sigma0, sigma1 = (3 * t / (1 + 2 * t) for t in (t0, (t0 - 1 / 40).clamp(min=0)))
        z = (1 - sigma0) * z0 + sigma0 * z1
        losses = [(velocity(z, sigma0, micro.prompt) - (z1 - z0)).square().mean()]
        both = TextCondition(
            torch.cat([micro.prompt.text_BTE, micro.empty.text_BTE.expand(B, -1, -1)]),
            torch.cat([micro.prompt.pooled_BV, micro.empty.pooled_BV.expand(B, -1)]),
        )
        v_cond, v_empty = velocity(z.repeat(2, 1, 1, 1), sigma0.repeat(2, 1, 1, 1), both).chunk(2)
        rolled = z + (sigma1 - sigma0) * (v_empty + guidance * (v_cond - v_empty)).detach()
        for _ in range(N):
            sigma = sigma1 + (1 - sigma1) * torch.rand_like(sigma1)
            a = (sigma - sigma1) / (1 - sigma1)
            state = (1 - a) * rolled + a * z1
            target = (state - z0) / sigma
            losses.append((velocity(state, sigma, micro.prompt) - target).square().mean())
        (torch.stack(losses).sum() / (1 + N)).backward()

    return step


_SIDES: dict[str, Callable[[Case], Callable[[], None]]] = {"ours": _ours, "plain": _plain}


def _shake(model: torch.nn.Module) -> None:
    """Weights away from zero, so that every gradient is computed from real numbers."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def measure_once(side: str, case: Case, steps: int) -> dict[str, float]:
    """In this process: growth of peak memory in the first step, median time of the following.

    Returns:
        ``peak_growth_mib`` (Linux's VmHWM after the step less VmRSS before it) and ``seconds``.
    """
    torch.set_num_threads(case.threads)
    step = _SIDES[side](case)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the set-up
    before = _status_mib("VmRSS")
    step()
    growth = _status_mib("VmHWM") - before
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return {"peak_growth_mib": growth, "seconds": statistics.median(times)}


def _status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}: this benchmark needs Linux")


def compare(case: Case, repeats: int, steps: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Both sides, ``repeats`` fresh processes each, alternating which goes first.

    Returns:
        A record with hardware, case, all measurements, medians and ratios.
    """
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "plain": []}
    for repeat in range(repeats):
        for side in ("ours", "plain") if repeat % 2 == 0 else ("plain", "ours"):
            command = [sys.executable, "-m", "soar_mega.training.benchmark", side, str(steps)]
            done = subprocess.run(
                [*command, json.dumps(asdict(case))], capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                raise RuntimeError(f"{side} failed:\n{done.stderr}")
            result = json.loads(done.stdout.splitlines()[-1])
            runs[side].append(result)
            say(
                f"{side:>5}: +{result['peak_growth_mib']:.0f} MiB, {result['seconds']:.2f} s a step"
            )
    median = {
        side: {key: statistics.median(r[key] for r in results) for key in results[0]}
        for side, results in runs.items()
    }
    layouts = parameter_layouts(
        MMDiTStage(case.architecture(), Mesh.single("meta"), TorchBackend())
    )
    return {
        "what": "SOAR step: this project against a plain loop on diffusers' model",
        "hardware": hardware(),
        "torch": torch.__version__,
        "case": asdict(case),
        "parameters": sum(torch.Size(layout.global_shape).numel() for layout in layouts.values()),
        "runs": runs,
        "median": median,
        "memory_ratio": median["ours"]["peak_growth_mib"] / median["plain"]["peak_growth_mib"],
        "speedup": median["plain"]["seconds"] / median["ours"]["seconds"],
    }


def hardware() -> str:
    """Number and name of this machine's processors."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


if __name__ == "__main__":
    print(json.dumps(measure_once(sys.argv[1], Case(**json.loads(sys.argv[3])), int(sys.argv[2]))))
