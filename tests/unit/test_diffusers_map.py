"""The table between our parameters and diffusers' keys, against diffusers' own models."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import SD3Transformer2DModel

from soar_mega.backends.torch import TorchBackend
from soar_mega.checkpoint.diffusers_map import POSITION, check_keys, diffusers_shapes, mapping
from soar_mega.checkpoint.errors import CheckpointError
from soar_mega.checkpoint.importer import load_diffusers_transformer
from soar_mega.checkpoint.safetensors_files import INDEX, STEM, SafetensorsFolder, StreamWriter
from soar_mega.checkpoint.torch_arrays import as_array, as_tensor, code_of
from soar_mega.checkpoint.weight_sources import read_transformer_config
from soar_mega.model.config import MMDiTConfig
from soar_mega.model.stage import MMDiTStage
from soar_mega.parallel.layout import layout_of, local_slice, parameter_layouts
from soar_mega.parallel.mesh import Mesh

# The published models: (config, parameters, elements of the stored position table).
PUBLISHED: dict[str, tuple[dict[str, Any], int, int]] = {
    "sd3_medium": (
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
        2028328000,
        56623104,
    ),
    "sd35_medium": (
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
            "dual_attention_layers": tuple(range(13)),
        },
        2243171520,
        226492416,
    ),
    "sd35_large": (
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        8056627520,
        89653248,
    ),
}
TINY: dict[str, Any] = {
    "sample_size": 8,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 12,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_table_covers_the_published_models_exactly(name: str) -> None:
    fields, parameters, position = PUBLISHED[name]
    # The sine table is made with numpy even on the meta device; its values do not matter here.
    shape = (fields["pos_embed_max_size"] ** 2, fields["caption_projection_dim"])
    table = torch.empty(shape, device="meta")
    with (
        torch.device("meta"),
        mock.patch("diffusers.models.embeddings.get_2d_sincos_pos_embed", return_value=table),
    ):
        model = SD3Transformer2DModel(**fields)
    theirs = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    config = MMDiTConfig(**fields)
    assert diffusers_shapes(config) == theirs
    entries = mapping(config)
    count = sum(torch.Size(entry.shape).numel() for entry in entries.values())
    assert torch.Size(entries[POSITION].shape).numel() == position
    assert count - position == parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "changes", [{}, {"qk_norm": None, "dual_attention_layers": ()}, {"num_layers": 1}]
)
def test_table_covers_our_model_exactly(changes: dict[str, Any]) -> None:
    config = MMDiTConfig(**{**TINY, **changes})
    stage = MMDiTStage(config, Mesh.single(), TorchBackend())
    ours = {name: layout.global_shape for name, layout in parameter_layouts(stage).items()}
    ours |= {name: tuple(buffer.shape) for name, buffer in stage.named_buffers()}
    assert {name: entry.shape for name, entry in mapping(config).items()} == ours


@pytest.fixture(scope="module")
def tiny() -> SD3Transformer2DModel:
    torch.manual_seed(3)
    model = SD3Transformer2DModel(**TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def test_round_trip_is_bit_equal(tiny: SD3Transformer2DModel) -> None:
    theirs = tiny.state_dict()
    back: dict[str, torch.Tensor] = {}
    for entry in mapping(MMDiTConfig(**TINY)).values():
        ours = entry.to_ours(lambda key, region: as_array(theirs[key][region or ...]))
        assert ours.shape == entry.shape
        back.update({key: as_tensor(part) for key, part in entry.to_diffusers(ours)})
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("shard_bytes", [10**9, 60_000])
def test_import_fills_every_tensor_parallel_slice(
    tiny: SD3Transformer2DModel, tmp_path: Path, shard_bytes: int
) -> None:
    tiny.save_pretrained(tmp_path / "transformer", max_shard_size=shard_bytes)
    assert (tmp_path / "transformer" / INDEX).exists() == (shard_bytes == 60_000)
    config = MMDiTConfig.from_diffusers(read_transformer_config(tmp_path))
    whole = MMDiTStage(config, Mesh.single(), TorchBackend())
    load_diffusers_transformer(tmp_path, [whole], Mesh.single())
    assert torch.equal(whole.patch_embed.position, tiny.pos_embed.pos_embed)
    theirs = tiny.state_dict()
    for name, parameter in whole.named_parameters():
        entry = mapping(config)[name]
        expected = torch.cat([theirs[key].reshape(-1) for key in entry.keys])
        assert torch.equal(parameter.detach().reshape(-1), expected), name
    full = {n: p.detach().view(layout_of(p).global_shape) for n, p in whole.named_parameters()}
    for rank in range(4):
        mesh = Mesh(rank, 4, rank, 4, 0, 1, None, None, None, torch.device("cpu"))
        part = MMDiTStage(config, mesh, TorchBackend())
        load_diffusers_transformer(tmp_path / "transformer", [part], mesh)
        for name, parameter in part.named_parameters():
            expected = full[name][local_slice(layout_of(parameter), mesh)]
            assert torch.equal(parameter.detach(), expected.reshape(parameter.shape)), name


def test_position_table_keeps_the_bits_and_dtype_of_the_file(
    tiny: SD3Transformer2DModel, tmp_path: Path
) -> None:
    half = SD3Transformer2DModel(**TINY)
    half.load_state_dict(tiny.state_dict())
    half.half().save_pretrained(tmp_path)
    stage = MMDiTStage(MMDiTConfig(**TINY), Mesh.single(), TorchBackend()).bfloat16()
    load_diffusers_transformer(tmp_path, [stage], Mesh.single())
    assert stage.patch_embed.position.dtype == torch.float16
    assert torch.equal(stage.patch_embed.position, half.pos_embed.pos_embed)


def test_all_wrong_keys_are_listed() -> None:
    config = MMDiTConfig(**TINY)
    found = diffusers_shapes(config)
    del found["proj_out.bias"], found["context_embedder.weight"]
    found["proj_out.weight"] = (1, 2)
    found["extra.a"] = found["extra.b"] = (3,)
    with pytest.raises(CheckpointError) as error:
        check_keys(config, found, "there")
    message = str(error.value)
    assert "missing keys (2):\n    context_embedder.weight\n    proj_out.bias" in message
    assert "unexpected keys (2):\n    extra.a\n    extra.b" in message
    assert "wrong shapes (1):\n    proj_out.weight: (1, 2), expected (64, 32)" in message


def test_folders_that_are_no_diffusers_model(tiny: SD3Transformer2DModel, tmp_path: Path) -> None:
    config = MMDiTConfig(**TINY)
    stage = MMDiTStage(config, Mesh.single(), TorchBackend())

    def refused(folder: Path) -> str:
        with pytest.raises(CheckpointError) as error:
            load_diffusers_transformer(folder, [stage], Mesh.single())
        return str(error.value)

    assert "does not exist" in refused(tmp_path / "absent")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert str(empty / "transformer" / "config.json") in refused(empty)
    folder = tmp_path / "model"
    tiny.save_pretrained(folder, max_shard_size=60_000)
    next(folder.glob("*00002-of*")).unlink()
    assert "names missing files" in refused(folder)
    (folder / INDEX).unlink()
    assert f"neither {STEM}.safetensors nor {INDEX}" in refused(folder)
    (folder / "model.bin").write_bytes(b"")
    assert "pickles" in refused(folder)
    (folder / f"{STEM}.safetensors").write_bytes(b"not at all")
    assert "no readable safetensors" in refused(folder)
    (folder / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    assert "FluxTransformer2DModel" in refused(folder)


def test_another_architecture_is_refused(tiny: SD3Transformer2DModel, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    deeper = MMDiTConfig(**{**TINY, "num_layers": 4, "pooled_projection_dim": 21})
    stage = MMDiTStage(deeper, Mesh.single(), TorchBackend())
    with pytest.raises(CheckpointError, match="another architecture") as error:
        load_diffusers_transformer(tmp_path, [stage], Mesh.single())
    assert "blocks.3.attention.image.qkv.weight" in str(error.value)
    assert "condition.pooled_in.weight: (32, 20) in the folder" in str(error.value)


def test_stream_writer_cuts_shards_and_refuses_another_order(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(i + 1, 3).to(torch.bfloat16) for i in range(5)}
    tensors["scalar"] = torch.tensor(2.5)
    plan = {key: (tuple(value.shape), code_of(value.dtype)) for key, value in tensors.items()}
    with StreamWriter(tmp_path, plan, 40) as writer:
        for key, value in tensors.items():
            writer.write(key, as_array(value))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    files = SafetensorsFolder(tmp_path)
    for key, value in tensors.items():
        found = as_tensor(files.read(key))
        assert found.dtype == value.dtype and torch.equal(found, value)
    with pytest.raises(ValueError, match="expected t0"), StreamWriter(tmp_path, plan) as writer:
        writer.write("t1", as_array(tensors["t1"]))
