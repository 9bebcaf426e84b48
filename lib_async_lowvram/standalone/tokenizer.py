"""CLIP's tokenizer, from the vocabulary file that an installed package ships.

Problem: the tokenizers that transformers loads come from a hub, and nothing is fetched here. The vocabulary is one file,
`bpe_simple_vocab_16e6.txt.gz` of OpenAI's CLIP (https://github.com/openai/CLIP, MIT), which the packages `openai-clip` (`clip`) and
`open-clip-torch` (`open_clip`) hold; it is read where they lie, without importing them. From it and the rules of CLIP's
`simple_tokenizer.py` the library `tokenizers` makes the same tokenizer.

The file: a first line about itself, then merges, most frequent first, of which CLIP uses 49152 - 256 - 2. Tokens: 256 byte characters, the
same at a word's end, one for each merge, and the two special ones.
"""

from __future__ import annotations

import gzip
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lib_async_lowvram.standalone.errors import CannotMake

FILE = "bpe_simple_vocab_16e6.txt.gz"
PACKAGES = {"clip": "openai-clip", "open_clip": "open-clip-torch"}
"""Module -> package that is installed with pip."""

MERGES = 49152 - 256 - 2
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def vocabulary_file() -> Path:
    """Where it lies. `CannotMake` where no package has it."""
    for module in PACKAGES:
        spec = find_spec(module)
        for folder in spec.submodule_search_locations or () if spec is not None else ():
            path = Path(folder) / FILE
            if path.is_file():
                return path
    raise CannotMake(f"no installed package has {FILE}: python -m pip install {next(iter(PACKAGES.values()))}")


def byte_characters() -> list[str]:
    """Of each byte, in the vocabulary's order: printable ones stand for themselves, the others for characters from 256 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(own)
    return [chr(byte) for byte in own] + [chr(256 + number) for number in range(others)]


class Tokenizer:
    """Prompts to numbers. `path`: of the vocabulary."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1 : MERGES + 1]
        merges = [tuple(line.split()) for line in lines]
        single = byte_characters()
        tokens = [*single, *(f"{each}</w>" for each in single), *("".join(pair) for pair in merges), BEGIN, END]
        if len(merges) != MERGES or any(len(pair) != 2 for pair in merges):
            raise CannotMake(f"{path} is not CLIP's vocabulary: {len(merges)} merges")
        numbers = {token: number for number, token in enumerate(tokens)}
        self.begin, self.end = numbers[BEGIN], numbers[END]
        self._numbers = numbers
        model = models.BPE(
            vocab=numbers, merges=merges, unk_token=END, continuing_subword_prefix="", end_of_word_suffix="</w>", fuse_unk=False
        )
        self._tokenizer: Any = Tokenizer(model)
        self._tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    def tokens(self, text: str) -> list[int]:
        """Of the text alone."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def padded(self, text: str, pads_with: str = END) -> tuple[list[int], int]:
        """(`LENGTH` numbers: begin, the text's first 75, end, padding; how many tokens of the text were cut off)."""
        found = self.tokens(text)
        kept = found[: LENGTH - 2]
        row = [self.begin, *kept, self.end]
        return row + [self._pad(pads_with)] * (LENGTH - len(row)), len(found) - len(kept)

    def _pad(self, token: str) -> int:
        return self._numbers[token]


@lru_cache(maxsize=1)
def tokenizer() -> Tokenizer:
    """The one that is installed. `CannotMake`."""
    return Tokenizer(vocabulary_file())
