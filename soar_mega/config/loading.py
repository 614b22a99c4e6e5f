"""Reading configurations: YAML files that inherit, command-line overrides, writing them back.

A file may name others in ``base:`` (a path or a list of paths, relative to the file). They are
merged key by key in order, then the file itself, then the overrides; the later one wins.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from soar_mega.config.errors import ConfigError, explain
from soar_mega.config.schema import Config

OVERRIDE_ORIGIN = "command line override"


class _Loader(yaml.SafeLoader):
    """Safe YAML with ``1e-4`` a number (as in YAML 1.2), no dates, and repeated keys an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Refuse a key that stands twice; the plain loader keeps the last one silently."""
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag != "tag:yaml.org,2002:merge":
                key = self.construct_object(key_node, deep=True)
                line = key_node.start_mark.line + 1
                if not isinstance(key, Hashable):
                    continue  # the parent class has its own message
                if key in seen:
                    message = f"key {key!r} stands twice, in lines {seen[key]} and {line}"
                    raise yaml.constructor.ConstructorError(problem=message)
                seen[key] = line
        return super().construct_mapping(node, deep)


# The mapping is copied first: the resolvers of SafeLoader are shared by everything in the process.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in found if not tag.endswith((":float", ":timestamp"))]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOAT = re.compile(
    r"^[-+]?(?:(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+"
    r"|[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML version would read as something else than a text."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


class _Merged:
    """Values merged so far and where each came from."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.origins: dict[tuple[str, ...], str] = {}

    def put(self, path: tuple[str, ...], value: Any, origin: str) -> None:
        """Set one value; sections on the way are made as needed."""
        place = self.values
        for part in path[:-1]:
            inner = place.get(part)
            if not isinstance(inner, dict):
                inner = place[part] = {}
            place = inner
        place[path[-1]] = value
        self.origins[path] = origin


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        path: YAML file.
        overrides: ``section.key=value`` each; the value is a YAML scalar or a YAML list. A later
            one wins.

    Raises:
        ConfigError: A file cannot be read, a key is unknown, a value breaks its rule. The message
            names the setting, its value, the rule, and the file and line or the override.
    """
    merged = _Merged()
    _read_file(Path(path), merged, ())
    for text in overrides:
        _override(text, merged)
    try:
        return Config.model_validate(merged.values)
    except ValidationError as error:
        raise explain(error, merged.values, merged.origins) from None


def dump_yaml(config: Config) -> str:
    """The whole configuration as YAML; reading it back gives an equal one."""
    values = config.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _read_file(path: Path, merged: _Merged, parents: tuple[Path, ...]) -> None:
    resolved = path.resolve()
    if resolved in parents:
        chain = " -> ".join(p.name for p in (*parents[parents.index(resolved) :], resolved))
        raise ConfigError(f"base: goes in a circle: {chain}; remove one of the base entries")
    values, lines = _parse(path)
    for base in _bases(values.pop("base", None), path):
        _read_file(path.parent / base, merged, (*parents, resolved))
    for section, content in values.items():
        origin = f"{path}, line {lines.get((section,), 1)}"
        if isinstance(content, dict):
            for key, value in content.items():
                where = f"{path}, line {lines.get((section, str(key)), 1)}"
                merged.put((section, str(key)), value, where)
        elif content is not None:  # a section whose keys are all commented out says nothing
            merged.put((section,), content, origin)


def _parse(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """Values of one file, and the line of each key."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"configuration {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration {path} cannot be read: {error}") from None
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        values = {} if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"configuration {path} is not valid YAML: {error}") from None
    finally:
        loader.dispose()
    if not isinstance(values, dict):
        raise ConfigError(f"configuration {path} must be a mapping of sections, but is {values!r}")
    lines: dict[tuple[str, ...], int] = {}
    for key, inner in node.value if node is not None else ():
        lines[(str(key.value),)] = key.start_mark.line + 1
        if isinstance(inner, yaml.MappingNode):
            for sub, _ in inner.value:
                lines[(str(key.value), str(sub.value))] = sub.start_mark.line + 1
    return {str(key): value for key, value in values.items()}, lines


def _bases(value: Any, path: Path) -> list[str]:
    bases = [value] if isinstance(value, str) else ([] if value is None else value)
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(
            f"base = {value!r} in {path} must be a path or a list of paths, relative to that file"
        )
    return bases


def _override(text: str, merged: _Merged) -> None:
    name, equals, value = text.partition("=")
    path = tuple(name.strip().split("."))
    if not equals or len(path) != 2 or not all(path):
        raise ConfigError(
            f"{text!r} is no override; the form is section.key=value, "
            "for example train.max_train_steps=100"
        )
    merged.put(path, _override_value(name, value.strip()), f"{OVERRIDE_ORIGIN} {text}")


def _override_value(name: str, text: str) -> Any:
    try:
        if text[:1] in ("[", '"', "'"):
            return yaml.load(text, Loader=_Loader)
        # A plain scalar, whatever its characters: the * and {} of a glob are no YAML syntax here.
        loader = _Loader("")
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        if tag.endswith((":merge", ":value")):  # << and =, which mean nothing here
            return text
        return loader.construct_object(yaml.ScalarNode(tag, text))
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(
            f"{name} = {text}: not a YAML scalar or list ({OVERRIDE_ORIGIN}): {error}"
        ) from None
