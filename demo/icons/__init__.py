"""Icons for the COCO categories that the emoji font has no glyph for."""

from PIL import Image

from demo.icons.canvas import Canvas
from demo.icons.home import HOME
from demo.icons.outdoors import OUTDOORS


def draw_icons(category: str) -> list[Image.Image]:
    """Paint the icons of a category.

    Parameters
    ----------
    category
        COCO category name.

    Returns
    -------
    RGBA images of SIZE x SIZE pixels, none where the font has the glyphs.
    """
    images = []
    for paint in (OUTDOORS | HOME).get(category, ()):
        canvas = Canvas()
        paint(canvas)
        images.append(canvas.finish())
    return images
