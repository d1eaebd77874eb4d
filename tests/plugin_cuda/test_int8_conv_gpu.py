"""The convolution kernels against exact integer convolution by PyTorch in float64."""

import numpy as np
import pytest

from plugin_cuda.int8_conv import conv3x3, stem, stem_weight

torch = pytest.importorskip("torch")

pytest_plugins = ("tests.support.nms_library",)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("nms_library"),
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a GPU of compute capability 9.0",
    ),
]
POISON = 0x55


def random_bytes(rng, *shape):
    return torch.from_numpy(rng.integers(-128, 128, shape, np.int8)).cuda()


def multipliers(rng, channels, inputs):
    """Scales and biases that spread the results over all of 0 to 127 and beyond."""
    spread = 70.0 / (74.0 * 74.0 * inputs**0.5)
    multiplier = torch.from_numpy(spread * rng.uniform(0.5, 1.5, channels).astype(np.float32))
    bias = torch.from_numpy(rng.normal(20, 20, channels).astype(np.float32))
    return multiplier.cuda(), bias.cuda()


def rounded(real):
    return real.clamp(0, 127).round()


def check(actual, expected):
    """Equal but for values that lie on a tie: then one apart, and rarely."""
    difference = (actual.double() - expected.double()).abs()
    assert difference.max() <= 1
    assert (difference > 0).double().mean() < 1e-4


def launch(run):
    run(torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize(
    "channels", [(64, 64), (64, 192), (128, 128), (128, 256), (256, 256), (256, 64)]
)
@pytest.mark.parametrize(
    ("batch", "height", "width"),
    [(1, 1, 1), (1, 30, 8), (2, 37, 21), (5, 75, 75), (1, 150, 150), (3, 300, 300)],
)
def test_conv3x3(batch, height, width, channels, residual):
    inputs, outputs = channels
    rng = np.random.default_rng([batch, height, inputs, outputs, residual])
    x = random_bytes(rng, batch, height, width, inputs)
    weight = random_bytes(rng, outputs, 3, 3, inputs)
    multiplier, bias = multipliers(rng, outputs, 9 * inputs)
    shape = (batch, height, width, outputs)
    skip, step = random_bytes(rng, *shape), 0.37
    y = torch.full(shape, POISON, dtype=torch.int8, device="cuda")
    run = conv3x3(
        batch,
        height,
        width,
        inputs,
        outputs,
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        multiplier=multiplier.data_ptr(),
        bias=bias.data_ptr(),
        y=y.data_ptr(),
        residual=skip.data_ptr() if residual else None,
        residual_multiplier=step,
    )
    launch(run)
    sums = torch.nn.functional.conv2d(
        x.permute(0, 3, 1, 2).double(), weight.permute(0, 3, 1, 2).double(), padding=1
    )
    real = sums.permute(0, 2, 3, 1) * multiplier + bias
    expected = rounded(real + step * skip.double() if residual else real)
    if batch > 1:  # both bounds are met
        assert {0, 127} <= set(expected.unique().tolist())
    check(y, expected)


@pytest.mark.parametrize("pool_multiplier", [0.8, 1.0, 1.7])
@pytest.mark.parametrize(
    ("batch", "height", "width"),
    [(1, 16, 16), (2, 100, 400), (1, 404, 364), (300, 36, 244), (2, 1200, 1200)],
)
def test_stem(batch, height, width, pool_multiplier):
    rng = np.random.default_rng([batch, height])
    x = random_bytes(rng, batch, 3, height, width)
    weight = random_bytes(rng, 64, 3, 7, 7)
    arranged = torch.from_numpy(stem_weight(weight.cpu().numpy())).cuda()
    multiplier, bias = multipliers(rng, 64, 147)
    bias -= 60  # the maximum of nine is large
    y = torch.full((batch, height // 4, width // 4, 64), POISON, dtype=torch.int8, device="cuda")
    run = stem(
        batch,
        height,
        width,
        x=x.data_ptr(),
        weight=arranged.data_ptr(),
        multiplier=multiplier.data_ptr(),
        bias=bias.data_ptr(),
        pool_multiplier=pool_multiplier,
        y=y.data_ptr(),
    )
    launch(run)
    sums = torch.nn.functional.conv2d(x.double(), weight.double(), stride=2, padding=3)
    first = rounded(sums * multiplier[:, None, None] + bias[:, None, None])
    pooled = torch.nn.functional.max_pool2d(first, 3, 2, 1)
    expected = rounded(pooled * float(np.float32(pool_multiplier))).permute(0, 2, 3, 1)
    limit = round(127 * min(pool_multiplier, 1.0))
    assert expected.max() == limit
    difference = (y.double() - expected).abs()
    assert difference.max() <= max(1, np.ceil(pool_multiplier))  # a tie before pooling, scaled
    assert (difference > 0).double().mean() < 1e-3


@pytest.mark.parametrize("channels", [64, 128, 256])
def test_runs_are_the_same(channels):
    """Ten runs of one input, over poisoned outputs: the same bits."""
    rng = np.random.default_rng(0)
    shape = (4, 150, 150, channels)
    x, weight = random_bytes(rng, *shape), random_bytes(rng, channels, 3, 3, channels)
    multiplier, bias = multipliers(rng, channels, 9 * channels)
    skip = random_bytes(rng, *shape)
    y = torch.empty(shape, dtype=torch.int8, device="cuda")
    run = conv3x3(
        *shape,
        channels,
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        multiplier=multiplier.data_ptr(),
        bias=bias.data_ptr(),
        y=y.data_ptr(),
        residual=skip.data_ptr(),
        residual_multiplier=0.5,
    )
    results = []
    for _ in range(10):
        y.fill_(POISON)
        launch(run)
        results.append(y.clone())
    assert all(torch.equal(results[0], other) for other in results[1:])
