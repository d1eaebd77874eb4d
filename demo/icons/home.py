"""Icons of furniture, kitchen and household things.

Each function paints one object on a 128-unit canvas in the manner of the emoji font's pictures. All
coordinates are in canvas units, (0, 0) is the top left corner.
"""

from collections.abc import Callable

from demo.icons.canvas import Canvas, mirror


def _fork(c: Canvas) -> None:
    for x in (49, 59, 69, 79):
        c.line([(x, 6), (x, 44)], 5, "#f4f6f8 #aab2ba", "x")
    c.smooth(mirror([(47, 38), (47, 52), (56, 62), (61, 68)]), "#eef1f4 #9aa3ab", "x")
    c.smooth(mirror([(60, 62), (60.5, 80), (57, 112), (60, 124)]), "#eef1f4 #8d969e", "x")
    c.rotate(-28)


def _dining_table(c: Canvas) -> None:
    for x in (24, 104):
        c.polygon([(x - 5, 62), (x + 5, 62), (x + 3, 122), (x - 3, 122)], "#a86a30 #6e4017", "x")
    for x in (38, 90):
        c.polygon([(x - 4, 58), (x + 4, 58), (x + 2, 104), (x - 2, 104)], "#8a5422 #573212", "x")
    c.polygon([(22, 34), (106, 34), (126, 62), (2, 62)], "#dc9a52 #b97636")
    c.box((2, 61, 126, 70), "#a5652b #7c481b", 2)
    c.ellipse((48, 42, 80, 55), "#ffffff #dfe4e8")
    c.ellipse((54, 45, 74, 53), "#eef2f5 #cfd6db")
    c.line([(40, 45), (37, 54)], 1.8, "#f3f6f8")
    c.line([(88, 45), (91, 54)], 1.8, "#f3f6f8")
    c.box((58, 26, 70, 40), "#4aa3df #2b78b0", 4)
    for x, y, colours in ((58, 20, "#ff6a8a"), (64, 15, "#ffd24d"), (70, 20, "#ff6a8a")):
        c.line([(64, 28), (x, y)], 1.6, "#3c8d3a")
        c.ellipse((x - 4, y - 4, x + 4, y + 4), colours)


def _remote(c: Canvas) -> None:
    c.box((42, 2, 86, 126), "#565e66 #24292e", 12, "x")
    c.box((46, 6, 82, 122), "#4a5158 #2e3439", 9)
    c.ellipse((51, 10, 61, 20), "#ff5a4d #c01d14")
    c.box((66, 12, 78, 18), "#9aa3ab #6b747b", 3)
    c.ellipse((49, 26, 79, 56), "#8d969e #5d666d")
    c.ellipse((58, 35, 70, 47), "#e7ebee #b3bbc2")
    for row in range(4):
        for column in range(3):
            x, y = 51 + column * 9.5, 64 + row * 10.5
            c.box((x, y, x + 7, y + 6.5), "#eef1f4 #b3bbc2", 2)
    for x, colours in ((50.0, "#e53935"), (57.5, "#43a047"), (65, "#fdd835"), (72.5, "#1e88e5")):
        c.box((x, 109, x + 5.5, 114), colours, 2)
    c.rotate(-22)


def _microwave(c: Canvas) -> None:
    for x in (14.0, 104.0):
        c.box((x, 96, x + 10, 104), "#4a5259 #2b3136", 2)
    c.box((3, 26, 125, 99), "#eef1f4 #aab2ba", 7)
    c.box((10, 34, 88, 91), "#5b646c #30373d", 5)
    c.box((17, 41, 81, 84), "#2c3a45 #10181e", 4)
    c.ellipse((24, 70, 74, 82), "#8fa9b8 #5c7686")
    c.smooth([(38, 74), (40, 58), (49, 54), (58, 58), (60, 74)], "#f2c14e #c98a12")
    c.polygon([(24, 41), (38, 41), (22, 84), (17, 84), (17, 62)], "#4a5f6d #2a3c48")
    c.box((84, 38, 88, 87), "#f7f9fa #c4cbd1", 2)
    c.box((94, 36, 119, 48), "#123b2c #0b241b", 2)
    for tick in (98, 105, 112):
        c.line([(tick, 39.5), (tick, 44.5)], 2, "#57f2a1")
    for row in range(3):
        for column in range(3):
            x, y = 94.5 + column * 8.6, 54 + row * 8.5
            c.box((x, y, x + 6.6, y + 6), "#7d878f #59626a", 1.5)
    c.box((94, 81, 119, 91), "#66bb6a #388e3c", 3)


def _oven(c: Canvas) -> None:
    for x in (20, 98):
        c.box((x, 118, x + 10, 125), "#4a5259 #2b3136", 1)
    c.box((12, 12, 116, 120), "#f2f4f6 #b3bbc2", 5)
    for x in (30, 78):
        c.ellipse((x - 10, 6, x + 30, 15), "#2b3136 #15191d")
        c.ellipse((x - 4, 8, x + 24, 13), "#ff7043 #bf360c")
    c.box((12, 14, 116, 38), "#59626a #39414a", 3)
    for x in (26, 44, 84, 102):
        c.ellipse((x - 6.5, 20, x + 6.5, 33), "#ffffff #c4cbd1")
        c.line([(x, 21.5), (x, 26)], 2, "#d22a2a")
    c.box((53, 21, 75, 32), "#123b2c #0b241b", 2)
    c.line([(57, 26.5), (71, 26.5)], 2.5, "#ff9800")
    c.box((20, 50, 108, 112), "#4a5259 #2b3136", 5)
    c.box((27, 60, 101, 105), "#5a1c08 #ff9a3d", 4)
    for y in (72, 86):
        c.line([(29, y), (99, y)], 1.8, "#c9cfd4")
    c.smooth([(44, 86), (46, 76), (64, 70), (82, 76), (84, 86)], "#e2a25a #a8632a")
    c.box((24, 42, 104, 48), "#ffffff #aab2ba", 3)


