"""Tells whether two model folders have the same VAE, text encoders and tokenizers.

The weights are not read whole: of each file its length, its header and blocks spread evenly over it
count. Other weights of the same shapes differ nearly everywhere, so a few megabytes tell.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from soar_mega.data.model_folder import ENCODERS, FolderError, check_folder, read_json

_BLOCK, _BLOCKS = 2**16, 64
_MAX_HEADER = 2**26
# Written by the libraries, of no effect on what the models compute.
_REMARKS = ("_name_or_path", "_diffusers_version", "transformers_version", "torch_dtype", "dtype")
_STEMS = ("diffusion_pytorch_model.safetensors", "model.safetensors")


def encoder_fingerprint(folder: str | Path) -> dict[str, str]:
    """sha256 (hex) of each component that turns pictures and captions into numbers.

    Raises:
        FolderError: See ``check_folder``; or a file cannot be read.
    """
    root = Path(folder).expanduser()
    lead = f"model.pretrained={str(folder)!r}: "
    parts = sorted(
        part for part in check_folder(folder) if part in ENCODERS or part.startswith("tokenizer")
    )
    return {part: component_fingerprint(root / part, lead) for part in parts}


def component_fingerprint(folder: Path, lead: str) -> str:
    """sha256 (hex) of one component, by its folder's name: weights, or all files.

    Args:
        folder: Of a component of a diffusers model, or a transformer alone.
        lead: Starts messages.

    Raises:
        FolderError: A file cannot be read.
    """
    try:
        return _component(folder, lead)
    except OSError as error:
        raise FolderError(f"{lead}{error.filename}: cannot be read: {error.strerror}") from error


def _component(folder: Path, lead: str) -> str:
    digest = hashlib.sha256()
    weights = [] if folder.name.startswith("tokenizer") else _weights(folder, lead)
    if weights:
        texts = [folder / "config.json"]
    else:
        texts = sorted(path for path in folder.iterdir() if path.is_file())
    for path in texts:
        digest.update(f"{path.name}\n".encode())
        digest.update(_canonical(path, lead) if "config" in path.name else path.read_bytes())
    for path in weights:
        digest.update(f"{path.name}\n".encode())
        _sample(path, digest)
    return digest.hexdigest()


def _weights(folder: Path, lead: str) -> list[Path]:
    """The files that ``from_pretrained`` loads: others, such as fp16 variants, do not count."""
    for stem in _STEMS:
        if (folder / stem).is_file():
            return [folder / stem]
        index = folder / f"{stem}.index.json"
        if index.is_file():
            names = read_json(index, lead).get("weight_map", {}).values()
            return [folder / name for name in sorted(set(names))]
    return sorted(folder.glob("*.safetensors"))


def _canonical(path: Path, lead: str) -> bytes:
    record = read_json(path, lead)
    kept = {key: value for key, value in record.items() if key not in _REMARKS}
    return json.dumps(kept, sort_keys=True).encode()


def _sample(path: Path, digest: Any) -> None:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(size.to_bytes(8, "little"))
        header = int.from_bytes(file.read(8), "little")
        digest.update(file.read(min(header, _MAX_HEADER)))
        last = max(size - _BLOCK, 0)
        # Of a small file the blocks overlap, which leaves nothing out.
        for number in range(_BLOCKS):
            file.seek(last * number // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK))
