"""Lag over the number of streams as an SVG picture, drawn without a library, so that the clients stay small."""

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

    parts: list[str] = []
    right, middle = WIDTH - RIGHT, 'text-anchor="middle"'

    def text(x: float, y: float, content: object, attributes: str = "") -> None:
        parts.append(f'<text x="{x}" y="{y}" {attributes}>{escape(str(content))}</text>')

    def level(lag: float, attributes: str) -> None:
        parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{y(lag)}" y2="{y(lag)}" {attributes}/>')

    text(LEFT, 26, title, 'class="title"')
    text((LEFT + right) / 2, HEIGHT - 10, "live streams", middle)
    text(LEFT - 48, TOP - 14, "lag, ms")
    for power in range(floor, roof + 1):
        for step in (1, 2, 5) if power < roof else (1,):
            lag = step * 10.0**power
            level(lag, 'class="grid"')
            text(LEFT - 8, y(lag) + 4, f"{lag:g}", 'text-anchor="end"')
    taken = -math.inf
    for streams, _ in points:
        if x(streams) - taken >= 28:  # numbers must not overlap
            taken = x(streams)
            text(taken, HEIGHT - BOTTOM + 20, streams, middle)
    labels: list[float] = []
    if max_lag:
        level(max_lag, 'stroke="#888" stroke-dasharray="5 4"')
        labels.append(y(max_lag))
        text(right + 10, labels[0] + 4, f"limit {max_lag:g} ms")
    for name, color in CURVES:
        line = [(x(streams), y(figures[name])) for streams, figures in points]
        path, style = " ".join(f"{a},{b}" for a, b in line), 'stroke-width="2.5" stroke-linejoin="round"'
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" {style}/>')
        parts += [f'<circle cx="{a}" cy="{b}" r="3.5" fill="{color}"/>' for a, b in line]
        label = line[-1][1]
        while any(abs(label - other) < 15 for other in labels):  # names must not overlap
            label -= 1
        labels.append(label)
        text(right + 10, label + 4, name, f'style="fill:{color};font-weight:600"')
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">\n'
        f'<style>{STYLE}</style>\n<rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n'
    )
