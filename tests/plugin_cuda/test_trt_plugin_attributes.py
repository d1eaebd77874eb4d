"""libnmsoptplugin.so: what it is called, and what it makes of fields."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graph_surgery.errors import SurgeryError
from graph_surgery.nms_function import OURS, NmsAttributes
from tests.support.nms_cases import SIGMOID, SSD
from tests.support.plugin_cases import (
    FLOATS,
    KINDS,
    NVIDIAS,
    Given,
    carried,
    create,
    given_fields,
    make,
    refused,
    wanted,
)
from tests.support.plugin_driver import (
    BF16,
    CHAR,
    DIMS,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INT8,
    INT16,
    INT32,
    INT64,
    UNKNOWN,
    Collection,
    read_fields,
)
from tests.support.retinanet_golden import retinanet_attributes

LIMITS = {"numClasses": 352, "keepTopK": 1024, "numLayers": 8, "levelTopK": 1024}
"""Those of nms_opt.h, besides topK."""

TOP_K = 1024
"""That of topK without levelTopK."""

RETINANET = retinanet_attributes(264)
BOTH = pytest.mark.parametrize("whole", [SSD, RETINANET], ids=["version 1", "version 2"])


# Names and attributes


@BOTH
def test_creator_says_what_it_makes(driver, whole):
    says = [driver.c.driver_creator_says(whole.version, what).decode() for what in range(4)]
    assert says == ["NMS_OPT_TRT", str(whole.version), "", "PLUGIN CREATOR_V3ONE"]
    names = read_fields(driver.c.driver_field_names(whole.version))
    assert names == {
        name: (kind, length, None) for name, (kind, length, _) in wanted(whole).items()
    }


@BOTH
def test_plugin_has_every_interface(driver, whole):
    plugin = make(driver, whole)
    says = [plugin.says(what) for what in (0, 1, 2, 3, 4, 5, 7)]
    assert says == [
        *("NMS_OPT_TRT", str(whole.version), "", "PLUGIN_V3ONE_CORE", "PLUGIN_V3ONE_BUILD"),
        *("PLUGIN_V3ONE_RUNTIME", "PLUGIN"),
    ]
    found = [driver.c.driver_has_capability(plugin.pointer, kind) for kind in range(4)]
    assert found == [1, 1, 1, 0]


@st.composite
def supported(draw) -> NmsAttributes:
    classes, levels = draw(st.integers(1, LIMITS["numClasses"])), draw(st.integers(1, 8))
    fraction = st.floats(0, 1, width=32)
    ours = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "levelTopK": st.integers(0, LIMITS["levelTopK"]),
                "clipBeforeNms": st.integers(0, 1),
                "bboxXformClip": st.floats(0, width=32, allow_infinity=False),
            },
        )
    )
    return NmsAttributes(
        numClasses=classes,
        topK=levels * ours.get("levelTopK", 0) or draw(st.integers(1, TOP_K)),
        keepTopK=draw(st.integers(1, 1024)),
        confidenceThreshold=draw(fraction),
        nmsThreshold=draw(fraction),
        backgroundLabelId=draw(st.integers(-1, classes - 1)),
        numLayers=levels,
        inputOrder=(0, levels, 2 * levels),
        **draw(st.sampled_from([{}, SIGMOID])),
        **ours,
    )


@given(attributes=supported(), wide=st.sets(st.sampled_from(sorted(KINDS))), data=st.data())
def test_serialised_and_cloned_plugins_are_equal(driver, attributes, wide, data):
    """Any order of the fields, any integer as 64 bits."""
    kinds = {name: INT64 for name in wide if KINDS[name] == INT32}
    fields = data.draw(st.permutations(given_fields(attributes, **kinds)))
    plugin = create(driver, fields, attributes.version)
    assert plugin is not None, driver.messages()
    expected = wanted(attributes)
    assert read_fields(plugin.fields()) == expected
    restored = driver.create_from(plugin.fields().contents, attributes.version, runtime=True)
    copies = [restored, plugin.clone(), restored.clone(attach=True)]
    timing_id = plugin.says(6)
    del plugin  # the copies own what they point to
    for copy in copies:
        assert read_fields(copy.fields()) == expected
        assert copy.says(6) == timing_id
        assert copy.says(1) == str(attributes.version)
    assert driver.messages() == ""


def test_timing_cache_tells_attributes_apart(driver):
    changes = [{}, {"topK": 100}, {"keepTopK": 100}, {"confidenceThreshold": 0.06}, SIGMOID]
    changes += [{"levelTopK": 10, "topK": 60}, {"clipBeforeNms": 1}, {"bboxXformClip": 4.0}]
    ids = {make(driver, replace(SSD, **change)).says(6) for change in changes}
    assert len(ids) == len(changes)


def is_supported(values: dict) -> bool:
    """NmsAttributes knows the operator's values, LIMITS those of the kernels."""
    try:
        attributes = NmsAttributes(**values)
    except SurgeryError:
        return False
    capped = attributes.levelTopK or attributes.topK <= TOP_K
    return capped and all(getattr(attributes, name) <= limit for name, limit in LIMITS.items())


INTEGERS = st.one_of(
    st.integers(-2, 10),
    st.integers(380, 390),
    st.integers(1020, 1030),
    st.integers(-(2**31), 2**31 - 1),
)
REALS = st.one_of(st.floats(width=32), st.sampled_from([-0.01, 0.0, 1.0, 1.01, np.nan, np.inf]))
WITHOUT_CUT = replace(RETINANET, levelTopK=0, topK=200)


