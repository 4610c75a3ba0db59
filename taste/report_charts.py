"""Pictures inside a report's page: curves as SVG in the page's colours, matrices as PNG, sounds as WAV."""

import base64
import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import soundfile
from markupsafe import Markup, escape
from torch import Tensor

# N samples
WIDTH, HEIGHT = 420, 280  # units of the drawing; a unit is about a pixel
LEFT, RIGHT, TOP, BOTTOM = 62, 10, 10, 40
TICKS = 5
MELS_COLOURS, ATTENTION_COLOURS = "magma", "viridis"


class Series(NamedTuple):
    """A line of a chart."""

    label: str
    points: list[tuple[float, float]]
    colour: int  # number of the page's colour
    dashed: bool


class Chart(NamedTuple):
    """A chart as the page shows it."""

    title: str
    svg: Markup
    series: list[Series]


def line_chart(title: str, x_label: str, y_label: str, series: Sequence[Series]) -> Chart:
    """Draw lines over one pair of axes, in colours and letters that follow the page's.

    Args:
        title: for those who hear the page.
        x_label: below the axis.
        y_label: beside the axis.
        series: the lines; at least one point in all.

    Returns:
        the drawing and its lines, for a legend.
    """
    from matplotlib.ticker import MaxNLocator

    xs, ys = zip(*(point for line in series for point in line.points), strict=True)
    x_ticks = MaxNLocator(TICKS, integer=True).tick_values(min(xs), max(max(xs), min(xs) + 1))
    y_ticks = MaxNLocator(TICKS).tick_values(min(ys), max(ys))
    x_range, y_range = (min(xs), max(max(xs), min(xs) + 1)), (float(y_ticks[0]), float(y_ticks[-1]))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_range[0]) / (x_range[1] - x_range[0])
        up = (y - y_range[0]) / (y_range[1] - y_range[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = []
    for value in y_ticks:
        _, y = place(x_range[0], value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in x_ticks:
        if x_range[0] <= value <= x_range[1]:
            x, _ = place(value, y_range[0])
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:.0f}</text>')
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text x="{middle_x:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text transform="translate(11 {middle_y:.0f}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    parts += [_line(line, place) for line in series]
    heard = f"{title}. " + "; ".join(_summary(line) for line in series if line.points)
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(heard)}">'
    return Chart(title, Markup(f"{head}{''.join(parts)}</svg>"), list(series))


def picture(values: Tensor, colours: str, lowest: float, highest: float, upwards: bool) -> str:
    """Paint a matrix, a pixel a value.

    Args:
        values: [rows, columns].
        colours: name of matplotlib's map of colours.
        lowest: value of the first colour.
        highest: value of the last one.
        upwards: whether the first row is the lowest.

    Returns:
        PNG as a data URI.
    """
    from matplotlib.image import imsave

    pixels = values.detach().cpu().float().numpy()
    file = io.BytesIO()
    span = max(highest, lowest + 1e-9)
    imsave(file, pixels, vmin=lowest, vmax=span, cmap=colours, origin="lower" if upwards else "upper", format="png")
    return data_uri("image/png", file.getvalue())


def sound(waveform: Tensor, rate_hz: int) -> str:
    """Hold a sound ready to be played.

    Args:
        waveform: [N] float; values beyond -1..1 are clipped.
        rate_hz: its rate.

    Returns:
        16-bit WAV as a data URI.
    """
    file = io.BytesIO()
    samples: np.ndarray = waveform.detach().cpu().float().clamp(-1, 1).numpy()
    soundfile.write(file, samples, rate_hz, format="WAV", subtype="PCM_16")
    return data_uri("audio/wav", file.getvalue())


def data_uri(kind: str, content: bytes) -> str:
    """Write a file as an address that holds it.

    Args:
        kind: media type.
        content: of the file.

    Returns:
        the address.
    """
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _line(line: Series, place: Callable[[float, float], tuple[float, float]]) -> str:
    """One line with a dot a point, whose value shows where a pointer rests."""
    if not line.points:
        return ""
    places = [place(*point) for point in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    kind = f"colour-{line.colour}" + (" dashed" if line.dashed else "")
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"><title>{escape(line.label)}, {at:g}: {value:.4g}</title></circle>'
        for (x, y), (at, value) in zip(places, line.points, strict=True)
    )
    return f'<g class="{kind}"><polyline points="{path}"/>{dots}</g>'


def _summary(line: Series) -> str:
    (first_x, first), (last_x, last) = line.points[0], line.points[-1]
    return f"{line.label}: {first:.3g} at {first_x:g}, {last:.3g} at {last_x:g}"
