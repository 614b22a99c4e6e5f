"""The data side of a run: its loader, its position, and what it does about bad samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from soar_mega.config import Config, ConfigError
from soar_mega.data.bad_samples import BadSampleCount
from soar_mega.data.decode.make import make_decoder
from soar_mega.data.encoded.rows import EncodedRows
from soar_mega.data.encoders import FrozenEncoders
from soar_mega.data.errors import BadSampleError, DataError
from soar_mega.data.loader import Batch, StepLoader
from soar_mega.data.model_folder import ModelFacts
from soar_mega.data.online import OnlineRows
from soar_mega.data.plan import Picture, Planner, StepPlan
from soar_mega.data.rank_file import RankFile
from soar_mega.data.rows import RowSource
from soar_mega.data.shards.remote import is_remote
from soar_mega.data.sources import TrainingData
from soar_mega.parallel.errors import waiting_for
from soar_mega.parallel.mesh import Mesh
from soar_mega.passes import MicroBatch, TextCondition

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BAD_SAMPLES, SAMPLE_IDS = "bad_samples", "sample_ids"


class Feed:
    """Hands out the microbatches of each step, counts bad samples and knows what to save.

    Args:
        config, mesh: Of the run.
        data: Its samples.
        facts: Of the model folder.
        encoders: On the mesh's device; encoded sets need none.
        step: The next step, from 0.
        saved: ``state`` as a checkpoint has it; None: from the start.

    Raises:
        ConfigError: ``saved`` is damaged or of other data.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        data: TrainingData,
        facts: ModelFacts,
        encoders: FrozenEncoders | None,
        *,
        step: int = 0,
        saved: Mapping[str, Any] | None = None,
    ) -> None:
        self._config, self._mesh, self._data = config, mesh, data
        self._ahead: list[int] = []
        self._remote = any(is_remote(shard.path) for shard in data.index.shards)
        folder = Path(config.run.dir)
        self._bad_lines = RankFile(folder / BAD_SAMPLES, mesh.rank)
        self._id_lines = RankFile(folder / SAMPLE_IDS, mesh.rank)
        try:
            self._after = data.order.start if saved is None else data.order.parse(saved["order"])
            self._count = BadSampleCount(
                config.data.max_bad_rate,
                folder / BAD_SAMPLES,
                None if saved is None else saved["samples"],
            )
            self._check_position(step)
        except (DataError, KeyError, TypeError) as error:
            raise ConfigError(
                f"checkpoint.resume: the checkpoint does not say where the data stood: {error}. "
                "Use another checkpoint, or checkpoint.reset_data = true to begin its order anew"
            ) from error
        planner = Planner(
            data.order,
            data.buckets,
            mesh,
            seed=config.run.seed,
            global_batch_size=config.train.global_batch_size,
            group_size=config.group_size,
            random_crop=config.data.random_crop,
            random_flip=config.data.random_flip,
            step=step,
            state=self._after,
        )
        self._loader = StepLoader(
            planner,
            self._rows(encoders),
            facts,
            mesh,
            seed=config.run.seed,
            micro_batch_size=config.train.micro_batch_size,
            prefetch_steps=config.data.prefetch_steps,
        )

    def _check_position(self, step: int) -> None:
        """A position from which samples would be skipped or repeated is none.

        Raises:
            DataError: It is not where the counted samples end, or they are more than ``step`` steps
                take.
        """
        taken, size = self._after.taken, self._config.train.global_batch_size
        if taken != self._count.seen or taken % size or taken > step * size:
            raise DataError(
                f"the saved data position is after {taken} samples, and {self._count.seen} were "
                f"counted in up to {step} steps of {size}"
            )

    def _rows(self, encoders: FrozenEncoders | None) -> RowSource:
        data, workers = self._config.data, self._config.data.num_workers
        micro_batch_size = self._config.train.micro_batch_size
        if self._data.encoded is not None:
            return EncodedRows(
                self._data.encoded,
                self._mesh,
                micro_batch_size=micro_batch_size,
                dtype=DTYPES[self._config.precision.compute_dtype],
                ahead=workers > 0,
                on_bad=self._note_bad,
            )
        assert encoders is not None
        return OnlineRows(
            self._data.index,
            encoders,
            self._mesh,
            make_decoder(data.decoder, workers, device_id=self._mesh.device.index),
            micro_batch_size=micro_batch_size,
            max_sequence_length=data.max_sequence_length,
            cache=data.cache_encoded,
            num_workers=workers,
            on_bad=self._note_bad,
        )

    @property
    def empty(self) -> TextCondition:
        """Condition of the empty prompt, with B = 1."""
        return self._loader.empty

    def load(self, step: int) -> list[MicroBatch]:
        """This rank's microbatches of ``step``; none where no sample of the global batch is good.

        A collective over all ranks: all call it for the same steps, in order.

        Raises:
            DataError: Too many samples could not be used, or none can be read at all.
        """
        self._fetch_ahead()
        batch = self._loader.load(step)
        bad_K = batch.bad_K
        if self._mesh.data_group is not None:
            bad_K = bad_K.to(self._mesh.device)
            with waiting_for("data-parallel peers, to count bad samples"):
                dist.all_reduce(bad_K, group=self._mesh.data_group)
            bad_K = bad_K.cpu()
        samples = self._config.train.global_batch_size
        self._count.add(samples, bad_K)
        self._after = batch.plan.after
        if self._config.logging.sample_ids and self._mesh.model_rank == 0:
            self._write_ids(batch)
        return batch.microbatches if int(bad_K.sum()) < samples else []

    @property
    def metrics(self) -> dict[str, float]:
        """``data/*`` so far: epochs of each source, bad samples."""
        epochs = self._data.epochs(self._after)
        alone = len(epochs) == 1
        return {
            "data/bad_samples": float(self._count.total),
            **{"data/epoch" if alone else f"data/epoch/{name}": n for name, n in epochs.items()},
        }

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint after the last loaded step keeps."""
        return {"order": self._after.to_json(), "samples": self._count.to_json()}

    def close(self) -> None:
        """Stop the threads, close the files."""
        self._data.index.files.close()
        self._loader.close()
        self._bad_lines.close()
        self._id_lines.close()

    def _fetch_ahead(self) -> None:
        """Have remote shards of this window and the next in the cache before they are read."""
        if not self._remote:
            return
        ahead = self._data.order.shards_ahead(self._after)
        if ahead != self._ahead:
            self._ahead = ahead
            self._data.index.files.prefetch(self._data.index.shards[n].path for n in ahead)

    def _note_bad(self, plan: StepPlan, picture: Picture, error: BadSampleError) -> None:
        shard, row = self._data.index.locate(picture.sample)
        self._bad_lines.write(
            {
                "step": plan.step + 1,
                "shard": shard.path,
                "key": shard.keys[row],
                "kind": error.kind,
                "message": str(error),
            }
        )

    def _write_ids(self, batch: Batch) -> None:
        plan, index = batch.plan, self._data.index
        samples = []
        for slot, draw in zip(plan.slots_B.tolist(), plan.draws, strict=True):
            shard, row = index.locate(draw.sample)
            samples.append([slot, draw.epoch, shard.path, shard.keys[row]])
        self._id_lines.write({"step": plan.step + 1, "samples": samples})
