"""What every typed configuration is made of: sections of documented settings, YAML in, checked values out.

An unknown key is an error that names its dotted path and the nearest valid one.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from opmix_dist.bounded import read_bounded
from opmix_dist.data.printable import first_words
from opmix_dist.errors import UserError
from opmix_dist.safe_yaml import load_yaml

MAX_YAML_BYTES = 256 << 10
"""Read in seconds; settings of thousands of domains fit."""
MAX_SHOWN = 200
"""Characters of what is wrong, in a message."""


class Section(BaseModel):
    """A group of settings; immutable once it is checked."""

    model_config = ConfigDict(extra="forbid", frozen=True)


S = TypeVar("S", bound=Section)


def read_settings(path: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Nested plain values of a YAML file, with dotted overrides (``--train.steps 10``, ``--train.steps=10``).

    Without a file, of the overrides alone.

    Raises:
        UserError: one line that names the file or the key.
    """
    data = read_yaml(Path(path)) if path is not None else {}
    for key, value in parse_overrides(overrides):
        set_dotted(data, key, value)
    return data


def read_yaml(path: Path) -> dict[str, Any]:
    """Nested plain values of a file that anybody may have written.

    Raises:
        UserError: it cannot be read, is too large, or is no mapping in YAML; names it.
    """
    try:
        data = load_yaml(read_bounded(path, MAX_YAML_BYTES))
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {first_words(str(error), MAX_SHOWN)}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a mapping of settings, not {type(data).__name__}")
    return data


def check_settings(kind: type[S], data: Mapping[str, Any]) -> S:
    """Turn nested plain values into a checked section.

    Raises:
        UserError: one line that names the dotted key, and the nearest valid key for an unknown one.
    """
    leaves = [key for key, _ in fields(kind)]
    valid = [*leaves, *{key.rpartition(".")[0] for key in leaves if "." in key}]
    for key in _unknown_keys(kind, data):
        near = difflib.get_close_matches(key, valid, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown setting `{key}`: the nearest valid one is `{near}`")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = max(error.errors(), key=lambda one: len(one["loc"]))  # of a union, the likeliest type
        key = ".".join(str(part) for part in first["loc"])
        key = next((leaf for leaf in leaves if key.startswith(f"{leaf}.")), key)  # not which type of a union
        got = first_words(repr(first["input"]), MAX_SHOWN)
        shown = "" if first["type"] in ("missing", "value_error") else f" (got {got})"
        where = f"setting `{key}`: " if key else ""  # a check of the whole names its settings itself
        raise UserError(f"{where}{first['msg'].removeprefix('Value error, ')}{shown}") from None


def parse_overrides(arguments: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """``["--a.b", "1", "--c=x"]`` to ``("a.b", 1), ("c", "x")``; values are YAML."""
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise UserError(f"`{flag}` is not a setting: write --dotted.key value")
        key, equals, text = flag[2:].partition("=")
        if not equals:
            if not rest:
                raise UserError(f"setting `{key}` has no value")
            text = rest.pop(0)
        yield key, _yaml_value(text)


def _yaml_value(text: str) -> Any:
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:  # YAML 1.1 takes 1e-3 for a string
            number = float(value)
        except ValueError:
            return value
        return number if math.isfinite(number) else value
    return value


def merged_settings(kind: type[Section], base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested plain values of ``kind``: those of ``over``, and of ``base`` where it has none.

    Settings that are mappings themselves, such as weights by domain, are one value."""
    merged = dict(base)
    for name, value in over.items():
        field, below = kind.model_fields.get(name), merged.get(name)
        child = _section(field.annotation) if field is not None else None
        if child is not None and isinstance(value, Mapping) and isinstance(below, Mapping):
            value = merged_settings(child, below, value)
        merged[name] = value
    return merged


def set_dotted(data: dict[str, Any], dotted: str, value: Any) -> None:
    """``a.b`` of nested plain values; what is no mapping on the way becomes one."""
    *parents, leaf = dotted.split(".")
    for name in parents:
        child = data.get(name)
        if not isinstance(child, dict):
            child = data[name] = {}
        data = child
    data[leaf] = value


def _section(annotation: Any) -> type[Section] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and field of every leaf setting, in order."""
    for name, field in section.model_fields.items():
        child = _section(field.annotation)
        if child is None:
            yield prefix + name, field
        else:
            yield from fields(child, f"{prefix}{name}.")


def _unknown_keys(section: type[Section], data: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in data.items():
        field = section.model_fields.get(str(name))
        if field is None:
            yield f"{prefix}{name}"
        elif (child := _section(field.annotation)) is not None and isinstance(value, Mapping):
            yield from _unknown_keys(child, value, f"{prefix}{name}.")


def to_yaml(config: Section, *, documented: bool = False) -> str:
    """The resolved configuration as YAML that loads back to an equal one.

    Args:
        documented: put each field's documentation above it.
    """
    plain = config.model_dump(mode="json")
    if not documented:
        return yaml.safe_dump(plain, sort_keys=False)
    return "\n".join(_documented(type(config), plain, "")) + "\n"


def _documented(section: type[Section], data: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        child = _section(field.annotation)
        if child is not None:
            yield f"{indent}{name}:"
            yield from _documented(child, data[name], indent + "  ")
            continue
        yield f"{indent}# {field.description}"
        in_a_list = yaml.safe_dump([data[name]], sort_keys=False, default_flow_style=True, width=math.inf)
        yield f"{indent}{name}: {in_a_list.strip()[1:-1]}"


def changed_settings(old: S, new: S, allowed: Sequence[str]) -> list[str]:
    """Dotted settings that differ, but for those at or below an allowed key."""
    prefixes = tuple(f"{key}." for key in allowed)
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    return [
        key
        for key, _ in fields(type(old))
        if not f"{key}.".startswith(prefixes) and _get_dotted(before, key) != _get_dotted(after, key)
    ]


def _get_dotted(data: Mapping[str, Any], dotted: str) -> Any:
    value: Any = data
    for name in dotted.split("."):
        value = value[name]
    return value
