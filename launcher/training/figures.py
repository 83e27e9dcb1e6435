"""Pictures of an evaluation, for TensorBoard."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIDE, MARGIN = 360, 30
COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")


def curves_picture(lines: Mapping[str, Sequence[Sequence[float]]]) -> NDArray[np.uint8]:
    """Draw curves in the unit square, each with its name in its colour.

    Args:
        lines: x and y of each curve by name.

    Returns:
        uint8 [side, side, 3].
    """
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (SIDE, SIDE), "white")
    draw: Any = ImageDraw.Draw(picture)
    width = SIDE - 2 * MARGIN
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        at = MARGIN + width * share
        draw.line([(MARGIN, at), (SIDE - MARGIN, at)], fill="#dddddd")
        draw.line([(at, MARGIN), (at, SIDE - MARGIN)], fill="#dddddd")
        draw.text((at - 8, SIDE - MARGIN + 6), f"{share:g}", fill="black")
        draw.text((2, SIDE - at - 6), f"{share:g}", fill="black")
    for number, (name, (xs, ys)) in enumerate(lines.items()):
        color = COLORS[number % len(COLORS)]
        points = [(MARGIN + width * x, SIDE - MARGIN - width * y) for x, y in zip(xs, ys, strict=True)]
        draw.line(points, fill=color, width=2)
        draw.text((SIDE // 2, MARGIN + width // 2 + 12 * number), name[:28], fill=color)
    return np.asarray(picture, np.uint8)
