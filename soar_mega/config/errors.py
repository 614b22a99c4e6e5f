"""Turning what is wrong with a configuration into one message a person can act on."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import ValidationError

from soar_mega.config.describe import section_models
from soar_mega.config.section import Section

# Where each value came from, by its path in the configuration.
Origins = Mapping[tuple[str, ...], str]


class ConfigError(Exception):
    """A setting is wrong; the message names it, its value, the rule and the fix."""


def explain(error: ValidationError, values: Mapping[str, Any], origins: Origins) -> ConfigError:
    """One error for everything pydantic found wrong.

    Args:
        error: What validation raised.
        values: The merged configuration that was validated.
        origins: Path of a value -> where it came from.
    """
    lines = [_line(problem, values, origins) for problem in error.errors(include_url=False)]
    lines = list(dict.fromkeys(lines))  # the members of a union repeat themselves
    if len(lines) == 1:
        return ConfigError(lines[0])
    return ConfigError(f"{len(lines)} settings are wrong:\n" + "\n".join(f"- {x}" for x in lines))


def _line(problem: Any, values: Mapping[str, Any], origins: Origins) -> str:
    path = _path(problem["loc"])
    key = ".".join(path)
    kind = problem["type"]
    if kind == "rule":
        context = problem["ctx"]
        where = [f"{k}: {_origin(tuple(k.split('.')), origins)}" for k in context["keys"]]
        return f"{context['message']} ({'; '.join(where)})"
    origin = _origin(path, origins)
    if kind == "extra_forbidden":
        return f"unknown key {key} (from {origin}); {_nearest(path, values)}"
    if kind == "missing":
        return f"{key} is required: {_meaning(path)} Give it in the file or as {_example(path)}"
    if kind == "union_tag_not_found":
        return f"{key}.name is required; use one of {', '.join(_objective_names())}"
    if kind == "union_tag_invalid":
        names = _objective_names()
        value = values["objective"]["name"]
        origin = _origin((*path, "name"), origins)
        return f"{key}.name = {_show(value)} must be one of {', '.join(names)} (from {origin})" + (
            _did_you_mean(str(value), names)
        )
    rule = str(problem["msg"]).replace("Input should be", "must be")
    rule = rule[0].lower() + rule[1:]
    hint = ""
    if kind == "literal_error":
        choices = [part.strip("'") for part in _choices(path, values)]
        hint = _did_you_mean(str(problem["input"]), choices)
    elif kind == "string_type" and isinstance(problem["input"], bool | int | float):
        hint = f"; write it in double quotes to make it a text, on a command line {key}='\"...\"'"
    return f"{key} = {_show(problem['input'])}: {rule} (from {origin}){hint}"


def _path(loc: tuple[int | str, ...]) -> tuple[str, ...]:
    """The place of a problem as section and key: without union members and list positions."""
    path = [part for part in loc if isinstance(part, str)]
    if path and path[0] == "objective" and len(path) > 1 and path[1] in _objective_names():
        del path[1]
    return tuple(path[:2])


def _origin(path: tuple[str, ...], origins: Origins) -> str:
    for length in range(len(path), 0, -1):
        if path[:length] in origins:
            return origins[path[:length]]
    inner = [where for place, where in origins.items() if place[: len(path)] == path]
    return inner[0] if inner else "the default"


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _objective_names() -> list[str]:
    return [_tag(model) for model in section_models()["objective"]]


def _tag(model: type[Section]) -> str:
    return str(get_args(model.model_fields["name"].annotation)[0])


def _model(section: str, values: Mapping[str, Any]) -> type[Section]:
    """The model that checks this section, given the objective's name."""
    models = section_models()[section]
    chosen = values.get(section)
    name = chosen.get("name") if isinstance(chosen, Mapping) else None
    return next((m for m in models if len(models) > 1 and _tag(m) == name), models[0])


def _choices(path: tuple[str, ...], values: Mapping[str, Any]) -> list[str]:
    field = _model(path[0], values).model_fields[path[1]]
    return [str(choice) for choice in get_args(field.annotation)]


def _did_you_mean(word: str, candidates: list[str]) -> str:
    close = difflib.get_close_matches(word, candidates, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _nearest(path: tuple[str, ...], values: Mapping[str, Any]) -> str:
    """What an unknown key was probably meant to be."""
    sections = section_models()
    if len(path) == 1:
        close = difflib.get_close_matches(path[0], sections, n=1, cutoff=0.5)
        homes = [f"{s}.{path[0]}" for s, ms in sections.items() if path[0] in _keys(ms)]
        found = homes or close
        hint = f"did you mean {found[0]}? " if found else ""
        return f"{hint}the sections are {', '.join(sections)}"
    section, key = path
    for model in sections[section]:
        if key in model.model_fields:
            name = _tag(_model(section, values))
            return f"{key} belongs to objective.name = {_tag(model)}, but objective.name = {name}"
    own = list(_model(section, values).model_fields)
    homes = [f"{s}.{key}" for s, ms in sections.items() if key in _keys(ms)]
    near = difflib.get_close_matches(key, own, n=1, cutoff=0.5)
    if homes:
        return f"did you mean {homes[0]}?"
    if near:
        return f"did you mean {section}.{near[0]}?"
    everywhere = {k: f"{s}.{k}" for s, ms in sections.items() for k in _keys(ms)}
    far = difflib.get_close_matches(key, everywhere, n=1, cutoff=0.6)
    return f"did you mean {everywhere[far[0]]}?" if far else f"{section} has {', '.join(own)}"


def _keys(models: list[type[Section]]) -> list[str]:
    return list(dict.fromkeys(key for model in models for key in model.model_fields))


def _meaning(path: tuple[str, ...]) -> str:
    if len(path) == 1:
        keys = _keys(section_models()[path[0]])
        return f"a section with the keys {', '.join(keys)}."
    models = section_models()[path[0]]
    return str(models[0].model_fields[path[1]].description)


def _example(path: tuple[str, ...]) -> str:
    return f"{'.'.join(path)}=VALUE" if len(path) > 1 else f"{path[0]}.KEY=VALUE"
