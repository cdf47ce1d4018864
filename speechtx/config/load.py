"""Reading YAML into the typed schemas, with errors that name the file, the line and the nearest valid key.

YAML is read with the safe loader's types only (no tags that construct objects), duplicate keys are errors, and `1e-3`
is a number as in YAML 1.2 (PyYAML alone would read it as a string).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from speechtx.config.errors import ConfigError

Key = str | int
Loc = tuple[Key, ...]
SchemaT = TypeVar("SchemaT", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """SafeLoader that also reads `1e-3` and `1E5` as floats."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def load_config(path: str | Path, schema: type[SchemaT], overrides: Sequence[str] = ()) -> SchemaT:
    """Reads one YAML file into a frozen schema.

    Args:
        path: the YAML file.
        schema: a pydantic model of `speechtx.config.schema`.
        overrides: `key.path=value` strings as given to `--set`; the value is read as YAML.

    Raises:
        ConfigError: the file cannot be read, is not YAML, has a duplicate or unknown key, a value of the wrong type or
            an impossible combination; every problem found is listed, each with file and line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {err}") from None
    return parse_config(text, schema, overrides, source=str(path))


def parse_config(text: str, schema: type[SchemaT], overrides: Sequence[str] = (), source: str = "<string>") -> SchemaT:
    """Like `load_config`, from a string; `source` is the name that errors show."""
    lines: dict[Loc, str] = {}
    raw = _parse_yaml(text, source, lines)
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}:1: expected a mapping of keys to values, found {type(raw).__name__}")
    for override in overrides:
        _apply_override(raw, override, lines)
    try:
        return schema.model_validate(raw)
    except ValidationError as err:
        raise ConfigError("\n".join(_describe_all(err.errors(), schema, lines, source))) from None


def locate(path: str | Path, key: str, overrides: Sequence[str] = ()) -> str:
    """Where a dotted key is set: `FILE:LINE`, or the override; the nearest section above it if the key itself is not there."""
    lines: dict[Loc, str] = {}
    raw = _parse_yaml(Path(path).read_text(encoding="utf-8"), str(path), lines) or {}
    for override in overrides:
        _apply_override(raw, override, lines)
    loc: Loc = tuple(key.split("."))
    while loc and loc not in lines:
        loc = loc[:-1]
    return lines.get(loc, str(path))


def dump_config(config: BaseModel) -> str:
    """The resolved configuration as YAML that `parse_config` reads back to an equal value."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def config_hash(config: BaseModel) -> str:
    """SHA-256 (hex) of the canonical JSON form: equal for equal configurations, whatever the YAML looked like.

    Values at their defaults do not count, so that a checkpoint outlives the keys that later versions add.
    """
    canonical = json.dumps(config.model_dump(mode="json", exclude_defaults=True), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _parse_yaml(text: str, source: str, lines: dict[Loc, str]) -> Any:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _construct(loader, node, (), source, lines)
    except yaml.MarkedYAMLError as err:
        mark = err.problem_mark or err.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        raise ConfigError(f"{where}: not valid YAML: {err.problem or err.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as err:  # control characters; dates such as 2026-13-40; nesting
        if isinstance(err, ConfigError):
            raise
        raise ConfigError(f"{source}: not valid YAML: {err}") from None


def _construct(loader: _Loader, node: yaml.Node, loc: Loc, source: str, lines: dict[Loc, str]) -> Any:
    """Builds plain values out of YAML nodes, noting for every key where it stands."""
    lines.setdefault(loc, f"{source}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.CollectionNode) and node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
        raise ConfigError(
            f"{source}:{node.start_mark.line + 1}: not valid YAML here: the tag {node.tag}; only plain values are read"
        )
    if isinstance(node, yaml.MappingNode):
        mapping: dict[Key, Any] = {}
        for key, (key_node, value_node) in _entries(loader, node, source).items():
            lines[(*loc, key)] = f"{source}:{key_node.start_mark.line + 1}"
            mapping[key] = _construct(loader, value_node, (*loc, key), source, lines)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, item, (*loc, i), source, lines) for i, item in enumerate(node.value)]
    return loader.construct_object(node, deep=True)


def _entries(loader: _Loader, node: yaml.MappingNode, source: str) -> dict[Key, tuple[yaml.Node, yaml.Node]]:
    """The nodes of keys and values; a key that is given wins over the same one of a merge (`<<: *anchor`)."""
    num_given = sum(key_node.tag != "tag:yaml.org,2002:merge" for key_node, _ in node.value)
    loader.flatten_mapping(node)  # puts what is merged in front
    entries: dict[Key, tuple[yaml.Node, yaml.Node]] = {}
    given: dict[Key, str] = {}
    for number, (key_node, value_node) in enumerate(node.value, start=num_given - len(node.value)):
        key = loader.construct_object(key_node, deep=True)
        where = f"{source}:{key_node.start_mark.line + 1}"
        if not isinstance(key, str | int):
            raise ConfigError(f"{where}: a key must be a plain word, found {key!r}")
        if number >= 0:
            if key in given:
                raise ConfigError(f"{where}: duplicate key {key!r} (first at {given[key]})")
            given[key] = where
        entries[key] = key_node, value_node
    node.value = list(entries.values())  # where an alias names this mapping again, its merges are done
    return entries


def _apply_override(raw: dict[str, Any], override: str, lines: dict[Loc, str]) -> None:
    name, equals, value_text = override.partition("=")
    where = f"--set {override}"
    if not equals or not name.strip():
        raise ConfigError(f"{where}: expected key.path=value, for example --set model.encoder.layers=6")
    value = _parse_yaml(value_text, where, {})
    keys = name.strip().split(".")
    target: Any = raw
    for depth, key in enumerate(keys[:-1]):
        if not isinstance(target, dict):
            raise ConfigError(f"{where}: {'.'.join(keys[:depth])} is not a section")
        if target.get(key) is None:
            target[key] = {}
        target = target[key]
        lines[tuple(keys[: depth + 1])] = where
    if not isinstance(target, dict):
        raise ConfigError(f"{where}: {'.'.join(keys[:-1])} is not a section")
    target[keys[-1]] = value
    for loc in [loc for loc in lines if loc[: len(keys)] == tuple(keys)]:
        del lines[loc]  # a section that was there is replaced with all that it held
    lines[tuple(keys)] = where


def _describe_all(problems: Sequence[Any], schema: type[BaseModel], lines: dict[Loc, str], source: str) -> list[str]:
    """One line a place; where a value may be of several types, pydantic reports each, and they are joined by `or`."""
    found: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        loc: Loc = tuple(problem["loc"])
        known = loc
        while known and known not in lines:
            known = known[:-1]
        name = loc if problem["type"] == "missing" else known
        place = lines.get(known, source), ".".join(map(str, name)) or "(top level)"
        found.setdefault(place, []).append(_message(problem, schema))
    return [f"{where}: {name}: {'; or '.join(dict.fromkeys(messages))}" for (where, name), messages in found.items()]


def _message(problem: Any, schema: type[BaseModel]) -> str:
    kind, value = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        *section, key = problem["loc"]
        valid = _field_names(schema, tuple(section))
        near = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.5)
        return "unknown key; " + (f"did you mean '{near[0]}'?" if near else f"valid keys here: {', '.join(valid)}")
    if kind == "missing":
        return "required key is missing"
    if kind == "literal_error":
        wanted = problem["ctx"]["expected"]
        near = difflib.get_close_matches(str(value), re.findall(r"'([^']*)'", wanted), n=1, cutoff=0.5)
        return f"{value!r} is not {wanted}" + (f"; did you mean '{near[0]}'?" if near else "")
    if kind == "string_type" and isinstance(value, bool):
        return f"YAML reads an unquoted yes, no, on or off as {value}; write it in quotes"
    if kind in ("list_type", "tuple_type"):
        return f"must be a list, as in [{value}]" if isinstance(value, str | int | float) else f"must be a list, found {value!r}"
    message = problem["msg"].removeprefix("Value error, ")
    return message if kind == "value_error" else f"{message[0].lower()}{message[1:]}, found {value!r}"


def _field_names(schema: type[BaseModel], loc: Loc) -> list[str]:
    """Names of the keys that are valid in the section at `loc`."""
    current: type[BaseModel] = schema
    for part in loc:
        field = current.model_fields.get(str(part))
        inner = _section_type(field.annotation) if field else None
        if inner is None:
            return []
        current = inner
    return [field.alias or name for name, field in current.model_fields.items()]


def _section_type(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for option in typing.get_args(annotation):
            if (found := _section_type(option)) is not None:
                return found
    return None
