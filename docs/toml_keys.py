"""Write toml.md, every key of every TOML file, from the models: ``python docs/toml_keys.py``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from engine.load import BACKENDS
from harness.loadgen.settings import DEFAULT_BATCH, SCENARIOS
from harness.make.system_config import ENGINE_KEYS, VERSIONS, Machine, SystemConfig
from harness.submission.description import (
    CALIBRATION,
    GIVEN_ELSEWHERE,
    MEASUREMENT_FIELDS,
    STATUSES,
    SYSTEM_FIELDS,
    SYSTEM_TYPES,
)

PAGE = Path(__file__).with_name("toml.md")

_HEAD = """\
# TOML files

Every key of every TOML file that the commands read. A file with another key, a value of another
kind or a key that stands twice is refused in one line. This page is written by
`python docs/toml_keys.py` from the classes that check the files.

## Settings of LoadGen

For `harness run --config FILE`, and in the versions of a system configuration. On the top level a
key holds for every scenario that has it, in a table named as a scenario (`[Server]`) for that one.
Options of the command line go before the file.
"""
_SYSTEM = """\
## System configurations

One file for each machine and benchmark, in `configs/`, where `make` and `harness tune` find it by
the name of the GPU or processor, or anywhere: `make run RUN_ARGS="--system=mine.toml"`,
`harness run MODEL --config mine.toml`. `harness tune -o mine.toml` writes one. `[system]` says what
it is for:
"""
_VERSIONS = f"""\
Then a table for each version that `--config_ver` can choose, `[{"]`, `[".join(VERSIONS)}]`
(`harness run --config` takes `[{VERSIONS[0]}]`). Of the engine:
"""
_REST = f"""\
All other keys are the settings above: for every scenario in `[{VERSIONS[0]}]`, for one in
`[{VERSIONS[0]}.Offline]` and so on.
"""
_SUBMISSION = """\
## Description of a submission

For `harness submission --system FILE`: texts or whole numbers, in the words of MLPerf Inference
v2.0. What is left out is read off the machine and the runs where it can be.
"""


def render() -> str:
    """Content of the page."""
    machine = TypeAdapter(Machine).json_schema()
    config = TypeAdapter(SystemConfig).json_schema()
    measured = ", ".join(f"`{name}`" for name in (*MEASUREMENT_FIELDS, CALIBRATION))
    system = ", ".join(f"`{name}`" for name in SYSTEM_FIELDS if name not in GIVEN_ELSEWHERE)
    parts = [
        _HEAD,
        "\n".join(_settings()),
        _SYSTEM,
        "\n".join(_rows(Machine, machine, tuple(machine["properties"]))),
        _VERSIONS,
        "\n".join(_rows(SystemConfig, config, ENGINE_KEYS)),
        f"Engines: {', '.join(f'`{name}`' for name in BACKENDS)}.",
        _REST,
        _SUBMISSION,
        f"On the top level: {system}. `status` is one of {_listed(STATUSES)}, `system_type` one of "
        f"{_listed(SYSTEM_TYPES)}.",
        f"In `[measurements]`: {measured}.",
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _settings() -> Iterator[str]:
    yield "| key | of | value | default | what |"
    yield "|---|---|---|---|---|"
    schemas = {name: TypeAdapter(kind).json_schema() for name, kind in SCENARIOS.items()}
    names = dict.fromkeys(name for one in schemas.values() for name in one["properties"])
    for name in names:
        cells: dict[tuple[str, str, str], list[str]] = {}
        for scenario, kind in SCENARIOS.items():
            if name in schemas[scenario]["properties"]:
                what, otherwise = _described(kind, name)
                found = schemas[scenario]["properties"][name]
                default = found.get("default")
                shown = otherwise if default is None else f"{default}"
                cells.setdefault((_kind(found), shown, what), []).append(scenario)
        for (kind_, default, what), scenarios in cells.items():
            of = "all" if len(scenarios) == len(SCENARIOS) else ", ".join(scenarios)
            yield f"| `{name}` | {of} | {kind_} | {default} | {what} |"


def _rows(model: type, schema: Mapping[str, Any], names: tuple[str, ...]) -> Iterator[str]:
    yield "| key | value | default | what |"
    yield "|---|---|---|---|"
    for name in names:
        found = schema["properties"][name]
        what, otherwise = _described(model, name)
        default = found.get("default")
        shown = otherwise if default is None else f"{default}"
        if name in schema.get("required", ()):
            shown = "required"
        kind = f"{_kind(found)}; or `all`" if name == "devices" else _kind(found)
        yield f"| `{name}` | {kind} | {shown} | {what} |"


def _described(model: type, name: str) -> tuple[str, str]:
    """What the docstring of a model, or of its base, says of an attribute, and of its absence."""
    for kind in model.__mro__:
        text = inspect.cleandoc(kind.__doc__ or "").partition("Attributes\n----------\n")[2]
        for names, indented in re.findall(r"^(\S.*)\n((?:    .*\n?)+)", text, re.MULTILINE):
            if name in names.split(", "):
                whole = " ".join(indented.split()).replace("``", "`")
                whole = whole.replace("`DEFAULT_BATCH`", str(DEFAULT_BATCH))
                what, _, otherwise = whole.partition("; None: ")
                return what.removesuffix(".") + ".", otherwise.removesuffix(".") or "–"
    raise LookupError(f"{model.__name__} does not describe {name}")


def _kind(schema: Mapping[str, Any]) -> str:
    one = next(iter(schema.get("anyOf", [schema])))
    if one["type"] == "array":
        return f"list, each a {_kind(one['items'])}"
    words = {"integer": "whole number", "number": "number", "string": "text"}[one["type"]]
    if "exclusiveMinimum" in one:
        words += f" above {one['exclusiveMinimum']}"
    if "minimum" in one:
        words += f" from {one['minimum']}"
    return words


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
