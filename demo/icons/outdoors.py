"""Icons of street furniture, sports gear and clothing.

Each function paints one object on a 128-unit canvas in the manner of the emoji font's pictures. All
coordinates are in canvas units, (0, 0) is the top left corner.
"""

import math
from collections.abc import Callable

from demo.icons.canvas import Canvas, Point, mirror


def _fire_hydrant(c: Canvas) -> None:
    c.box((34, 112, 94, 122), "#f0442f #a51d14", 3)
    c.box((42, 44, 86, 114), "#ff6a4d #b81f14", 4, "x")
    c.box((36, 100, 92, 108), "#ff7a5e #a51d14", 3, "x")
    c.box((16, 58, 44, 82), "#ffcf4a #c98a12", 4)
    c.box((84, 58, 112, 82), "#ffcf4a #c98a12", 4)
    c.box((11, 62, 20, 78), "#e6a923 #9c6a0a", 2)
    c.box((108, 62, 117, 78), "#e6a923 #9c6a0a", 2)
    c.ellipse((49, 56, 79, 86), "#ffd65c #c98a12")
    c.ellipse((57, 64, 71, 78), "#b57a0c #e6a923")
    c.polygon(mirror([(56, 14), (46, 22), (40, 38)]), "#ff7a5e #c2281a")
    c.box((34, 36, 94, 47), "#ff8468 #b81f14", 4)
    c.box((57, 5, 71, 17), "#ffcf4a #c98a12", 3)
    c.line([(50, 90), (50, 97)], 3, "#ff9d86")


def _stop_sign(c: Canvas) -> None:
    c.box((60, 70, 68, 127), "#b9c0c7 #6f7880", 1, "x")

    def octagon(radius: float) -> list[Point]:
        turns = [math.pi / 8 + i * math.pi / 4 for i in range(8)]
        return [(64 + radius * math.cos(a), 50 + radius * math.sin(a)) for a in turns]

    c.polygon(octagon(50), "#ffffff #e3e3e3")
    c.polygon(octagon(45), "#e8322a #b81414")
    letters = (
        [
            [
                (33, 41),
                (30, 38),
                (22, 38),
                (20, 43),
                (31, 52),
                (32, 58),
                (29, 62),
                (22, 62),
                (19, 59),
            ]
        ],
        [[(38, 38), (54, 38)], [(46, 38), (46, 62)]],
        [
            [
                (62, 38),
                (72, 38),
                (75, 43),
                (75, 57),
                (72, 62),
                (62, 62),
                (59, 57),
                (59, 43),
                (62, 38),
            ]
        ],
        [[(83, 62), (83, 38), (95, 38), (99, 43), (99, 47), (95, 51), (83, 51)]],
    )
    for letter in letters:
        for stroke in letter:
            c.line([(x * 0.84 + 13.5, y) for x, y in stroke], 5, "#ffffff")


def _parking_meter(c: Canvas) -> None:
    c.box((58, 70, 70, 126), "#aab3bb #59626a", 2, "x")
    c.box((48, 118, 80, 126), "#8b959d #4a5259", 3)
    c.smooth(mirror([(52, 4), (33, 18), (30, 44), (36, 72), (52, 80)]), "#93a3b1 #4a5a68", "x")
    c.smooth(mirror([(54, 12), (42, 22), (41, 38), (54, 42)]), "#f4fbff #b9d8e8")
    c.polygon([(62, 40), (66, 40), (76, 22)], "#d22222")
    for x, y in ((48, 26), (55, 19), (64, 17), (73, 19)):
        c.ellipse((x - 1.6, y - 1.6, x + 1.6, y + 1.6), "#333b42")
    c.box((52, 49, 76, 73), "#2f6fd0 #1f4f9c", 4)
    c.line([(60, 69), (60, 54), (67, 54), (69, 58), (67, 62), (60, 62)], 3.4, "#ffffff")


