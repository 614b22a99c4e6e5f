"""A schedule is data: for each pipeline rank an ordered list of actions.

Words. A *rank* owns ``chunks`` slices of the model; the slices in the order a microbatch visits
them are the *stages*. A *trip* is one pass of one microbatch. A rank does the actions of its list
one after the other:

    FORWARD, BACKWARD, INPUT_BACKWARD, WEIGHT_BACKWARD   compute, once its inputs are there
    SEND                                                 wait until the peer has posted the receive
    RECEIVE                                              post the receive; waits for nothing

Stages on one rank pass their results on without a message. Messages of one channel from one rank
to another form a *link*; on a link the n-th send meets the n-th receive, whatever they carry.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from functools import cached_property

from soar_mega.passes import Pass


class Kind(StrEnum):
    """What an action does. BACKWARD is both halves at once: input and weight gradients."""

    FORWARD = "forward"
    BACKWARD = "backward"
    INPUT_BACKWARD = "input_backward"
    WEIGHT_BACKWARD = "weight_backward"
    SEND = "send"
    RECEIVE = "receive"


COMPUTE = frozenset({Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_BACKWARD, Kind.WEIGHT_BACKWARD})
# What takes the gradient of a stage's output and makes that of its input.
TAKES_GRADIENT = frozenset({Kind.BACKWARD, Kind.INPUT_BACKWARD})
# What lets go of the activations a forward with gradient has kept.
RELEASES = frozenset({Kind.BACKWARD, Kind.WEIGHT_BACKWARD})


class Channel(StrEnum):
    """What a message carries; each has its process groups to itself."""

    ACTIVATION = "activation"
    GRADIENT = "gradient"
    HAND_OVER = "hand_over"


@dataclass(frozen=True, slots=True)
class Action:
    """One entry of a rank's list.

    Attributes:
        kind: What to do.
        pass_name: Name of the pass. A hand-over is named after the last pass it waits for.
        microbatch: Index of the microbatch in the step.
        chunk: Which of the rank's chunks computes, made what is sent or will use what is received.
        channel: Of SEND and RECEIVE.
        peer: The other rank, of SEND and RECEIVE.
    """

    kind: Kind
    pass_name: str
    microbatch: int
    chunk: int = 0
    channel: Channel | None = None
    peer: int | None = None

    def __str__(self) -> str:
        text = f"{self.kind} {self.pass_name} of microbatch {self.microbatch}, chunk {self.chunk}"
        if self.channel is None:
            return text
        return f"{text} ({self.channel} {'to' if self.kind is Kind.SEND else 'from'} {self.peer})"


@dataclass(frozen=True, slots=True)
class Message:
    """What a send and its receive must agree on."""

    channel: Channel
    pass_name: str
    microbatch: int
    source_stage: int


@dataclass(frozen=True)
class Placement:
    """Which rank owns which stage.

    Attributes:
        ranks: P, pipeline ranks.
        chunks: v, chunks of a rank.
        folded: False: stage s is on rank s % P. True (two chunks): a V, down the ranks and back up,
            so that the first and the last stage share rank 0.
    """

    ranks: int
    chunks: int = 1
    folded: bool = False

    @property
    def stages(self) -> int:
        return self.ranks * self.chunks

    @property
    def last_stage(self) -> int:
        return self.stages - 1

    def stage(self, rank: int, chunk: int) -> int:
        """Stage number of a rank's chunk."""
        if self.folded and chunk == 1:
            return 2 * self.ranks - 1 - rank
        return chunk * self.ranks + rank

    def rank(self, stage: int) -> int:
        """Rank that owns a stage."""
        if self.folded and stage >= self.ranks:
            return 2 * self.ranks - 1 - stage
        return stage % self.ranks

    def chunk(self, stage: int) -> int:
        """Which of its rank's chunks a stage is."""
        return stage // self.ranks


