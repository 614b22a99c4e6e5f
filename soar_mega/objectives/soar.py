"""SOAR: flow matching, one guided sampling step without gradient, and the way back from there.

Passes of a microbatch, in an order one process can run:

    base            with gradient: flow matching's own
    rollout_cond    without; only if the base output is not reused
    rollout         without: the empty prompt; only if the guidance scale is not 1
    aux0, aux1 ...  with gradient: ``aux_group_size`` auxiliary states each, path by path

``aux_states`` other than ``rollout`` are the controls of an experiment: as many states and losses,
but no rollout, and aux passes that wait for nothing. ``ideal`` puts z_sigma1 in the place of the
rolled-out state; ``independent`` draws timestep and noise of every state (SFT with 1 + K draws).

Both ends of a pipeline begin from the same microbatch: they hold the same z0, z1 and coefficients.
The last stage combines the guided velocity in the working precision, rounds it to the dtype of the
model output and hands it over; both ends go on from those bits, so no state or noise is ever sent.
Auxiliary states and targets are made group by group, never all at once.

Legend: B samples, M paths, N states a path, K = M N, S states of a pass, C/H/W latent channels,
height, width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from soar_mega import rng
from soar_mega.objectives.flow_matching import FlowMatching, FlowState
from soar_mega.objectives.rollout import (
    aux_sigma,
    euler_step,
    guided_velocity,
    noisy_step,
    renoise_share,
)
from soar_mega.objectives.settings import (
    TRAIN_TIMESTEPS,
    SoarSettings,
    check_soar,
    has_aux_terms,
)
from soar_mega.objectives.sigmas import loss_weight
from soar_mega.passes import LossTerms, MicroBatch, ModelInput, Pass, TextCondition
from soar_mega.rng import Purpose


@dataclass
class SoarState(FlowState):
    """One microbatch on its way through SOAR.

    Attributes:
        euler_3B: Rows keep - 1, push, shake of path 0.
        noisy_3B: The same of every other path.
        sigma_KB: Sigma of each auxiliary state, path-major.
        share_KB: a of each.
        aux_weight_KB: w(sigma) of each.
        aux_counted_KB: bool, False for placeholders and for noisy paths where t1 = 0.
        halves: Velocities waiting to be combined, by pass name.
        guided_BCHW: The guided velocity in the model output's dtype, once known.
        path: The path in ``away_BCHW``.
        away_BCHW: z_r - z0 of that path.
        aux_term_SB: Loss terms of each auxiliary pass, by its first state, fp64.
    """

    euler_3B: Tensor = field(kw_only=True)
    noisy_3B: Tensor = field(kw_only=True)
    sigma_KB: Tensor = field(kw_only=True)
    share_KB: Tensor = field(kw_only=True)
    aux_weight_KB: Tensor = field(kw_only=True)
    aux_counted_KB: Tensor = field(kw_only=True)
    halves: dict[str, Tensor] = field(default_factory=dict)
    guided_BCHW: Tensor | None = None
    path: int = -1
    away_BCHW: Tensor | None = None
    aux_term_SB: dict[int, Tensor] = field(default_factory=dict)


class Soar(FlowMatching):
    """SOAR of a microbatch; implements ``passes.Objective``.

    Without auxiliary terms (``lambda_aux`` = 0 or ``trajectory_length`` = 0) SOAR is flow matching:
    ``make_objective`` then gives that, and this class refuses.

    Args:
        config: The settings, by attribute.
        shift: Shift of the sigma schedule.
        seed: Run seed; every draw hangs on it.
        dtype: Working precision of sigmas, states, targets and losses.

    Raises:
        ValueError: A setting is outside its range.
    """

    config: SoarSettings

    def __init__(
        self,
        config: SoarSettings,
        *,
        shift: float,
        seed: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(config, shift=shift, seed=seed, dtype=dtype)
        check_soar(config)
        if not has_aux_terms(config):
            raise ValueError(
                f"lambda_aux = {config.lambda_aux} and trajectory_length = "
                f"{config.trajectory_length} leave no auxiliary term: use FlowMatching"
            )
        self.num_states = config.num_rollout_paths * config.trajectory_length
        self._passes = self._build_passes()

    def passes(self) -> tuple[Pass, ...]:
        """Base, the rollout's, then the auxiliary groups, which wait for all of those."""
        return self._passes

    def _build_passes(self) -> tuple[Pass, ...]:
        config = self.config
        before: list[Pass] = [self.base]
        after: tuple[str, ...] = ()
        if config.aux_states == "rollout":
            if not config.reuse_base_forward:
                before.append(Pass("rollout_cond", "rollout", grad=False))
            if config.cfg_scale_sampling != 1:
                before.append(Pass("rollout", "rollout", grad=False))
            after = tuple(p.name for p in before)
        groups = range(0, self.num_states, config.aux_group_size)
        return (
            *before,
            *(
                Pass(
                    f"aux{j}",
                    "aux",
                    grad=True,
                    after=after,
                    states=min(config.aux_group_size, self.num_states - first),
                    first=first,
                )
                for j, first in enumerate(groups)
            ),
        )

    def begin(self, micro: MicroBatch) -> SoarState:
        """Draw what the microbatch needs, the rollout's noise apart; no text is touched."""
        config, grid = self.config, self.grid
        t0_B = self.draw_t0(micro.step, micro.slots_B)
        t1_B = self._t1(t0_B)
        sigma0_B, sigma1_B = grid.sigma(t0_B), grid.sigma(t1_B)
        euler = euler_step(sigma0_B, sigma1_B)
        noisy = noisy_step(
            config.sde_rollout_type,
            sigma0_B,
            sigma1_B,
            config.sde_noise_scale,
            float(grid.table[1]),
        )
        sigma_KB = grid.round(self._aux_sigmas(micro, sigma0_B, sigma1_B))
        numbers = self._to_device(
            [
                torch.stack([euler.keep_less_one, euler.push, euler.shake]),
                torch.stack([noisy.keep_less_one, noisy.push, noisy.shake]),
                sigma_KB,
                renoise_share(sigma_KB, sigma1_B),
                loss_weight(config.weighting_scheme, sigma_KB, config.min_aux_sigma),
                self._live_paths(t1_B),
            ],
            micro.clean_BCHW.device,
        )
        base = self._base_fields(micro, sigma0_B)
        return SoarState(
            **base,
            euler_3B=numbers[0],
            noisy_3B=numbers[1],
            sigma_KB=numbers[2],
            share_KB=numbers[3],
            aux_weight_KB=numbers[4],
            aux_counted_KB=(numbers[5] > 0) & base["counted_B"],
        )

    def count(self, micro: MicroBatch) -> Tensor:
        """``[base terms, auxiliary terms]``, fp64."""
        t1_B = self._t1(self.draw_t0(micro.step, micro.slots_B))
        live_KB = self._live_paths(t1_B).to(micro.weight_B.device, non_blocking=True)
        counted_B = micro.weight_B > 0
        aux = ((live_KB > 0) & counted_B).sum(dtype=torch.float64)
        return torch.stack([counted_B.sum(dtype=torch.float64), aux])

    def normaliser(self, counts: Tensor) -> Tensor:
        """Base terms + lambda_aux * auxiliary terms, or 1 if there are none; working precision."""
        return self._nonzero(counts[0] + self.config.lambda_aux * counts[1])

    def make_input(self, p: Pass, state: FlowState) -> ModelInput:
        """The base state (with the prompt or the empty prompt), or the pass's auxiliary states."""
        assert isinstance(state, SoarState)
        if p.kind == "aux":
            states = slice(p.first, p.first + p.states)
            latent_SBCHW = state.clean_BCHW + self._away(p, state)
            timestep_SB = TRAIN_TIMESTEPS * state.sigma_KB[states]
            condition = self._condition(state).repeat(p.states)
            return ModelInput(latent_SBCHW.flatten(0, 1), timestep_SB.flatten(), condition)
        given = super().make_input(p, state)
        if p.name != "rollout":
            return given
        batch, empty = len(state.sigma_B), state.micro.empty
        condition = TextCondition(
            empty.text_BTE.expand(batch, -1, -1), empty.pooled_BV.expand(batch, -1)
        )
        return ModelInput(given.latent_BCHW, given.timestep_B, condition)

    def take_output(
        self, p: Pass, state: FlowState, velocity_BCHW: Tensor, normaliser: Tensor
    ) -> Tensor | None:
        """The loss of a pass with gradient; a rollout's half of the guided velocity is kept."""
        assert isinstance(state, SoarState)
        if p.kind == "rollout":
            self._combine(p.name, state, velocity_BCHW)
            return None
        if p.kind == "base":
            if self.config.aux_states == "rollout" and self.config.reuse_base_forward:
                self._combine("base", state, velocity_BCHW)
            return super().take_output(p, state, velocity_BCHW, normaliser)
        states = slice(p.first, p.first + p.states)
        target_SBCHW = self._away(p, state) / state.sigma_KB[states, :, None, None, None]
        velocity_SBCHW = velocity_BCHW.unflatten(0, (p.states, -1))
        term_SB = self._terms(
            velocity_SBCHW, target_SBCHW, state.aux_weight_KB[states], state.aux_counted_KB[states]
        )
        state.aux_term_SB[p.first] = term_SB.detach().double()
        return self.config.lambda_aux * term_SB.sum() / normaliser

    def hand_over(self, state: SoarState) -> Tensor:
        """The guided velocity, (B, C, H, W) in the model output's dtype."""
        if state.guided_BCHW is None:
            raise RuntimeError("the guided velocity was asked for before the rollout was done")
        return state.guided_BCHW

    def receive(self, state: SoarState, guided_BCHW: Tensor) -> None:
        """Take the guided velocity in the dtype it was handed over in."""
        state.guided_BCHW = guided_BCHW

    def terms(self, state: FlowState) -> LossTerms:
        """Base and auxiliary terms, the latter path by path."""
        assert isinstance(state, SoarState)
        base = super().terms(state)
        if sum(len(term) for term in state.aux_term_SB.values()) != self.num_states:
            raise RuntimeError("the loss terms were asked for before every auxiliary pass was done")
        aux_KB = torch.cat([state.aux_term_SB[first] for first in sorted(state.aux_term_SB)])
        counted_KB = state.aux_counted_KB.double()
        return LossTerms(base.base_B, aux_KB, base.base_counted_B, counted_KB, base.sigma_B)

    def _t1(self, t0_B: Tensor) -> Tensor:
        return (t0_B - 1 / self.config.num_sampling_steps).clamp_min(0)

    def _live_paths(self, t1_B: Tensor) -> Tensor:
        """(K, B) fp64: 1, but 0 for the noisy paths of a sample with t1 = 0."""
        if self.config.aux_states != "rollout":
            return torch.ones(self.num_states, len(t1_B), dtype=torch.float64, device=t1_B.device)
        live_MB = (t1_B > 0).double().repeat(self.config.num_rollout_paths, 1)
        live_MB[0] = 1
        return live_MB.repeat_interleave(self.config.trajectory_length, 0)

    def _aux_sigmas(self, micro: MicroBatch, sigma0_B: Tensor, sigma1_B: Tensor) -> Tensor:
        """(K, B) fp64, all drawn at once."""
        config, slots_B = self.config, micro.slots_B
        if config.aux_states == "independent":
            draws = range(1, self.num_states + 1)  # draw 0 is the base state's
            t_KB = torch.stack([self.draw_t0(micro.step, slots_B, draw) for draw in draws])
            return self.grid.sigma(t_KB)
        state_K = torch.arange(self.num_states, device=slots_B.device)
        state_KB = state_K.repeat_interleave(len(slots_B))
        draw = rng.uniform(
            self.seed,
            Purpose.AUX_SIGMA,
            micro.step,
            slots_B.repeat(self.num_states),
            1,
            path=state_KB // config.trajectory_length,
            index=state_KB % config.trajectory_length,
        )
        draw_KB = draw.view(self.num_states, -1).double()
        return aux_sigma(
            draw_KB, sigma0_B, sigma1_B, config.min_aux_sigma, config.sigma_upper_ratio
        )

    def _combine(self, name: str, state: SoarState, velocity_BCHW: Tensor) -> None:
        """Keep a half of the guided velocity, or make it and drop the halves."""
        conditional = "base" if self.config.reuse_base_forward else "rollout_cond"
        velocity_BCHW = velocity_BCHW.detach()
        if self.config.cfg_scale_sampling == 1:
            state.guided_BCHW = velocity_BCHW
            return
        state.halves[name] = velocity_BCHW
        if len(state.halves) == 2:
            guided_BCHW = guided_velocity(
                state.halves[conditional].to(self.dtype),
                state.halves["rollout"].to(self.dtype),
                self.config.cfg_scale_sampling,
            )
            state.guided_BCHW = guided_BCHW.to(velocity_BCHW.dtype)
            state.halves.clear()

    def _away(self, p: Pass, state: SoarState) -> Tensor:
        """z_k - z0 of the states of an auxiliary pass, (S, B, C, H, W)."""
        if self.config.aux_states != "rollout":
            return torch.stack([self._ideal(k, state) for k in range(p.first, p.first + p.states)])
        reach_BCHW = state.noise_BCHW - state.clean_BCHW
        away = []
        for k in range(p.first, p.first + p.states):
            share_B111 = state.share_KB[k].view(-1, 1, 1, 1)
            rolled_BCHW = self._roll(k // self.config.trajectory_length, state)
            away.append((1 - share_B111) * rolled_BCHW + share_B111 * reach_BCHW)
        return torch.stack(away)

    def _ideal(self, k: int, state: SoarState) -> Tensor:
        """sigma_k (z1 - z0), with the base state's z1 or one of state k's own."""
        noise_BCHW = state.noise_BCHW
        if self.config.aux_states == "independent":
            noise_BCHW = self.draw_noise(state.micro, k + 1)
        return state.sigma_KB[k].view(-1, 1, 1, 1) * (noise_BCHW - state.clean_BCHW)

    def _roll(self, path: int, state: SoarState) -> Tensor:
        """z_r - z0 of a path; the latest one is kept, for the other states of the path."""
        if state.path == path and state.away_BCHW is not None:
            return state.away_BCHW
        guided_BCHW = self.hand_over(state).to(self.dtype)
        less, push, shake = (state.noisy_3B if path else state.euler_3B)[..., None, None, None]
        sigma0_B111 = state.sigma_B.view(-1, 1, 1, 1)
        reach_BCHW = state.noise_BCHW - state.clean_BCHW
        away_BCHW = less * state.clean_BCHW + (1 + less) * sigma0_B111 * reach_BCHW
        away_BCHW = away_BCHW + push * guided_BCHW
        if path:
            micro, numel = state.micro, guided_BCHW[0].numel()
            eps = rng.normal(
                self.seed,
                Purpose.ROLLOUT_NOISE,
                micro.step,
                micro.slots_B,
                numel,
                path=path,
                device=guided_BCHW.device,
            )
            away_BCHW = away_BCHW + shake * eps.view_as(guided_BCHW).to(self.dtype)
        state.path, state.away_BCHW = path, away_BCHW
        return away_BCHW
