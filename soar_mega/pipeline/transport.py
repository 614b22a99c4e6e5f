"""Messages between the pipeline ranks that hold one model: buffers, links, and what is waited for.

Every link (channel, from, to) has a process group of its two ranks to itself: an NCCL communicator
runs what it is given in order, so a receive posted early would hold up any other message behind it.
Receives are posted early and waited for where their data is needed. A send is started and its
buffer kept until it is through.

On a CPU a wait holds the process, so what never comes is found where it is missed. On a GPU a wait
only orders the stream, and the process runs ahead; what never comes is found at the end of the
step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise, product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from soar_mega.parallel.errors import PeerError, reason
from soar_mega.parallel.mesh import Mesh, own_groups
from soar_mega.pipeline.actions import Action, Channel, Kind, Message, Placement

Link = tuple[Channel, int, int]
# Sends on a CPU that may be under way; more than a rank has between two that are received.
_IN_FLIGHT = 8
_DEFAULT_TIMEOUT = timedelta(minutes=30)


def links(placement: Placement) -> list[Link]:
    """The links that a placement's schedules may use, in one order."""
    found: set[Link] = set()
    for stage, following in pairwise(range(placement.stages)):
        a, b = placement.rank(stage), placement.rank(following)
        if a != b:
            found |= {(Channel.ACTIVATION, a, b), (Channel.GRADIENT, b, a)}
    last = placement.rank(placement.last_stage)
    if last != 0:
        found.add((Channel.HAND_OVER, last, 0))
    return sorted(found)


@dataclass(eq=False)
class _Flight:
    """A message on its way; the buffer is kept while the backend needs it."""

    action: Action
    buffer: Tensor | None
    work: Any


class Transport:
    """This process's ends of its pipeline's links; every process of the run makes one.

    Args:
        mesh: Where this process stands.
        placement: Which rank owns which stage.
        synchronous_sends: Wait in every send until the receive is posted and the data is through,
            as the validator assumes; to test that schedules bear it.
    """

    def __init__(
        self, mesh: Mesh, placement: Placement, *, synchronous_sends: bool = False
    ) -> None:
        self._mesh, self._synchronous = mesh, synchronous_sends
        self._timeout = mesh.timeout or _DEFAULT_TIMEOUT
        # Longer than ours, so that our message, which names the action, comes first.
        groups = own_groups(_members(mesh, placement), mesh.rank, 2 * self._timeout)
        self._groups = {
            link: group
            for (link, tensor, data), group in groups.items()
            if (tensor, data) == (mesh.tensor_rank, mesh.data_rank)
        }
        self._receives: dict[Message, _Flight] = {}
        self._flying: list[_Flight] = []

    def post_receive(self, action: Action, message: Message, buffer: Tensor) -> None:
        """Begin to receive into ``buffer``; waits for nothing."""
        peer = self._peer(action)
        group = self._groups[message.channel, peer, self._mesh.pipeline_rank]
        source = self._mesh.pipeline_peer(peer)
        with self._waiting(action):
            work = dist.irecv(buffer, source, group=group)
        self._receives[message] = _Flight(action, buffer, work)

    def take(self, message: Message) -> Tensor:
        """The buffer of a receive that was posted, once its data is there.

        Raises:
            PeerError: It did not come in time, or its sender is gone.
        """
        flight = self._receives.pop(message)
        self._wait(flight)
        assert flight.buffer is not None
        if self._mesh.device.type == "cuda":
            self._flying.append(_Flight(flight.action, None, flight.work))
        return flight.buffer

    def send(self, action: Action, message: Message, buffer: Tensor) -> None:
        """Begin to send ``buffer``, which must not change any more.

        Raises:
            PeerError: The receiver is gone.
        """
        peer = self._peer(action)
        group = self._groups[message.channel, self._mesh.pipeline_rank, peer]
        with self._waiting(action):
            work = dist.isend(buffer, self._mesh.pipeline_peer(peer), group=group)
        flight = _Flight(action, buffer, work)
        self._flying.append(flight)
        if self._mesh.device.type == "cuda":
            self._flying = [f for f in self._flying if not self._is_through(f)]
        else:
            # gloo tells of no end but by a wait. That sends may block is what the validator
            # assumes, so waiting for older ones ties no knot, and bounds the buffers.
            while len(self._flying) > (0 if self._synchronous else _IN_FLIGHT):
                self._wait(self._flying.pop(0))

    def finish(self) -> None:
        """Wait for every message that is still on its way.

        Raises:
            PeerError: One did not get through in time.
        """
        flying, self._flying = self._flying, []
        if self._mesh.device.type != "cuda":
            for flight in flying:
                self._wait(flight)
            return
        deadline = time.monotonic() + self._timeout.total_seconds()
        for flight in flying:
            while not self._is_through(flight):
                if time.monotonic() > deadline:
                    raise self._lost(flight.action, "it did not get through in time")
                time.sleep(1e-4)

    def _is_through(self, flight: _Flight) -> bool:
        """Whether a message on a GPU is through; raises if it failed, which also completes it."""
        if not flight.work.is_completed():
            return False
        self._wait(flight)
        return True

    @staticmethod
    def _peer(action: Action) -> int:
        assert action.peer is not None
        return action.peer

    def _wait(self, flight: _Flight) -> None:
        with self._waiting(flight.action):
            if self._mesh.device.type == "cuda":
                flight.work.wait()
            else:
                flight.work.wait(self._timeout)

    @contextmanager
    def _waiting(self, action: Action) -> Iterator[None]:
        """Names the action in whatever goes wrong in a point-to-point call."""
        since = time.monotonic()
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            why = f"after {time.monotonic() - since:.1f} s {reason(error)}"
            raise self._lost(action, why) from error

    def _lost(self, action: Action, why: str) -> PeerError:
        assert action.peer is not None and action.channel is not None
        verb = "sending" if action.kind is Kind.SEND else "receiving"
        direction = "to" if action.kind is Kind.SEND else "from"
        return PeerError(
            f"process {self._mesh.rank} (pipeline rank {self._mesh.pipeline_rank}) was {verb} the "
            f"{action.channel.replace('_', '-')} of pass {action.pass_name}, microbatch "
            f"{action.microbatch}, {direction} pipeline rank {action.peer} (process "
            f"{self._mesh.pipeline_peer(action.peer)}): {why}. That process hangs, died or waits "
            "for another one: look at its log. parallel.distributed_timeout_minutes is "
            f"{self._timeout.total_seconds() / 60:g}"
        )


def _members(mesh: Mesh, placement: Placement) -> Iterator[tuple[tuple[Link, int, int], list[int]]]:
    """Every link of every pipeline of the run with its two world ranks, in one order."""
    for link, tensor, data in product(
        links(placement), range(mesh.tensor_size), range(mesh.data_size)
    ):
        ends = [mesh.rank_at(tensor, data, rank) for rank in link[1:]]
        yield (link, tensor, data), ends
