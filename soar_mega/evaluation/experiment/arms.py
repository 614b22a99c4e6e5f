"""What is compared: the arms of the experiment, how they are sampled, and what counts.

Every arm continues from the same base on the same curated pages, with one seed per repetition: of
the order of pages, the noise and the timesteps. Arms with the same seed see the same pages in the
same order with the same base noise, so differences are taken seed by seed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

NUM_SAMPLING_STEPS = 10  # K, of the rollout and of the sampler that is judged
GUIDANCE = 3.0  # of both
STEPS = 100  # of every arm at equal steps
SEEDS = 5


@dataclass(frozen=True)
class Sampling:
    """One way to draw: sampler steps and guidance."""

    name: str
    steps: int
    guidance: float


SAMPLINGS = (
    Sampling("guided", NUM_SAMPLING_STEPS, GUIDANCE),
    Sampling("unguided", NUM_SAMPLING_STEPS, 1.0),
    Sampling("few_steps", 4, GUIDANCE),
    Sampling("many_steps", 30, GUIDANCE),
)


@dataclass(frozen=True)
class Arm:
    """One way to continue from the base.

    Attributes:
        name: Folder and column.
        title: In tables and plots.
        config: File in ``configs/``.
        forwards: Forward passes a sample costs, a backward counting two.
        overrides: ``section.key=value``.
        steps: Training steps.
        drawn: Names of the ways to draw it, ``PRIMARY``'s among them.
    """

    name: str
    title: str
    config: str
    forwards: int
    overrides: tuple[str, ...] = ()
    steps: int = STEPS
    drawn: tuple[str, ...] = tuple(sampling.name for sampling in SAMPLINGS)

    def longer(self, factor: float) -> Arm:
        """The same with ``factor`` times as many steps, at least one."""
        return replace(self, steps=max(round(self.steps * factor), 1))


# Decided before the comparison was run: the benchmark's overall score, drawn as the rollout is.
PRIMARY = ("guided", "handwriting/correct")

SFT = Arm("sft", "SFT", "handwriting_sft.yaml", 3)
SOAR = Arm("soar", "SOAR", "handwriting_soar.yaml", 22)
INDEPENDENT = Arm(
    "independent",
    "SFT, 7 draws",
    "handwriting_soar.yaml",
    21,
    ("objective.aux_states=independent",),
)
IDEAL = Arm(
    "ideal", "SOAR, ideal states", "handwriting_soar.yaml", 21, ("objective.aux_states=ideal",)
)
EQUAL_COMPUTE = Arm(
    "sft_compute",
    "SFT, SOAR's compute",
    "handwriting_sft.yaml",
    3,
    steps=round(STEPS * SOAR.forwards / SFT.forwards),
)
MAIN = (SFT, SOAR, INDEPENDENT, IDEAL, EQUAL_COMPUTE)
EXPOSED = (SFT, SOAR, INDEPENDENT)  # whose exposure bias is drawn; the first is compared with


def _soar(
    name: str, title: str, forwards: int, *overrides: str, drawn: tuple[str, ...] = (PRIMARY[0],)
) -> Arm:
    settings = tuple(f"objective.{setting}" for setting in overrides)
    return Arm(name, title, SOAR.config, forwards, settings, drawn=drawn)


# Drawn as the main comparison is decided, and as their own rollouts are where that is another way.
ABLATIONS = (
    _soar("lambda_03", "lambda 0.3", 22, "lambda_aux=0.3"),
    _soar("lambda_3", "lambda 3", 22, "lambda_aux=3.0"),
    _soar("n_1", "N = 1", 7, "trajectory_length=1", "aux_group_size=1"),
    _soar("n_3", "N = 3", 13, "trajectory_length=3", "aux_group_size=3"),
    # Of large steps many end at sigma 0, from where targets divide by sigmas near 0.
    _soar("k_5", "K = 5", 22, "num_sampling_steps=5", "min_aux_sigma=0.1"),
    _soar("k_30", "K = 30", 22, "num_sampling_steps=30", drawn=(PRIMARY[0], "many_steps")),
    _soar(
        "guidance_1",
        "rollout unguided",
        21,
        "cfg_scale_sampling=1.0",
        drawn=(PRIMARY[0], "unguided"),
    ),
    _soar("guidance_6", "rollout guidance 6", 22, "cfg_scale_sampling=6.0"),
    _soar("paths_2_sde", "2 paths, sde", 22, "num_rollout_paths=2", "trajectory_length=3"),
    _soar(
        "paths_2_cps",
        "2 paths, cps",
        22,
        "num_rollout_paths=2",
        "trajectory_length=3",
        "sde_rollout_type=cps",
    ),
    _soar("no_reuse", "base forward not reused", 23, "reuse_base_forward=false"),
)
