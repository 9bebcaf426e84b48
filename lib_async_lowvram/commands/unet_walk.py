"""A UNet's leaves in the order in which they run, with what each computes, from nothing but names and shapes.

Problem: a header lists tensors by name; a plan needs execution order and work. Both follow from the structure: embeddings of
timestep and label, then the blocks down, in the middle and up, where every block on the way up takes one skip connection back
(and with it the picture's size). Within a residual block: norm, convolution, embedding, norm, convolution, skip; within a
transformer block: self-attention (query, key, value, out), cross-attention, feed-forward.

FLOPs, two for a multiplication and an addition, per image: a linear layer 2 x inputs x outputs x rows; a convolution
2 x weights x output positions; a norm 8 x channels x positions; attention 4 x rows x keys x channels, given to its value
layer, after which it runs. Additions, activations and the softmax are left out.

Pure; no torch. Called by `plan`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lib_async_lowvram.commands.unet_names import DIFFUSERS, Attention, Names, NoUnet, find
from lib_async_lowvram.safetensors_header import TensorInfo, shown

PROMPT_TOKENS = 77
"""Rows of the prompt's embedding: one chunk of it."""

LATENT_SCALE = 8
"""Pixels per position of the latent picture."""

_MOST_LEAVES = 20_000
"""Known UNets have up to 1,100; planning takes time with the square of them."""

Size = tuple[int, int]


@dataclass(frozen=True)
class Leaf:
    """A module with weights of its own.

    Attributes:
        name: without the UNet's prefix. tensors: all that lie directly under that name.
        flops: per image; attention_flops: of the attention that runs between this leaf and the next.
        block: what stock moves it with; "" where stock leaves it on the device (`out`, the label's embedding).
        fires: False for weights that belong to no layer known here: taken for never used.
    """

    name: str
    tensors: tuple[TensorInfo, ...]
    flops: float
    attention_flops: float
    block: str
    fires: bool = True


@dataclass(frozen=True)
class Unet:
    """`leaves` in execution order, those that never fire last. `prefix` and `naming`: where it lies in the file."""

    prefix: str
    naming: str
    leaves: tuple[Leaf, ...]


