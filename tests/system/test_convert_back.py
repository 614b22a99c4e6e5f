"""From diffusers to checkpoints of ours and back, and to one file, loses no bit."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from soar_mega.backends.torch import TorchBackend
from soar_mega.checkpoint import exporter, raw_tensors, store
from soar_mega.checkpoint.errors import CheckpointError
from soar_mega.checkpoint.exporter import export, export_single_file
from soar_mega.checkpoint.from_diffusers import convert_from_diffusers
from soar_mega.checkpoint.importer import load_weights
from soar_mega.model.config import MMDiTConfig
from soar_mega.model.stage import MMDiTStage
from soar_mega.parallel.mesh import Mesh
from soar_mega.training.verify_export import verify_export
from tools import convert_from_diffusers as from_tool
from tools import convert_to_diffusers as to_tool

KINDS: dict[str, dict[str, Any]] = {
    "SD3-M": {"qk_norm": None, "dual_attention_layers": ()},
    "SD3.5-M": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    "SD3.5-L": {"qk_norm": "rms_norm", "dual_attention_layers": ()},
}


def transformer(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    """A tiny transformer of the kind, all of whose numbers are random."""
    torch.manual_seed(len(kind))
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        pos_embed_max_size=12,
        **KINDS[kind],
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, **more)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    """Everything in a folder's safetensors files, as stored."""
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype and torch.equal(value, other[key]), key


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tiny tensors come in several pieces, too."""
    monkeypatch.setattr(raw_tensors, "PIECE", 1000)
    monkeypatch.setattr(raw_tensors, "_SHORT_RUN", 200)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_the_same_file(
    kind: str, dtype: torch.dtype, sharded: bool, tmp_path: Path
) -> None:
    more = {"max_shard_size": "60KB"} if sharded else {}
    source = transformer(kind, tmp_path / "source", dtype, **more)
    assert (len(list(source.glob("*.safetensors"))) > 1) == sharded
    ours = convert_from_diffusers(source, tmp_path / "ours")
    assert store.verify(ours) == []
    back = export(ours, tmp_path / "back", transformer_only=True)
    assert_equal(tensors(back), tensors(source))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (back, source)]
    assert configs[0] == configs[1]
    assert verify_export(ours, back) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_opens_in_diffusers(kind: str, tmp_path: Path) -> None:
    source = transformer(kind, tmp_path / "source")
    ours = convert_from_diffusers(source, tmp_path / "ours")
    file = tmp_path / "one.safetensors"
    to_tool.main([str(ours), str(file), "--single-file", "--verify"])
    model = SD3Transformer2DModel.from_single_file(str(file), config=str(source))
    expected = SD3Transformer2DModel.from_pretrained(source).state_dict()
    assert_equal(dict(model.state_dict()), dict(expected))
    with safe_open(file, "pt") as opened:
        keys = set(opened.keys())
    prefix = "model.diffusion_model."
    for key in ("joint_blocks.0.x_block.attn.qkv.weight", "final_layer.adaLN_modulation.1.bias"):
        assert prefix + key in keys
    assert (prefix + "joint_blocks.1.x_block.attn2.ln_q.weight" in keys) == (kind == "SD3.5-M")
    with pytest.raises(CheckpointError, match="does not exist"):
        export_single_file(ours, file)


def test_casting(tmp_path: Path) -> None:
    """Weights are rounded once; the position table only where that loses nothing."""
    source = transformer("SD3.5-M", tmp_path / "source")
    from_tool.main([str(source), str(tmp_path / "ours"), "--dtype", "bf16", "--hash", "sha256"])
    ours = store.StateReader(tmp_path / "ours")
    dtypes = dict(ours.dtypes)
    assert dtypes.pop("model.patch_embed.position") == "F32"
    assert set(dtypes.values()) == {"BF16"}
    manifest = json.loads((tmp_path / "ours" / "manifest.json").read_text())
    assert manifest["algorithm"] == "sha256"
    out = tmp_path / "out"
    arguments = [str(tmp_path / "ours"), str(out), "--transformer-only", "--dtype", "fp16"]
    to_tool.main([*arguments, "--verify"])
    for key, value in tensors(source).items():
        expected = value if key == "pos_embed.pos_embed" else value.bfloat16().half()
        assert torch.equal(tensors(out)[key], expected), key


def test_a_run_starts_from_converted_weights(tmp_path: Path) -> None:
    """With the default, ``ema``: there is one kind only."""
    source = transformer("SD3.5-L", tmp_path / "source", torch.bfloat16)
    ours = convert_from_diffusers(source, tmp_path / "ours")
    states = []
    for start in (source, ours):
        config = MMDiTConfig.from_diffusers(json.loads((source / "config.json").read_text()))
        stage = MMDiTStage(config, Mesh.single(), TorchBackend())
        parents = load_weights(start, [stage], stage.mesh, "ema")
        states.append(dict(stage.state_dict()))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    newest, oldest = parents
    assert newest["weights"] == "plain" and newest["hash"] == store.identity(ours)
    assert oldest == {"pretrained": str(source)}


def test_keys_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    source = transformer("SD3.5-M", tmp_path / "source")
    file = source / "diffusion_pytorch_model.safetensors"
    whole = load_file(file)
    broken = dict(whole)
    broken["stranger.weight"] = broken.pop("proj_out.bias")
    broken["proj_out.weight"] = broken["proj_out.weight"][:-1].clone()
    save_file(broken, file)
    with pytest.raises(SystemExit) as error:
        from_tool.main([str(source), str(tmp_path / "ours")])
    message = str(error.value)
    for words in (
        "missing keys (1):\n    proj_out.bias",
        "unexpected keys (1):\n    stranger.weight",
        "wrong shapes (1):\n    proj_out.weight: (63, 32), expected (64, 32)",
    ):
        assert words in message
    # The weights of one variant with the config of another.
    other = transformer("SD3-M", tmp_path / "other")
    shutil.copy(other / "config.json", source / "config.json")
    save_file(whole, file)
    with pytest.raises(CheckpointError, match=r"transformer_blocks\.0\.attn2\.norm_q\.weight"):
        convert_from_diffusers(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("how", ["cut", "garbage"])
def test_a_source_that_is_damaged_leaves_nothing(how: str, tmp_path: Path) -> None:
    source = transformer("SD3-M", tmp_path / "source")
    file = source / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-10] if how == "cut" else os.urandom(4000))
    with pytest.raises(CheckpointError, match="no readable safetensors file"):
        convert_from_diffusers(source, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name", ["state/rank-00000.safetensors", "state/index.json"])
def test_a_damaged_checkpoint_is_not_exported(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it is read or found unreadable before its hashes are."""
    ours = convert_from_diffusers(transformer("SD3-M", tmp_path / "source"), tmp_path / "ours")
    content = bytearray((ours / name).read_bytes())
    content[-5] ^= 1
    (ours / name).write_bytes(content)

    def slow(checkpoint: Path) -> list[str]:
        time.sleep(0.5)
        return store.verify(checkpoint)

    monkeypatch.setattr(exporter, "verify", slow)
    for call in (
        lambda: export(ours, tmp_path / "out", transformer_only=True),
        lambda: export_single_file(ours, tmp_path / "out.safetensors"),
    ):
        with pytest.raises(CheckpointError, match=f"{re.escape(name)}: another hash"):
            call()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "source"]


