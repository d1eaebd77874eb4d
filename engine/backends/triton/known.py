"""Known answers: what an engine must find on pictures that anyone can draw again.

A server may give answers that are whole, plausible and of another image, without any error: when
it sends them before they are written, or replays a CUDA graph on old input. So the answers to
known pictures travel with the model, and are asked for again, under load, before figures count.
A picture is drawn from its seed, so that only seeds and answers have to be kept.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from engine.data.matching import match_detections
from engine.data.preprocessed import MEAN, STD, quantize_images
from engine.errors import EngineError
from engine.protocol import Engine, InputSpec, Session
from engine.support.documents import parse_json
from engine.support.progress import Progress

COUNT = 24
"""Pictures that are looked for."""

LEAST = 4
"""Pictures without which nothing can be told apart."""

_TRIES = 3 * COUNT
_ROWS = 32  # the best detections of a picture that are kept
_MIN_IOU = 0.5  # of detections of one object by two implementations
_BYTES = 2**27  # of the pictures together: of large ones there are fewer
_MIN_SCORE = 0.6  # sum of the scores of a picture: a single weak detection may come and go
_ALIKE = 0.25
"""Agreement of two pictures' answers from which on one of them is left out."""

_RIGHT = 0.5
"""Agreement of right answers. The demo model in INT8 by other arithmetic (ONNX Runtime without its
optimisations) has 0.80 and more, FP32 against INT8 0.63 and more."""

_LEAST_IOU = 0.94
"""Mean IoU of all pairs: 0.974 and 0.966 in these two cases; boxes shifted by 1 % have 0.906."""

_MOST_BIAS = 0.07
"""Relative difference of the sum of all scores: 0.011 and 0.025 in these two cases."""

_LOAD_SECONDS = 1.0
_SLOW_SECONDS = 20.0  # for the full batches of an engine for which that is little


_NO_FIGURE = (
    "No figure of it counts: start it again, with a repository that 'harness triton-repository' "
    "writes anew"
)


@dataclass(frozen=True)
class KnownAnswers:
    """Answers to known pictures.

    Attributes
    ----------
    seeds
        Of the pictures, see `draw`.
    answers
        For each float32 [n, 7], its best detections: rows as of `engine.protocol.Session`.
    images_sha256
        Hash of the pictures as the engine takes them: who draws others cannot use the answers.
    """

    seeds: tuple[int, ...]
    answers: tuple[NDArray[np.float32], ...]
    images_sha256: str

    def to_text(self) -> str:
        """Write them as JSON, in one line."""
        rows = [
            [[round(float(x), 4) for x in row[1:]] for row in answer] for answer in self.answers
        ]
        return json.dumps(
            {"images_sha256": self.images_sha256, "seeds": self.seeds, "answers": rows},
            separators=(",", ":"),
        )

    @staticmethod
    def from_text(text: str) -> KnownAnswers:
        """Read what `to_text` wrote.

        Raises
        ------
        EngineError
            When it is something else.
        """
        try:
            values = parse_json(text)
            answers = [
                np.insert(np.array(rows, np.float32).reshape(-1, 6), 0, 0, axis=1)
                for rows in values["answers"]
            ]
            seeds = tuple(map(int, values["seeds"]))
            known = KnownAnswers(seeds, tuple(answers), str(values["images_sha256"]))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise EngineError("the known answers are damaged") from error
        whole = LEAST <= len(seeds) == len(answers) and min(seeds) >= 0 and max(seeds) < 2**32
        if not (whole and all(np.isfinite(answer).all() for answer in answers)):
            raise EngineError("the known answers are damaged")
        return known


