"""libnms_opt.so and its binding without a GPU: checks, messages, layouts."""

import ctypes
import re
import shutil
import subprocess
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from plugin_cuda import library
from plugin_cuda.errors import PluginError
from plugin_cuda.library import Config, Format, Level, library_path, load_library, workspace_size
from tests.support import ROOT

pytest_plugins = ("tests.support.nms_library",)
pytestmark = pytest.mark.usefixtures("nms_library")
HEADER = ROOT / "plugin_cuda" / "include" / "nms_opt.h"


def read_statuses() -> dict[str, int]:
    """Names and values of nms_opt_status, from the header."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    body = re.search(r"enum\s*{([^}]*NMS_OPT_BAD_BATCH[^}]*)}", text).group(1)
    statuses: dict[str, int] = {}
    for entry in filter(None, (part.strip() for part in body.split(","))):
        name, _, value = entry.partition("=")
        statuses[name.strip()] = int(value) if value else max(statuses.values()) + 1
    return statuses


STATUSES = read_statuses()
LIMIT = {
    name: int(value)
    for name, value in re.findall(r"#define NMS_OPT_MAX_(\w+) (\d+)", HEADER.read_text())
}
TOP, CLASSES, ANCHORS = LIMIT["TOP_K"], LIMIT["CLASSES"], LIMIT["ANCHORS"]


def words(status: int) -> str:
    return load_library().nms_opt_status_string(status).decode()


def test_every_status_has_words_of_its_own():
    texts = [words(value) for name, value in STATUSES.items() if name != "NMS_OPT_CUDA_ERROR"]
    assert len(set(texts)) == len(texts) == len(STATUSES) - 1
    assert all(text and "\n" not in text for text in texts)
    assert "memory" in words(STATUSES["NMS_OPT_CUDA_ERROR"] + 2)  # cudaErrorMemoryAllocation


@given(st.integers(-(2**31), 2**31 - 1))
def test_any_number_is_answered(status):
    assert words(status)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_structures_are_those_of_the_header(tmp_path):
    types = {
        "nms_opt_format": library._Format,
        "nms_opt_level": library._Level,
        "nms_opt_config": library._Config,
    }
    members = [(c, name) for c, struct in types.items() for name, *_ in struct._fields_]
    lines = [f"sizeof({name})" for name in types]
    lines += [f"offsetof({c}, {name})" for c, name in members]
    lines += ["NMS_OPT_VERSION", "NMS_OPT_MAX_LEVELS", "NMS_OPT_FLOAT32", "NMS_OPT_FLOAT16"]
    source = "".join(f'printf("%d\\n", (int)({line}));' for line in [*lines, "NMS_OPT_INT8"])
    program = f'#include <cstdio>\n#include "{HEADER}"\nint main() {{ {source} }}\n'
    (tmp_path / "layout.cpp").write_text(program)
    subprocess.run(["g++", "layout.cpp", "-o", "layout"], cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "layout"], capture_output=True, text=True, check=True)
    expected = [ctypes.sizeof(struct) for struct in types.values()]
    expected += [getattr(types[c], name).offset for c, name in members]
    expected += [library.VERSION, library.MAX_LEVELS]
    assert [int(line) for line in done.stdout.split()] == [
        *expected,
        *(library.FLOAT32, library.FLOAT16, library.INT8),
    ]
    assert {field.name for field in fields(Config)} | {"num_levels"} == {
        name for name, *_ in library._Config._fields_
    }


VECTORS = (2, 4, 16, 32, 328, 4096)


def cell_bytes(channels, vector, dtype):
    """Shared memory of the channels of a conf cell: what nms_opt.h bounds."""
    return -(-channels // vector) * (-(-vector * (4, 2, 1)[dtype] // 16) * 16)


@st.composite
def configs(draw):
    """Configurations that the library has to take."""
    classes = draw(st.integers(1, CLASSES))

    def level():
        anchors = draw(st.integers(1, ANCHORS))
        conf = draw(st.integers(0, 2))
        vectors = [1, *filter(lambda v: cell_bytes(anchors * classes, v, conf) <= 45056, VECTORS)]
        return Level(
            draw(st.integers(1, 60)),
            draw(st.integers(1, 60)),
            anchors,
            Format(draw(st.integers(0, 1)), draw(st.sampled_from([1, 4, 32, anchors * 4 + 8]))),
            Format(conf, draw(st.sampled_from(vectors)), draw(st.floats(0.001, 10))),
        )

    levels = tuple(level() for _ in range(draw(st.integers(1, LIMIT["LEVELS"]))))
    level_top_k = draw(st.just(0) | st.integers(1, LIMIT["LEVEL_TOP_K"]))
    return Config(
        num_classes=classes,
        background_class=draw(st.integers(-1, classes - 1)),
        top_k=len(levels) * level_top_k or draw(st.integers(1, TOP)),
        keep_top_k=draw(st.integers(1, TOP)),
        confidence_threshold=draw(st.floats(0, 1, width=32)),
        nms_threshold=draw(st.floats(0, 1, width=32)),
        levels=levels,
        sigmoid=draw(st.integers(0, 1)),
        level_top_k=level_top_k,
        clip_before_nms=draw(st.integers(0, 1)),
        bbox_xform_clip=draw(st.floats(0, width=32, allow_infinity=False)),
    )


@given(configs(), st.integers(1, 1000))
def test_workspace_of_what_is_valid(config, batch):
    one, many = workspace_size(config, 1), workspace_size(config, batch)
    assert 0 < one <= many <= one * batch


@pytest.mark.parametrize(("classes", "dtype"), [(351, 0), (352, 0), (352, 1), (352, 2)])
def test_a_conf_cell_fits_into_shared_memory(classes, dtype):
    for vector in VECTORS:
        level = Level(3, 3, 16, Format(0), Format(dtype, vector, 1.0))
        config = Config(classes, 0, 200, 200, 0.05, 0.5, (level,))
        if cell_bytes(16 * classes, vector, dtype) <= 45056:
            assert workspace_size(config, 1) > 0
        else:
            with pytest.raises(PluginError, match="conf format"):
                workspace_size(config, 1)


def test_workspace_of_the_benchmark_model():
    sizes = [(4, 50), (6, 25), (6, 13), (6, 7), (4, 3), (4, 3)]
    levels = tuple(Level(s, s, a, Format(1), Format(1)) for a, s in sizes)
    config = Config(81, 0, 200, 200, 0.05, 0.5, levels)
    assert config.num_priors == 15130
    assert workspace_size(config, 64) < 64 * 2 * 2**20


def test_workspace_of_retinanet():
    """At 800x800, as nms_opt.h says it, to a tenth."""
    levels = tuple(Level(s, s, 9, Format(1), Format(1)) for s in (100, 50, 25, 13, 7))
    config = Config(264, -1, 5000, 300, 0.05, 0.5, levels, level_top_k=1000)
    assert config.num_priors == 120087
    (said,) = re.findall(
        r"level_top_k = 1000, keep_top_k = 300\) about ([\d.]+) MB", HEADER.read_text()
    )
    assert workspace_size(config, 64) / 64e6 == pytest.approx(float(said), rel=0.1)


def below_or_above(low, high):
    whole = st.integers(-(2**31), low - 1) | st.integers(high + 1, 2**31 - 1)
    return st.sampled_from([low - 1, high + 1]) | whole


NO_FRACTION = st.floats(width=32).filter(lambda value: not 0 <= value <= 1)
BAD_FIELDS = {
    "num_classes": ("NUM_CLASSES", below_or_above(1, CLASSES)),
    "background_class": ("BACKGROUND_CLASS", below_or_above(-1, CLASSES - 1)),
    "top_k": ("TOP_K", below_or_above(1, TOP)),
    "keep_top_k": ("KEEP_TOP_K", below_or_above(1, TOP)),
    "sigmoid": ("SIGMOID", below_or_above(0, 1)),
    "level_top_k": ("LEVEL_TOP_K", below_or_above(0, LIMIT["LEVEL_TOP_K"])),
    "clip_before_nms": ("CLIP_BEFORE_NMS", below_or_above(0, 1)),
    "bbox_xform_clip": (
        "BBOX_XFORM_CLIP",
        st.floats(max_value=0, width=32, exclude_max=True) | st.sampled_from([np.nan, np.inf]),
    ),
    "confidence_threshold": ("CONFIDENCE_THRESHOLD", NO_FRACTION),
    "nms_threshold": ("NMS_THRESHOLD", NO_FRACTION),
}
BAD_LEVEL_FIELDS = {
    "height": ("LEVEL_SHAPE", st.integers(-(2**31), 0) | st.just(2**31 - 1)),
    "width": ("LEVEL_SHAPE", st.integers(-(2**31), 0) | st.just(2**31 - 1)),
    "anchors": ("LEVEL_SHAPE", below_or_above(1, ANCHORS)),
    "loc": (
        "LOC_FORMAT",
        st.builds(Format, below_or_above(0, 1))
        | st.builds(Format, st.just(0), st.integers(-(2**31), 0)),
    ),
    "conf": (
        "CONF_FORMAT",
        st.builds(Format, below_or_above(0, 2))
        | st.builds(Format, st.just(0), st.integers(-(2**31), 0))
        | st.builds(
            Format,
            st.just(2),
            st.just(1),
            st.sampled_from([0.0, -1.0, float("nan"), float("inf")]),
        ),
    ),
}


def refused(name, config, batch=1):
    with pytest.raises(PluginError) as error:
        workspace_size(config, batch)
    assert str(error.value) == f"NMS_OPT_TRT: {words(STATUSES[f'NMS_OPT_{name}'])}"


@pytest.mark.parametrize("field", BAD_FIELDS)
@given(st.data())
def test_a_bad_field_is_refused_in_its_own_words(field, data):
    status, values = BAD_FIELDS[field]
    config = replace(data.draw(configs()), **{field: data.draw(values)})
    assume(field != "top_k" or config.top_k != len(config.levels) * config.level_top_k)
    refused(f"BAD_{status}", config)


def test_a_cut_of_levels_needs_a_top_k_that_caps_nothing():
    config = Config(2, 0, 1001, 1, 0.5, 0.5, SMALL.levels, level_top_k=500)
    refused("BAD_TOP_K", config)
    assert workspace_size(replace(config, top_k=1000), 1) > 0


@pytest.mark.parametrize("field", BAD_LEVEL_FIELDS)
@given(st.data())
def test_a_bad_level_is_refused_in_its_own_words(field, data):
    config = data.draw(configs())
    status, values = BAD_LEVEL_FIELDS[field]
    which = data.draw(st.integers(0, len(config.levels) - 1))
    levels = list(config.levels)
    levels[which] = replace(levels[which], **{field: data.draw(values)})
    refused(f"BAD_{status}", replace(config, levels=tuple(levels)))


@given(configs(), below_or_above(1, LIMIT["BATCH"]), st.sampled_from([0, LIMIT["LEVELS"] + 1, 20]))
def test_bad_batch_and_number_of_levels(config, batch, levels):
    refused("BAD_BATCH", config, batch)
    refused("BAD_NUM_LEVELS", replace(config, levels=config.levels[:1] * levels))


def test_more_scores_than_fit_in_an_index():
    level = Level(16000, 16000, 32, Format(0), Format(0))
    refused("BAD_LEVEL_SHAPE", Config(2, 0, 1, 1, 0.5, 0.5, (level,)))


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 2**32 + 1])
def test_an_integer_is_not_cut_short(value):
    config = Config(2, 0, 1, 1, 0.5, 0.5, (Level(1, 1, 1, Format(0), Format(0)),))
    with pytest.raises(PluginError, match=f"top_k={value}"):
        workspace_size(replace(config, top_k=value), 1)
    with pytest.raises(PluginError, match=f"batch={value}"):
        workspace_size(config, value)


FAKE = 1 << 20  # an aligned address that is never read: the library refuses before it gets there


def run_status(valid, **changes) -> int:
    """Status of nms_opt_run; None makes a pointer null, `by` moves one."""
    level = ctypes.c_void_p * len(valid.levels)
    heads = changes.get("loc_0", FAKE), changes.get("conf_0", FAKE)
    arguments = {
        "config": ctypes.pointer(valid.to_c()),
        "batch": 1,
        "loc": level(heads[0], *[FAKE] * (len(valid.levels) - 1)),
        "conf": level(heads[1], *[FAKE] * (len(valid.levels) - 1)),
        "priors": FAKE,
        "detections": FAKE,
        "num_detections": FAKE,
        "workspace": FAKE,
        "workspace_bytes": workspace_size(valid, 1),
    }
    arguments |= {name: value for name, value in changes.items() if name in arguments}
    return load_library().nms_opt_run(*arguments.values(), None)


SMALL = Config(2, 0, 1, 1, 0.5, 0.5, (Level(2, 2, 1, Format(1), Format(0)),) * 2)
POINTERS = ["config", "loc", "conf", "loc_0", "conf_0", "priors", "detections", "num_detections"]


@pytest.mark.parametrize("name", [*POINTERS, "workspace"])
def test_a_null_pointer_is_refused(name):
    assert run_status(SMALL, **{name: None}) == STATUSES["NMS_OPT_NULL_POINTER"]


@pytest.mark.parametrize(
    ("name", "by"),
    list(zip([*POINTERS[3:], "workspace"], [1, 2, 8, 2, 2, 8], strict=True)),
)
def test_a_misaligned_pointer_is_refused(name, by):
    assert run_status(SMALL, **{name: FAKE + by}) == STATUSES["NMS_OPT_MISALIGNED_POINTER"]


def test_too_small_a_workspace_is_refused():
    size = workspace_size(SMALL, 1) - 1
    status = run_status(SMALL, workspace_bytes=size)
    assert status == STATUSES["NMS_OPT_WORKSPACE_TOO_SMALL"]


def test_where_the_library_is_looked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("NMS_OPT_LIBRARY", str(tmp_path / "own.so"))
    assert library_path() == tmp_path / "own.so"
    monkeypatch.delenv("NMS_OPT_LIBRARY")
    monkeypatch.setenv("BUILD_DIR", str(tmp_path))
    assert library_path() == tmp_path / "plugins" / "libnms_opt.so"
    with pytest.raises(PluginError, match=r"not found.*build-plugin"):
        load_library()
    path = tmp_path / "text.so"
    path.write_text("no library")
    with pytest.raises(PluginError, match="build-plugin"):
        load_library(path)


def test_other_libraries_and_versions_are_refused(monkeypatch, nms_library, tmp_path):
    with pytest.raises(PluginError, match="nms_opt_version"):
        load_library(Path(np.random.mtrand.__file__))
    monkeypatch.setattr(library, "VERSION", library.VERSION + 1)
    shutil.copy(nms_library, tmp_path / "old.so")
    with pytest.raises(PluginError, match=r"of version 2, this binding of 3: .*build-plugin"):
        load_library(tmp_path / "old.so")
