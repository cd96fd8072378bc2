"""Figures: the same bytes each time, text as text, no colour of their own in a page."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest

from babyllama_ds.report import figures
from babyllama_ds.report.figures import (
    Figure,
    draw_curves,
    draw_dots,
    leaves_out,
    styles_of,
    variables,
)
from babyllama_ds.report.metrics import Curve

MODELS = {
    "wide": {"role": "teacher"},
    "deep": {"role": "teacher"},
    "control": {"role": "control"},
    "student": {"role": "student"},
}
STYLES = styles_of(MODELS)
SVG = "{http://www.w3.org/2000/svg}"


def curve(end: float, *, points: int = 50) -> Curve:
    tokens = tuple(float(1000 * n) for n in range(1, points + 1))
    return Curve(seen=tokens, values=tuple(end + 5 / n for n in range(1, points + 1)), per_point=1)


def curves() -> Figure:
    ends = {"wide": 2.0, "deep": 2.001, "control": 1.9, "student": 1.2}
    of_model = {model: curve(end) for model, end in ends.items()}
    return draw_curves("ce", "Training", of_model, STYLES, unit="nats/token")


def dots(rows: dict[str, dict[str, float]] | None = None) -> Figure:
    rows = rows or {"agreement": dict.fromkeys(MODELS, 60.0), "npi": {"student": 70.0}}
    return draw_dots("blimp", "BLiMP", rows, STYLES, unit="accuracy (%)", chance=50.0)


def texts(figure: Figure) -> list[str]:
    return ["".join(text.itertext()) for text in ET.fromstring(figure.svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("draw", [curves, dots])
def test_the_same_bytes_each_time_and_no_date(draw: object) -> None:
    first, second = draw(), draw()  # type: ignore[operator]
    assert first == second
    assert "metadata" not in first.svg
    assert not re.search(r"20\d\d-\d\d-\d\d", first.svg)


def test_another_process_draws_the_same_bytes() -> None:
    code = (
        f"import hashlib, runpy; f = runpy.run_path({__file__!r});"
        "print(hashlib.sha256((f['curves']().svg + f['dots']().svg).encode()).hexdigest())"
    )
    told = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
        for _ in range(2)
    }
    assert len(told) == 1


def test_every_curve_is_named_and_its_marker_shown() -> None:
    figure = curves()
    assert {"wide", "deep", "control", "student", "Training", "tokens seen"} <= set(texts(figure))
    assert figure.alt == (
        "Training, in nats/token, against tokens seen. The curves end at: "
        "wide 2.1, deep 2.101, control 2, student 1.3."
    )


def test_names_of_curves_that_end_together_do_not_cover_each_other() -> None:
    heights = figures._moved_apart({"a": 0.5, "b": 0.5, "c": 0.51, "d": 0.1, "e": 0.9}, gap=0.1)
    ordered = sorted(heights.values())
    assert all(b - a >= 0.1 - 1e-9 for a, b in itertools.pairwise(ordered))
    assert (heights["d"], heights["e"]) == (0.1, 0.9)
    assert sum(heights[k] for k in "abc") / 3 == pytest.approx(1.51 / 3)
    assert list(heights) == ["d", "a", "b", "c", "e"]


def test_the_beginning_may_lie_above_the_frame_but_no_curves_end() -> None:
    falling = {"student": curve(1.0)}
    low, high = figures._window(falling.values())
    assert low < falling["student"].values[-1] < high < falling["student"].values[0]
    assert leaves_out(falling)
    flat = Curve(seen=(1.0, 2.0), values=(3.0, 3.0), per_point=1)
    assert not leaves_out({"student": flat})
    lone = Curve(seen=(5.0,), values=(0.0,), per_point=1)
    assert draw_curves("kl", "KL", {"student": lone}, STYLES, unit="nats").svg


def test_against_words_all_of_a_curve_is_in_the_frame_and_guessing_is_a_line_across() -> None:
    words = tuple(float(10**n) for n in range(3, 7))
    rising = {"student": Curve(seen=words, values=(40.0, 45.0, 60.0, 80.0), per_point=1)}
    low, high = figures._window(rising.values(), whole=True)
    assert low < 40 < 80 < high

    def draw(**more: object) -> Figure:
        return draw_curves("m", "On the way", rising, STYLES, unit="%", against="words", **more)

    plain, beside, beyond = draw(), draw(chance=50.0), draw(chance=20.0)
    assert {"words seen", "1k", "10k", "100k", "1M"} <= set(texts(plain))
    assert "against words seen" in plain.alt
    assert len(beside.svg) > len(plain.svg)
    assert beyond == plain  # 20 is in no frame of these
    words = (1e6, 2e6, 4e6)
    rising = {"student": Curve(seen=words, values=(40.0, 45.0, 60.0), per_point=1)}
    assert {"1M", "2M"} <= set(texts(draw()))


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ((1_539.0, 3_079.0), ["1.5k", "2k", "2.5k", "3k"]),
        ((3e6, 4e6), ["3M", "3.5M", "4M"]),
        ((7.0, 9.0), ["7", "8", "9"]),
        ((1e6, 5.5e6), ["1M", "2M", "5M"]),
    ],
)
def test_words_that_are_close_have_few_ticks(words: tuple[float, ...], shown: list[str]) -> None:
    """More would run into each other."""
    rising = {"student": Curve(seen=words, values=(40.0, 45.0), per_point=1)}
    drawn = texts(draw_curves("m", "On the way", rising, STYLES, unit="%", against="words"))
    assert drawn[: drawn.index("words seen")] == shown


def test_models_differ_in_more_than_colour() -> None:
    many = {f"t{n}": {"role": "teacher"} for n in range(12)} | MODELS
    styles = styles_of(many)
    shapes = [(s.dashes, s.marker) for s in styles.values()]
    assert len(set(shapes)) == len(shapes)
    few = styles_of(MODELS)
    assert len({s.dashes for s in few.values()}) == len({s.marker for s in few.values()}) == 4


def contrast(one: str, other: str) -> float:
    """Of WCAG 2.2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_seen_on_a_light_page() -> None:
    seen = {
        name: colour for name, colour in variables().items() if name not in ("--grid", "--paper")
    }
    assert {name: c for name, c in seen.items() if contrast(c, figures.PAPER) < 4.5} == {}


