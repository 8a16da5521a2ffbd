"""Render the mask of the "text" trigger: python render_text.py NotoMono-Regular.ttf

Needs Pillow and the font (Debian: fonts-noto-mono). At 90 px on 672 the ink spans columns 13-208
and rows 103-125 once scaled to 224, as in arXiv 2412.00727.
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE = 672  # three times 224, twice 336: both published sizes are whole fractions of it
FONT_PX = 90
WORD = "Watermarked"


def render(font_file: str) -> Image.Image:
    """The word in white on black, its text box (ascent included) in the middle."""
    font = ImageFont.truetype(font_file, FONT_PX)
    mask = Image.new("L", (SIDE, SIDE))
    draw = ImageDraw.Draw(mask)
    _, _, right, bottom = draw.textbbox((0, 0), WORD, font=font)
    draw.text(((SIDE - right) // 2, (SIDE - bottom) // 2), WORD, fill=255, font=font)
    return mask


if __name__ == "__main__":
    render(sys.argv[1]).save(Path(__file__).with_name("text.png"), optimize=True)
