"""What the table of layers is made of."""

from __future__ import annotations

import pytest

from engine.backends.cudnn.layers import groups
from engine.bench.cudnn import bench, least_bytes, operations
from engine.errors import EngineError
from tests.support.ssd_geometry import ssd_graph


def test_operations_of_the_full_network():
    """432.83 GFLOP an image: counted by hooks on the PyTorch model, 2 for a multiply-add."""
    graph = ssd_graph()
    assert operations(graph, graph.layers) == pytest.approx(432.83e9, rel=1e-4)


def test_head_maps_of_the_full_network():
    graph = ssd_graph()
    maps = {graph.tensors[head.tensor].height: 0 for head in graph.heads.values()}
    assert list(maps) == [50, 25, 13, 7, 3]
    cells = [graph.tensors[head.tensor] for name, head in graph.heads.items() if "conf" in name]
    assert sum(t.height * t.width * t.channels // 85 for t in cells) == 15130  # priors


def test_a_size_that_the_engine_runs_as_another(tmp_path):
    with pytest.raises(
        EngineError, match="engine runs 5 images as more; what it prepares: 1, 2, 3"
    ):
        bench(tmp_path / "m.onnx", output=tmp_path / "o.json", batches="1,5,8")


def test_least_bytes():
    graph = ssd_graph()
    steps = groups(graph)
    image, pooled = 3 * 1200 * 1200, 64 * 300 * 300
    assert least_bytes(graph, steps[0], 2) == 2 * (image + pooled) + 64 * 3 * 7 * 7
    first, second = steps[1], steps[2]
    weight = 64 * 64 * 3 * 3
    assert least_bytes(graph, first, 1) == 2 * pooled + weight
    assert least_bytes(graph, second, 1) == 3 * pooled + weight  # with the residual
    assert least_bytes(graph, steps[-1], 1) == 256 * 7 * 7 + 340 * 3 * 3 * 2 + 340 * 256 * 9
