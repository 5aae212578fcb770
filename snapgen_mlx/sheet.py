"""Many pictures on one sheet, with what they show beside them."""

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .files import atomic_write

GAP = 12  # pixels between pictures
INK, PAPER = "#33333a", "#ffffff"


def contact_sheet(
    rows: list[list[Image.Image]], names: list[str], columns: list[str] | None = None
) -> Image.Image:
    """Rows of pictures with a name at each row's start and one above each column.

    Args:
        rows: pictures; rows may differ in length, pictures in size (each is centred in its cell).
        names: one for each row.
        columns: one for each column; None for a sheet without.
    """
    pictures = [picture for row in rows for picture in row]
    width, height = (max(p.size[axis] for p in pictures) for axis in (0, 1))
    letters = max(12, height // 14)  # pixels
    font = ImageFont.load_default(letters)
    letter = font.getlength("n")
    margin = int(letter * min(18, max(map(len, names)))) + 2 * GAP
    top = (2 * GAP + letters) if columns else GAP
    across = max(map(len, rows))
    size = margin + across * (width + GAP), top + len(rows) * (height + GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for c, column in enumerate(columns or []):
        x = margin + c * (width + GAP) + width // 2
        draw.text((x, top // 2), column, INK, font, anchor="mm")
    for r, (row, name) in enumerate(zip(rows, names, strict=True)):
        y = top + r * (height + GAP)
        lines = "\n".join(textwrap.wrap(name, 18)[: max(1, height // int(1.3 * letters))])
        draw.multiline_text((GAP, y + height // 2), lines, INK, font, anchor="lm")
        for c, picture in enumerate(row):
            x = margin + c * (width + GAP)
            at = x + (width - picture.width) // 2, y + (height - picture.height) // 2
            sheet.paste(picture, at, picture if picture.has_transparency_data else None)
    return sheet


def save_sheet(path, rows, names) -> Path:
    """Write ``contact_sheet`` as a PNG, over what stands there."""
    path = Path(path)
    with atomic_write(path) as temporary:
        contact_sheet(rows, names).save(temporary, format="PNG")
    return path