def _bench(c: Canvas) -> None:
    for x in (20, 104):
        c.line([(x, 30), (x, 112)], 6, "#5a636b #343b41")
        c.line([(x - 10, 112), (x + 10, 112)], 6, "#4a5259 #2b3136")
        c.line([(x, 68), (x + (8 if x < 64 else -8), 84)], 5, "#4a5259")
    for y in (28, 43):
        c.box((6, y, 122, y + 11), "#d99a55 #a2672b", 3)
    for y in (70, 81):
        c.box((2, y, 126, y + 9), "#e5a863 #9a6026", 3)
    for x in (20, 104):
        for y in (33, 48):
            c.ellipse((x - 2, y - 2, x + 2, y + 2), "#5c3a17")


def _plain_tie(c: Canvas) -> None:
    c.polygon([(52, 26), (76, 26), (86, 98), (64, 126), (42, 98)], "#3a6fd8 #173a86", "x")
    c.polygon([(48, 4), (80, 4), (74, 28), (54, 28)], "#5a8cf0 #24509e", "x")
    for x, y in ((60, 46), (70, 60), (56, 72), (72, 84), (62, 98)):
        c.ellipse((x - 3, y - 3, x + 3, y + 3), "#f3f6ff")


def _striped_tie(c: Canvas) -> None:
    c.polygon([(52, 26), (76, 26), (86, 98), (64, 126), (42, 98)], "#d8333f #8c1320", "x")
    for y in (38, 58, 78, 98):
        half = 12 + (y - 26) * 0.14
        c.polygon(
            [(64 - half, y + 10), (64 + half, y - 6), (64 + half, y + 2), (64 - half, y + 18)],
            "#f6d66b #d9a92d",
        )
    c.polygon([(48, 4), (80, 4), (74, 28), (54, 28)], "#ef5a64 #a81c2b", "x")


def _skis(c: Canvas) -> None:
    for x, colours in ((44, "#ff5a4d #b3170f"), (84, "#ff5a4d #b3170f")):
        c.smooth(
            mirror([(x - 1, 2), (x - 7, 16), (x - 7, 60), (x - 7, 116), (x - 5, 126)], x),
            colours,
            "x",
        )
        c.box((x - 3, 18, x + 3, 42), "#ffe27a #f0b429", 3)
        c.box((x - 8, 56, x + 8, 70), "#4d565e #22272c", 3)
        c.box((x - 9, 80, x + 9, 90), "#4d565e #22272c", 3)
        c.box((x - 3, 98, x + 3, 116), "#ffffff #d8d8d8", 3)
    c.rotate(-12)


def _ski_pair_crossed(c: Canvas) -> None:
    for slope in (-1, 1):
        c.line([(64 - 40 * slope, 120), (64 + 40 * slope, 10)], 9, "#39b6f0 #0b5c9c")
        c.line([(64 + 40 * slope, 10), (64 + 47 * slope, 4)], 7, "#5cc9fa #2b8cc9")
        c.line([(64 - 10 * slope, 79), (64 - 2 * slope, 57)], 12, "#3b434a #1f2428")
        c.line([(64 + 26 * slope, 29), (64 + 33 * slope, 20)], 4, "#ffffff")
    for x in (12, 116):
        c.line([(x, 22), (64 + (x - 64) * 0.78, 122)], 2.6, "#9aa3ab #5d666d")
        c.line([(x, 14), (x + (64 - x) * 0.04, 26)], 5, "#30363b")
        c.ellipse((x * 0.78 + 8, 110, x * 0.78 + 20, 116), "#6b747b #4a5259")


