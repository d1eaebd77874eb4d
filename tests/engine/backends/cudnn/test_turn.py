"""Engines that tune at once, in threads and in processes, with a made-up cuDNN."""

from __future__ import annotations

import errno
import multiprocessing
import threading
import time
from contextlib import closing
from unittest.mock import MagicMock

import pytest

from engine.backends.cudnn import engine as cudnn
from engine.backends.cudnn import tuning
from engine.backends.cudnn.engine import _plans
from engine.backends.cudnn.measure import Chooser
from engine.backends.cudnn.plans import Choice, CompiledPlan
from engine.backends.cudnn.tuning import Machine, Turn, cache_path, load_cache
from engine.errors import EngineError
from tests.engine.backends.cudnn.test_hopper import network

MACHINE = Machine("NVIDIA H200", "9.19.0", "1.32.0")
BATCHES = (1, 2, 4)


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    """Shapes that were compiled, in this process and in forked ones; compiling takes its time."""
    compiled = multiprocessing.get_context("fork").SimpleQueue()

    def compile_all(jobs, _device, count):
        found = {}
        for shape, choice in jobs:
            compiled.put(str(shape))
            found.setdefault(shape, []).append(CompiledPlan(shape, choice, 8, b"plan"))
            count()
        time.sleep(0.3)  # the other asks meanwhile
        return found

    monkeypatch.setenv("BUILD_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "choices", lambda *_, **__: [Choice(4, ())])
    monkeypatch.setattr(tuning, "compile_all", compile_all)
    monkeypatch.setattr(cudnn, "load_plan", lambda _cudnn, _handle, plan: plan.plan)
    monkeypatch.setattr(cudnn, "measure_plans", lambda *_: [1.0])
    return compiled


def load(device, start):
    """Find the plans of every shape, as an engine does that is loaded on a GPU."""
    start.wait(10)
    with closing(Turn(cache_path(MACHINE))) as turn:
        return _plans(
            MagicMock(), None, network(), BATCHES, MACHINE, turn=turn, stream=None, device=device
        )


def taken(queue):
    found = []
    while not queue.empty():
        found.append(queue.get())
    return found


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_two_engines_that_load_together_search_once(kind, kernels):
    if kind == "threads":
        start, make = threading.Barrier(2), threading.Thread
    else:
        context = multiprocessing.get_context("fork")
        start, make = context.Barrier(2), context.Process
    both = [make(target=load, args=(device, start), daemon=True) for device in (0, 1)]
    for one in both:
        one.start()
    for one in both:
        one.join(30)
        assert not one.is_alive()  # nobody waits for a circle
    once = taken(kernels)
    assert len(once) == len(set(once)) > len(BATCHES)
    at_once = threading.Event()
    at_once.set()
    known = load(0, at_once)
    assert {str(shape) for shape in known} == set(once)
    assert not taken(kernels)


def test_where_a_file_system_has_no_locks_nobody_waits(kernels, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    at_once = threading.Event()
    at_once.set()
    assert load(0, at_once)
    assert taken(kernels)


def test_the_next_goes_on_where_one_was_killed(kernels):
    """The kernel takes the lock back; what was found before is kept."""
    context = multiprocessing.get_context("fork")
    path = cache_path(MACHINE)
    held = context.Event()

    def hold():
        with closing(Turn(path)) as turn:
            turn.take()
            held.set()
            time.sleep(60)

    holder = context.Process(target=hold, daemon=True)
    holder.start()
    assert held.wait(10)
    start = threading.Event()
    start.set()
    waiting = threading.Thread(target=load, args=(0, start), daemon=True)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    assert not taken(kernels)
    holder.kill()
    waiting.join(30)
    assert not waiting.is_alive()
    assert taken(kernels)


def test_a_load_that_lacks_nothing_does_not_wait(kernels):
    start = threading.Event()
    start.set()
    found = load(0, start)
    with closing(Turn(cache_path(MACHINE))) as turn:
        turn.take()
        again = load(1, start)
    assert again == found
    assert load_cache(cache_path(MACHINE), MACHINE, found).keys() == found.keys()


def test_winners_that_another_found_meanwhile_are_not_measured(monkeypatch):
    from engine.backends.cudnn.hopper import Hopper
    from engine.backends.cudnn.layers import groups
    from tests.engine.backends.cudnn.test_hopper import CUDNN, Recorder

    measured, winners = [], {}
    monkeypatch.setattr(
        Chooser, "_measure", lambda _, candidates, *__: measured.append(1) or candidates[0].name
    )
    hopper, graph = Hopper(Recorder(), ""), network()

    def choose(take_turn):
        chooser = Chooser(CUDNN, hopper, graph, None, lambda: dict(winners), take_turn=take_turn)
        for group in groups(graph):
            chooser(4, group)
        return chooser.winners

    found = choose(bool)
    assert len(measured) == len(found) > 1

    def other_first():
        winners.update(found)
        return True

    assert choose(other_first) == found
    assert len(measured) == len(found)


def test_a_folder_that_cannot_be_locked_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match=r"search\.lock: cannot lock it: ") as caught:
        Turn(tmp_path / "file" / "cache.json").take()
    assert "\n" not in str(caught.value)
