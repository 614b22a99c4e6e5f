"""Forward and every gradient equal diffusers' SD3Transformer2DModel, from the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel

from soar_mega.backends.torch import TorchBackend
from soar_mega.checkpoint.diffusers_map import mapping
from soar_mega.checkpoint.importer import load_diffusers_transformer
from soar_mega.checkpoint.torch_arrays import as_array, as_tensor
from soar_mega.model.config import MMDiTConfig
from soar_mega.model.init import initialise, position_table
from soar_mega.model.stage import MMDiTStage
from soar_mega.parallel.layout import layout_of
from soar_mega.parallel.mesh import Mesh
from soar_mega.parallel.sharded import ShardedParameters
from soar_mega.passes import ModelInput, TextCondition

COMMON = {
    "sample_size": 16,
    "attention_head_dim": 16,
    "joint_attention_dim": 40,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 20,
}
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
# (rows, latent height, latent width, text tokens)
SIZES = [(1, 8, 8, 154), (3, 6, 10, 154), (3, 10, 4, 90), (1, 14, 6, 90)]


def oracle(variant: str) -> SD3Transformer2DModel:
    torch.manual_seed(3)
    model = SD3Transformer2DModel(**COMMON, **CONFIGS[variant])  # type: ignore[arg-type]
    with torch.no_grad():  # diffusers leaves norms at 1 and biases at small values: shake them all
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("variant", CONFIGS)
def test_forward_and_gradients_equal_diffusers(variant: str, tmp_path: Path) -> None:
    theirs = oracle(variant)
    theirs.save_pretrained(tmp_path / "transformer")
    config = MMDiTConfig.from_diffusers(dict(theirs.config))
    ours = MMDiTStage(config, Mesh.single(), TorchBackend())
    load_diffusers_transformer(tmp_path, [ours], Mesh.single())
    parameters = ShardedParameters([ours], Mesh.single())
    table = mapping(config)

    for rows, height, width, tokens in SIZES:
        generator = torch.Generator().manual_seed(rows + tokens)

        def draw(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        latent, text, pooled = draw(rows, 16, height, width), draw(rows, tokens, 40), draw(rows, 24)
        timestep = 1000 * torch.rand(rows, generator=generator)
        weight = draw(rows, 16, height, width)
        theirs.zero_grad()
        parameters.zero_gradients()
        expected = theirs(latent, text, pooled, timestep, return_dict=False)[0]
        (expected * weight).sum().backward()
        result = ours(ModelInput(latent, timestep, TextCondition(text, pooled)))
        (result * weight).sum().backward()

        assert (result - expected).norm() <= 1e-5 * expected.norm()
        gradients = {name: p.grad for name, p in theirs.named_parameters()}
        whole = torch.stack([g.norm() for g in gradients.values() if g is not None]).norm().item()
        for name, parameter in ours.named_parameters():
            # main_grad is what the optimizer sees: zero, never missing, where nothing flows.
            mine = parameter.main_grad.view(layout_of(parameter).global_shape)
            gradient = as_tensor(table[name].to_ours(lambda key, _, g=gradients: as_array(g[key])))
            difference = (mine - gradient).norm().item()
            scale = max(gradient.norm().item(), 1e-6 * whole)
            assert difference <= 1e-5 * scale, (variant, rows, tokens, name, difference / scale)
            for theirs_name, part in table[name].to_diffusers(as_array(mine)):
                if not gradients[theirs_name].any():
                    assert not part.any(), f"{theirs_name} must be exactly 0"


def test_last_block_text_query_gradient_is_zero_and_present(tmp_path: Path) -> None:
    config = MMDiTConfig.from_diffusers({**COMMON, **CONFIGS["sd35_medium"]})
    ours = MMDiTStage(config, Mesh.single(), TorchBackend())
    initialise(ours, seed=0)
    for parameter in ours.parameters():
        parameter.data.add_(0.1)
    condition = TextCondition(torch.randn(2, 7, 40), torch.randn(2, 24))
    ours(ModelInput(torch.randn(2, 16, 8, 8), torch.rand(2), condition)).square().sum().backward()
    last = config.num_layers - 1
    stream = ours.get_submodule(f"blocks.{last}.attention.text")
    q, k, _ = stream.get_parameter("qkv.weight").grad.view(3, 64, 64)  # type: ignore[union-attr]
    assert not q.any() and k.any()
    norm_grad = stream.get_parameter("norm_q.weight").grad
    assert norm_grad is None or not norm_grad.any()


def test_fresh_weights_are_distributed_as_diffusers_own() -> None:
    config = MMDiTConfig.from_diffusers({**COMMON, **CONFIGS["sd35_medium"]})
    ours = MMDiTStage(config, Mesh.single(), TorchBackend())
    initialise(ours, seed=5)
    theirs = SD3Transformer2DModel(**config.to_diffusers())
    torch.testing.assert_close(
        position_table(config), theirs.pos_embed.pos_embed, rtol=0, atol=2e-7
    )
    reference = theirs.state_dict()
    for name, parameter in ours.named_parameters():
        entry = mapping(config)[name]
        expected = as_tensor(entry.to_ours(lambda key, _: as_array(reference[key])))
        if parameter.numel() >= 1000:
            assert parameter.std().item() == pytest.approx(expected.std().item(), rel=0.1), name
            assert abs(parameter.mean().item()) < 0.1 * expected.std().item(), name
    again = MMDiTStage(config, Mesh.single(), TorchBackend())
    initialise(again, seed=6)
    name = "blocks.0.image_mlp.up.weight"
    assert not torch.equal(again.get_parameter(name), ours.get_parameter(name))
