"""The schema of `conf/tune.yaml`: for some keys of `conf/decode.yaml`, the values to try on the development set."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, create_model

from speechtx.config.decode import DecodeConfig
from speechtx.config.errors import ConfigError
from speechtx.config.load import load_config, locate
from speechtx.config.section import Section

MAX_POINTS = 500  # each keeps a file open while it is decoded


# Keys that leave the best hypothesis as it is, whatever the method.
_NEVER: dict[str, str] = {
    "frames_per_batch": "it changes how fast a search is, not what it finds; set it in the decoding configuration",
    "nbest": "the best hypothesis is scored, however many are written",
}

# When a search reads the keys that DecodeConfig lets stand although a search does not; all others are read or refused there.
_READ: dict[str, Callable[[DecodeConfig], bool]] = {
    "beam": lambda c: c.method in ("beam", "ctc_beam", "attention_rescoring"),
    "ctc_weight": lambda c: c.method in ("beam", "attention_rescoring"),
    "max_len_ratio": lambda c: c.method in ("beam", "ctc_beam", "attention_rescoring"),
    "coverage_threshold": lambda c: c.coverage_weight > 0,
    "hot_word_bonus": lambda c: bool(c.hot_words),
    "mask_threshold": lambda c: c.method == "mask_ctc",
    "mask_iterations": lambda c: c.method == "mask_ctc",
}


@dataclass(frozen=True)
class GridPoint:
    """One combination of the grid's values.

    Attributes:
        values: of the grid's keys, in the order in which the file names them.
        rank: the same as places in the sorted lists; of equally good points the one of lower rank is chosen.
        config: the base configuration with these values.
    """

    values: dict[str, Any]
    rank: tuple[int, ...]
    config: DecodeConfig

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.values.items())


def load_grid(path: str | Path, base: DecodeConfig) -> list[GridPoint]:
    """Reads a grid and makes all its combinations, in the order of their ranks.

    Args:
        path: YAML of `key: [value, value, ...]`, the keys those of `DecodeConfig`.
        base: the configuration whose values are replaced.

    Raises:
        ConfigError: an unknown key, no list, a bad or repeated value, a key without effect (each with file and line), values that
            do not go together, no key at all, or more than MAX_POINTS combinations.
    """
    grid = load_config(path, _Grid)
    lists = {key: getattr(grid, key) for key in grid.model_fields_set}
    lists = {key: lists[key] for key in _written_order(Path(path), lists)}
    if not lists:
        raise ConfigError(f"{path}: names no key; for example `lm_weight: [0.0, 0.2, 0.4]`")
    count = math.prod(map(len, lists.values()))
    if count > MAX_POINTS:
        raise ConfigError(f"{path}: {count} combinations, at most {MAX_POINTS} are tried; shorten the lists")
    ordered = {key: sorted(values) if _are_numbers(values) else list(values) for key, values in lists.items()}
    points = []
    for rank in itertools.product(*(range(len(values)) for values in ordered.values())):
        values = {key: ordered[key][i] for key, i in zip(ordered, rank, strict=True)}
        points.append(GridPoint(values, rank, _point_config(path, base, values)))
    _require_effect(path, lists, [point.config for point in points])
    return points


def _require_effect(path: str | Path, keys: Iterable[str], configs: Sequence[DecodeConfig]) -> None:
    """Refuses keys whose values would all be equally good, and the choice among them nobody's."""
    for key in keys:
        why = _NEVER.get(key)
        if why is None and key in _READ and not any(map(_READ[key], configs)):
            methods = " and ".join(dict.fromkeys(config.method for config in configs))
            why = f"no combination reads it (method {methods})"
        if why is not None:
            raise ConfigError(f"{locate(path, key)}: {key}: trying values has no effect: {why}")


def _point_config(path: str | Path, base: DecodeConfig, values: dict[str, Any]) -> DecodeConfig:
    try:
        return DecodeConfig.model_validate({**base.model_dump(), **values})
    except ValidationError as err:
        point = ", ".join(f"{key} {value}" for key, value in values.items())
        cause = "; ".join(str(e["msg"]).removeprefix("Value error, ") for e in err.errors())
        raise ConfigError(f"{path}: {point}: these values do not go together: {cause}") from None


def _written_order(path: Path, keys: dict[str, Any]) -> list[str]:
    """The keys by the lines on which they stand."""
    return sorted(keys, key=lambda key: int(locate(path, key).rpartition(":")[2]))


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _each_once(values: list[Any]) -> list[Any]:
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ValueError(f"{value} stands here twice")
    return values


def _grid_schema() -> type[Section]:
    """A section with a list of values for every key of `DecodeConfig`, with that key's type and limits."""
    fields: dict[str, Any] = {}
    for name, info in DecodeConfig.model_fields.items():
        value = Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
        fields[name] = (Annotated[list[value], Field(min_length=1), AfterValidator(_each_once)], Field(default=[]))  # type: ignore[valid-type]
    return create_model("Grid", __base__=Section, **fields)


_Grid = _grid_schema()
