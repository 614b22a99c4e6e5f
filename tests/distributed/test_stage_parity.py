"""Stages of a tensor- and sequence-parallel model, chained by payloads, equal the uncut model.

That the uncut parallel model equals one process is test_model_parity's business.
"""

from __future__ import annotations

import torch

from soar_mega.backends.torch import TorchBackend
from soar_mega.model.payload import PassSize, Payload
from soar_mega.model.stage import MMDiTStage
from soar_mega.parallel.layout import fill_parameter, layout_of, local_slice
from soar_mega.parallel.mesh import Mesh
from tests.distributed.harness import run_ranks
from tests.distributed.test_model_parity import CONFIG, global_tensor, inputs

Result = dict[str, torch.Tensor]


def build(mesh: Mesh, layers: range, sequence_parallel: bool) -> MMDiTStage:
    stage = MMDiTStage(
        CONFIG, mesh, TorchBackend(), layers=layers, sequence_parallel=sequence_parallel
    ).double()
    for name, parameter in stage.named_parameters():
        layout = layout_of(parameter)
        whole = global_tensor(name, layout.global_shape).double()
        fill_parameter(parameter, mesh, whole[local_slice(layout, mesh)])
    if stage.is_first:
        position = stage.patch_embed.position
        position.copy_(global_tensor("position", position.shape))
    return stage


def run_cut(mesh: Mesh, cut: list[range], sequence_parallel: bool, text_length: int) -> Result:
    """Local gradients by name and the velocity, one stage after the other on every rank."""
    stages = [build(mesh, layers, sequence_parallel) for layers in cut]
    x, target = inputs(3, text_length)
    size = PassSize.of(x)
    shapes = stages[0].payload_shapes(*size)
    sent, received = [], [stages[0].embed(x)]
    for stage in stages[:-1]:
        sent.append(stage.run(received[-1], size))
        received.append(Payload.unpack(sent[-1].pack(), shapes).leaves())
    velocity = stages[-1].velocity(received[-1], size)
    (velocity - target).square().sum().backward()
    for out, entered in zip(sent[::-1], received[:0:-1], strict=True):
        out.backward(Payload.unpack(entered.gradient().pack(), shapes))
    gradients = {
        name: parameter.grad
        for stage in stages
        for name, parameter in stage.named_parameters()
        if parameter.grad is not None
    }
    return {"velocity": velocity.detach(), **gradients}


def all_cuts(tensor_size: int) -> list[tuple[bool, int, list[Result]]]:
    mesh = Mesh.build(tensor_size)
    cuts = [[range(3)], [range(2), range(2, 3)], [range(1), range(1, 2), range(2, 3)]]
    return [
        (sequence_parallel, text, [run_cut(mesh, cut, sequence_parallel, text) for cut in cuts])
        # 15 image tokens and 9 text tokens need padding, 8 text tokens do not.
        for sequence_parallel, text in ((False, 9), (True, 9), (True, 8))
    ]


def test_stages_equal_the_uncut_model_on_every_tensor_rank() -> None:
    for rank in run_ranks(2, all_cuts, 2):
        for sequence_parallel, text, (expected, *others) in rank:
            for result in others:
                assert result.keys() == expected.keys()
                for name, value in expected.items():
                    # The sum over blocks is taken stage by stage for the conditioning alone.
                    close = 1e-9 * value.norm() if name.startswith("condition.") else 0.0
                    difference = (result[name] - value).norm()
                    assert difference <= close, (sequence_parallel, text, name)