def _toaster(c: Canvas) -> None:
    for x, lift in ((30, 0), (68, 4)):
        c.smooth(
            [(x, 22 + lift), (x + 4, 10 + lift), (x + 15, 7 + lift), (x + 27, 10 + lift),
             (x + 31, 22 + lift), (x + 29, 50), (x + 2, 50)],
            "#d9a05b #b87530",
        )  # fmt: skip
        c.box((x + 5, 15 + lift, x + 26, 50), "#ffe3b0 #f3c987", 6)
    for x in (22, 92):
        c.box((x, 108, x + 14, 118), "#39414a #1c2125", 2)
    c.smooth(
        [(10, 50), (20, 41), (64, 40), (108, 41), (118, 50), (120, 80), (117, 108), (104, 112),
         (64, 112), (24, 112), (11, 108), (8, 80)],
        "#f7f9fa #8d969e",
    )  # fmt: skip
    c.box((26, 42, 102, 48), "#2b3136 #4a5259", 3)
    c.box((14, 88, 114, 94), "#6fc3df #3793b5", 1)
    c.line([(24, 54), (24, 80)], 5, "#ffffff")
    c.box((103, 56, 107, 84), "#39414a", 2)
    c.box((99, 58, 124, 68), "#30373d #15191d", 4)
    c.ellipse((84, 68, 97, 81), "#59626a #2b3136")
    c.line([(90.5, 69), (90.5, 74)], 2, "#ffffff")


def _sink(c: Canvas) -> None:
    c.line([(64, 56), (64, 16), (68, 8), (82, 8), (88, 16), (88, 26)], 9, "#eef1f4 #8d969e", "x")
    c.box((82, 24, 94, 30), "#aab2ba #6b747b", 2)
    for x, colours in ((36, "#e53935 #a51d14"), (104, "#1e88e5 #0d4f94")):
        c.box((x - 3, 44, x + 3, 58), "#c4cbd1 #8d969e", 1)
        c.line([(x - 8, 43), (x + 8, 43)], 6, colours)
    c.smooth([(88, 31), (85, 38), (88, 43), (91, 38)], "#6fd3ff #2196f3")
    c.polygon([(10, 66), (118, 66), (104, 108), (88, 116), (40, 116), (24, 108)], "#ffffff #b9c3cb")
    c.box((2, 55, 126, 69), "#ffffff #cfd6db", 6)
    c.ellipse((22, 56, 106, 67), "#a9cfe0 #d9eef7")
    c.ellipse((58, 59, 70, 65), "#59626a #30373d")
    c.box((50, 115, 78, 126), "#dfe4e8 #9aa3ab", 2)


def _refrigerator(c: Canvas) -> None:
    for x in (34, 84):
        c.box((x, 118, x + 10, 126), "#39414a #1c2125", 2)
    c.box((26, 2, 102, 121), "#f4f7f9 #a4b0ba", 7, "x")
    c.box((26, 44, 102, 47), "#66717a")
    c.box((32, 16, 38, 38), "#8d969e #59626a", 3)
    c.box((32, 54, 38, 92), "#8d969e #59626a", 3)
    c.box((66, 56, 90, 80), "#cfe6f2 #9cc4d8", 3)
    c.box((70, 60, 86, 76), "#2c3a45 #465866", 2)
    c.line([(78, 66), (78, 71)], 2.5, "#6fd3ff")
    c.line([(50, 10), (62, 36)], 3, "#ffffff")
    c.line([(48, 56), (60, 112)], 3, "#ffffff")
    c.ellipse((80, 12, 90, 22), "#ffb300 #f57c00")


def _hair_drier(c: Canvas) -> None:
    c.polygon([(52, 66), (76, 66), (84, 116), (62, 120)], "#e24a8d #93205a", "x")
    c.line([(74, 118), (84, 125), (102, 122), (122, 126)], 3.5, "#39414a")
    c.smooth(
        [(52, 22), (80, 14), (104, 24), (112, 46), (104, 66), (80, 76), (52, 68)],
        "#ff79b4 #b82a72",
    )
    c.polygon([(54, 24), (54, 67), (18, 60), (18, 32)], "#ff8fc1 #c23a80")
    c.box((6, 27, 20, 65), "#4a5259 #22272c", 3)
    c.ellipse((78, 28, 104, 62), "#5b646c #2b3136")
    for y in (37, 45, 53):
        c.line([(83, y), (99, y)], 2.2, "#aab2ba")
    c.box((62, 80, 70, 96), "#ffffff #cfd6db", 3)
    c.box((63, 81, 69, 88), "#e53935", 2)


HOME: dict[str, tuple[Callable[[Canvas], None], ...]] = {
    "fork": (_fork,),
    "dining table": (_dining_table,),
    "remote": (_remote,),
    "microwave": (_microwave,),
    "oven": (_oven,),
    "toaster": (_toaster,),
    "sink": (_sink,),
    "refrigerator": (_refrigerator,),
    "hair drier": (_hair_drier,),
}
"""Category name to its icons."""
