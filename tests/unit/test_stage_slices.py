"""A model cut into stages is the whole model: same loss, same gradients, same parameters.

Stages are run as a pipeline does: detached payloads forwards and their gradients backwards, each
through one flat buffer. Everything is bitwise equal but the conditioning vector's gradient, whose
sum over blocks is taken stage by stage.
"""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch

from soar_mega.backends.torch import TorchBackend
from soar_mega.model.config import MMDiTConfig
from soar_mega.model.init import initialise
from soar_mega.model.payload import PassSize, Payload
from soar_mega.model.stage import MMDiTStage
from soar_mega.parallel.mesh import Mesh
from soar_mega.parallel.sharded import ShardedParameters
from soar_mega.passes import ModelInput, TextCondition

CONFIGS = {
    "sd3_medium": {"num_layers": 3, "num_attention_heads": 3, "caption_projection_dim": 48},
    "sd35_medium": {
        "num_layers": 4,
        "num_attention_heads": 4,
        "caption_projection_dim": 64,
        "qk_norm": "rms_norm",
        "dual_attention_layers": (0, 1),
    },
    "sd35_large": {
        "num_layers": 3,
        "num_attention_heads": 5,
        "caption_projection_dim": 80,
        "qk_norm": "rms_norm",
    },
}
ROWS, HEIGHT, WIDTH, TEXT = 3, 6, 10, 9


def configuration(variant: str) -> MMDiTConfig:
    common = {"sample_size": 16, "attention_head_dim": 16, "joint_attention_dim": 40}
    common |= {"pooled_projection_dim": 24, "pos_embed_max_size": 12}
    return MMDiTConfig(**common, **CONFIGS[variant])  # type: ignore[arg-type]


def all_cuts(layers: int) -> list[tuple[range, ...]]:
    """Every way to cut the layers, from one stage to a stage each."""
    return [
        tuple(range(*ends) for ends in pairwise((0, *inner, layers)))
        for count in range(layers)
        for inner in combinations(range(1, layers), count)
    ]


def build(config: MMDiTConfig, layers: range | None = None, recompute: str = "none") -> MMDiTStage:
    stage = MMDiTStage(
        config,
        Mesh.single(),
        TorchBackend(),
        layers=layers,
        activation_checkpointing=recompute,  # type: ignore[arg-type]
    )
    initialise(stage, seed=4)
    return stage.double()


