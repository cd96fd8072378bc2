"""Figures: the report's dictionary and curves enter, SVG text leaves, to stand alone or in a page.

matplotlib draws them in the colours of a light page, every one of which has a name. A file that
stands alone keeps them; inlined in a page, each becomes a CSS variable of that name, so that the
page decides. A model has a colour, a dash pattern and a marker of its own, and its name at its
curve: none of them is told by colour alone. The same report gives the same bytes.

matplotlib is imported by the functions that draw, on rank 0 at a run's end: it costs a second that
`check` and the other ranks need not spend.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from babyllama_ds.report.formatting import count, number
from babyllama_ds.report.metrics import Curve, last_values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

# Points (1/72 inch) are the units of an SVG that matplotlib draws. The figures are drawn as wide
# as a phone shows them, so that their text can be read there; a wide page sets them side by side.
WIDTH_PT = 380.0
CURVES_HEIGHT_PT = 262.0
ROW_PT = 38.0
"""Of a row of dots: its name, its line, and the dots about it."""
SPREAD_PT = 14.0
"""How far the first model's dots lie above the last one's, so that equal ones are all seen."""
TEXT_PT = 10.5
LABEL_CHARS = 15
"""Letters of a name that fit beside a curve; a longer one is cut, the page tells it in full."""

INK, MUTED, GRID, PAPER = "#1b1f25", "#57606b", "#dde1e7", "#ffffff"
COLOURS = {"--ink": INK, "--muted": MUTED, "--grid": GRID, "--paper": PAPER}
"""The colours of everything that is no model, by the names of their CSS variables."""


@dataclass(frozen=True, kw_only=True)
class Style:
    """How one model is drawn, in every figure."""

    variable: str
    """CSS variable of its colour."""
    colour: str
    """On a light page; at least 4.5 times as bright or dark as it."""
    dashes: tuple[float, ...] | None
    """Lengths of dashes and gaps, in line widths; none: a whole line."""
    marker: str
    """matplotlib's name of it."""
    width_pt: float
    size_pt: float


STUDENT = Style(
    variable="--student", colour="#0a5ca8", dashes=None, marker="o", width_pt=2.4, size_pt=8.5
)
CONTROL = Style(
    variable="--control", colour="#b03a00", dashes=(5, 1.6), marker="s", width_pt=2.0, size_pt=7
)
# Okabe and Ito's hues, darkened until they can be told from white; then by dashes and markers.
_TEACHER_COLOURS = ("#00735a", "#86398c", "#6e5a00", "#9c1f4f", "#006a80", "#4b5058")
_TEACHER_DASHES = ((1.2, 1.2), (4, 1.4, 1.2, 1.4), (8, 1.6), (4, 1.2, 1.2, 1.2, 1.2, 1.2))
_TEACHER_MARKERS = ("^", "D", "v", "P", "X", "<", ">")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure, drawn."""

    name: str
    """Of its file, and the beginning of its ids."""
    title: str
    alt: str
    """What it shows, for those who do not see it."""
    svg: str
    """To stand alone, on a light page."""

    def inline(self) -> str:
        """The `<svg>` element for a page: its colours are variables, its ids its own."""
        svg = self.svg[self.svg.index("<svg") :]
        svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
        svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
        # A rule for every element there is: in a page it would mean the page's too.
        svg = re.sub(r"<style.*?</style>", "", svg, count=1, flags=re.DOTALL)
        svg = re.sub(r'\bid="', f'id="{self.name}-', svg)
        svg = re.sub(r"url\(#", f"url(#{self.name}-", svg)
        svg = re.sub(r'href="#', f'href="#{self.name}-', svg)
        return re.sub(r"\b(fill|stroke): (#[0-9a-f]{6})\b", _as_variable, svg)


def styles_of(models: Mapping[str, Mapping[str, Any]]) -> dict[str, Style]:
    """Each model's style, by its role and its place among the teachers."""
    teachers = [name for name, model in models.items() if model["role"] == "teacher"]
    return {
        name: _style_of_teacher(teachers.index(name))
        if model["role"] == "teacher"
        else {"student": STUDENT, "control": CONTROL}[model["role"]]
        for name, model in models.items()
    }


