"""What `bench` can be asked for: contenders, budgets, models; read from the command line, with one clear line where it is wrong.

Called by `command` before anything heavy is imported; standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass

OURS = ("resident", "stock", "async")
PEER_NAMES = ("diffusers-resident", "accelerate", "diffusers-group", "diffusers-group-record", "mmgp")
CONTENDERS = (*OURS, *PEER_NAMES)
MODELS = ("tiny", "sd15", "sdxl")
DEFAULT_BUDGETS = "10%,30%,50%,70%,90%,equal"
MIB = 1 << 20


class BenchError(Exception):
    """The benchmark cannot run; the message is one line for the user."""


@dataclass(frozen=True)
class Budget:
    """Device bytes for weights: a number, a share of the weights, or (neither) as much as each of the others was seen to take."""

    nbytes: int | None = None
    share: float | None = None

    @property
    def equal(self) -> bool:
        return self.nbytes is None and self.share is None

    def of(self, total_bytes: int) -> int:
        """Bytes, for a model of `total_bytes`. Not for `equal`."""
        return self.nbytes if self.nbytes is not None else int(self.share * total_bytes)

    def __str__(self) -> str:
        if self.equal:
            return "equal"
        return f"{self.nbytes / MIB:g}" if self.nbytes is not None else f"{100 * self.share:g}%"


def parse_budgets(texts: list[str]) -> tuple[Budget, ...]:
    """"600", "10%,50%", "equal"; each text may hold several. Megabytes are of 2**20 bytes. Raises `BenchError`."""
    budgets = [_budget(part) for part in _parts(texts, "--budget")]
    return tuple(dict.fromkeys(budgets))


def _budget(text: str) -> Budget:
    if text == "equal":
        return Budget()
    number = _number(text.removesuffix("%"), f"--budget {text}: not MB, N% or equal")
    if text.endswith("%"):
        if not 0 < number <= 100:
            raise BenchError(f"--budget {text}: a share is above 0% and at most 100%")
        return Budget(share=number / 100)
    if not 0 < number <= 1 << 24:
        raise BenchError(f"--budget {text}: megabytes are above 0 and at most {1 << 24}")
    return Budget(nbytes=int(number * MIB))


def parse_contenders(texts: list[str]) -> tuple[str, ...]:
    """Names from `CONTENDERS`, or "all"; `resident` is always among them: the limit rests on it. Raises `BenchError`."""
    names = _parts(texts, "--contenders")
    if names == ["all"]:
        return CONTENDERS
    for name in names:
        if name not in CONTENDERS:
            raise BenchError(f"--contenders {name}: unknown; choose from {', '.join(CONTENDERS)}, or all")
    wanted = {"resident", *names}
    if wanted & (set(PEER_NAMES)):
        wanted.add("diffusers-resident")  # the peers' reference
    return tuple(name for name in CONTENDERS if name in wanted)


def parse_models(texts: list[str]) -> tuple[str, ...]:
    """Names from `MODELS`. Raises `BenchError`."""
    models = _parts(texts, "--model")
    for model in models:
        if model not in MODELS:
            raise BenchError(f"--model {model}: unknown; choose from {', '.join(MODELS)}")
    return tuple(dict.fromkeys(models))


def parse_numbers(texts: list[str], option: str, least: float, most: float) -> tuple[float, ...]:
    """Numbers in [least, most]. Raises `BenchError`."""
    numbers = []
    for part in _parts(texts, option):
        number = _number(part, f"{option} {part}: not a number")
        if not least <= number <= most:
            raise BenchError(f"{option} {part}: must be between {least:g} and {most:g}")
        numbers.append(number)
    return tuple(dict.fromkeys(numbers))


def _number(text: str, message: str) -> float:
    try:
        number = float(text)
    except ValueError as error:
        raise BenchError(message) from error
    if number != number:
        raise BenchError(message)
    return number


def _parts(texts: list[str], option: str) -> list[str]:
    parts = [part.strip().lower() for text in texts for part in text.split(",")]
    if not all(parts):
        raise BenchError(f"{option} {','.join(texts)!r}: an entry is empty")
    return parts
