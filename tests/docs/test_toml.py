"""docs/toml.md: written from the models, and true."""

from __future__ import annotations

import importlib.util
import re
import tomllib

import pytest

from harness.errors import HarnessError
from harness.loadgen.settings import SCENARIOS, load_settings
from harness.make.system_config import config_of
from harness.submission.description import load_description
from tests.support import ROOT

PAGE = (ROOT / "docs" / "toml.md").read_text()


def rows(title):
    """The rows of the tables under a title."""
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("| `")
    ]


def test_it_is_up_to_date():
    path = ROOT / "docs" / "toml_keys.py"
    spec = importlib.util.spec_from_file_location("toml_keys", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.render() == PAGE, "python docs/toml_keys.py writes it"


@pytest.mark.parametrize("row", rows("Settings of LoadGen"), ids=lambda row: f"{row[0]}-{row[1]}")
def test_settings_and_their_defaults(row, tmp_path):
    key, of, kind, default, _ = row
    key, path = key.strip("`"), tmp_path / "settings.toml"
    for scenario in SCENARIOS if of == "all" else of.split(", "):
        path.write_text(f"[{scenario}]\n{key} = 7{'.5' if kind.startswith('number') else ''}\n")
        (found,) = load_settings([scenario], path, {})
        assert getattr(found, key) == float(path.read_text().split("= ")[1])
        (found,) = load_settings([scenario], None, {})
        value = getattr(found, key)
        assert default == str(value) if value is not None else not default[0].isdigit()
        path.write_text(f"[{scenario}]\n{key} = -1\n")
        with pytest.raises(HarnessError, match=re.escape(f"{scenario}.{key}")):
            load_settings([scenario], path, {})


def test_every_key_of_the_shipped_configurations_is_there(tmp_path):
    known = {
        row[0].strip("`")
        for title in ("Settings of LoadGen", "System conf")
        for row in rows_of(title)
    }
    for path in (ROOT / "configs").glob("*.toml"):
        document = tomllib.loads(path.read_text())
        tables = [document.pop("system"), *document.values()]
        tables += [
            one for table in document.values() for one in table.values() if isinstance(one, dict)
        ]
        keys = {
            key for table in tables for key, value in table.items() if not isinstance(value, dict)
        }
        assert keys <= known, path


def rows_of(title):
    return rows(next(head for head in re.findall(r"## (.*)", PAGE) if head.startswith(title)))


def test_a_system_configuration_of_all_its_keys(tmp_path):
    values = {
        "benchmark": '"ssd-resnet34"',
        "gpu": '"NVIDIA X"',
        "engine": '"triton"',
        "device": '"cuda"',
        "devices": "[0, 1]",
        "threads": "3",
        "url": '"a:1"',
        "serves": '"cudnn"',
    }
    keys = [row[0].strip("`") for row in rows("System configurations") if row[0] != "`cpu`"]
    assert keys == list(values)
    lines = [f"{key} = {value}" for key, value in values.items()]
    path = tmp_path / "mine.toml"
    path.write_text("\n".join(["[system]", *lines[:2], "[default]", *lines[2:]]))
    assert config_of(path, "ssd-resnet34").devices == (0, 1)


def test_a_description_of_all_its_keys(tmp_path):
    section = PAGE.split("## Description of a submission\n")[1]
    first, second = re.findall(
        r"^(?:On the top level|In `\[measurements\]`): (.*?)\.", section, re.M
    )
    top, measured = (re.findall(r"`([\w-]+)`", part) for part in (first, second))
    values = {"status": "preview", "system_type": "edge"}
    text = "".join(f'{key} = "{values.get(key, "x")}"\n' for key in top)
    text += "[measurements]\n" + "".join(f'{key} = "x"\n' for key in measured)
    (tmp_path / "mine.toml").write_text(text)
    assert len(load_description(tmp_path / "mine.toml").system) == len(top) > 20
