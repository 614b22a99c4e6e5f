"""What a transport does with lost messages, on backends that behave as NCCL and gloo do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from soar_mega.parallel.errors import PeerError
from soar_mega.parallel.mesh import Mesh
from soar_mega.pipeline import transport
from soar_mega.pipeline.actions import Action, Channel, Kind, Message, Placement
from soar_mega.pipeline.transport import Transport, links

SEND = Action(Kind.SEND, "aux0", 3, 0, Channel.ACTIVATION, 1)
MESSAGE = Message(Channel.ACTIVATION, "aux0", 3, 0)
WORDS = "sending the activation of pass aux0, microbatch 3, to pipeline rank 1 .process 1."


@dataclass
class Work:
    """A message as a backend sees it."""

    completed: bool = False
    failure: str | None = None
    waited: int = 0

    def is_completed(self) -> bool:
        return self.completed

    def wait(self, timeout: timedelta | None = None) -> None:
        self.waited += 1
        if self.failure is not None:
            raise RuntimeError(self.failure)


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> list[Work]:
    """What the next sends give, in order."""
    queue: list[Work] = []

    def groups(every: Any, rank: int, timeout: Any) -> dict[Any, Any]:
        return {key: object() for key, ranks in every if rank in ranks}

    monkeypatch.setattr(transport, "own_groups", groups)
    monkeypatch.setattr(dist, "isend", lambda *_, **__: queue.pop(0))
    return queue


def made(device: str, timeout: float = 60.0) -> Transport:
    mesh = replace(Mesh.single(device), pipeline_size=2, world_size=2)
    return Transport(replace(mesh, timeout=timedelta(seconds=timeout)), Placement(2))


def send(end: Transport, count: int = 1) -> None:
    for _ in range(count):
        end.send(SEND, MESSAGE, torch.zeros(1))


def test_failed_message_on_a_gpu_counts_as_completed_and_is_still_found(works: list[Work]) -> None:
    """NCCL's works are completed by an exception too."""
    works += [Work(completed=True, failure="NCCL communicator was aborted")]
    with pytest.raises(PeerError, match=WORDS + ".*aborted"):
        send(made("cuda"))
    end = made("cuda")
    late = Work()
    works.append(late)
    send(end)
    late.completed, late.failure = True, "remote process exited"
    with pytest.raises(PeerError, match=WORDS + ".*remote process exited"):
        end.finish()


def test_message_that_never_goes_is_found_at_the_end_of_the_step(works: list[Work]) -> None:
    end = made("cuda", timeout=0.05)
    works.append(Work())
    send(end)
    with pytest.raises(PeerError, match=WORDS + ".*not get through in time"):
        end.finish()


def test_messages_that_are_through_are_let_go(works: list[Work]) -> None:
    end = made("cuda")
    works += [Work(completed=True) for _ in range(3)]
    send(end, 3)
    assert end._flying == []
    end.finish()


def test_sends_on_a_cpu_are_bounded(works: list[Work]) -> None:
    """gloo's works say that they are through only when they are waited for."""
    end, every = made("cpu"), [Work() for _ in range(20)]
    works += every
    send(end, 20)
    assert len(end._flying) == transport._IN_FLIGHT
    assert sum(work.waited for work in every) == 20 - transport._IN_FLIGHT
    end.finish()
    assert all(work.waited == 1 for work in every)


def test_links_of_a_placement() -> None:
    """Two directions between neighbours; between the two of a V both carry both; one way back."""
    assert len(links(Placement(4))) == 3 + 3 + 1
    assert len(links(Placement(4, 2, folded=True))) == 2 * (3 + 3)
    assert len(links(Placement(4, 2))) == 2 * 4 + 1
    assert links(Placement(1, 2)) == []
