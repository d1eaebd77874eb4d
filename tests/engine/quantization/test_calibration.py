"""Calibration against NumPy on all activations at once, and bad input."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from engine.data.preprocessed import images_sha256
from engine.errors import EngineError
from engine.model import load_detector
from engine.quantization.cache import Calibration, parse_trt
from engine.quantization.calibration import _check_float32, calibrate, calibrate_all, is_current
from engine.quantization.histogram import BINS
from engine.quantization.placement import find_placement
from tests.support.calibrated import activations, write_images


def as_bright_as_can_be(image):
    """An image whose pixels begin above 0 and end below three quarters, up to white."""
    mean, std = (np.array(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = image * std + mean
    assert 0 < pixels.min() < pixels.max() < 0.75
    return np.float32((pixels / pixels.max() - mean) / std)


@pytest.fixture(scope="module")
def looked_at(images):
    """What calibration runs: the images, and the dark ones again."""
    three = images.load(range(3))
    return np.concatenate([three, [as_bright_as_can_be(three[index]) for index in DARK]])


@pytest.fixture(scope="module")
def images(small_images, tmp_path_factory):
    spread = small_images * np.float32([0.2, 1, 0.4])[:, None, None, None]
    return write_images(tmp_path_factory.mktemp("images"), spread)


DARK = (0, 2)  # of the images, those without a level above 0.75


@pytest.fixture(scope="module")
def calibrations(surgered, images):
    return calibrate_all(load_detector(surgered), images)


# A whole model


def test_a_float16_network_is_refused_before_its_images_are_run(surgered) -> None:
    model = onnx.load(surgered)
    placement = find_placement(model)
    for tensor in model.graph.initializer:
        if tensor.name == placement.layers[-1].weight:
            value = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    with pytest.raises(EngineError, match="are FLOAT16; quantisation starts from the float32 net"):
        _check_float32(model, placement)


def test_images_of_another_normalisation_are_not_clipped(surgered, small_images, tmp_path) -> None:
    source = write_images(tmp_path, small_images * 3)
    scale = calibrate(load_detector(surgered), source).scales["image"]
    assert scale * 127 == pytest.approx(3 * np.abs(small_images).max(), rel=1e-6)


def test_scales_are_those_of_all_activations_at_once(surgered, looked_at, calibrations) -> None:
    model = onnx.load(surgered)
    values = activations(model, looked_at)
    names = set(calibrations["minmax"].scales)
    # every convolution's and pooling's input, and nothing behind the heads
    wanted = {n.input[0] for n in model.graph.node if n.op_type in ("Conv", "MaxPool")}
    assert wanted <= names <= values.keys()
    # a pixel is 0 to 255: (1 - 0.406) / 0.225 is the farthest from 0, with ImageNet's figures
    assert {c.scales["image"] * 127 for c in calibrations.values()} == {(1 - 0.406) / 0.225}
    for name in names - {"image"}:
        magnitudes = np.abs(values[name])
        top = float(magnitudes.max())
        bin_width = 2.0 ** (np.frexp(top)[1]) / BINS
        scale = {method: c.scales[name] * 127 for method, c in calibrations.items()}
        # batches of one and of three round differently inside ONNX Runtime
        assert scale["minmax"] == pytest.approx(top, rel=1e-4)
        assert 128 * bin_width / 1.001 <= scale["entropy"] <= top * 1.0001
        for method, one in calibrations.items():
            assert one.statistics[name].scales == {
                m: c.scales[name] for m, c in calibrations.items()
            }
            clipped = (magnitudes > scale[method] * 1.0001).mean()
            assert one.statistics[name].clipped <= clipped + 1e-3


def test_the_largest_values_are_those_that_float16_has_to_hold(
    surgered, looked_at, calibrations
) -> None:
    """What is left out is no larger, or is negative and a ReLU makes 0 of it."""
    model = onnx.load(surgered)
    values = activations(model, looked_at)
    found = calibrations["auto"].largest
    for name, value in found.items():
        assert value == pytest.approx(np.abs(values[name]).max(), rel=1e-4)
    (nms,) = (node for node in model.graph.node if node.domain)
    assert found.keys() >= set(nms.input[:-1]) | (calibrations["auto"].scales.keys() - {"image"})
    next_of = {name: n for n in model.graph.node for name in n.input}
    for name in values.keys() - found.keys() - {"image"}:
        behind = next_of[name]
        if behind.op_type == "Add":  # the main branch; the skip is what a ReLU made
            (skip,) = set(behind.input) - {name}
            assert values[skip].min() >= 0
            behind = next_of[behind.output[0]]
        assert behind.op_type == "Relu"
        assert values[name].max() <= found[behind.output[0]] * 1.0001


def test_an_image_is_read_once_and_what_was_read_is_hashed(surgered, images, tmp_path) -> None:
    """Files that are replaced after they were read leave no scales under the new hash."""
    copy = write_images(tmp_path, images.load(range(3)))
    before = images_sha256(copy, 3)

    def replace(done, total) -> None:
        np.save(tmp_path / f"{done - 1:03}.jpg.npy", np.zeros((3, 400, 400), np.float32))

    found = calibrate(load_detector(surgered), copy, method="minmax", progress=replace)
    with pytest.raises(EngineError, match=r"000\.jpg\.npy was written since this command opened"):
        images_sha256(copy, 3)
    copy = dataclasses.replace(copy, times={})  # opened anew
    assert found.images_sha256 == before != images_sha256(copy, 3)
    assert found.scales == calibrate(load_detector(surgered), images, method="minmax").scales
    found.save(tmp_path / "cache.json")
    assert not is_current(
        tmp_path / "cache.json", load_detector(surgered), copy, method="minmax", limit=None
    )


def test_images_that_show_nothing_are_said(surgered, images, calibrations, tmp_path) -> None:
    assert calibrations["auto"].warning is None
    assert calibrations["auto"].empty_images == 0
    flat = np.repeat(np.float32([[-2, 0.5, 2]]).T[..., None, None], 3, axis=1)
    flat = np.broadcast_to(flat, (3, 3, 400, 400))
    white = calibrate(load_detector(surgered), write_images(tmp_path, flat))
    assert white.warning.startswith("3 of 3 calibration images show nothing")
    white.save(tmp_path / "cache.json")
    assert Calibration.load(tmp_path / "cache.json").warning == white.warning
    mixed = np.concatenate([flat[:2], images.load([0])])
    found = calibrate(load_detector(surgered), write_images(tmp_path, mixed))
    assert found.warning.startswith("2 of 3 calibration images show nothing")
    mixed[1] = mixed[2]
    assert calibrate(load_detector(surgered), write_images(tmp_path, mixed)).warning is None


def test_the_batch_does_not_matter(surgered, images, calibrations) -> None:
    seen = []
    detector = load_detector(surgered)
    two = calibrate(
        detector, images, method="minmax", batch=2, progress=lambda *done: seen.append(done)
    )
    assert seen == [(2, 3), (3, 3)]
    one = calibrations["minmax"].scales
    assert two.scales.keys() == one.keys()
    assert all(two.scales[name] == pytest.approx(one[name], rel=1e-4) for name in one)


def test_memory_does_not_grow_with_the_images(surgered, small_images, tmp_path) -> None:
    write_images(tmp_path, np.tile(small_images, (8, 1, 1, 1)))
    script = f"""
