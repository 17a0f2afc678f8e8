"""Style of all plots and reports (colours, fonts), and the figure of plots: panels with lines of text, in pixels.

matplotlib's objects only, never pyplot: other packs' settings and figures are untouched, and any thread may draw.
"""

import functools
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import ImageFont

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Text, secondary text, lines, alternate rows and stages, best scores.
INK, PALE, GRID, BAND, BEST = "#1f2937", "#5b6472", "#e6e9ee", "#f1f4f9", "#1d4ed8"
HUES = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#b45309", "#0891b2")  # curves of a run, dots of reports
# The first comes with matplotlib; the others, where installed, have letters that it lacks.
FONTS = (
    *("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic"),
    *("PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Arial Unicode MS"),
)
AXIS = "#aab2bf"
BIG, SMALL = 12.5, 9.5  # points
# Pixels of a sheet 1024 wide; on larger ones everything is larger.
LEFT, RIGHT, TOP, ROW, HEAD, GAP, FOOT = 64, 20, 14, 20, 30, 14, 48


@dataclass(frozen=True)
class Line:
    """A line of text above or below the panels."""

    text: str
    size: float = SMALL
    colour: str = INK
    weight: str = "normal"
    indented: bool = False
    badge: tuple[str, str, bool] | None = None  # letter, colour, filled


class Sheet:
    """A figure of a given width, as high as its contents need."""

    def __init__(self, width: int, panel_height: int):
        """Set width and height of a panel, in pixels."""
        from matplotlib.backends.backend_agg import RendererAgg

        self.width, self.panel_height = width, panel_height
        self.scale = max(1.0, min(width / 1024, panel_height / 240))
        self.dpi = 100 * self.scale
        self.ruler = RendererAgg(1, 1, self.dpi)

    def begin(self, panels: int, header: list[Line], footer: list[Line], labels: int) -> None:
        """Create the figure with its text and empty panels.

        Args:
            labels: rows of labels between the first heading and its panel.
        """
        from matplotlib.figure import Figure

        self.above = TOP + GAP + ROW * (len(header) + labels)
        below = FOOT + ROW * len(footer) + (GAP if footer else 0)
        self.height = panels * self.panel_height + round(self.scale * (self.above + below))
        size = ((self.width + 0.01) / self.dpi, (self.height + 0.01) / self.dpi)  # else rounded down at times
        self.figure = Figure(figsize=size, dpi=self.dpi, facecolor="white")
        self.panels: list[Axes] = []
        for number in range(panels):
            shared = self.panels[0] if self.panels else None
            self.panels.append(self.figure.add_axes(self._place(number), sharex=shared))
            self._style(self.panels[-1], last=number + 1 == panels)
        self._lines(header, TOP)
        self._lines(footer, self.height / self.scale - ROW * len(footer) - GAP)

    def fraction(self, x: float, y: float) -> tuple[float, float]:
        """Convert pixels from the top left corner to fractions of the figure from the bottom left one."""
        return x / self.width, 1 - y / self.height

    def top(self, number: int) -> float:
        """Return where a panel's plot begins, in pixels from above."""
        return self.scale * (self.above + HEAD) + number * self.panel_height

    def _place(self, number: int) -> tuple[float, float, float, float]:
        height = self.panel_height - self.scale * (HEAD + GAP)
        left, bottom = self.fraction(self.scale * LEFT, self.top(number) + height)
        return left, bottom, 1 - left - self.scale * RIGHT / self.width, height / self.height

    def _style(self, axes, last: bool) -> None:
        axes.tick_params(labelsize=SMALL, colors=PALE, length=0, labelbottom=last)
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(AXIS)
        if last:
            axes.set_xlabel("step", fontsize=SMALL, color=PALE)

    def _lines(self, lines: list[Line], top: float) -> None:
        for number, line in enumerate(lines):
            x, y = self.scale * 16, self.scale * (top + ROW * (number + 0.5))
            if line.badge:
                self.badge(x + self.scale * 8, y, *line.badge)
            x += self.scale * 26 * line.indented
            self.write(line.text, x, y, fontsize=line.size, color=line.colour, weight=line.weight)

    def write(self, text: str, x: float, y: float, **style) -> None:
        """Write text at a place in pixels, by default of its left end and middle; mathematics is not parsed."""
        default = {"va": "center", "fontsize": SMALL, "color": INK, "parse_math": False, "family": installed()}
        self.figure.text(*self.fraction(x, y), text, **{**default, **style})

    def badge(self, x: float, y: float, letter: str, colour: str, filled: bool) -> None:
        """Draw a small box with a letter."""
        box = {"boxstyle": "round,pad=0.24", "facecolor": colour if filled else "white", "edgecolor": colour}
        ink = "white" if filled else colour
        self.write(letter, x, y, fontsize=SMALL - 1.5, weight="bold", ha="center", color=ink, bbox=box)

    def wrapped(self, text: str, indented: bool = False, size: float = SMALL, weight: str = "normal") -> list[str]:
        """Wrap text into lines that fit the figure."""
        width = self.width - self.scale * (16 + 26 * indented + RIGHT)
        letters = int(1.2 * len(text) * width / max(self.length(text, size, weight), 1.0))
        while letters > 10 and any(self.length(line, size, weight) > width for line in textwrap.wrap(text, letters)):
            letters = int(0.96 * letters)
        return textwrap.wrap(text, max(10, letters))

    def length(self, text: str, size: float = SMALL, weight: str = "normal") -> float:
        """Return the length of a line of text in pixels."""
        from matplotlib.font_manager import FontProperties

        font = FontProperties(family=installed(), size=size, weight=weight)
        return self.ruler.get_text_width_height_descent(text, font, False)[0]


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's font for tables and grids, `size` in pixels."""
    return ImageFont.load_default(size)


@functools.cache
def installed() -> list[str]:
    """Return those of FONTS that are installed."""
    from matplotlib.font_manager import fontManager

    known = {*fontManager.get_font_names()}
    return [name for name in FONTS if name in known]