def walk(tensors: Mapping[str, TensorInfo], width: int, height: int) -> Unet:
    """The UNet in `tensors` for pictures of `width` x `height` pixels. Raises `NoUnet`."""
    prefix, names = find(tensors)
    return _Walk(tensors, prefix, names).run((-(-height // LATENT_SCALE), -(-width // LATENT_SCALE)))


class _Walk:
    def __init__(self, tensors: Mapping[str, TensorInfo], prefix: str, names: Names) -> None:
        self._prefix, self._names = prefix, names
        self._own: dict[str, dict[str, TensorInfo]] = {}  # module -> its own tensors, by their last name
        self._children: dict[str, set[str]] = {}
        for name, tensor in tensors.items():
            if name.startswith(prefix):
                module, _, last = name[len(prefix) :].rpartition(".")
                self._own.setdefault(module, {})[last] = tensor
        for module in list(self._own):
            parts = module.split(".")
            for depth in range(1, min(len(parts), 8)):
                self._children.setdefault(".".join(parts[:depth]), set()).add(parts[depth])
            self._children.setdefault("", set()).add(parts[0])
        if len(self._own) > _MOST_LEAVES:
            raise NoUnet(f"the UNet would have {len(self._own)} layers, more than any known one")
        self._leaves: dict[str, Leaf] = {}
        self._block = ""

    def run(self, size: Size) -> Unet:
        names = self._names
        for name in names.vectors:
            if self._has(name):
                self._in_block("time_embed" if name.startswith("time_embed.") else "")
                self._linear(name, 1)
        if names is DIFFUSERS:
            self._run_diffusers(size)
        else:
            self._run_ldm(size)
        fired = tuple(self._leaves.values())
        # What is known by no name may be anything; it takes room on the device as stock's blocks do.
        silent = tuple(
            Leaf(module, tuple(own.values()), 0.0, 0.0, "unknown", fires=False)
            for module, own in self._own.items()
            if module not in self._leaves
        )
        return Unet(self._prefix, names.title, fired + silent)

    def _run_ldm(self, size: Size) -> None:
        skips: list[Size] = []
        for number, block in enumerate(self._numbered("input_blocks")):
            self._in_block(block)
            for layer in self._numbered(block):
                size = self._layer(layer, size, first=number == 0)
            skips.append(size)
        self._in_block("middle_block")
        for layer in self._numbered("middle_block"):
            size = self._layer(layer, size)
        for block in self._numbered("output_blocks"):
            self._in_block(block)
            if not skips:
                raise NoUnet("the UNet has more output blocks than input blocks")
            size = skips.pop()
            for layer in self._numbered(block):
                size = self._layer(layer, size)
        self._in_block("")
        self._norm("out.0", size)
        self._convolution("out.2", size)

    def _layer(self, layer: str, size: Size, first: bool = False) -> Size:
        """One layer of an LDM block; returns the size after it."""
        names = self._names
        if self._has(f"{layer}.{names.residual[1]}"):
            self._residual(layer, size)
        elif self._has(f"{layer}.proj_in"):
            self._transformer(layer, size)
        elif self._has(f"{layer}.conv"):
            size = (2 * size[0], 2 * size[1])
            self._convolution(f"{layer}.conv", size)
        elif self._has(f"{layer}.op") or (self._has(layer) and not first):
            size = _halved(size)
            self._convolution(f"{layer}.op" if self._has(f"{layer}.op") else layer, size)
        elif self._has(layer):
            self._convolution(layer, size)
        else:
            raise NoUnet(f"the UNet's layer {shown(layer)} is of an unknown kind")
        return size

    def _run_diffusers(self, size: Size) -> None:
        self._in_block("conv_in")
        self._convolution("conv_in", size)
        skips = [size]
        for block in self._numbered("down_blocks"):
            self._in_block(block)
            attentions = dict(enumerate(self._numbered(f"{block}.attentions")))
            for number, residual in enumerate(self._numbered(f"{block}.resnets")):
                self._residual(residual, size)
                if number in attentions:
                    self._transformer(attentions[number], size)
                skips.append(size)
            if self._has(f"{block}.downsamplers.0.conv"):
                size = _halved(size)
                self._convolution(f"{block}.downsamplers.0.conv", size)
                skips.append(size)
        self._in_block("mid_block")
        first, *others = self._numbered("mid_block.resnets")
        self._residual(first, size)
        attentions = self._numbered("mid_block.attentions")
        for number, residual in enumerate(others):
            if number < len(attentions):
                self._transformer(attentions[number], size)
            self._residual(residual, size)
        for block in self._numbered("up_blocks"):
            self._in_block(block)
            attentions = self._numbered(f"{block}.attentions")
            for number, residual in enumerate(self._numbered(f"{block}.resnets")):
                if not skips:
                    raise NoUnet("the UNet has more residual blocks on the way up than on the way down")
                size = skips.pop()
                self._residual(residual, size)
                if number < len(attentions):
                    self._transformer(attentions[number], size)
            if self._has(f"{block}.upsamplers.0.conv"):
                size = (2 * size[0], 2 * size[1])
                self._convolution(f"{block}.upsamplers.0.conv", size)
        self._in_block("")
        self._norm("conv_norm_out", size)
        self._convolution("conv_out", size)

    # -- blocks --------------------------------------------------------------------------------------------------------
    def _residual(self, base: str, size: Size) -> None:
        norm_in, conv_in, time, norm_out, conv_out = (f"{base}.{name}" for name in self._names.residual)
        self._norm(norm_in, size)
        self._convolution(conv_in, size)
        self._linear(time, 1)
        self._norm(norm_out, size)
        self._convolution(conv_out, size)
        if self._has(f"{base}.{self._names.skip}"):
            self._convolution(f"{base}.{self._names.skip}", size)

    def _transformer(self, base: str, size: Size) -> None:
        names, rows = self._names, size[0] * size[1]
        self._norm(f"{base}.norm", size)
        self._projection(f"{base}.proj_in", rows)
        for block in self._numbered(f"{base}.{names.blocks}"):
            self._attention(block, names.self_attention, rows, crossed=False)
            self._attention(block, names.cross_attention, rows, crossed=True)
            self._norm(f"{block}.{names.norm_ff}", size)
            self._linear(f"{block}.{names.wide}", rows)
            self._linear(f"{block}.{names.narrow}", rows)
        self._projection(f"{base}.proj_out", rows)

    def _attention(self, block: str, names: Attention, rows: int, crossed: bool) -> None:
        query, key, value = (f"{block}.{name}" for name in (names.query, names.key, names.value))
        self._leaf(f"{block}.{names.norm}", (1,), rows, 8)
        self._linear(query, rows)
        inner, width = self._shape(query)
        # Some networks attend to the prompt in both places.
        keys = PROMPT_TOKENS if crossed or self._shape(key)[-1:] != (width,) else rows
        self._linear(key, keys)
        self._linear(value, keys, attention_flops=4.0 * rows * keys * inner)
        self._linear(f"{block}.{names.out}", rows)

    # -- leaves --------------------------------------------------------------------------------------------------------
    def _norm(self, name: str, size: Size) -> None:
        self._leaf(name, (1,), size[0] * size[1], 8)

    def _linear(self, name: str, rows: int, attention_flops: float = 0.0) -> None:
        self._leaf(name, (2,), rows, 2, attention_flops)

    def _convolution(self, name: str, size: Size) -> None:
        self._leaf(name, (4,), size[0] * size[1], 2)

    def _projection(self, name: str, rows: int) -> None:
        self._leaf(name, (2, 4), rows, 2)

    def _leaf(self, name: str, dimensions: tuple[int, ...], positions: int, factor: int, attention_flops: float = 0.0) -> None:
        shape = self._shape(name)
        if len(shape) not in dimensions:
            wanted = " or ".join(map(str, dimensions))
            raise NoUnet(f"the UNet's {shown(name)}.weight has the shape {shown(list(shape))}, where {wanted} dimensions were expected")
        own = self._own[name]
        flops = float(factor * own["weight"].elements * positions)
        self._leaves[name] = Leaf(name, tuple(own.values()), flops, attention_flops, self._block)

    def _in_block(self, block: str) -> None:
        self._block = block

    def _has(self, name: str) -> bool:
        return "weight" in self._own.get(name, ())

    def _shape(self, name: str) -> tuple[int, ...]:
        if not self._has(name):
            raise NoUnet(f"the UNet lacks {shown(self._prefix + name)}.weight")
        return self._own[name]["weight"].shape

    def _numbered(self, module: str) -> list[str]:
        """`module`'s children 0, 1, 2 ... as far as they go. Raises `NoUnet` when one is left out."""
        numbers = sorted(int(child) for child in self._children.get(module, ()) if child.isascii() and child.isdecimal() and len(child) < 5)
        if numbers != list(range(len(numbers))):
            raise NoUnet(f"the UNet's {shown(module)} are not numbered without gaps")
        if not numbers and module.rpartition(".")[2] != "attentions":
            raise NoUnet(f"the UNet has no {shown(module)}")
        return [f"{module}.{number}" for number in numbers]


def _halved(size: Size) -> Size:
    return -(-size[0] // 2), -(-size[1] // 2)


def sum_flops(leaves: Iterable[Leaf]) -> float:
    """Per image and pass."""
    return sum(leaf.flops + leaf.attention_flops for leaf in leaves)
