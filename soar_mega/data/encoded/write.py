"""Writes the files of an encoded set: the same bytes whichever rank writes them."""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save

from soar_mega.data.encoded.encode import Encoded, Refused
from soar_mega.data.encoders import FrozenEncoders
from soar_mega.data.prepare.write import key_of
from soar_mega.data.shards.index import ShardIndex
from soar_mega.data.shards.index_file import INDEX_VERSION
from soar_mega.data.shards.write_index import PARTIAL, dump, index_path, replacing


def remove_partials(out: Path, rank: int, world_size: int) -> None:
    """What this rank, or one that is not there this time, left when it was killed."""
    for partial in out.glob(f".*{PARTIAL}"):
        writer = int(partial.name.removesuffix(PARTIAL).rpartition(".")[2])
        if writer == rank or (rank == 0 and writer >= world_size):
            partial.unlink(missing_ok=True)


def write_empty(path: Path, encoders: FrozenEncoders, max_sequence_length: int, rank: int) -> None:
    """Write the empty prompt's embeddings."""
    empty = encoders.encode_prompts([""], max_sequence_length)
    tensors = {"text": empty.text_BTE[0], "pooled": empty.pooled_BV[0]}
    stored = {name: tensor.bfloat16().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path, rank) as file:
        file.write(save(stored))


def write_shard(
    path: Path, index: ShardIndex, results: Iterable[Encoded | Refused], rank: int
) -> int:
    """Write the tar and its index; returns the number of samples.

    Raises:
        OSError: The disk is full.
    """
    import webdataset

    rows: list[dict[str, Any]] = []
    refused: list[dict[str, str]] = []
    with replacing(path, rank) as file:
        # encoder=False: bytes go in as they are. Owners and times are fixed.
        with webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
            for result in results:
                shard, row = index.locate(result.sample)
                source = f"{os.path.basename(shard.path)}:{shard.keys[row]}"
                if isinstance(result, Refused):
                    why = {"reason": result.kind, "detail": result.detail}
                    refused.append({"source": source, **why})
                    continue
                key = key_of(result.sample, os.path.basename(shard.keys[row]))
                caption = result.caption.encode()
                tar.write({"__key__": key, "bin": result.payload.tobytes(), "txt": caption})
                width, height = result.bucket
                rows.append({"key": key, "width": width, "height": height, "source": source})
        file.flush()
        with tarfile.open(file.name, "r:") as written:
            place = {member.name: [member.offset_data, member.size] for member in written}
        for entry in rows:
            entry["payload"] = place[entry["key"] + ".bin"]
            entry["caption"] = place[entry["key"] + ".txt"]
        size = os.fstat(file.fileno()).st_size
    record = {
        "version": INDEX_VERSION,
        "kind": "encoded",
        "shard": path.name,
        "size": size,
        "samples": rows,
        "refused": refused,
    }
    with replacing(index_path(path), rank) as file:
        file.write(dump(record))
    return len(rows)


def collect(path: Path, shards: list[Path], rank: int) -> tuple[int, Counter[str]]:
    """Write ``refused.jsonl`` from the shards' indexes; returns samples, and refused by kind."""
    samples, refused = 0, Counter[str]()
    with replacing(path, rank) as file:
        for shard in shards:
            record = json.loads(index_path(shard).read_bytes())
            samples += len(record["samples"])
            for entry in record["refused"]:
                refused[entry["reason"]] += 1
                file.write(dump(entry))
    return samples, refused