import resource, sys
from pathlib import Path
from tests.support.calibrated import SPEC
from engine.model import load_detector
from engine.quantization.calibration import calibrate
from engine.data.preprocessed import PreprocessedSet
names = tuple(f"{{i:03}}.jpg" for i in range(24))
images = PreprocessedSet(Path({str(tmp_path)!r}), names, SPEC, {{}})
calibrate(load_detector(Path({str(surgered)!r})), images, method="minmax", limit=int(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = []
    for count in ("3", "24"):
        command = [sys.executable, "-c", script, count]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    # all activations of one image take 9 MiB, those of 21 more would be far above
    assert peaks[1] < peaks[0] + 20 * 1024


# The cache


def test_the_cache_comes_back(calibrations, tmp_path) -> None:
    path = tmp_path / "cache.json"
    calibrations["entropy"].save(path)
    assert Calibration.load(path) == calibrations["entropy"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["cache.json"]
    with pytest.raises(EngineError, match="cannot write"):
        calibrations["entropy"].save(tmp_path / "nowhere" / "cache.json")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda text: text[:-30], "damaged"),
        (lambda text: text[:0] + "[]", "damaged"),
        (
            lambda text: text.replace('"format": 3', '"format": 2'),
            "another format; make it anew: 'engine calibrate MODEL --data FOLDER -o .* --force'",
        ),
        (lambda text: text.replace('"snr_db"', '"snr"'), "damaged"),
        (lambda text: text.replace('"method"', '"way"'), "damaged"),
        (
            lambda text: text.replace('"image": ', '"image": -'),
            r"scales\.image: greater than 0 expected, not -0\.0",
        ),
        (lambda text: text.replace('"image": ', '"image": "x", "y": '), "damaged"),
    ],
)
def test_unusable_caches(calibrations, tmp_path, change, problem) -> None:
    path = tmp_path / "cache.json"
    calibrations["entropy"].save(path)
    path.write_text(change(path.read_text()))
    with pytest.raises(EngineError, match=problem) as caught:
        Calibration.load(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(EngineError, match="cannot read"):
        Calibration.load(tmp_path / "none.json")


def test_another_models_calibration_is_refused_by_name(surgered, calibrations) -> None:
    model = load_detector(surgered).model
    placement = find_placement(model)
    good = calibrations["entropy"]
    good.check(model, placement)
    for tensor in model.graph.initializer:  # how a file stores weights, and metadata, do not count
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.raw_data:
            value = numpy_helper.to_array(tensor)
            tensor.ClearField("raw_data")
            tensor.float_data.extend(value.ravel().tolist())
            break
    del model.metadata_props[:]
    good.check(model, placement)
    weight = next(t for t in model.graph.initializer if t.name.endswith("conv1.weight"))
    value = numpy_helper.to_array(weight).copy()
    value.flat[5] += 1e-3
    weight.CopyFrom(numpy_helper.from_array(value, weight.name))
    with pytest.raises(EngineError, match="other weights"):
        good.check(model, placement)

    few = dict(good.scales)
    first, second, *_ = sorted(few)
    del few[first], few[second]
    with pytest.raises(EngineError, match=f"no scale for '{first}' and 1 more"):
        dataclasses.replace(good, scales=few).check(model, placement)
    many = {**good.scales, "other": 1.0}
    with pytest.raises(EngineError, match="not quantised, 'other'"):
        dataclasses.replace(good, scales=many).check(model, placement)
    larger = dataclasses.replace(placement, shape=(3, 1200, 1200))
    with pytest.raises(EngineError, match="another preprocessing"):
        good.check(model, larger)


def test_a_cache_is_current_until_something_changes(
    surgered, images, calibrations, tmp_path
) -> None:
    path = tmp_path / "cache.json"
    options = {"method": "entropy", "limit": None}
    assert not is_current(path, load_detector(surgered), images, **options)
    calibrations["entropy"].save(path)
    assert is_current(path, load_detector(surgered), images, **options)
    assert not is_current(path, load_detector(surgered), images, method="minmax", limit=None)
    assert not is_current(path, load_detector(surgered), images, method="entropy", limit=2)
    other = images.load(range(3))
    other[1, 2, 3, 4] += 1
    (tmp_path / "images").mkdir()
    changed = write_images(tmp_path / "images", other)
    assert not is_current(path, load_detector(surgered), changed, **options)
    path.write_text("{}")
    assert not is_current(path, load_detector(surgered), images, **options)


def test_trt_text(calibrations) -> None:
    good = calibrations["entropy"]
    text = good.to_trt()
    assert text.startswith("TRT-100000-EntropyCalibration2\n")
    parsed = parse_trt(text)
    assert parsed == {name: float(np.float32(scale)) for name, scale in good.scales.items()}
    # the line that NVIDIA's cache has for its input: 0.0207925 * 127 = 2.64064
    nvidia = parse_trt("TRT-8001-EntropyCalibration2\ninput: 3caa54fc\n")
    assert nvidia == {"input": pytest.approx(2.640645 / 127, rel=1e-6)}


# Bad input


def test_unusable_images_and_options(surgered, images, exported, tmp_path) -> None:
    def refuse(problem, model=surgered, source=images, **options):
        with pytest.raises(EngineError, match=problem) as caught:
            calibrate(load_detector(model), source, **options)
        assert "\n" not in str(caught.value)

    refuse("no images", source=dataclasses.replace(images, files=()))
    refuse("no images", limit=0)
    refuse("4 images wanted, .* holds 3", limit=4)
    refuse("batch of 0", batch=0)
    refuse("unknown method 'kl'", method="kl")
    refuse("no NMS_OPT_TRT node", model=exported)
    refuse("cannot read", model=tmp_path / "none.onnx")
    spec = dataclasses.replace(images.spec, shape=(3, 300, 300))
    refuse("holds float32 images", source=dataclasses.replace(images, spec=spec))
    bad = images.load(range(3))
    bad[1, 0, 7, 7] = np.nan
    refuse(r"'image': a value is NaN or infinite, for 001\.jpg", source=write_images(tmp_path, bad))
    (tmp_path / "002.jpg.npy").write_bytes(b"")
    refuse(r"002\.jpg\.npy is damaged", source=write_images_but_last(tmp_path, images))


def write_images_but_last(directory, images):
    for index in range(2):
        np.save(directory / f"{index:03}.jpg.npy", images.load([index])[0])
    return dataclasses.replace(images, directory=directory, times={})


def test_a_fixed_batch(surgered, images, tmp_path) -> None:
    model = onnx.load(surgered)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 3
    del model.graph.value_info[:]
    path = tmp_path / "fixed.onnx"
    onnx.save(model, path)
    with pytest.raises(EngineError, match="batch is fixed at 3"):
        calibrate(load_detector(path), images, method="minmax")
    fixed = calibrate(load_detector(path), images, method="minmax", batch=3)
    assert json.loads(json.dumps(fixed.scales)) == fixed.scales
