"""Class names in figures: in fonts that have their characters, and never read as formulas."""

import contextlib

from matplotlib import font_manager, rc_context, rcParams

from ..files import printable

REGULAR = range(300, 501)  # weights of fonts that are neither thin nor bold


def plain_text(families: list[str]) -> contextlib.AbstractContextManager:
    """A context in which figures draw text in these fonts; otherwise "$5_$10" would be parsed as a formula."""
    return rc_context({"text.parse_math": False, "text.usetex": False, "font.family": families})


def readable_names(class_names: list[str]) -> tuple[list[str], list[str], list[int]]:
    """The class names as the fonts of this machine can draw them, these fonts, and the classes that became a number."""
    names = [printable(name) for name in class_names]
    families, missing = fonts_for({character for name in names for character in name})
    numbered = [number for number, name in enumerate(names) if missing.intersection(name)]
    for number in numbered:
        names[number] = f"class {number}"
    return names, families, numbered


def fonts_for(characters: set[str]) -> tuple[list[str], set[str]]:
    """The usual font and, if it lacks some of the characters, others that have them; and the characters of no font."""
    families = list(rcParams["font.family"])
    missing = characters - drawn_by(font_manager.findfont(font_manager.FontProperties()), characters)
    if not missing:
        return families, missing
    files = {
        font.name: font.fname
        for font in font_manager.fontManager.ttflist
        if font.style == "normal" and font.weight in REGULAR and "Last Resort" not in font.name  # it draws boxes
    }
    drawn = {family: drawn_by(file, missing) for family, file in sorted(files.items())}
    while missing:
        best = max(drawn, key=lambda family: len(drawn[family] & missing))
        if not drawn[best] & missing:
            break
        families.append(best)
        missing = missing - drawn[best]
    return families, missing


def drawn_by(file: str, characters: set[str]) -> set[str]:
    """The characters for which a font has a glyph."""
    try:
        codes = font_manager.get_font(file).get_charmap()
    except (OSError, RuntimeError):  # a damaged font
        return set()
    return {character for character in characters if ord(character) in codes}
