"""Draw docs/architecture.svg from the table of layers in the package's docstring.

python docs/architecture.py
"""

import re
from html import escape
from pathlib import Path

import orpo_lite

TARGET = Path(__file__).with_name("architecture.svg")
WIDTH, LEFT, HIGH, GAP, TEXT = 1000, 60, 46, 14, 360


def read_layers() -> list[tuple[str, list[str], str]]:
    """Return (layer, modules, what for), the highest layer first; lines of one layer are joined."""
    layers: list[tuple[str, list[str], str]] = []
    for line in (orpo_lite.__doc__ or "").splitlines():
        match = re.match(r"(\d)  (.+)", line)
        if match is None:
            continue
        names, _, purpose = match[2].partition("   ")
        modules = re.sub(r"[()]", "", names).replace("__main__", "").split()
        if layers and layers[-1][0] == match[1]:
            layers[-1] = (match[1], layers[-1][1] + modules, layers[-1][2])
        else:
            layers.append((match[1], modules, purpose.strip()))
    return layers


def draw(layers: list[tuple[str, list[str], str]]) -> str:
    """Return the picture: a row of boxes for each layer, imports from top to bottom."""
    height = len(layers) * (HIGH + GAP) + 40
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="white"/>',
        '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="4" refY="4" '
        'orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#555"/></marker></defs>',
        f'<line x1="25" y1="20" x2="25" y2="{height - 24}" stroke="#555" stroke-width="2" '
        'marker-end="url(#head)"/>',
        f'<text x="12" y="{height - 6}" font-size="12" fill="#555">imports</text>',
    ]
    for row, (layer, modules, purpose) in enumerate(layers):
        y = 12 + row * (HIGH + GAP)
        out.append(f'<text x="38" y="{y + 28}" font-size="14" fill="#555">{layer}</text>')
        wide = (WIDTH - LEFT - TEXT - 10) / max(len(modules), 1)
        for place, name in enumerate(modules):
            x = LEFT + place * wide
            out.append(
                f'<rect x="{x:.0f}" y="{y}" width="{wide - 6:.0f}" height="{HIGH}" rx="5" '
                f'fill="#e8f0f8" stroke="#4e79a7"/>'
                f'<text x="{x + wide / 2 - 3:.0f}" y="{y + 28}" font-size="13" '
                f'text-anchor="middle">{escape(name)}</text>'
            )
        out.append(
            f'<text x="{WIDTH - TEXT}" y="{y + 28}" font-size="12" fill="#555">'
            f"{escape(purpose)}</text>"
        )
    return "\n".join([*out, "</svg>"]) + "\n"


if __name__ == "__main__":
    TARGET.write_text(draw(read_layers()), encoding="utf-8")