def _style_of_teacher(place: int) -> Style:
    """The first 84 differ; of few, each in colour, dashes and marker."""
    return Style(
        variable=f"--teacher-{1 + place % len(_TEACHER_COLOURS)}",
        colour=_TEACHER_COLOURS[place % len(_TEACHER_COLOURS)],
        dashes=_TEACHER_DASHES[place % len(_TEACHER_DASHES)],
        marker=_TEACHER_MARKERS[place % len(_TEACHER_MARKERS)],
        width_pt=1.5,
        size_pt=6.5,
    )


def variables() -> dict[str, str]:
    """Every CSS variable of a figure and its colour on a light page."""
    teachers = map(_style_of_teacher, range(len(_TEACHER_COLOURS)))
    return COLOURS | {style.variable: style.colour for style in (STUDENT, CONTROL, *teachers)}


# -- curves ---------------------------------------------------------------------------------------


def draw_curves(
    name: str,
    title: str,
    curves: Mapping[str, Curve],
    styles: Mapping[str, Style],
    *,
    unit: str,
    markers: bool = False,
    against: Literal["tokens", "words"] = "tokens",
    chance: float | None = None,
) -> Figure:
    """One measure of all models against what each has seen; the student above all.

    Against tokens the frame holds what came after the first tenth of each training: a loss falls
    steeply at first, and would leave no room for the differences that are of interest. Against
    words, as milestones are, it holds everything, on a logarithmic axis: they lie ever farther
    apart, and how a model begins to learn is what they are for. `chance` is a line across.
    """
    early = against == "words"
    with _canvas(name, CURVES_HEIGHT_PT) as (canvas, axes):
        low, high = _window(curves.values(), whole=early)
        for model, curve in curves.items():
            style = styles[model]
            axes.plot(
                curve.seen,
                curve.values,
                color=style.colour,
                linewidth=style.width_pt,
                linestyle=_line_style(style),
                marker=style.marker if markers or len(curve.seen) == 1 else "",
                markersize=0.6 * style.size_pt,
                zorder=3 + style.width_pt,
            )
        axes.set_ylim(low, high)
        if chance is not None and low <= chance <= high:
            axes.axhline(chance, color=MUTED, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
        if early:
            _count_by_powers(axes)
        else:
            axes.set_xlim(left=0)
            axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel(f"{against} seen", parse_math=False)
        axes.set_ylabel(unit, parse_math=False)
        axes.xaxis.set_major_formatter(lambda seen, _: _tokens(seen))
        _name_curves(axes, curves, styles, low=low, high=high)
        _decorate(canvas, axes, title, left_pt=48, right_pt=96, top_pt=30, bottom_pt=36)
        svg = _svg(canvas)
    ends = ", ".join(f"{model} {value:.4g}" for model, value in last_values(curves).items())
    alt = f"{title}, in {unit}, against {against} seen. The curves end at: {ends}."
    return Figure(name=name, title=title, alt=alt, svg=svg)


def _count_by_powers(axes: Axes) -> None:
    """A logarithmic axis to the right; where it shows few powers of ten, with numbers between, and
    where it may show none, with a few round numbers."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axes.set_xscale("log")
    first, last = axes.get_xlim()
    axes.xaxis.set_major_locator(
        MaxNLocator(nbins=4, steps=[1, 2, 5, 10], integer=True)
        if last < 5 * first
        else LogLocator(subs=(1, 2, 5) if last < 200 * first else (1,))
    )
    axes.xaxis.set_minor_locator(NullLocator())


def _window(curves: Iterable[Curve], *, whole: bool = False) -> tuple[float, float]:
    """Limits of the axis, between which every curve ends, or lies as a `whole`."""
    settled = [curve.values if whole else _from_a_tenth_on(curve) for curve in curves]
    low, high = min(map(min, settled)), max(map(max, settled))
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.1
    return low - margin, high + margin


def _from_a_tenth_on(curve: Curve) -> tuple[float, ...]:
    beginning = 0.1 * curve.seen[-1]
    return tuple(
        value for tokens, value in zip(curve.seen, curve.values, strict=True) if tokens >= beginning
    )


def leaves_out(curves: Mapping[str, Curve]) -> bool:
    """Whether some of a curve lies outside of the figure's frame."""
    low, high = _window(curves.values())
    return any(max(one.values) > high or min(one.values) < low for one in curves.values())


def _name_curves(
    axes: Axes,
    curves: Mapping[str, Curve],
    styles: Mapping[str, Style],
    *,
    low: float,
    high: float,
) -> None:
    """Names to the right of where curves end, moved apart until none covers another."""
    ends = {model: (curve.seen[-1], curve.values[-1]) for model, curve in curves.items()}
    wanted = {model: (value - low) / (high - low) for model, (_, value) in ends.items()}
    for model, height in _moved_apart(wanted, gap=1.3 * TEXT_PT / 196).items():
        style = styles[model]
        axes.annotate(
            _cut(model),
            xy=ends[model],
            xytext=(1.05, height),
            textcoords=axes.transAxes,
            va="center",
            fontweight="bold" if style is STUDENT else "normal",
            annotation_clip=False,
            parse_math=False,
            arrowprops={
                "arrowstyle": "-",
                "color": style.colour,
                "linewidth": 0.9,
                "shrinkA": 1,
                "shrinkB": 3,
            },
        )
        axes.plot(
            *([part] for part in ends[model]),
            color=style.colour,
            marker=style.marker,
            markersize=style.size_pt,
            zorder=7,
            clip_on=False,
        )


def _moved_apart(wanted: Mapping[str, float], *, gap: float) -> dict[str, float]:
    """Heights in their order, at least `gap` apart, each group about where it wanted to be."""
    groups: list[list[str]] = []
    centre: list[float] = []
    for model in sorted(wanted, key=lambda model: wanted[model]):
        groups.append([model])
        centre.append(wanted[model])
        while len(groups) > 1 and centre[-1] - centre[-2] < gap * (
            (len(groups[-1]) + len(groups[-2])) / 2
        ):
            merged = groups[-2] + groups[-1]
            groups[-2:] = [merged]
            centre[-2:] = [sum(wanted[one] for one in merged) / len(merged)]
    return {
        model: middle + gap * (place - (len(group) - 1) / 2)
        for group, middle in zip(groups, centre, strict=True)
        for place, model in enumerate(group)
    }


# -- dots -----------------------------------------------------------------------------------------


def draw_dots(
    name: str,
    title: str,
    rows: Mapping[str, Mapping[str, float]],
    styles: Mapping[str, Style],
    *,
    unit: str,
    chance: float | None = None,
) -> Figure:
    """A row for each thing measured, a dot about it for each model; `chance` as a line across."""
    models = [model for model in styles if any(model in row for row in rows.values())]
    columns = max(1, int(WIDTH_PT // (30 + 0.62 * TEXT_PT * max(len(_cut(m)) for m in models))))
    legend_lines = -(-len(models) // columns)
    top_pt = 30 + 17 * legend_lines
    height_pt = top_pt + ROW_PT * (len(rows) + 0.05) + 36
    with _canvas(name, height_pt) as (canvas, axes):
        for place, (label, row) in enumerate(rows.items()):
            axes.axhline(place, color=GRID, linewidth=1, zorder=1)
            axes.annotate(
                _cut(label, 56),
                xy=(0, place),
                xycoords=axes.get_yaxis_transform(),
                xytext=(0, 0.5 * SPREAD_PT + 3.5),
                textcoords="offset points",
                va="bottom",
                parse_math=False,
                zorder=8,
            )
            for nth, model in enumerate(models):
                if model in row:
                    # Heights count downwards, in rows.
                    aside = (nth / max(1, len(models) - 1) - 0.5) * SPREAD_PT / ROW_PT
                    _dot(axes, row[model], place + aside, styles[model])
        axes.set_ylim(len(rows) - 0.65, -0.7)
        axes.set_yticks([])
        shown = [value for row in rows.values() for value in row.values()]
        margin = 0.05 * (max(shown) - min(shown)) or 1.0
        axes.set_xlim(min(shown) - margin, max(shown) + margin)
        if chance is not None and axes.get_xlim()[0] <= chance <= axes.get_xlim()[1]:
            axes.axvline(chance, color=MUTED, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
        axes.set_xlabel(unit, parse_math=False)
        _decorate(canvas, axes, title, left_pt=12, right_pt=12, top_pt=top_pt, bottom_pt=36)
        _legend(canvas, models, styles, columns=columns, below_pt=26)
        svg = _svg(canvas)
    said = "; ".join(
        f"{label}: " + ", ".join(f"{model} {number(v, 2)}" for model, v in row.items())
        for label, row in rows.items()
    )
    return Figure(name=name, title=title, alt=f"{title}, in {unit}. {said}.", svg=svg)


def _dot(axes: Axes, value: float, height: float, style: Style) -> None:
    axes.plot(
        [value],
        [height],
        color=style.colour,
        marker=style.marker,
        markersize=style.size_pt + 1,  # of which its rim takes a part
        markeredgecolor=PAPER,
        markeredgewidth=0.7,
        zorder=3 + style.width_pt,
    )


def _legend(
    canvas: Canvas,
    models: Sequence[str],
    styles: Mapping[str, Style],
    *,
    columns: int,
    below_pt: float,
) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            color=styles[model].colour,
            marker=styles[model].marker,
            markersize=styles[model].size_pt,
            linestyle="",
        )
        for model in models
    ]
    legend = canvas.legend(
        handles,
        [_cut(model) for model in models],
        loc="upper left",
        bbox_to_anchor=(4 / WIDTH_PT, 1 - below_pt / (72 * canvas.get_figheight())),
        ncols=columns,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handletextpad=0.2,
        columnspacing=1.2,
        labelspacing=0.4,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


# -- drawing --------------------------------------------------------------------------------------


@contextmanager
def _canvas(name: str, height_pt: float) -> Iterator[tuple[Canvas, Axes]]:
    """An empty figure; what is drawn into it follows our settings, not those of the machine."""
    # It tells that it makes its cache of fonts, and where: nothing that a run should say.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": TEXT_PT,
        "text.color": INK,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": GRID,
        "xtick.color": GRID,
        "ytick.color": GRID,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "figure.facecolor": PAPER,
        "axes.facecolor": PAPER,
    }
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        # Letters that its own font lacks: the reader's browser has the fonts, not this machine.
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        canvas = Canvas(figsize=(WIDTH_PT / 72, height_pt / 72))
        yield canvas, canvas.add_subplot()


def _decorate(
    canvas: Canvas,
    axes: Axes,
    title: str,
    *,
    left_pt: float,
    right_pt: float,
    top_pt: float,
    bottom_pt: float,
) -> None:
    """Title, grid and margins, the same in all figures."""
    height_pt = 72 * canvas.get_figheight()
    canvas.text(
        4 / WIDTH_PT,
        1 - 14 / height_pt,
        _cut(title, 48),
        fontsize=TEXT_PT + 1,
        fontweight="bold",
        va="center",
        parse_math=False,
    )
    axes.grid(axis="both", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    canvas.subplots_adjust(
        left=left_pt / WIDTH_PT,
        right=1 - right_pt / WIDTH_PT,
        top=1 - top_pt / height_pt,
        bottom=bottom_pt / height_pt,
    )


def _svg(canvas: Canvas) -> str:
    stream = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    canvas.savefig(stream, format="svg", metadata=nothing, facecolor=PAPER)
    return stream.getvalue()


def _line_style(style: Style) -> Any:
    return "solid" if style.dashes is None else (0, style.dashes)


def _as_variable(found: re.Match[str]) -> str:
    names = {colour: variable for variable, colour in variables().items()}
    variable = names.get(found[2])
    return f"{found[1]}: var({variable})" if variable else found[0]


def _cut(text: str, chars: int = LABEL_CHARS) -> str:
    return text if len(text) <= chars else text[: chars - 1] + "…"


def _tokens(tokens: float) -> str:
    """A tick of the axis of tokens: 1.5M."""
    text = count(tokens).replace(" ", "")
    return re.sub(r"\.?0+(?=[kMB]$)", "", text) if "." in text else text
