"""Known answers: the pictures are the same everywhere, right engines pass, wrong ones never."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from hashlib import sha256
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.backends.triton.known import (
    COUNT,
    LEAST,
    KnownAnswers,
    _firsts,
    agreement,
    check_answers,
    draw,
    find_known,
)
from engine.errors import EngineError
from engine.load import load_engine
from engine.protocol import InputSpec, Session
from tests.support import ROOT
from tests.support.int8_models import write_int8

SPEC = InputSpec("image", (3, 60, 80), "float32")


@pytest.fixture(scope="module")
def engine(exported):
    return load_engine("onnxruntime", exported)


@pytest.fixture(scope="module")
def known(engine):
    return find_known(engine)


# Pictures


@pytest.mark.parametrize("spec", [SPEC, replace(SPEC, dtype="int8", scale=1 / 48)])
def test_pictures_are_the_same_in_another_process(spec):
    script = (
        "import sys; from engine.backends.triton.known import draw\n"
        "from engine.protocol import InputSpec\n"
        f"sys.stdout.buffer.write(draw(7, {spec!r}).tobytes())"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, cwd=ROOT)
    picture = draw(7, spec)
    assert (picture.shape, picture.dtype) == (spec.shape, spec.dtype)
    assert picture.tobytes() == done.stdout
    assert not np.array_equal(picture, draw(8, spec))


def test_pictures_are_normalised_images_of_whole_grey_levels():
    """(level / 255 - mean) / std of ImageNet, as for photographs."""
    picture = draw(3, SPEC).transpose(1, 2, 0)
    levels = (picture * (0.229, 0.224, 0.225) + (0.485, 0.456, 0.406)) * 255
    assert np.abs(levels - np.rint(levels)).max() < 1e-3
    assert levels.min() > -1e-3
    assert levels.max() < 255.001
    assert np.ptp(levels) > 50


# Agreement


def detections(*rows):
    """Rows of (label, left, score): boxes of 0.1 x 0.1."""
    found = [[0, 0, left, 0.1, left + 0.1, score, label] for label, left, score in rows]
    return np.array(found, np.float32).reshape(-1, 7)


def test_agreement_of_small_answers():
    one = detections((1, 0.1, 0.8), (2, 0.5, 0.4))
    assert agreement(one, one) == 1
    assert agreement(one, detections((1, 0.1, 0.8))) == pytest.approx(0.8 / 1.2)
    assert agreement(one, detections((1, 0.1, 0.6), (2, 0.5, 0.4))) == pytest.approx(1.0 / 1.2)
    assert agreement(one, detections((2, 0.1, 0.8), (1, 0.5, 0.4))) == 0  # labels swapped
    assert agreement(one, detections((1, 0.3, 0.8), (2, 0.7, 0.4))) == 0  # boxes elsewhere
    assert agreement(one, detections()) == 0
    assert agreement(detections(), detections()) == 1


ROWS = st.lists(
    st.tuples(st.integers(1, 3), st.sampled_from([0.0, 0.02, 0.3, 0.6]), st.floats(0.05, 1)),
    max_size=6,
)


@given(first=ROWS, second=ROWS)
def test_agreement_is_a_symmetric_share(first, second):
    one, other = detections(*first), detections(*second)
    found = agreement(one, other)
    assert 0 <= found <= 1 + 1e-6
    assert found == pytest.approx(agreement(other, one))
    assert agreement(one, one) == pytest.approx(1)


# Text


def test_answers_survive_as_text(known):
    again = KnownAnswers.from_text(known.to_text())
    assert (again.seeds, again.images_sha256) == (known.seeds, known.images_sha256)
    for one, other in zip(again.answers, known.answers, strict=True):
        assert agreement(one, other) > 0.99
    assert "\n" not in known.to_text()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(
    text=st.text(max_size=9)
    | JSON.map(json.dumps)
    | st.fixed_dictionaries({"seeds": JSON, "answers": JSON, "images_sha256": JSON}).map(json.dumps)
)
def test_any_other_text_is_refused_or_read(text):
    try:
        found = KnownAnswers.from_text(text)
    except EngineError as error:
        assert str(error) == "the known answers are damaged"
    else:
        assert len(found.seeds) == len(found.answers)
        assert all(answer.shape[1:] == (7,) for answer in found.answers)


# Engines that are right


def test_known_answers_are_those_of_the_engine(engine, known):
    assert LEAST <= len(known.seeds) <= COUNT
    images = np.stack([draw(seed, engine.input_spec) for seed in known.seeds])
    assert sha256(images.tobytes()).hexdigest() == known.images_sha256
    session = engine.session()
    for image, answer in zip(images, known.answers, strict=True):
        found, counts = session.infer(image[None])
        np.testing.assert_array_equal(found[0, : min(counts[0], 32)], answer)
    for number, answer in enumerate(known.answers):
        assert all(agreement(answer, other) < 0.5 for other in known.answers[:number])


def check(engine, known, batch):
    with closing(engine.session()) as session:
        check_answers(session, engine, known, batch, "the server")


def test_a_right_engine_passes(engine, known, monkeypatch):
    """It gets batches up to the size it is asked with, and never sees more than it takes."""
    sizes = []  # a batch takes 20 ms of a clock of its own
    clock = SimpleNamespace(monotonic=lambda: 0.02 * len(sizes))
    monkeypatch.setattr("engine.backends.triton.known.time", clock)

    def note(detections, counts, _):
        sizes.append(len(counts))
        return detections, counts

    check(WrongEngine(engine, note), known, 4)
    assert {1, 4} <= set(sizes) <= {1, 2, 3, 4}
    assert sum(sizes) > 3 * len(known.seeds)


def test_int8_passes_by_its_own_answers_with_other_threads(surgered, tmp_path):
    model = write_int8(surgered, tmp_path / "int8.onnx", "fp32")
    found = find_known(load_engine("onnxruntime", model, threads=1))
    check(load_engine("onnxruntime", model, threads=2), found, 3)


# Engines that are wrong


class Wrong(Session):
    """A session whose answers are spoilt by a function; at most two batches are in flight."""

    depth = 2

    def __init__(self, engine, spoil):
        self._session = engine.session()
        self._spoil = spoil
        self._results = []

    def submit(self, images):
        self._session.submit(images)
        detections, counts = (array.copy() for array in self._session.result())
        self._results.append(self._spoil(detections, counts, len(self._results)))

    def result(self):
        return self._results.pop(0)

    def close(self):
        self._session.close()


class WrongEngine:
    def __init__(self, engine, spoil):
        self.input_spec, self.host_array = engine.input_spec, engine.host_array
        self.session = lambda: Wrong(engine, spoil)


def stale():
    """Every answer is that of the request before: a replayed CUDA graph on old input."""
    last = []

    def spoil(detections, counts, _):
        last.append((detections, counts))
        before, numbers = last[-2] if len(last) > 1 else last[-1]
        rows = np.resize(before, detections.shape)
        return rows, np.resize(numbers, counts.shape)

    return spoil


def unwritten(detections, counts, _):
    """The buffer is sent before it is written."""
    return np.zeros_like(detections), np.zeros_like(counts)


def half_written(detections, counts, _):
    for image, count in zip(detections, counts, strict=True):
        image[: count // 2 + 1, 1:] = 0
    return detections, counts


def swapped(detections, counts, _):
    """Two images of a batch for each other, which a batch of one does not show."""
    order = np.arange(len(counts))
    order[:2] = order[:2][::-1]
    return detections[order], counts[order]


def under_load(detections, counts, in_flight):
    """Only wrong while another batch is in flight."""
    return (detections[::-1], counts[::-1]) if in_flight else (detections, counts)


def not_numbers(detections, counts, _):
    """Memory that was never written may hold anything."""
    detections[..., 5] = np.nan
    return detections, counts


def last_slot(detections, counts, _):
    """The last place of a full batch is never computed."""
    if len(counts) == 4:
        counts[3] = 0
    return detections, counts


def shifted(detections, counts, _):
    """Every box, by so little that each is still found."""
    detections[..., 1:5] += 0.003
    return detections, counts


def dimmed(detections, counts, _):
    detections[..., 5] *= 0.9
    return detections, counts


@pytest.mark.parametrize("spoil", [shifted, dimmed], ids=lambda spoil: spoil.__name__)
def test_an_engine_that_is_a_little_wrong_everywhere_is_refused(engine, known, spoil):
    with pytest.raises(EngineError, match="the server gives wrong answers: boxes overlap"):
        check(WrongEngine(engine, spoil), known, 4)


@pytest.mark.parametrize(
    "spoil",
    [stale(), unwritten, half_written, swapped, under_load, not_numbers, last_slot],
    ids=lambda spoil: spoil.__name__,
)
def test_a_wrong_engine_is_refused(engine, known, spoil):
    with pytest.raises(EngineError, match=r"the server gives wrong answers: the one to known pict"):
        check(WrongEngine(engine, spoil), known, 4)


def test_the_message_names_the_answer_that_came_instead(engine, known):
    with pytest.raises(EngineError, match=r"known picture 1, .*; it is that to picture 0"):
        check(WrongEngine(engine, stale()), known, 1)


def test_who_draws_other_pictures_cannot_check(engine, known):
    with pytest.raises(EngineError, match="drawn otherwise here"):
        check(engine, replace(known, images_sha256="0" * 64), 4)


@given(count=st.integers(LEAST, COUNT), depth=st.integers(1, 9), batch=st.integers(1, 70))
def test_every_full_batch_has_other_pictures_than_the_last(count, depth, batch):
    """Else a late answer would be right; but for the turns of one picture alone."""
    firsts = _firsts(count, depth)
    turns = [[(first + slot) % count for slot in range(batch)] for first, step in firsts if step]
    assert len(turns) > depth
    for one, other in pairwise(turns):
        assert all(a != b for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("damage", [{"seeds": []}, {"seeds": [-1] * 5}, {"seeds": [float("inf")]}])
def test_answers_that_nothing_can_be_checked_by(known, damage):
    text = json.dumps(json.loads(known.to_text()) | damage)
    with pytest.raises(EngineError, match="the known answers are damaged"):
        KnownAnswers.from_text(text)


def test_an_engine_without_numbers_has_no_known_answers(engine):
    with pytest.raises(EngineError, match="only 0 of"):
        find_known(WrongEngine(engine, not_numbers))


def test_large_pictures_are_fewer(engine, known, monkeypatch):
    monkeypatch.setattr("engine.backends.triton.known._BYTES", 6 * 3 * 400 * 400 * 4)
    assert find_known(engine).seeds == known.seeds[:6]


def test_a_model_that_finds_nothing(engine):
    with pytest.raises(EngineError, match="only 0 of 72 generated pictures have detections"):
        find_known(WrongEngine(engine, unwritten))