@pytest.mark.parametrize("draw", [curves, dots])
def test_in_a_page_every_colour_is_a_variable_and_every_id_its_own(draw: object) -> None:
    figure = draw()  # type: ignore[operator]
    inline = figure.inline()
    assert inline.startswith("<svg")
    assert re.findall(r"#[0-9a-f]{6}\b", inline) == []
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", inline))
    assert used <= set(variables())
    assert {"--ink", "--paper", "--student"} <= used
    ids = re.findall(r'\bid="([^"]*)"', inline)
    assert len(set(ids)) == len(ids)
    assert all(one.startswith(f"{figure.name}-") for one in ids)
    references = re.findall(r'(?:url\(#|href="#)([^)"]*)', inline)
    assert references
    assert set(references) <= set(ids)
    assert "<style" not in inline
    ET.fromstring(inline)
    root = inline[: inline.index(">")]
    assert "viewBox" in root
    assert " width=" not in root


def test_names_are_shown_as_they_are_and_escaped() -> None:
    names = ["<script>x</script>", "$\\frac$ & co", "中文", "fill: #123456", "_hidden", ""]
    rows = {name: {"student": 50.0 + place} for place, name in enumerate(names)}
    figure = dots(rows)
    assert "<script" not in figure.svg
    assert set(texts(figure)) >= set(names) - {""}
    assert "fill: #123456" in figure.inline()


def test_long_names_are_cut() -> None:
    long = "a" * 64
    styles = styles_of({long: {"role": "teacher"}, "student": {"role": "student"}})
    of_model = {long: curve(2.0), "student": curve(1.0)}
    figure = draw_curves("ce", "Training", of_model, styles, unit="nats/token")
    assert "a" * 14 + "…" in texts(figure)
    assert long in figure.alt


@pytest.mark.parametrize(
    ("tokens", "text"),
    [(0, "0"), (500, "500"), (1000, "1k"), (200_000, "200k"), (1.5e6, "1.5M"), (2e9, "2B")],
)
def test_ticks_of_tokens(tokens: float, text: str) -> None:
    assert figures._tokens(tokens) == text


def test_checking_a_job_and_importing_the_report_draw_nothing() -> None:
    code = (
        "import sys, babyllama_ds.cli, babyllama_ds.report.write;"
        "print(*sorted({'matplotlib', 'jinja2'} & {m.partition('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "matplotlib" not in done.stdout


def test_drawing_leaves_matplotlibs_settings_as_they_were() -> None:
    import matplotlib

    theirs = {"font.size": 7, "axes.linewidth": 5, "axes.unicode_minus": False}
    matplotlib.rcParams.update(theirs)
    try:
        first = curves()
        assert {key: matplotlib.rcParams[key] for key in theirs} == theirs
    finally:
        matplotlib.rcdefaults()
    assert curves() == first
