"""The roofline as a drawing on two logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from markupsafe import Markup

from einsumcascade.analysis.roofline import pipe_rates
from einsumcascade.analysis.targets import GpuTarget
from einsumcascade.report.data import Point
from einsumcascade.report.markup import element

_WIDTH: Final = 720.0
_HEIGHT: Final = 380.0
_LEFT: Final = 64.0
_RIGHT: Final = 20.0
_TOP: Final = 16.0
_BOTTOM: Final = 48.0
_RADIUS: Final = 9.0
# Operations in which each pipe is usually counted: a multiply-add is two.
_PAIRS: Final = {"tensor": 2, "fp32": 2, "special": 1}
_SUPERSCRIPTS: Final = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def ceilings(target: GpuTarget, *, dtype: str) -> dict[str, float]:
    """Return the rate of each pipe of a whole GPU in 1e9 operations a second, a multiply-add as two."""
    rates = pipe_rates(target)
    names = [p for p in rates if p != "tensor" or dtype != "float32"]
    return {p: rates[p] * target.multiprocessors * _PAIRS[p] / 1e3 for p in names}


def draw_roofline(points: Sequence[Point], *, target: GpuTarget, dtype: str) -> Markup:
    """Draw points below the roof of a target: its bandwidth, and a ceiling for each of its pipes."""
    roofs = ceilings(target, dtype=dtype)
    highest, bandwidth = max(roofs.values()), target.bandwidth_gb_s
    xs = [p.intensity for p in points if p.intensity] + [highest / bandwidth]
    ys = [p.gflops for p in points if p.gflops] + list(roofs.values())
    x0, x1 = math.floor(math.log10(min(xs)) - 0.3), math.log10(max(xs)) + 0.5
    y0, y1 = math.floor(math.log10(min(ys)) - 0.2), math.log10(highest) + 0.35

    def x(value: float) -> float:
        return _LEFT + (math.log10(value) - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (math.log10(value) - y0) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM)

    right, floor = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = [element("title", None, f"Roofline of {target.name}")]
    for k in range(x0, math.floor(x1) + 1):
        parts.append(element("path", {"class": "grid", "d": f"M{x(10.0**k):.1f} {_TOP:.1f}V{floor:.1f}"}))
        parts.append(element("text", {"x": x(10.0**k), "y": floor + 18, "class": "tick middle"}, _power(k)))
    for k in range(y0, math.floor(y1) + 1):
        parts.append(element("path", {"class": "grid", "d": f"M{_LEFT:.1f} {y(10.0**k):.1f}H{right:.1f}"}))
        parts.append(element("text", {"x": _LEFT - 8, "y": y(10.0**k) + 4, "class": "tick end"}, _power(k)))
    # The slope starts where it enters the frame: at the left, or at the bottom.
    start = max(10.0**x0, 10.0**y0 / bandwidth)
    ridge = highest / bandwidth
    slope = f"M{x(start):.1f} {y(start * bandwidth):.1f}L{x(ridge):.1f} {y(highest):.1f}H{right:.1f}"
    parts.append(element("path", {"class": "roof", "d": slope}))
    for name, rate in roofs.items():
        begin = max(x(rate / bandwidth), _LEFT)
        parts.append(element("path", {"class": "ceiling", "d": f"M{begin:.1f} {y(rate):.1f}H{right:.1f}"}))
        label = f"{name} pipe, {_rate(rate)}"
        parts.append(element("text", {"x": right - 4, "y": y(rate) - 5, "class": "label end"}, label))
    # Where the slope is farthest from all points.
    places = [start * (ridge / start) ** (k / 10) for k in range(2, 9)]
    middle = max(places, key=lambda v: min((abs(math.log(v / p.intensity)) for p in points if p.intensity), default=0))
    tilt = math.degrees(math.atan2(y(highest) - y(start * bandwidth), x(ridge) - x(start)))
    place = f"translate({x(middle):.1f} {y(middle * bandwidth):.1f}) rotate({tilt:.1f})"
    label = f"memory, {bandwidth:,.0f} GB/s"
    parts.append(element("text", {"class": "label middle", "transform": place, "y": -7.0}, label))
    marks: list[tuple[float, float]] = []
    for k, p in enumerate(points, start=1):
        if not p.intensity or not p.gflops:
            continue
        at, height = x(p.intensity), y(p.gflops)
        parts.append(element("path", {"class": "drop", "d": f"M{at:.1f} {height:.1f}V{floor:.1f}"}))
        # Points that coincide stand side by side.
        while any(math.hypot(at - a, height - b) < 2 * _RADIUS for a, b in marks):
            at += 2 * _RADIUS
        marks.append((at, height))
        mark = {"cx": at, "cy": height, "r": _RADIUS, "class": f"point p{k}"}
        parts.append(element("circle", mark, element("title", None, p.name)))
        parts.append(element("text", {"x": at, "y": height + 4, "class": "number middle"}, str(k)))
    parts.append(
        element("text", {"x": (_LEFT + right) / 2, "y": _HEIGHT - 8, "class": "axis middle"}, "operations a byte")
    )
    turned = {"class": "axis middle", "transform": f"translate(16 {(_TOP + floor) / 2:.1f}) rotate(-90)"}
    parts.append(element("text", turned, "10⁹ operations a second"))
    attributes = {
        "class": "roofline",
        "viewBox": f"0 0 {_WIDTH:.0f} {_HEIGHT:.0f}",
        "role": "img",
        "style": f"width: {_WIDTH:.0f}px; min-width: 520px",
    }
    return element("svg", attributes, *parts)


def _power(k: int) -> str:
    return str(10**k) if 0 <= k <= 3 else f"10{str(k).translate(_SUPERSCRIPTS)}"


def _rate(gflops: float) -> str:
    return f"{gflops / 1e3:,.0f} Tflop/s" if gflops >= 1e4 else f"{gflops / 1e3:.2g} Tflop/s"
