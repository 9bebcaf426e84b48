"""CLIP's tokens, from the vocabulary that a package ships. Expected: transformers' CLIPTokenizer of clip-vit-large-patch14."""

from __future__ import annotations

import pytest

pytest.importorskip("tokenizers")

from lib_async_lowvram.standalone import tokenizer as module
from lib_async_lowvram.standalone.errors import CannotMake
from lib_async_lowvram.standalone.tokenizer import LENGTH, tokenizer

EXPECTED = [
    ("", []),
    ("a photo of a cat", [320, 1125, 539, 320, 2368]),
    ("A Lighthouse, at DUSK!", [320, 13717, 267, 536, 19708, 256]),
    ("it's 2048x2048 pixels -- isn't it?", [585, 568, 273, 271, 275, 279, 343, 273, 271, 275, 279, 34099, 2432, 2923, 713, 585, 286]),
    ("  spaces \n\t and lines  ", [9006, 537, 3418]),
    ("naïve café über straße", [1097, 35689, 563, 15304, 6522, 1516, 1894, 127, 253, 324]),
    ("日本の城 🏯", [39121, 44353, 21575, 161, 253, 492, 1109, 363]),
    ("(masterpiece:1.2), [best|quality] <x>", [263, 12066, 281, 272, 269, 273, 2361, 314, 949, 347, 3027, 316, 283, 343, 285]),
    ("supercalifragilistic", [1642, 2857, 13093, 2076, 1561]),
    ("don't we'll they're I'd you've I'm", [847, 713, 649, 1342, 889, 982, 328, 1896, 592, 1200, 328, 880]),
    ("é combined", [4166, 10427]),
    ("a_b-c/d\\e 3.14", [320, 318, 321, 268, 322, 270, 323, 315, 324, 274, 269, 272, 275]),
]


@pytest.mark.parametrize(("text", "numbers"), EXPECTED, ids=lambda value: value[:20] if isinstance(value, str) else "")
def test_as_clip_does(text: str, numbers: list[int]) -> None:
    assert tokenizer().tokens(text) == numbers


def test_padding() -> None:
    words = tokenizer()
    row, cut = words.padded("a cat")
    assert row == [49406, 320, 2368] + [49407] * 74 and cut == 0
    row, _ = words.padded("a cat", "!")
    assert row == [49406, 320, 2368, 49407] + [0] * 73
    row, cut = words.padded("cat " * 100)
    assert row == [49406] + [2368] * 75 + [49407] and cut == 25 and len(row) == LENGTH


def test_without_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(CannotMake, match="pip install openai-clip"):
        module.vocabulary_file()
