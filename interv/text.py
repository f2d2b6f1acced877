"""Text from prompts, tokens, names and files, made safe to show on a terminal."""

from __future__ import annotations

import unicodedata

# Line breaks and tabs lay text out; everything else of these categories steers a terminal (Cc),
# changes the order of what is shown (Cf, as bidirectional overrides), or cannot be encoded (Cs).
_KEPT = "\n\t"
_JOINERS = "\u200c\u200d"  # parts of words in many scripts, and of emoji
_STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")


def printable(text: str) -> str:
    r"""Return `text` with control, format and surrogate characters written as escapes.

    >>> print(printable("\x1b[31mred"))
    \x1b[31mred
    """
    if text.isprintable():
        return text
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character in _KEPT or character in _JOINERS:
        return character
    if unicodedata.category(character) not in _STEERING:
        return character
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
