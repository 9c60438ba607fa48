"""Fonts for names in any script, in plots and on photos: those installed that have the letters."""

import unicodedata
import warnings

import matplotlib
from matplotlib import font_manager
from matplotlib.font_manager import FontEntry

from common import warn_once

CHINESE_JAPANESE_KOREAN = {"Cjk", "Hiragana", "Katakana", "Hangul", "Bopomofo", "Fullwidth", "Halfwidth", "Ideographic"}
NO_LETTERS = ("Last Resort", "LastResort", ".LastResort", "Adobe Blank")  # fonts that draw a box for every letter
COLOURED = ("Color", "Colour")  # bitmaps, that matplotlib cannot draw
_found: dict[str, FontEntry | None] = {}  # script -> its font: looking through all fonts takes seconds


def show_in_plots(text: str) -> None:
    """Let matplotlib's texts made from now on fall back to the fonts that show `text`."""
    families = matplotlib.rcParams["font.family"]
    added = [font.name for font in _fonts_beside_the_usual(text) if font and font.name not in families]
    if added:
        matplotlib.rcParams["font.family"] = [*families, *added]


def font_file(text: str) -> str:
    """The file of one font for all of `text`, where one is installed: that of the first letter that the usual lacks."""
    for font in _fonts_beside_the_usual(text):
        if font:
            return font.fname
    return font_manager.findfont("DejaVu Sans")  # comes with matplotlib


def _fonts_beside_the_usual(text: str) -> list[FontEntry | None]:
    usual = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    samples: dict[str, str] = {}  # script -> the first letter of it that is missing
    for character in text:
        if not character.isspace() and not usual.get_char_index(ord(character)):
            samples.setdefault(script_of(character), character)
    return [_font_of_script(script, sample) for script, sample in samples.items()]


def script_of(character: str) -> str:
    """Its script by Unicode's name for it: 'Cjk' of CJK UNIFIED IDEOGRAPH-5C71, 'Devanagari'; 'Symbols' for emoji."""
    if unicodedata.category(character)[0] == "S":
        return "Symbols"
    return unicodedata.name(character, "Unknown").split()[0].title()


def _font_of_script(script: str, sample: str) -> FontEntry | None:
    """An installed font that has `sample`. Warns once, with the font to install, where there is none."""
    if script not in _found:
        _found[script] = _search(sample, font_manager.fontManager.ttflist) or _search(sample, _new_fonts())
    if _found[script] is None:
        letters, font = f"{script} letters", f"Noto Sans {script}"
        if script in CHINESE_JAPANESE_KOREAN:
            letters, font = "Chinese, Japanese or Korean letters", "Noto Sans CJK"
        elif script == "Symbols":
            letters, font = f"the symbol {sample}", "Noto Emoji"
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # matplotlib's own, once per letter
        warn_once(
            f"no installed font has {letters}, so names show boxes in pictures; install {font} "
            "(https://fonts.google.com/noto)"
        )
    return _found[script]


def _search(character: str, fonts: list[FontEntry]) -> FontEntry | None:
    """The plainest of `fonts` that has the character."""

    def fancy(font: FontEntry) -> tuple[bool, bool, bool, str]:
        regular = str(font.weight) in ("400", "normal", "regular")
        return font.style != "normal", not regular, not font.name.startswith("Noto Sans"), font.name

    for font in sorted(fonts, key=fancy):
        if font.name.startswith(NO_LETTERS) or any(word in font.name for word in COLOURED):
            continue
        try:
            if font_manager.get_font(font.fname).get_char_index(ord(character)):
                return font
        except (OSError, RuntimeError):  # removed since the list was made, or damaged
            continue
    return None


def _new_fonts() -> list[FontEntry]:
    """Fonts that were installed after matplotlib had made its list, which it keeps between runs."""
    manager = font_manager.fontManager
    known = {font.fname for font in manager.ttflist}
    before = len(manager.ttflist)
    for file in font_manager.findSystemFonts():
        if file not in known:
            try:
                manager.addfont(file)
            except (OSError, RuntimeError, ValueError):  # nothing that matplotlib can read
                continue
    return manager.ttflist[before:]