def inputs(dtype: torch.dtype = torch.float64) -> tuple[ModelInput, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    condition = TextCondition(draw(ROWS, TEXT, 40), draw(ROWS, 24))
    timestep = torch.linspace(3, 997, ROWS, dtype=dtype)
    latent, target = draw(ROWS, 16, HEIGHT, WIDTH), draw(ROWS, 16, HEIGHT, WIDTH)
    return ModelInput(latent, timestep, condition), target


def run_pipeline(
    stages: list[MMDiTStage], x: ModelInput, target: torch.Tensor
) -> tuple[torch.Tensor, list[Payload]]:
    """The velocity, after all backwards, and what entered each stage but the first."""
    size = PassSize.of(x)
    shapes = stages[0].payload_shapes(*size)
    sent, received = [], []
    payload = stages[0].embed(x)
    for before, after in pairwise(stages):
        sent.append(before.run(payload, size))
        buffer = sent[-1].pack()
        assert not buffer.requires_grad
        payload = Payload.unpack(buffer, after.payload_shapes(*size)).leaves()
        received.append(payload)
    velocity = stages[-1].velocity(payload, size)
    (velocity - target).square().sum().backward()
    for out, entered in zip(reversed(sent), reversed(received), strict=True):
        out.backward(Payload.unpack(entered.gradient().pack(), shapes))
    return velocity.detach(), received


def main_gradients(stages: list[MMDiTStage]) -> dict[str, torch.Tensor]:
    gradients: dict[str, torch.Tensor] = {}
    for stage in stages:
        mine = {name: p.main_grad.clone() for name, p in stage.named_parameters()}
        assert not mine.keys() & gradients.keys(), "a parameter belongs to one stage"
        gradients |= mine
    return gradients


def assert_same_gradients(
    gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> None:
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        if name.startswith("condition."):
            difference = (gradients[name] - gradient).norm()
            assert gradient.any() and difference <= 1e-9 * gradient.norm(), name
        else:
            assert torch.equal(gradients[name], gradient), name


@pytest.mark.parametrize("variant", CONFIGS)
def test_every_cut_gives_the_whole_models_loss_and_gradients(variant: str) -> None:
    config = configuration(variant)
    whole = build(config)
    ShardedParameters([whole], Mesh.single(), torch.float64)
    x, target = inputs()
    expected_velocity, _ = run_pipeline([whole], x, target)
    assert torch.equal(whole(x), expected_velocity)
    expected = main_gradients([whole])
    assert list(expected) == [name for name, _ in whole.named_parameters()]
    for cut in all_cuts(config.num_layers):
        stages = [build(config, layers) for layers in cut]
        for stage in stages:
            ShardedParameters([stage], Mesh.single(), torch.float64)
        velocity, _ = run_pipeline(stages, x, target)
        assert torch.equal(velocity, expected_velocity), cut
        assert_same_gradients(main_gradients(stages), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_velocity_is_bitwise_equal_in_the_compute_dtypes(dtype: torch.dtype) -> None:
    config = configuration("sd35_medium")
    x, target = inputs(torch.float32)
    expected = build(config).to(dtype)(x)
    stages = [build(config, layers).to(dtype) for layers in (range(1), range(1, 3), range(3, 4))]
    velocity, received = run_pipeline(stages, x, target)
    assert velocity.dtype == dtype and torch.equal(velocity, expected)
    assert {t.dtype for payload in received for t in payload.tensors} == {dtype}


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_inside_stages_changes_nothing(recompute: str) -> None:
    config, cut = configuration("sd35_medium"), (range(2), range(2, 4))
    x, target = inputs()
    results = []
    for kind in ("none", recompute):
        stages = [build(config, layers, kind) for layers in cut]
        for stage in stages:
            ShardedParameters([stage], Mesh.single(), torch.float64)
        velocity, _ = run_pipeline(stages, x, target)
        results.append((velocity, main_gradients(stages)))
    (expected_velocity, expected), (velocity, gradients) = results
    assert torch.equal(velocity, expected_velocity)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_conditioning_gradient_is_the_downstream_one_plus_ones_own() -> None:
    config = configuration("sd35_medium")
    x, target = inputs()
    size = PassSize.of(x)
    whole = build(config)
    entering = whole.embed(x).leaves()
    (whole.velocity(entering, size) - target).square().sum().backward()
    expected = entering.gradient()

    first, last = build(config, range(2)), build(config, range(2, 4))
    start = first.embed(x).leaves()
    sent = first.run(start, size)
    received = Payload.unpack(sent.pack(), first.payload_shapes(*size)).leaves()
    (last.velocity(received, size) - target).square().sum().backward()
    downstream = received.gradient()
    sent.backward(downstream)

    mine = start.gradient()
    assert torch.equal(mine.image_lBD, expected.image_lBD)
    assert torch.equal(mine.text_tBD, expected.text_tBD)
    whole_BD, mine_BD = expected.conditioning_BD, mine.conditioning_BD
    assert (mine_BD - whole_BD).norm() <= 1e-9 * whole_BD.norm()
    own_BD = mine_BD - downstream.conditioning_BD
    assert min(own_BD.norm(), downstream.conditioning_BD.norm()) > 1e-3 * whole_BD.norm()


@pytest.mark.parametrize("variant", CONFIGS)
def test_stages_have_the_whole_models_parameters_each_once(variant: str) -> None:
    config = configuration(variant)
    whole = dict(build(config).named_parameters())
    buffers = {name for name, _ in build(config).named_buffers()}
    assert buffers == {"patch_embed.position"}
    for cut in all_cuts(config.num_layers):
        stages = [build(config, layers) for layers in cut]
        named = [item for stage in stages for item in stage.named_parameters()]
        assert [name for name, _ in named] == list(whole)
        assert all(torch.equal(parameter, whole[name]) for name, parameter in named)
        for stage in stages:
            assert {name for name, _ in stage.named_buffers()} == (
                buffers if stage.is_first else set()
            )
            owned = {int(n.split(".")[1]) for n, _ in stage.named_parameters() if "blocks" in n}
            assert owned == set(stage.layers)


def test_text_reaches_the_last_block_and_ends_there() -> None:
    config = configuration("sd35_medium")
    x, target = inputs()
    stages = [build(config, range(3)), build(config, range(3, 4))]
    _, (received,) = run_pipeline(stages, x, target)
    # The last block's keys and values read the text sent to it; it makes none of its own.
    assert received.text_tBD.shape == (TEXT, ROWS, config.width)
    assert received.gradient().text_tBD.any()
    names = {name for name, _ in stages[1].named_parameters()}
    assert not {n for n in names if "text_mlp" in n or "text_out" in n}
    assert stages[1].get_parameter("blocks.3.text_modulation.bias").shape == (2 * config.width,)
    assert stages[0].get_parameter("blocks.2.text_modulation.bias").shape == (6 * config.width,)


def test_pass_without_gradient_keeps_no_graph() -> None:
    config = configuration("sd3_medium")
    x, _ = inputs()
    stage, whole = build(config, range(2)), build(config)
    with torch.no_grad():
        sent = stage.run(stage.embed(x), PassSize.of(x))
        assert not any(t.requires_grad for t in sent.tensors)
        payload = Payload.unpack(sent.pack(), stage.payload_shapes(*PassSize.of(x)))
        velocity = build(config, range(2, 3)).velocity(payload, PassSize.of(x))
        assert torch.equal(velocity, whole(x))


def test_payload_is_one_buffer_and_its_parts_are_views() -> None:
    config = configuration("sd3_medium")
    x, _ = inputs()
    stage = build(config, range(1))
    size = PassSize.of(x)
    sent, shapes = stage.run(stage.embed(x), size), stage.payload_shapes(*size)
    assert shapes.numel == ROWS * config.width * (HEIGHT * WIDTH // 4 + TEXT + 1)
    buffer = sent.pack()
    assert buffer.shape == (shapes.numel,)
    received = Payload.unpack(buffer, shapes).leaves()
    for mine, theirs in zip(received.tensors, sent.tensors, strict=True):
        assert mine.is_leaf and mine.requires_grad and mine.is_contiguous()
        assert mine.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
        assert torch.equal(mine, theirs)
    with pytest.raises(RuntimeError, match="run the stage's backward first"):
        received.gradient()
    with pytest.raises(ValueError, match=f"flat buffer of {shapes.numel} elements"):
        Payload.unpack(buffer[1:], shapes)


@pytest.mark.parametrize(
    "layers", [range(0), range(2, 2), range(2, 5), range(-1, 2), range(0, 3, 2)]
)
def test_what_is_no_slice_of_the_model_is_refused(layers: range) -> None:
    with pytest.raises(ValueError, match=r"one or more consecutive layers of the model's 3"):
        MMDiTStage(configuration("sd3_medium"), Mesh.single(), TorchBackend(), layers=layers)
