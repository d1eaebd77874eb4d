"""Supersampled, shaded drawing for the icons."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Point = tuple[float, float]
SIZE = 128
"""Side of a finished icon in pixels."""
_SCALE = 6


class Canvas:
    """RGBA canvas of SIZE units, _SCALE pixels a unit, with shapes filled by a gradient."""

    def __init__(self) -> None:
        self.image = Image.new("RGBA", (SIZE * _SCALE, SIZE * _SCALE), (0, 0, 0, 0))

    def _fill(self, mask: Image.Image, colours: str, axis: str) -> None:
        """Paint through ``mask``; ``colours`` is "#a" or "#a #b", a gradient over its box."""
        box = mask.getbbox()
        if box is None:
            return
        first, *rest = colours.split()
        start, stop = (_rgb(first), _rgb(rest[0] if rest else first))
        width, height = box[2] - box[0], box[3] - box[1]
        ramp = np.linspace(0, 1, width if axis == "x" else height)[:, None]
        line = (start + (stop - start) * ramp).round().astype(np.uint8)
        plane = line[None] if axis == "x" else line[:, None]
        paint = Image.fromarray(np.broadcast_to(plane, (height, width, 3)).copy(), "RGB")
        part = mask.crop(box)
        layer = Image.new("RGBA", self.image.size, (0, 0, 0, 0))
        layer.paste(paint, box[:2], part)
        layer.putalpha(mask)
        self.image.alpha_composite(layer)

    def _mask(self, paint: Callable[[ImageDraw.ImageDraw], None]) -> Image.Image:
        mask = Image.new("L", self.image.size, 0)
        paint(ImageDraw.Draw(mask))
        return mask

    def polygon(self, points: Sequence[Point], colours: str, axis: str = "y") -> None:
        """Fill the polygon through ``points``."""
        scaled = [(x * _SCALE, y * _SCALE) for x, y in points]
        self._fill(self._mask(lambda d: d.polygon(scaled, fill=255)), colours, axis)

    def smooth(self, points: Sequence[Point], colours: str, axis: str = "y") -> None:
        """Fill a closed Catmull-Rom curve through ``points``."""
        self.polygon(_closed_curve(points), colours, axis)

    def box(
        self,
        box: tuple[float, float, float, float],
        colours: str,
        radius: float = 0,
        axis: str = "y",
    ) -> None:
        """Fill a rounded rectangle (left, top, right, bottom)."""
        xy = [v * _SCALE for v in box]
        mask = self._mask(lambda d: d.rounded_rectangle(xy, radius * _SCALE, fill=255))
        self._fill(mask, colours, axis)

    def ellipse(
        self, box: tuple[float, float, float, float], colours: str, axis: str = "y"
    ) -> None:
        """Fill the ellipse in a box (left, top, right, bottom)."""
        xy = [v * _SCALE for v in box]
        self._fill(self._mask(lambda d: d.ellipse(xy, fill=255)), colours, axis)

    def line(self, points: Sequence[Point], width: float, colours: str, axis: str = "y") -> None:
        """Stroke a polyline with round joints and ends."""
        scaled = [(x * _SCALE, y * _SCALE) for x, y in points]
        radius = width * _SCALE / 2

        def paint(draw: ImageDraw.ImageDraw) -> None:
            draw.line(scaled, fill=255, width=round(width * _SCALE), joint="curve")
            for x, y in (scaled[0], scaled[-1]):
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)

        self._fill(self._mask(paint), colours, axis)

    def rotate(self, degrees: float) -> None:
        """Turn what is painted so far counter-clockwise about the centre."""
        self.image = self.image.rotate(degrees, Image.Resampling.BICUBIC)

    def finish(self) -> Image.Image:
        """Add a faint darker rim, as the font's pictures have, and reduce to SIZE."""
        alpha = self.image.getchannel("A")
        inner = alpha.filter(ImageFilter.MinFilter(2 * _SCALE - 1))
        rim = Image.fromarray(np.asarray(alpha) - np.minimum(np.asarray(alpha), np.asarray(inner)))
        shade = Image.new("RGBA", self.image.size, (20, 25, 30, 0))
        shade.putalpha(rim.point(lambda v: v * 0.35))
        self.image.alpha_composite(shade)
        return self.image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)], dtype=np.float64)


def _closed_curve(points: Sequence[Point], steps: int = 12) -> list[Point]:
    control = np.asarray(points, dtype=np.float64)
    before, after, later = (np.roll(control, shift, axis=0) for shift in (1, -1, -2))
    curve = []
    for p0, p1, p2, p3 in zip(before, control, after, later, strict=True):
        for t in np.arange(steps) / steps:
            x, y = (
                p1
                + 0.5 * t * (p2 - p0)
                + t**2 * (p0 - 2.5 * p1 + 2 * p2 - 0.5 * p3)
                + t**3 * (1.5 * (p1 - p2) + 0.5 * (p3 - p0))
            )
            curve.append((float(x), float(y)))
    return curve


def mirror(points: Sequence[Point], centre: float = 64) -> list[Point]:
    """Close a left outline (top to bottom) with its mirror image about x = ``centre``."""
    return [*points, *((2 * centre - x, y) for x, y in reversed(points))]
