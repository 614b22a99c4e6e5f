"""Runs this rank's list of a schedule: the same code for one process and for many stages.

A forward takes its input from the stage before (or makes it, on the first stage) and leaves an
output for the stage behind (or gives it to the objective, on the last). Forwards without gradient
keep nothing but that output. A forward with gradient keeps its graph until its backward, and where
backwards are split, the inputs of linear layers and the gradients of their outputs until the weight
gradients are done.

What enters and leaves stages, hand-overs apart, is a ``Payload``: one flat buffer a message, views
of the same memory between two stages of one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from soar_mega.model.payload import PassSize, Payload, PayloadShapes
from soar_mega.parallel.errors import CollectiveError, PeerError
from soar_mega.parallel.mesh import Mesh
from soar_mega.passes import ModelInput, Pass
from soar_mega.pipeline.actions import Action, Channel, Kind, Message, Schedule
from soar_mega.pipeline.recorder import NoRecorder, Recorder
from soar_mega.pipeline.transport import Transport

WeightWork = list[Callable[[], None]]
Trip = tuple[str, int, int]  # pass, microbatch, chunk


class Stage(Protocol):
    """What the executor needs of ``MMDiTStage``; the benchmark of schedules has one that sleeps."""

    @property
    def dtype(self) -> torch.dtype: ...
    def embed(self, x: ModelInput) -> Payload: ...
    def run(self, payload: Payload, size: PassSize) -> Payload: ...
    def velocity(self, payload: Payload, size: PassSize) -> Tensor: ...
    def payload_shapes(
        self, rows: int, height: int, width: int, text_length: int
    ) -> PayloadShapes: ...
    def hold_weight_gradients(self) -> AbstractContextManager[WeightWork]: ...


class Ends(Protocol):
    """What the two ends of the pipeline do with a step's microbatches.

    The first end alone is asked for inputs and given hand-overs, the last one alone given outputs
    and asked for hand-overs; one that is both keeps what it needs.
    """

    def size(self, p: Pass, microbatch: int) -> PassSize: ...
    def make_input(self, p: Pass, microbatch: int) -> ModelInput: ...
    def take_output(self, p: Pass, microbatch: int, velocity_BCHW: Tensor) -> Tensor | None:
        """The loss of a pass with gradient, to run backward from."""

    def hand_over(self, microbatch: int) -> Tensor: ...
    def hand_over_like(self, microbatch: int, dtype: torch.dtype) -> Tensor:
        """An empty tensor for what ``hand_over`` gives on the last stage."""

    def receive(self, microbatch: int, handed: Tensor) -> None: ...


@dataclass
class _Graph:
    """What a forward with gradient has left.

    Attributes:
        entered: Leaves of the graph; None on the first stage.
        left: The payload, or on the last stage the loss.
    """

    entered: Payload | None
    left: Payload | Tensor


class Executor:
    """One rank's part of one step.

    Args:
        schedule: What all ranks do.
        stages: The stages this rank owns, by chunk.
        mesh: Where this process stands.
        transport: Links to the other ranks; None where there are none.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Sequence[Stage],
        mesh: Mesh,
        transport: Transport | None = None,
    ) -> None:
        self._schedule, self._step, self._rank = schedule, schedule.step, mesh.pipeline_rank
        self._place = schedule.step.placement
        self._stages, self._mesh, self._transport = stages, mesh, transport
        self._run_kind: dict[Kind, Callable[[Action], None]] = {
            Kind.SEND: self._send,
            Kind.RECEIVE: self._receive,
            Kind.WEIGHT_BACKWARD: self._weight_backward,
        }

    def run(self, ends: Ends, recorder: Recorder | NoRecorder) -> None:
        """Do everything on the list.

        Raises:
            PeerError: A message did not come or go, or a tensor-parallel peer is lost; names the
                action.
        """
        self._ends, self._recorder = ends, recorder
        self._graphs: dict[Trip, _Graph] = {}
        self._weight_work: dict[Trip, WeightWork] = {}
        # Made on this rank: for another of its stages, and to be sent.
        self._made: dict[Message, Payload] = {}
        self._outgoing: dict[Message, Tensor] = {}
        self._handed: set[int] = set()
        for action in self._schedule.actions[self._rank]:
            if action.kind in self._run_kind:
                with recorder.time(action):
                    self._run_kind[action.kind](action)
            else:
                self._compute(action)
        if self._transport is not None:
            self._transport.finish()
        left = [*self._graphs, *self._weight_work, *self._made, *self._outgoing]
        assert not left, f"the schedule {self._schedule.name} left {left} undone"
        del self._ends, self._recorder  # and with them the step's samples

    def _compute(self, action: Action) -> None:
        try:
            (self._forward if action.kind is Kind.FORWARD else self._backward)(action)
        except CollectiveError as error:
            raise PeerError(
                f"process {self._mesh.rank} (pipeline rank {self._rank}, tensor-parallel rank "
                f"{self._mesh.tensor_rank}) was in the {action.kind.replace('_', ' ')} of pass "
                f"{action.pass_name}, microbatch {action.microbatch}: {error}"
            ) from error

    def _forward(self, action: Action) -> None:
        p, stage = self._step.by_name[action.pass_name], self._stages[action.chunk]
        number = self._place.stage(self._rank, action.chunk)
        size = self._ends.size(p, action.microbatch)
        entered = None
        need = self._step.needs(self._rank, action)
        if need is not None and need.channel is Channel.HAND_OVER:
            self._take_hand_over(need)
        elif need is not None:
            entered = self._take(need, stage.payload_shapes(*size))
            entered = entered.leaves() if p.grad else entered
        with self._recorder.time(action), torch.set_grad_enabled(p.grad):
            payload = entered
            if payload is None:
                payload = stage.embed(self._ends.make_input(p, action.microbatch))
            left: Payload | Tensor | None
            if number == self._place.last_stage:
                velocity_BCHW = stage.velocity(payload, size)
                left = self._ends.take_output(p, action.microbatch, velocity_BCHW)
                del velocity_BCHW
            else:
                left = stage.run(payload, size)
        if isinstance(left, Payload):
            made = self._step.makes(self._rank, action)
            assert made is not None
            self._put(made, left)
        if p.grad:
            assert left is not None
            trip = action.pass_name, action.microbatch, action.chunk
            self._graphs[trip] = _Graph(entered, left)

    def _backward(self, action: Action) -> None:
        trip = action.pass_name, action.microbatch, action.chunk
        graph, stage = self._graphs.pop(trip), self._stages[action.chunk]
        gradient = None
        need = self._step.needs(self._rank, action)
        if need is not None:
            p = self._step.by_name[action.pass_name]
            size = self._ends.size(p, action.microbatch)
            gradient = self._take(need, stage.payload_shapes(*size))
        with self._recorder.time(action):
            if action.kind is Kind.INPUT_BACKWARD:
                with stage.hold_weight_gradients() as work:
                    _run_backward(graph, gradient)
                self._weight_work[trip] = work
            else:
                _run_backward(graph, gradient)
        if graph.entered is not None:
            made = self._step.makes(self._rank, action)
            assert made is not None
            self._put(made, graph.entered.gradient())

    def _weight_backward(self, action: Action) -> None:
        # Backwards: each entry is dropped, with the activations it holds, as soon as it is done.
        work = self._weight_work.pop((action.pass_name, action.microbatch, action.chunk))[::-1]
        while work:
            work.pop()()

    def _put(self, message: Message, payload: Payload) -> None:
        """Leave what a stage made for another stage."""
        if self._place.rank(self._step.target(message)) == self._rank:
            self._made[message] = payload
        else:
            self._outgoing[message] = payload.pack()

    def _take(self, message: Message, shapes: PayloadShapes) -> Payload:
        """What another stage made."""
        if self._place.rank(message.source_stage) == self._rank:
            return self._made.pop(message)
        assert self._transport is not None
        return Payload.unpack(self._transport.take(message), shapes)

    def _take_hand_over(self, message: Message) -> None:
        if self._place.rank(message.source_stage) == self._rank:
            return  # the objective's own state has it
        if message.microbatch not in self._handed:
            assert self._transport is not None
            self._ends.receive(message.microbatch, self._transport.take(message))
            self._handed.add(message.microbatch)

    def _send(self, action: Action) -> None:
        assert self._transport is not None
        message = self._step.message(self._rank, action)
        if message.channel is Channel.HAND_OVER:
            buffer = self._ends.hand_over(action.microbatch).contiguous()
        else:
            buffer = self._outgoing.pop(message)
        self._transport.send(action, message, buffer)

    def _receive(self, action: Action) -> None:
        assert self._transport is not None
        message, stage = self._step.message(self._rank, action), self._stages[action.chunk]
        if message.channel is Channel.HAND_OVER:
            buffer = self._ends.hand_over_like(action.microbatch, stage.dtype)
        else:
            size = self._ends.size(self._step.by_name[action.pass_name], action.microbatch)
            count = stage.payload_shapes(*size).numel
            buffer = torch.empty(count, dtype=stage.dtype, device=self._mesh.device)
        self._transport.post_receive(action, message, buffer)


def _run_backward(graph: _Graph, gradient: Payload | None) -> None:
    if isinstance(graph.left, Payload):
        assert gradient is not None
        graph.left.backward(gradient)
    else:
        graph.left.backward()
    # The graph goes now; only what entered is still needed, for its gradient.
    del graph.left