_PLAIN = """
import sys
from tools import convert_from_diffusers, convert_to_diffusers

folder = sys.argv[1]
convert_from_diffusers.main([f"{folder}/source", f"{folder}/ours"])
convert_to_diffusers.main([f"{folder}/ours", f"{folder}/back", "--transformer-only"])
convert_to_diffusers.main([f"{folder}/ours", f"{folder}/one.safetensors", "--single-file"])
heavy = {"torch", "diffusers", "transformers", "pydantic", "yaml"} & sys.modules.keys()
sys.exit(str(heavy) if heavy else 0)
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_conversion_imports_neither_torch_nor_diffusers(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """They take longer to import than a small model to convert."""
    source = transformer("SD3.5-M", tmp_path / "source", dtype)
    subprocess.run([sys.executable, "-c", _PLAIN, str(tmp_path)], check=True)
    assert_equal(tensors(tmp_path / "back"), tensors(source))


def test_verify_finds_other_weights(tmp_path: Path) -> None:
    ours = convert_from_diffusers(transformer("SD3-M", tmp_path / "source"), tmp_path / "ours")
    out = export(ours, tmp_path / "out", transformer_only=True)
    file = out / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out.bias"] += 0.01
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="the outputs differ by"):
        verify_export(ours, out)


_SLOW = """
import sys, time
from soar_mega.checkpoint import raw_tensors, state_files
from tools import convert_from_diffusers

write = state_files.DataFile.write

def slow(self, tensor):
    print("writing", flush=True)
    time.sleep(0.2)
    write(self, tensor)

state_files.DataFile.write = slow
convert_from_diffusers.main(sys.argv[1:])
"""


def test_a_killed_converter_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    source = transformer("SD3-M", tmp_path / "source")
    arguments = [sys.executable, "-c", _SLOW, str(source), str(tmp_path / "ours")]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None and process.stdout.readline() == b"writing\n"
    time.sleep(0.3)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "ours").exists()
    from_tool.main([str(source), str(tmp_path / "ours")])  # and what it left is in nobody's way
    assert store.verify(tmp_path / "ours") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "source"]
