"""The pictures of the 80 COCO categories: emoji font glyphs, and icons where the font has none.

``python -m demo.glyphs -o demo/glyphs.npz`` packs them into an atlas that is read without the
font and without Pillow.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import numpy.typing as npt
import typer

from demo.categories import CATEGORIES

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
"""Where Debian's package fonts-noto-color-emoji puts the font."""
ATLAS = Path(__file__).with_name("glyphs.npz")
_STRIKE = 109  # the only size of the font's bitmaps (CBDT)

EMOJI: dict[str, str] = {
    "person": "🧍🏽‍♂️ 🧍🏻‍♀️ 🚶🏻‍♀️ 🏃🏿‍♂️ 💃🏼 🕺🏿",
    "bicycle": "🚲",
    "car": "🚗 🚙 🚕",
    "motorcycle": "🏍 🛵",
    "airplane": "✈ 🛩",
    "bus": "🚌 🚎 🚍",
    "train": "🚂 🚅 🚆 🚋",
    "truck": "🚚 🚛 🛻 🚒",
    "boat": "⛵ 🚤 🛥 🛶",
    "traffic light": "🚦 🚥",
    "stop sign": "🛑",
    "bird": "🐦 🦆 🕊 🦜",
    "cat": "🐈 🐈‍⬛ 🐱",
    "dog": "🐕 🐶 🐩",
    "horse": "🐎 🐴",
    "sheep": "🐑 🐏",
    "cow": "🐄 🐮",
    "elephant": "🐘",
    "bear": "🐻 🐻‍❄️",
    "zebra": "🦓",
    "giraffe": "🦒",
    "backpack": "🎒",
    "umbrella": "☂ 🌂",
    "handbag": "👜 👛",
    "suitcase": "🧳 💼",
    "frisbee": "🥏",
    "sports ball": "⚽ 🏀 🏐 ⚾",
    "kite": "🪁",
    "skateboard": "🛹",
    "tennis racket": "🎾",
    "bottle": "🍾 🍼 🧴",
    "wine glass": "🍷",
    "cup": "☕ 🥤 🍵",
    "knife": "🔪",
    "spoon": "🥄",
    "bowl": "🥣 🍚",
    "banana": "🍌",
    "apple": "🍎 🍏",
    "sandwich": "🥪",
    "orange": "🍊",
    "broccoli": "🥦",
    "carrot": "🥕",
    "hot dog": "🌭",
    "pizza": "🍕",
    "donut": "🍩",
    "cake": "🍰 🎂",
    "chair": "🪑",
    "couch": "🛋",
    "potted plant": "🪴",
    "bed": "🛏",
    "toilet": "🚽",
    "tv": "📺",
    "laptop": "💻",
    "mouse": "🖱",
    "keyboard": "⌨",
    "cell phone": "📱",
    "book": "📕 📖 📘 📗",
    "clock": "⏰ 🕒 🕰",
    "vase": "🏺",
    "scissors": "✂",
    "teddy bear": "🧸",
    "toothbrush": "🪥",
}
"""Category name to the emoji that show it, separated by spaces."""


class DemoError(Exception):
    """What the user of a demo command has to put right."""


@dataclasses.dataclass(frozen=True)
class Atlas:
    """Pictures of all categories.

    Attributes
    ----------
    pictures
        BGRA uint8 [h, w, 4], straight alpha, trimmed to the visible pixels.
    classes
        Index into CATEGORIES of each picture.
    """

    pictures: tuple[npt.NDArray[Any], ...]
    classes: npt.NDArray[np.int64]

    def save(self, path: Path) -> None:
        """Write one .npz: ``classes`` int64 [G], ``pngs`` uint8, ``ends`` int64 [G].

        ``pngs`` holds the PNG files of the pictures one behind the other, ``ends`` where each ends.
        """
        pngs = [cv2.imencode(".png", picture)[1].ravel() for picture in self.pictures]
        ends = np.cumsum([len(png) for png in pngs])
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as stream:
            np.savez(stream, classes=self.classes, ends=ends, pngs=np.concatenate(pngs))
        partial = Path(stream.name)
        partial.chmod(0o644)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path = ATLAS) -> "Atlas":
        """Read what ``save`` wrote.

        Raises
        ------
        DemoError
            The file is not there.
        """
        if not path.is_file():
            raise DemoError(f"{path}: no such atlas; make it with python -m demo.glyphs -o {path}")
        with np.load(path) as arrays:
            pngs: list[npt.NDArray[Any]] = np.split(arrays["pngs"], arrays["ends"][:-1])
            pictures = [np.asarray(cv2.imdecode(png, cv2.IMREAD_UNCHANGED)) for png in pngs]
            return cls(tuple(pictures), arrays["classes"])


def render(font: Path = FONT) -> Atlas:
    """Render every category's glyphs and icons.

    Raises
    ------
    DemoError
        The font is missing, or has no picture for one of the emoji.
    """
    from PIL import Image, ImageDraw, ImageFont

    from demo.icons import draw_icons

    if not font.is_file():
        raise DemoError(f"{font}: no such font; install fonts-noto-color-emoji or pass --font")
    face = ImageFont.truetype(str(font), _STRIKE)
    pictures, classes = [], []
    for index, category in enumerate(CATEGORIES):
        images = draw_icons(category.name)
        for emoji in EMOJI.get(category.name, "").split():
            canvas = Image.new("RGBA", (400, 200), (0, 0, 0, 0))
            ImageDraw.Draw(canvas).text((100, 20), emoji, font=face, embedded_color=True)
            images.append(canvas)
        for image in images:
            # Below 16 the alpha is the soft skirt of a shadow that nobody sees.
            box = image.getchannel("A").point(lambda v: 255 * (v >= 16)).getbbox()
            if box is None or box[2] - box[0] > 140:
                raise DemoError(f"{font}: no single picture for category {category.name!r}")
            rgba = np.asarray(image.crop(box))
            pictures.append(np.ascontiguousarray(rgba[..., [2, 1, 0, 3]]))
            classes.append(index)
    return Atlas(tuple(pictures), np.array(classes, dtype=np.int64))


app = typer.Typer(add_completion=False)


@app.command()
def atlas(
    out: Annotated[Path, typer.Option("-o", "--out", help="the .npz to write")] = ATLAS,
    font: Annotated[Path, typer.Option(help="NotoColorEmoji.ttf with CBDT bitmaps")] = FONT,
) -> None:
    """Pack the pictures of all categories into one .npz."""
    made = render(font)
    made.save(out)
    print(f"{out}: {len(made.pictures)} pictures, {out.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    """Run the command; a DemoError becomes one line and exit code 2."""
    try:
        app()
    except DemoError as error:
        print(f"glyphs: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
