"""The reference of all configuration keys as text, for ``--help`` and the documentation."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from soar_mega.config.objective import FlowMatchingConfig, SoarConfig
from soar_mega.config.schema import Config
from soar_mega.config.section import Section


def section_models() -> dict[str, list[type[Section]]]:
    """The models of each section: one, or one per ``objective.name``."""
    models: dict[str, list[type[Section]]] = {}
    for name, field in Config.model_fields.items():
        kind = field.annotation
        models[name] = (
            [kind]
            if isinstance(kind, type) and issubclass(kind, Section)
            else [FlowMatchingConfig, SoarConfig]
        )
    return models


def describe_keys() -> str:
    """Every key with its default, choices or range, and meaning; one line a key."""
    lines: list[str] = []
    for section, models in section_models().items():
        lines.append(f"{section}: {Config.model_fields[section].description}")
        seen: set[str] = set()
        for model in models:
            extra = f"[{_tag(model)}] " if len(models) > 1 and seen else ""
            for key, field in model.model_fields.items():
                if key not in seen:
                    lines.append(f"  {section}.{key} ({_default(models, key)}{_allowed(field)}): ")
                    lines[-1] += f"{extra}{field.description}"
            seen |= set(model.model_fields)
    return "\n".join(lines)


def _tag(model: type[Section]) -> str:
    return str(get_args(model.model_fields["name"].annotation)[0])


def _default(models: list[type[Section]], key: str) -> str:
    if len(models) > 1 and key == "name":
        return "required; " + " | ".join(_tag(model) for model in models)
    field = next(model.model_fields[key] for model in models if key in model.model_fields)
    if field.is_required():
        return "required"
    value = field.default
    shown: dict[Any, str] = {None: "null", True: "true", False: "false", (): "[]"}
    text = shown[value] if value is None or isinstance(value, bool | tuple) else str(value)
    return f"default {text}"


def _allowed(field: FieldInfo) -> str:
    # The type itself, or what may be null.
    for kind in (field.annotation, *get_args(field.annotation)):
        if get_origin(kind) is Literal and len(get_args(kind)) > 1:
            return "; " + " | ".join(map(str, get_args(kind)))
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = [
        f"{sign} {getattr(rule, name):.6g}"
        for rule in field.metadata
        if isinstance(rule, annotated_types.BaseMetadata)
        for name, sign in signs.items()
        if getattr(rule, name, None) is not None
    ]
    return "; " + ", ".join(limits) if limits else ""
