"""Tuning and its cache, with a cuDNN whose kernels and times are made up."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.backends.cudnn import tuning as cudnn_tuning
from engine.backends.cudnn.graph import Window
from engine.backends.cudnn.plans import Choice, CompiledPlan, ConvShape
from engine.backends.cudnn.tuning import (
    Machine,
    Tuned,
    cache_path,
    load_cache,
    load_winners,
    save_cache,
    save_winners,
    tune,
)
from engine.errors import EngineError
from engine.support.files import write_atomically
from tests.support.formats import Sample, damages

MACHINE = Machine("NVIDIA H100 80GB HBM3", "9.19.0", "1.32.0")
WINDOW = Window((3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
LARGE = ConvShape(1, 64, 30, 30, 64, WINDOW, "int8", "int8", residual=False, relu=True)
SMALL = replace(LARGE, height=1, width=1)
BATCHES = (1, 2, 4)
ADVISED = [Choice(4, (("KERNEL_CFG", index),)) for index in range(6)]
OTHERS = [Choice(4, (("KERNEL_CFG", index),)) for index in range(6, 12)]


class MadeUp:
    """Kernels take as long as `times` says, by batch; what is compiled is kept in `compiled`."""

    def __init__(self, patch, times):
        self.times, self.compiled = times, []
        patch.setattr(cudnn_tuning, "choices", self.choices)
        patch.setattr(cudnn_tuning, "compile_all", self.compile_all)

    def choices(self, *_, every):
        return [*ADVISED, *(OTHERS if every else [])]

    def compile_all(self, jobs, _device, progress):
        found = {}
        assert len(set(jobs)) == len(jobs)
        for shape, choice in jobs:
            self.compiled.append((shape, choice))
            found.setdefault(shape, []).append(CompiledPlan(shape, choice, 8, str(choice).encode()))
            progress()
        return found

    def measure(self, shape, plans):
        return [self.times(shape, plan.choice) for plan in plans]

    def tune(self, known=(), progress=None, keep=dict, batches=BATCHES):
        layers = [
            {batch: replace(shape, batch=batch) for batch in batches} for shape in (LARGE, SMALL)
        ]
        options = {"device": 0, "progress": progress, "keep": keep}
        return tune(None, None, layers, dict(known), self.measure, **options)


@pytest.fixture
def kernels(monkeypatch):
    def make(times):
        return MadeUp(monkeypatch, times)

    return make


def by_number(shape, choice):
    """The higher its number, the faster."""
    return 100.0 - choice.knobs[0][1]


def test_heavy_layers_try_every_kernel_and_smaller_batches_what_won(kernels):
    made = kernels(by_number)
    tuned = made.tune()
    assert len(tuned) == 6
    tried = {}
    for shape, choice in made.compiled:
        tried.setdefault(shape, set()).add(choice)
    assert tried[replace(LARGE, batch=4)] == {*ADVISED, *OTHERS}
    assert tried[replace(SMALL, batch=4)] == set(ADVISED)
    for batch in (1, 2):
        assert {OTHERS[-1], ADVISED[0]} <= tried[replace(LARGE, batch=batch)]
        assert len(tried[replace(LARGE, batch=batch)]) < len(ADVISED + OTHERS)
        assert tuned[replace(LARGE, batch=batch)].plan.choice == OTHERS[-1]
    assert tuned[replace(SMALL, batch=4)].milliseconds == 95.0
    for one in tuned.values():
        assert one.ranking[0] == one.plan.choice
        assert one.plan.plan == str(one.plan.choice).encode()


def test_what_is_known_is_not_tried_again(kernels):
    first = kernels(by_number)
    tuned = first.tune()
    known = {shape: one for shape, one in tuned.items() if shape.batch != 2}
    second = kernels(by_number)
    again = second.tune(known)
    assert {shape.batch for shape, _ in second.compiled} == {2}
    assert again == tuned
    third = kernels(by_number)
    assert third.tune(tuned) == tuned
    assert not third.compiled


@pytest.mark.parametrize(("largest", "searched"), [(8, False), (9, True)])
def test_a_batch_twice_as_large_tries_what_won(kernels, largest, searched):
    known = kernels(by_number).tune()
    made = kernels(by_number)
    tuned = made.tune(known, batches=(*BATCHES, largest))
    tried = {choice for shape, choice in made.compiled if shape == replace(LARGE, batch=largest)}
    assert (len(tried) == len(ADVISED + OTHERS)) == searched
    assert tuned[replace(LARGE, batch=largest)].plan.choice == OTHERS[-1]


def test_every_stage_is_kept_as_soon_as_it_is_there(kernels):
    kept = []
    tuned = kernels(by_number).tune(keep=kept.append)
    assert [{shape.batch for shape in found} for found in kept] == [{4}, {1, 2}]
    assert kept[0] | kept[1] == tuned


def test_progress_counts_to_the_end(kernels):
    told = []
    kernels(by_number).tune(progress=lambda done, total: told.append((done, total)))
    ends = [done for done, total in told if done == total]
    assert len(ends) == 2  # two stages
    assert told[0][0] == 1


def test_kernels_that_fail_are_passed_over(kernels):
    def times(shape, choice):
        return float("inf") if choice.knobs[0][1] > 3 else by_number(shape, choice)

    tuned = kernels(times).tune()
    for shape, one in tuned.items():
        assert one.plan.choice.knobs[0][1] <= 3
        assert one.milliseconds == by_number(shape, one.plan.choice)
    assert tuned[replace(LARGE, batch=4)].plan.choice.knobs == (("KERNEL_CFG", 3),)


def test_a_shape_that_no_kernel_runs_is_an_error(kernels):
    with pytest.raises(EngineError, match=r"no kernel that runs n4 int8 64x30x30 .* relu"):
        kernels(lambda *_: float("inf")).tune()


def some_tuned():
    ranking = (Choice(4, (("KERNEL_CFG", 26), ("SPLIT_K_SLC", 2))), Choice(7, ()))
    return {
        shape: Tuned(CompiledPlan(shape, ranking[0], 64, bytes(range(256))), 0.25, ranking)
        for shape in (LARGE, SMALL)
    }


def test_the_cache_returns_what_was_put_in(tmp_path):
    path = tmp_path / "folder" / "cache.json"
    tuned = some_tuned()
    assert load_cache(path, MACHINE, tuned) == {}
    save_cache(path, MACHINE, {LARGE: tuned[LARGE]})
    save_cache(path, MACHINE, {SMALL: tuned[SMALL]})  # adds to it
    assert load_cache(path, MACHINE, tuned) == tuned
    assert load_cache(path, MACHINE, [LARGE]) == {LARGE: tuned[LARGE]}
    assert load_cache(path, MACHINE, [replace(LARGE, batch=2), replace(LARGE, relu=False)]) == {}
    assert {file.name for file in path.parent.iterdir()} == {"cache.json", "cache.json.lock"}


def test_who_saves_at_the_same_time_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "cache.json"

    def slowly(path, content):
        time.sleep(0.02)  # others may read and write meanwhile
        write_atomically(path, content)

    monkeypatch.setattr(cudnn_tuning, "write_atomically", slowly)
    names = {f"layer {number}": str(number) for number in range(8)}
    with ThreadPoolExecutor(len(names) + 1) as pool:
        saved = [pool.submit(save_winners, path, MACHINE, {key: names[key]}) for key in names]
        saved.append(pool.submit(save_cache, path, MACHINE, some_tuned()))
        for one in saved:
            one.result()
    assert load_winners(path, MACHINE) == names
    assert load_cache(path, MACHINE, some_tuned()) == some_tuned()


def test_winners_lie_beside_the_plans(tmp_path):
    path = tmp_path / "cache.json"
    assert load_winners(path, MACHINE) == {}
    save_winners(path, MACHINE, {"a": "first", "b": "second"})
    save_cache(path, MACHINE, some_tuned())
    save_winners(path, MACHINE, {"b": "first"})
    assert load_winners(path, MACHINE) == {"a": "first", "b": "first"}
    assert load_cache(path, MACHINE, some_tuned()) == some_tuned()
    assert load_winners(path, replace(MACHINE, cudnn="other")) == {}


@pytest.mark.parametrize("field", ["gpu", "cudnn", "frontend"])
def test_the_cache_of_another_machine_is_none(tmp_path, field, monkeypatch):
    path = tmp_path / "cache.json"
    save_cache(path, MACHINE, some_tuned())
    other = replace(MACHINE, **{field: "other"})
    assert load_cache(path, other, [LARGE]) == {}
    monkeypatch.setenv("BUILD_DIR", str(tmp_path))
    assert cache_path(other) != cache_path(MACHINE)
    assert tmp_path in cache_path(MACHINE).parents


@given(st.data())
def test_a_damaged_cache_is_as_good_as_none(tmp_path, data):
    path = tmp_path / "cache.json"
    path.unlink(missing_ok=True)
    tuned = some_tuned()
    save_cache(path, MACHINE, tuned)
    save_winners(path, MACHINE, {"key": "name"})
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    assert all(isinstance(name, str) for name in load_winners(path, MACHINE).values())
    for one in load_cache(path, MACHINE, tuned).values():
        assert isinstance(one.plan.plan, bytes)
        assert one.ranking
    save_cache(path, MACHINE, tuned)  # and is mended
    assert load_cache(path, MACHINE, tuned) == tuned


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b"",
        b"[]",
        b"3",
        b"{}",
        b'{"machine": null}',
        b"\xff\xfe",
        b'{"plans": {"a": 1}}',
    ],
)
def test_a_file_that_is_no_cache_is_replaced(tmp_path, content):
    path = tmp_path / "cache.json"
    path.write_bytes(content)
    tuned = some_tuned()
    assert load_cache(path, MACHINE, tuned) == {}
    save_cache(path, MACHINE, tuned)
    assert load_cache(path, MACHINE, tuned) == tuned


@pytest.mark.parametrize(
    ("field", "value"),
    [("ranking", []), ("ranking", 3), ("plan", "?"), ("workspace_bytes", -1), ("plan", None)],
)
def test_a_damaged_entry_is_left_out(tmp_path, field, value):
    path = tmp_path / "cache.json"
    tuned = some_tuned()
    save_cache(path, MACHINE, tuned)
    document = json.loads(path.read_bytes())
    document["plans"][str(LARGE)][field] = value
    path.write_text(json.dumps(document))
    assert load_cache(path, MACHINE, tuned) == {SMALL: tuned[SMALL]}


ENTRY = Sample(
    {"milliseconds": 0.25, "ranking": [[4, {"KNOB": 26}], [7, {}]], "workspace_bytes": 64}
    | {"plan": "".join(chr(c) for c in range(97, 122))},
    maps=frozenset({"ranking[][]"}),
)


@given(damages(ENTRY))
def test_an_entry_of_another_type_is_left_out(tmp_path_factory, damage):
    path = tmp_path_factory.getbasetemp() / "cache.json"
    path.unlink(missing_ok=True)
    tuned = some_tuned()
    save_cache(path, MACHINE, tuned)
    document = json.loads(path.read_bytes())
    whole = document["plans"][str(LARGE)]
    document["plans"][str(LARGE)] = damage.document | (
        {"plan": whole["plan"]} if damage.document.get("plan") == ENTRY.document["plan"] else {}
    )
    path.write_text(json.dumps(document))
    assert load_cache(path, MACHINE, tuned) == {SMALL: tuned[SMALL]}


def test_a_cache_from_before_there_were_winners(tmp_path):
    path = tmp_path / "cache.json"
    save_cache(path, MACHINE, some_tuned())
    document = json.loads(path.read_bytes())
    del document["winners"]
    path.write_text(json.dumps(document))
    assert load_cache(path, MACHINE, some_tuned()) == some_tuned()
    assert load_winners(path, MACHINE) == {}


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match="cannot write it"):
        save_cache(tmp_path / "file" / "cache.json", MACHINE, some_tuned())
