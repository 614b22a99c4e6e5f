"""The ways to compute a step, how they are written, and those measured where nothing is said."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args, get_type_hints

from soar_mega.config import ConfigError

_SWITCH = {"on": True, "true": True, "off": False, "false": False}


@dataclass(frozen=True)
class Variant:
    """One way to compute the step; written ``key=value,key=value`` with these keys.

    Attributes:
        side: ``ours``, or the ``reference`` on diffusers' model.
        backend: ``torch`` or ``te`` (Transformer Engine).
        fp8_recipe: Of Transformer Engine; ``none`` computes in the load's dtype.
        compile: Whether the blocks are compiled.
        activation_checkpointing: The reference has ``none``, or diffusers' own as ``full``.
        aux_group_size: Auxiliary states that run as one pass (SOAR).
        micro_batch_size: Samples a step; 0 where the command line says it.
    """

    side: Literal["ours", "reference"] = "ours"
    backend: Literal["torch", "te"] = "torch"
    fp8_recipe: Literal["none", "current", "block", "delayed", "mxfp8"] = "none"
    compile: bool = False
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    aux_group_size: int = 1
    micro_batch_size: int = 0

    @property
    def label(self) -> str:
        """For people; the microbatch, which heads each table, is left out."""
        recompute = self.activation_checkpointing
        if self.side == "reference":
            return "reference" + (", no checkpointing" if recompute == "none" else "")
        words = ["torch" if self.backend == "torch" else "TE"]
        words += [f"fp8 {self.fp8_recipe}"] * (self.fp8_recipe != "none")
        words += ["compiled"] * self.compile
        words += [f"recompute {recompute}"] * (recompute != "none")
        words += [f"aux by {self.aux_group_size}"] * (self.aux_group_size > 1)
        return ", ".join(words)

    @property
    def spec(self) -> str:
        """What ``parse`` makes this variant of."""
        default = asdict(Variant())
        changed = {k: v for k, v in asdict(self).items() if v != default[k]}
        return ",".join(f"{key}={str(value).lower()}" for key, value in changed.items())


def parse_variant(spec: str) -> Variant:
    """A variant from ``key=value,key=value``; what is left out has its default.

    Raises:
        ConfigError: Names the key, its value and what is allowed.
    """
    hints = get_type_hints(Variant)
    values: dict[str, Any] = {}
    for part in filter(None, spec.split(",")):
        key, equals, text = part.partition("=")
        if not equals or key not in hints:
            raise ConfigError(
                f"--variant {spec}: {part} must be KEY=VALUE with one of the keys "
                f"{', '.join(hints)}"
            )
        values[key] = _value(spec, key, text, hints[key])
    variant = Variant(**values)
    if variant.fp8_recipe != "none" and variant.backend != "te":
        raise ConfigError(
            f"--variant {spec}: fp8_recipe={variant.fp8_recipe} is Transformer Engine's: add "
            "backend=te, or leave it out"
        )
    plain = Variant("reference", micro_batch_size=variant.micro_batch_size)
    if variant.side == "reference" and variant not in (
        plain,
        replace(plain, activation_checkpointing="full"),
    ):
        raise ConfigError(
            f"--variant {spec}: the reference knows activation_checkpointing=none or full, and "
            "micro_batch_size: leave the other keys out"
        )
    return variant


def _value(spec: str, key: str, text: str, hint: Any) -> Any:
    choices = get_args(hint)
    if choices and text in choices:
        return text
    if hint is bool and text in _SWITCH:
        return _SWITCH[text]
    if hint is int and text.isdecimal() and int(text) > 0:
        return int(text)
    allowed = choices or (tuple(_SWITCH) if hint is bool else ("a whole number above 0",))
    raise ConfigError(f"--variant {spec}: {key}={text} must be {' or '.join(allowed)}")


# As published, and without its recomputation.
REFERENCES = (
    Variant("reference", activation_checkpointing="full"),
    Variant("reference"),
)
DEFAULTS = {
    "cpu": (Variant(), Variant(activation_checkpointing="full")),
    "cuda": (
        Variant(),
        Variant(activation_checkpointing="selective"),
        Variant(activation_checkpointing="full"),
        Variant(compile=True),
        Variant(aux_group_size=3),
        Variant(backend="te"),
        Variant(backend="te", fp8_recipe="current"),
        Variant(backend="te", fp8_recipe="block"),
        Variant(backend="te", fp8_recipe="delayed"),
    ),
}
