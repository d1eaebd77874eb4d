"""The benchmarks: all that depends on which detector runs is data, and stands here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.errors import HarnessError


@dataclass(frozen=True)
class Remote:
    """A file on a server.

    Attributes
    ----------
    url
        Where it is.
    sha256
        Known SHA-256 in hex; None: recorded on first use.
    size
        Known size in bytes.
    unpacked
        Bytes that the files wanted of an archive take.
    md5
        Known MD5 in hex, where nothing better is published.
    """

    url: str
    sha256: str | None = None
    size: int | None = None
    unpacked: int = 0
    md5: str | None = None

    @property
    def name(self) -> str:
        """The file's name: the end of the URL."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Description:
    """A detector with the data set that judges it.

    Attributes
    ----------
    name
        As ``--benchmarks`` and ``--benchmark`` have it.
    detector
        The network, and LoadGen's name of the model; a folder of logs is called by it.
    dataset
        See `harness.data.dataset.known_dataset`.
    weights
        Checkpoint: in the build folder, where `models` leave it, or shipped.
    models
        What `harness download model` fetches into ``models/DETECTOR`` of the build folder; nothing:
        the weights are shipped.
    reference_map
        mAP of the FP32 model, a fraction, of which the round wants 99 %; None: it is no benchmark
        of MLPerf's.
    round
        Of MLPerf Inference, whose rules hold.
    compliance
        Its compliance tests, keys of `harness.loadgen.audit.COMPLIANCE_TESTS`.
    """

    name: str
    detector: str
    dataset: str
    weights: Path
    models: tuple[Remote, ...] = ()
    reference_map: float | None = None
    round: str = ""
    compliance: tuple[str, ...] = ()


_SSD = "ssd-resnet34"
_RETINANET = "retinanet"

BENCHMARKS: Mapping[str, Description] = {
    one.name: one
    for one in (
        Description(
            _SSD,
            _SSD,
            "coco",
            Path("models") / _SSD / "resnet34-ssd1200.pytorch",
            (
                # MLPerf Inference's PyTorch checkpoint; no checksum of it is published
                Remote("https://zenodo.org/record/3236545/files/resnet34-ssd1200.pytorch"),
                # its ONNX export; size, SHA-256: Open Model Zoo, ssd-resnet34-1200-onnx/model.yml
                Remote(
                    "https://zenodo.org/record/3228411/files/resnet34-ssd1200.onnx",
                    "b417a8186967f1e78670b0075aa72a10e5c7d1a6d5c08af9d13dc97f3d29ef0d",
                    80_363_696,
                ),
            ),
            reference_map=0.20,
            round="v2.0",
            compliance=("TEST01", "TEST04", "TEST05"),
        ),
        Description(
            f"{_SSD}-demo",
            _SSD,
            "demo",
            Path("demo") / f"{_SSD}-demo.safetensors",
            round="v2.0",
            compliance=("TEST01", "TEST04", "TEST05"),
        ),
        Description(
            _RETINANET,
            _RETINANET,
            "openimages",
            Path("models") / _RETINANET / "resnext50_32x4d_fpn.pth",
            (  # MLPerf Inference's PyTorch checkpoint and its ONNX export; MD5: zenodo's records
                Remote(
                    "https://zenodo.org/record/6617981/files/resnext50_32x4d_fpn.pth",
                    md5="a55f6bec3464f605ce8d686da8ac1533",
                ),
                Remote(
                    "https://zenodo.org/record/6617879/files/resnext50_32x4d_fpn.onnx",
                    md5="4544f4e56e0a4684215831cc937ea45c",
                ),
            ),
            reference_map=0.3755,
            round="v5.1",
            compliance=("TEST01",),
        ),
        Description(
            f"{_RETINANET}-demo",
            _RETINANET,
            "demo",
            Path("demo") / f"{_RETINANET}-demo.safetensors",
            round="v5.1",
            compliance=("TEST01",),
        ),
    )
}
"""By name. What rounds say of the scenarios is the same for all: `harness.loadgen.settings`."""

DEFAULT = BENCHMARKS[_SSD]

SUBMITTED = DEFAULT
"""That which ``harness submission`` writes and checks a tree for."""


def benchmark_of_file(model: Path, otherwise: Description = DEFAULT) -> Description:
    """Describe the benchmark of an ONNX file or an engine, which says its `Description.detector`.

    `otherwise` where it does not tell, or cannot be read: what loads it says why.

    Raises
    ------
    HarnessError
        When no benchmark has its detector.
    """
    from engine.errors import EngineError
    from engine.inspect import read_model
    from graph_surgery.names import DETECTOR_KEY

    try:
        metadata = read_model(model).metadata
    except EngineError:
        return otherwise
    return benchmark_of(metadata[DETECTOR_KEY]) if DETECTOR_KEY in metadata else otherwise


def benchmark_of(detector: str) -> Description:
    """Describe the benchmark of a detector, the first that has it.

    Raises
    ------
    HarnessError
        When none has.
    """
    for one in BENCHMARKS.values():
        if one.detector == detector:
            return one
    known = ", ".join(dict.fromkeys(one.detector for one in BENCHMARKS.values()))
    raise HarnessError(f"no benchmark has the detector {detector!r}; known are {known}")
