"""Captions to the numbers that CLIP's text tower reads: byte pair encoding.

A word is a row of bytes; pairs that occur often were merged, again and again, into longer pieces,
and what a piece is called is its place in the list of merges. The list is CLIP's own,
bpe_simple_vocab_16e6.txt.gz (github.com/openai/CLIP). The numbers are CLIP's for every caption in
ASCII; beyond it CLIP also mends quotation marks and ligatures, which is not done here.
"""
import gzip
import html
import re
from pathlib import Path

import numpy as np

from support.errors import DataError

LENGTH, START, END = 77, 49406, 49407
# contractions, words, single digits, and rows of anything else
PIECES = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\s\w]|_)+")


class Tokenizer:
    """Raises DataError for a file that is no list of merges."""

    def __init__(self, vocabulary: str | Path):
        try:
            with gzip.open(vocabulary, "rt", encoding="utf-8") as file:
                lines = file.read().split("\n")
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise DataError(f"{vocabulary} is no vocabulary of CLIP's: {error}") from None
        pairs = [tuple(line.split()) for line in lines[1 : START - 512 + 1]]
        if len(pairs) != START - 512 or any(len(pair) != 2 for pair in pairs):
            raise DataError(f"{vocabulary} is no vocabulary of CLIP's")
        # A byte is written as a letter: itself where it is one that shows, else one from 256 on.
        shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in shown]
        self.letters = {byte: chr(byte) for byte in shown}
        self.letters |= {byte: chr(256 + i) for i, byte in enumerate(hidden)}
        single = list(self.letters.values())
        names = [*single, *(letter + "</w>" for letter in single), *map("".join, pairs)]
        self.numbers = {name: number for number, name in enumerate(names)}
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}

    def split(self, word: str) -> list[str]:
        """A word in its pieces: the pair that was merged first is merged first."""
        symbols = [self.letters[byte] for byte in word.encode()]
        symbols[-1] += "</w>"
        while len(symbols) > 1:
            ranks = [self.ranks.get(pair, np.inf)
                     for pair in zip(symbols, symbols[1:], strict=False)]
            best = int(np.argmin(ranks))
            if ranks[best] == np.inf:
                break
            pair, merged, i = (symbols[best], symbols[best + 1]), [], 0
            while i < len(symbols):
                together = tuple(symbols[i : i + 2]) == pair
                merged.append("".join(pair) if together else symbols[i])
                i += 1 + together
            symbols = merged
        return symbols

    def __call__(self, caption: str) -> np.ndarray:
        """int64 [77]: start, pieces, end, zeros. A caption that is too long is cut off."""
        text = " ".join(html.unescape(html.unescape(caption)).split()).lower()
        numbers = [self.numbers[piece] for word in PIECES.findall(text)
                   for piece in self.split(word)]
        row = np.zeros(LENGTH, np.int64)
        numbers = [START, *numbers[: LENGTH - 2], END]
        row[: len(numbers)] = numbers
        return row