@dataclass(frozen=True)
class Step:
    """What a schedule has to get done: the passes of each microbatch over placed stages.

    Attributes:
        placement: Which rank owns which stage.
        passes: As the objective declares them; the first waits for nothing. All passes that wait
            for others wait for the same ones.
        microbatches: M, microbatches of the step on this data-parallel rank.
    """

    placement: Placement
    passes: tuple[Pass, ...]
    microbatches: int

    def __post_init__(self) -> None:
        names = [p.name for p in self.passes]
        if self.microbatches < 1 or self.placement.ranks < 1 or self.placement.chunks < 1:
            raise ValueError(
                f"a step of {self.microbatches} microbatches on {self.placement.ranks} ranks of "
                f"{self.placement.chunks} chunks: all three must be at least 1"
            )
        if not names or len(set(names)) < len(names):
            raise ValueError(f"passes {names}: at least one is needed and names must be unique")
        if self.passes[0].after:
            raise ValueError(f"the first pass, {names[0]}, must wait for none")
        waited = {p.after for p in self.passes if p.after}
        if len(waited) > 1 or any(self.by_name[name].after for name in self.awaited if name):
            raise ValueError(
                f"passes wait for {sorted(waited)}: there is one hand-over a microbatch, so all "
                "that wait must wait for the same passes, which wait for none"
            )

    @cached_property
    def by_name(self) -> dict[str, Pass]:
        """Passes by name."""
        return {p.name: p for p in self.passes}

    @cached_property
    def awaited(self) -> tuple[str, ...]:
        """The passes that must have left the last stage before the hand-over; empty: no such."""
        awaited = next((p.after for p in self.passes if p.after), ())
        unknown = [name for name in awaited if name not in self.by_name]
        if unknown:
            raise ValueError(f"passes wait for {unknown}, which the objective does not declare")
        return awaited

    def needs(self, rank: int, action: Action) -> Message | None:
        """What a compute action takes from another stage, on the same rank or not."""
        stage, place = self.placement.stage(rank, action.chunk), self.placement
        name, microbatch = action.pass_name, action.microbatch
        if action.kind is Kind.FORWARD:
            if stage > 0:
                return Message(Channel.ACTIVATION, name, microbatch, stage - 1)
            if self.by_name[name].after:
                return self.hand_over(microbatch)
        if action.kind in TAKES_GRADIENT and stage < place.last_stage:
            return Message(Channel.GRADIENT, name, microbatch, stage + 1)
        return None

    def makes(self, rank: int, action: Action) -> Message | None:
        """What a compute action gives to another stage, hand-overs apart."""
        stage, name, microbatch = (
            self.placement.stage(rank, action.chunk),
            action.pass_name,
            action.microbatch,
        )
        if action.kind is Kind.FORWARD and stage < self.placement.last_stage:
            return Message(Channel.ACTIVATION, name, microbatch, stage)
        if action.kind in TAKES_GRADIENT and stage > 0:
            return Message(Channel.GRADIENT, name, microbatch, stage)
        return None

    def hand_over(self, microbatch: int) -> Message:
        """The message from the last stage to the first."""
        return Message(Channel.HAND_OVER, self.awaited[-1], microbatch, self.placement.last_stage)

    def target(self, message: Message) -> int:
        """The stage a message is for."""
        if message.channel is Channel.HAND_OVER:
            return 0
        return message.source_stage + (1 if message.channel is Channel.ACTIVATION else -1)

    def message(self, rank: int, action: Action) -> Message:
        """What a SEND or RECEIVE of a rank carries."""
        assert action.channel is not None
        stage = self.placement.stage(rank, action.chunk)
        if action.kind is Kind.RECEIVE:
            stage = {
                Channel.ACTIVATION: stage - 1,
                Channel.GRADIENT: stage + 1,
                Channel.HAND_OVER: self.placement.last_stage,
            }[action.channel]
        return Message(action.channel, action.pass_name, action.microbatch, stage)


@dataclass(frozen=True)
class Schedule:
    """Who does what in which order.

    Attributes:
        name: As in ``parallel.pipeline_schedule``.
        step: What is to be done.
        actions: One list per rank.
        live_bound: Most microbatches with kept activations that any rank may hold at a time; a
            chunk counts 1 / v.
    """

    name: str
    step: Step
    actions: tuple[tuple[Action, ...], ...]
    live_bound: Fraction