def _snowboard(c: Canvas) -> None:
    c.smooth(
        mirror([(60, 3), (44, 12), (43, 34), (47, 64), (43, 94), (44, 116), (60, 125)]),
        "#7b4be0 #2ec4d6",
    )
    c.polygon(mirror([(48, 46), (64, 30)]), "#ffd84d #ffa62b")
    c.polygon(mirror([(48, 82), (64, 98)]), "#ffd84d #ffa62b")
    for y in (36, 82):
        c.box((36, y, 92, y + 11), "#39414a #15191d", 5)
        c.box((50, y - 5, 78, y + 16), "#4f5a64 #20262b", 5)
        c.line([(55, y + 1), (73, y + 10)], 3, "#ff5d7a")
    c.rotate(-32)


def _baseball_bat(c: Canvas) -> None:
    c.smooth(
        mirror([(62, 2), (54, 6), (53, 30), (56, 62), (60, 90), (60.5, 117)]),
        "#efbf7d #a8692c",
        "x",
    )
    c.box((59.5, 88, 68.5, 116), "#3c3f45 #191b1e", 2, "x")
    for y in (92, 98, 104, 110):
        c.line([(60, y + 3), (68, y)], 1.2, "#73777e")
    c.ellipse((55, 114, 73, 124), "#d29a55 #8a531f")
    c.box((57, 30, 71, 42), "#c23b2f #8d2018", 1, "x")
    c.rotate(-38)


def _baseball_glove(c: Canvas) -> None:
    for tip, base in (
        ((32, 20), (42, 70)),
        ((50, 12), (54, 66)),
        ((70, 12), (68, 66)),
        ((88, 22), (82, 70)),
    ):
        c.line([base, tip], 18, "#c87a3a #9c5420")
        c.line([base, tip], 1.6, "#6e3813")
    c.line([(50, 96), (26, 78), (15, 52)], 20, "#c27434 #8f4b1b")
    c.smooth(
        [(30, 62), (40, 50), (64, 46), (88, 50), (98, 66), (96, 94), (82, 116), (56, 120),
         (38, 108), (28, 90)],
        "#cf8342 #874417",
    )  # fmt: skip
    c.smooth(
        [(46, 64), (64, 58), (82, 66), (84, 86), (70, 98), (52, 94), (42, 80)], "#8a4a1c #6b3510"
    )
    c.polygon([(20, 36), (32, 18), (42, 26), (36, 62), (28, 60)], "#a9622a #8a4a1c")
    for offset in (0, 9, 18):
        c.line([(20 + offset * 0.4, 40 + offset), (36, 30 + offset)], 2.2, "#f2d29b")
    c.line([(42, 112), (62, 117), (84, 108)], 3, "#f2d29b")
    c.ellipse((50, 62, 80, 92), "#ffffff #cfd3d6")
    c.line([(56, 67), (60, 77), (56, 87)], 1.8, "#d22a2a")
    c.line([(74, 67), (70, 77), (74, 87)], 1.8, "#d22a2a")


def _surfboard(c: Canvas) -> None:
    c.smooth(
        mirror([(62, 1), (52, 16), (44, 48), (45, 92), (55, 124)]),
        "#fff4d6 #f2d08a",
        "x",
    )
    c.polygon(mirror([(47, 36), (64, 54), (64, 68), (44.5, 50)]), "#ff6f3d #e6402a")
    c.polygon(mirror([(44.4, 60), (64, 80), (64, 92), (45, 74)]), "#18b5c9 #0d7f96")
    c.line([(64, 6), (64, 122)], 1.8, "#9a6a2f")
    c.polygon([(62, 108), (66, 108), (66, 122), (62, 122)], "#39414a")
    c.rotate(24)


OUTDOORS: dict[str, tuple[Callable[[Canvas], None], ...]] = {
    "fire hydrant": (_fire_hydrant,),
    "stop sign": (_stop_sign,),
    "parking meter": (_parking_meter,),
    "bench": (_bench,),
    "tie": (_plain_tie, _striped_tie),
    "skis": (_skis, _ski_pair_crossed),
    "snowboard": (_snowboard,),
    "baseball bat": (_baseball_bat,),
    "baseball glove": (_baseball_glove,),
    "surfboard": (_surfboard,),
}
"""Category name to its icons."""