def draw(seed: int, spec: InputSpec) -> NDArray[np.generic]:
    """Draw a picture: shapes of any colour on a gradient, with noise.

    Parameters
    ----------
    seed
        Of ``numpy.random.RandomState``, whose numbers no release of NumPy changes.
    spec
        The input that it is for.

    Returns
    -------
    ndarray
        [3, H, W] of the spec's dtype, normalised as `harness preprocess` does.
    """
    random = np.random.RandomState(seed)
    _, height, width = spec.shape
    corners = random.randint(0, 256, (2, 2, 3)).astype(np.float32)
    y = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    x = np.linspace(0, 1, width, dtype=np.float32)[:, None]
    top, bottom = (corners[i, 0] * (1 - x) + corners[i, 1] * x for i in (0, 1))
    image = top * (1 - y) + bottom * y
    for _ in range(random.randint(4, 16)):
        size = [int(side * random.uniform(0.05, 0.5)) for side in (height, width)]
        begin = [
            random.randint(0, side - part) for side, part in zip((height, width), size, strict=True)
        ]
        v, u = (np.linspace(-1, 1, part, dtype=np.float32) for part in size)
        v = v[:, None]
        inside = (v**2 + u**2 < 1, abs(v) + abs(u) < 1, np.ones(size, bool))[random.randint(3)]
        shade = (1 - 0.3 * v)[..., None] * random.randint(0, 256, 3).astype(np.float32)
        part = image[begin[0] : begin[0] + size[0], begin[1] : begin[1] + size[1]]
        np.copyto(part, shade, where=inside[..., None])
    image += random.randint(-12, 13, image.shape).astype(np.float32)
    pixels = np.clip(np.rint(image), 0, 255).astype(np.float32)
    normalised = (pixels / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return quantize_images(np.ascontiguousarray(normalised.transpose(2, 0, 1)), spec)


def agreement(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """Share of two answers that is the same: 1 for equal ones, 0 for answers without a match.

    Of every pair of detections (same label, IoU of at least 0.5) the lesser score counts, over the
    greater sum of all scores: so what matters most is what is surest. Two empty answers agree, and
    nothing with a NaN or an infinite value does.

    Parameters
    ----------
    first, second
        float32 [n, 7], valid rows of one image, best first.
    """
    first, second = first[:_ROWS], second[:_ROWS]
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return 0.0
    most = max(first[:, 5].sum(), second[:, 5].sum())
    if most == 0:
        return 1.0
    pairs = match_detections(first, second, _MIN_IOU).pairs
    common = np.minimum(first[pairs[:, 0], 5], second[pairs[:, 1], 5])
    return float(common.sum() / most)


def find_known(engine: Engine, progress: Progress | None = None) -> KnownAnswers:
    """Draw pictures, and keep those that an engine's answers tell apart.

    Parameters
    ----------
    engine
        An engine that is right.
    progress
        Called with the pictures found so far.

    Raises
    ------
    EngineError
        When too few of them have detections that differ, so that right answers could not be told
        from wrong ones.
    """
    spec = engine.input_spec
    image_bytes = math.prod(spec.shape) * np.dtype(spec.dtype).itemsize
    wanted = max(LEAST, min(COUNT, _BYTES // image_bytes))
    seeds: list[int] = []
    answers: list[NDArray[np.float32]] = []
    with closing(engine.session()) as session:
        for seed in range(_TRIES):
            detections, counts = session.infer(draw(seed, spec)[None])
            answer = detections[0, : min(counts[0], _ROWS)].copy()
            if not answer[:, 5].sum() >= _MIN_SCORE:  # nor NaN
                continue
            if all(agreement(answer, other) < _ALIKE for other in answers):
                seeds.append(seed)
                answers.append(answer)
                if progress is not None:
                    progress(len(seeds), wanted)
            if len(seeds) == wanted:
                break
    if len(seeds) < LEAST:
        raise EngineError(
            f"only {len(seeds)} of {_TRIES} generated pictures have detections that tell them "
            f"apart, at least {LEAST} are needed: is the model trained?"
        )
    return KnownAnswers(tuple(seeds), tuple(answers), _images_sha256(_draw_all(tuple(seeds), spec)))


def check_answers(
    session: Session, engine: Engine, known: KnownAnswers, max_batch: int, name: str
) -> None:
    """Ask a session for known answers, under load, and refuse it at the first wrong one.

    As many batches as it takes are in flight: one picture four times and then another, which shows
    answers that are late; full batches of pictures in turn; batches of all sizes for a second. The
    full ones are smaller where they would take over 20 seconds. In the end boxes and scores are
    looked at over all answers, for what is a little wrong everywhere.

    Parameters
    ----------
    session, engine
        What is under test.
    known
        The answers of the same model.
    max_batch
        Largest batch that will be used.
    name
        What the engine is, for the message.

    Raises
    ------
    EngineError
        When an answer is wrong: which, where it came, and whose answer it is instead.
    """
    spec, count = engine.input_spec, len(known.seeds)
    drawn = _draw_all(known.seeds, spec)
    if _images_sha256(drawn) != known.images_sha256:
        raise EngineError(
            f"{name}: the pictures of its known answers are drawn otherwise here; write the model "
            "repository anew with 'harness triton-repository'"
        )
    pictures = engine.host_array(drawn.shape, drawn.dtype)
    pictures[:] = drawn
    traffic = _Traffic(session, pictures, known, name)
    begin = time.monotonic()
    singles = [*[0] * 4, *[1] * 4, 0]
    traffic.run([one] for one in singles)
    each = (time.monotonic() - begin) / len(singles)
    firsts = _firsts(count, session.depth)
    batch = max(1, min(max_batch, int(_SLOW_SECONDS / each / len(firsts))))
    traffic.run([(first + slot * step) % count for slot in range(batch)] for first, step in firsts)
    traffic.run(_any_batches(count, batch, time.monotonic() + _LOAD_SECONDS))
    traffic.check_all()


class _Traffic:
    """Requests of pictures by their numbers, and the check of the answers."""

    def __init__(
        self, session: Session, pictures: NDArray[np.generic], known: KnownAnswers, name: str
    ) -> None:
        self._session = session
        self._images = pictures
        self._known = known
        self._name = name
        self._flying: deque[Sequence[int]] = deque()
        self._answered = 0
        self._last: dict[int, NDArray[np.float32]] = {}  # answer to each picture

    def run(self, requests: Iterator[Sequence[int]]) -> None:
        """Keep as many requests in flight as the session takes, until all are answered."""
        for numbers in requests:
            if len(self._flying) == self._session.depth:
                self._take()
            self._session.submit(list(_runs(self._images, numbers)))
            self._flying.append(numbers)
        while self._flying:
            self._take()

    def _take(self) -> None:
        detections, counts = self._session.result()
        numbers = self._flying.popleft()
        self._answered += 1
        for slot, number in enumerate(numbers):
            answer = detections[slot, : max(0, counts[slot])][:_ROWS]
            if not agreement(answer, self._known.answers[number]) >= _RIGHT:
                raise EngineError(self._wrong(answer, number, slot, len(numbers)))
            self._last[number] = answer.copy()

    def check_all(self) -> None:
        """Look at the boxes and scores of the pictures together, if half of them were asked for.

        Raises
        ------
        EngineError
            When they are not what they should be.
        """
        if 2 * len(self._last) < len(self._known.answers):
            return  # of a slow engine; a few may differ more
        pairs = [(self._known.answers[number], answer) for number, answer in self._last.items()]
        iou = np.concatenate([match_detections(*pair, _MIN_IOU).iou for pair in pairs]).mean()
        known, found = (
            sum(float(one[:, 5].sum()) for one in side) for side in zip(*pairs, strict=True)
        )
        if iou < _LEAST_IOU or abs(found / known - 1) > _MOST_BIAS:
            raise EngineError(
                f"{self._name} gives wrong answers: boxes overlap the known ones by {iou:.3f} in "
                f"the mean ({_LEAST_IOU} at least), scores are {found / known:.3f} of the known "
                f"ones (1 ± {_MOST_BIAS}). {_NO_FIGURE}"
            )

    def _wrong(self, answer: NDArray[np.float32], number: int, slot: int, size: int) -> str:
        found = [agreement(answer, other) for other in self._known.answers]
        instead = int(np.argmax(found))
        whose = (
            f"it is that to picture {instead}"
            if found[instead] >= _RIGHT
            else f"{found[number]:.0%} of it is right"
        )
        return (
            f"{self._name} gives wrong answers: the one to known picture {number}, at place "
            f"{slot + 1} of a batch of {size}, in request {self._answered} of the check, is not "
            f"what the model finds there; {whose}. {_NO_FIGURE}"
        )


def _firsts(count: int, depth: int) -> list[tuple[int, int]]:
    """First picture and step of each full batch: pictures in turn, then one alone, and another.

    Each batch has another picture in every place than the last one.
    """
    turns = [(number * (1 + count // 2) % count, 1) for number in range(depth + 2)]
    return turns + [(picture, 0) for picture in (0, 1) for _ in range(min(4, depth + 1))]


def _any_batches(count: int, batch: int, until: float) -> Iterator[Sequence[int]]:
    """Batches of any size, half of them full, until a time of `time.monotonic`."""
    random = np.random.default_rng()  # another check asks otherwise
    while time.monotonic() < until:
        size = batch if random.random() < 0.5 else int(random.integers(1, batch + 1))
        first = int(random.integers(count))
        yield [(first + slot) % count for slot in range(size)]


def _runs(images: NDArray[np.generic], numbers: Sequence[int]) -> Iterator[NDArray[np.generic]]:
    """Runs of images that lie side by side, as a query's samples often do."""
    begin = 0
    for end in range(1, len(numbers) + 1):
        if end == len(numbers) or numbers[end] != numbers[end - 1] + 1:
            yield images[numbers[begin] : numbers[end - 1] + 1]
            begin = end


@lru_cache(maxsize=1)
def _draw_all(seeds: tuple[int, ...], spec: InputSpec) -> NDArray[np.generic]:
    return np.stack([draw(seed, spec) for seed in seeds])


def _images_sha256(images: NDArray[np.generic]) -> str:
    return sha256(np.ascontiguousarray(images).data.cast("B")).hexdigest()