@given(
    whole=st.sampled_from([SSD, RETINANET, WITHOUT_CUT]),
    name=st.sampled_from(sorted(KINDS)),
    data=st.data(),
)
def test_any_value_is_taken_or_refused_by_name(driver, whole, name, data):
    values = carried(whole)
    if name not in values:
        return
    if name == "inputOrder":
        values[name] = data.draw(st.tuples(INTEGERS, INTEGERS, INTEGERS))
    else:
        value = data.draw(REALS if name in FLOATS else INTEGERS)
        values[name] = np.float32(value) if name in FLOATS else value
    fields = [Given(key, KINDS[key], value) for key, value in values.items()]
    if is_supported(values):
        assert create(driver, fields, whole.version) is not None, driver.messages()
        assert driver.messages() == ""
        return
    # numClasses, numLayers and levelTopK decide what another attribute may be
    others = {
        "numClasses": "backgroundLabelId",
        "numLayers": "topK" if whole.levelTopK else "inputOrder",
        "levelTopK": "topK",
    }
    assert create(driver, fields, whole.version) is None
    message = driver.messages()
    assert name in message or others.get(name, name) in message
    if name not in (*FLOATS, "inputOrder"):
        assert f"= {values[name]}" in message or others.get(name, "?") in message


@pytest.mark.parametrize(
    ("whole", "name"),
    [*((SSD, name) for name in sorted(NVIDIAS)), *((RETINANET, name) for name in OURS)],
)
def test_absent_duplicate_and_empty(driver, whole, name):
    def refused_so(fields, *parts):
        refused(driver, fields, *parts, version=whole.version)

    fields = given_fields(whole)
    own = next(item for item in fields if item.name == name)
    rest = [item for item in fields if item.name != name]
    refused_so(rest, f"attribute {name} is missing", "graph-surgery nms")
    refused_so([*fields, own], f"attribute {name} is there twice")
    empty = replace(own, values=None, length=3 if name == "inputOrder" else 1)
    refused_so([*rest, empty], f"attribute {name} has no data")
    for length in (-1, 0, 2, 1 << 30):
        refused_so([*rest, replace(own, length=length)], f"{name} has {length} values")
    right = {FLOAT32} if name in FLOATS else {INT32, INT64}
    for kind in {*range(14), 99, -1} - right:
        refused_so([*rest, replace(own, kind=kind)], f"{name} has the field type {kind}")


def test_a_node_of_version_1_has_no_attribute_of_version_2(driver):
    for name in OURS:
        refused(driver, [*given_fields(), Given(name, KINDS[name], 0)], f"{name} is not known")


def test_a_top_k_that_would_cap_is_refused(driver):
    fields = [item for item in given_fields(RETINANET) if item.name != "topK"]
    wrong = Given("topK", INT32, 4999)
    said = "topK = 4999 is not supported with levelTopK = 1000, only numLayers times it: 5000"
    refused(driver, [*fields, wrong], said, version=2)


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 2**40, 200 + 2**32])
def test_64_bits_that_do_not_fit(driver, value):
    fields = [item for item in given_fields() if item.name != "topK"]
    refused(driver, [*fields, Given("topK", INT64, value)], f"topK = {value} does not fit")


def test_names_that_are_none(driver):
    refused(driver, [*given_fields(), Given("permuteBeforeReshape", INT32, 1)], "permuteBeforeR")
    refused(driver, [*given_fields(), Given("", INT32, 1)], "is not known")
    refused(driver, [*given_fields(), Given("x" * 5000, INT32, 1)], "xxx is not known")
    refused(driver, [*given_fields(), Given(None, INT32, 1)], "without a name")
    refused(driver, [], "numClasses is missing")


def test_no_collection(driver):
    for collection in (None, Collection(14, None), Collection(-1, None)):
        assert driver.create_from(collection) is None
        assert driver.messages() == "1 NMS_OPT_TRT: no attributes were given\n"


RUBBISH = st.builds(
    Given,
    name=st.one_of(st.none(), st.sampled_from(sorted(KINDS)), st.text("abcK%ns", max_size=300)),
    kind=st.sampled_from(
        [FLOAT16, FLOAT32, FLOAT64, INT8, INT16, INT32, CHAR, DIMS, UNKNOWN, BF16, INT64, 77]
    ),
    # as many bytes as the longest attribute of the widest type takes
    values=st.one_of(st.none(), st.lists(st.integers(-128, 127), min_size=6, max_size=6)),
    length=st.integers(-2, 3),
)


@given(fields=st.lists(RUBBISH, max_size=20), whole=st.booleans())
def test_rubbish_is_refused(driver, fields, whole):
    """Even behind fourteen good attributes: every further one is a second or an unknown one."""
    if whole and not fields:
        return
    assert create(driver, [*(given_fields() if whole else ()), *fields]) is None
    assert driver.messages().startswith("1 NMS_OPT_TRT: ")


def test_without_a_logger_it_is_standard_error(driver, capfd):
    driver.use_logger(False)
    try:
        assert create(driver, []) is None
    finally:
        driver.use_logger(True)
    assert capfd.readouterr().err.startswith("NMS_OPT_TRT: attribute numClasses is missing")
    assert driver.messages() == ""
