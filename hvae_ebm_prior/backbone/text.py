"""Texts that people read: names of categories, classes and figures.

A text from elsewhere is printed to terminals and pages. What they obey rather than show, such as escape sequences and
marks that turn the direction of writing, can make a line look like another one.
"""

import unicodedata

# Longest text that a saved prior may hold.
LONGEST_TEXT = 1000
# Control and format characters, halves of pairs, and separators of lines and paragraphs.
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
# Format characters that Persian, Indic scripts and emoji are written with.
JOINERS = "\u200c\u200d"


def hidden_characters(text: str) -> str:
    """The characters of a text that are not shown but obeyed; empty where there are none."""
    return "".join(each for each in text if unicodedata.category(each) in HIDDEN and each not in JOINERS)


def visible(text: str) -> str:
    """A text with such characters written as Python writes them, "\\x1b" or "\\u202e"."""
    hidden = set(hidden_characters(text))
    return "".join(each.encode("unicode_escape").decode() if each in hidden else each for each in text)
