"""Lag over the number of streams as an SVG picture, drawn without a library: clients stay light."""

import math
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 420, 64, 130, 64, 52
CURVES = (("p50", "#4c9be8"), ("p95", "#e8894c"), ("p99", "#c2455e"))
STYLE = "text{font:13px system-ui,sans-serif;fill:#444}.title{font-size:15px;font-weight:600}.grid{stroke:#e4e4e4}"


def svg(title: str, points: list[tuple[int, dict]], max_lag: float | None = None) -> str:
    """Return a picture of `points`: (streams, {"p50", "p95", "p99"} in ms). Both axes are logarithmic."""
    points = sorted(points, key=lambda point: point[0])
    values = [max(figures[name], 1) for _, figures in points for name, _ in CURVES] + ([max_lag] if max_lag else [])
    floor, roof = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)
    roof += roof == floor
    low, high = math.log2(points[0][0]), math.log2(points[-1][0])

    def x(streams: int) -> float:
        share = (math.log2(streams) - low) / (high - low) if high > low else 0.5
        return round(LEFT + 16 + share * (WIDTH - LEFT - RIGHT - 32), 1)

    def y(lag: float) -> float:
        share = (math.log10(max(lag, 10**floor)) - floor) / (roof - floor)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    parts = [f'<text class="title" x="{LEFT}" y="26">{escape(title)}</text>']
    for power in range(floor, roof + 1):
        for step in (1, 2, 5) if power < roof else (1,):
            lag = step * 10.0**power
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(lag)}" y2="{y(lag)}"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y(lag) + 4}" text-anchor="end">{lag:g}</text>')
    taken = -math.inf
    for streams, _ in points:
        if x(streams) - taken >= 28:
            taken = x(streams)
            parts.append(f'<text x="{taken}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{streams}</text>')
    if max_lag:
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(max_lag)}" y2="{y(max_lag)}" stroke="#888" '
            f'stroke-dasharray="5 4"/><text x="{WIDTH - RIGHT + 10}" y="{y(max_lag) + 4}">limit {max_lag:g} ms</text>'
        )
    ends: list[float] = [y(max_lag)] if max_lag else []
    for name, color in CURVES:
        line = [(x(streams), y(figures[name])) for streams, figures in points]
        parts.append(
            f'<polyline points="{" ".join(f"{a},{b}" for a, b in line)}" fill="none" stroke="{color}" '
            'stroke-width="2.5" stroke-linejoin="round"/>'
        )
        parts += [f'<circle cx="{a}" cy="{b}" r="3.5" fill="{color}"/>' for a, b in line]
        label = line[-1][1]
        while any(abs(label - end) < 15 for end in ends):  # names must not lie on each other
            label -= 1
        ends.append(label)
        style = f"fill:{color};font-weight:600"
        parts.append(f'<text x="{WIDTH - RIGHT + 10}" y="{label + 4}" style="{style}">{name}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">live streams</text>'
        f'<text x="{LEFT - 48}" y="{TOP - 14}">lag, ms</text>'
    )
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">\n'
        f'<style>{STYLE}</style>\n<rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n'
    )
