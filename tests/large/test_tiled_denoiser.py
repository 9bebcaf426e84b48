"""A step in tiles: one tile is the very call, conditions are cut, batches are blended alike, memory makes them smaller."""

from __future__ import annotations

import pytest
import torch

from lib_async_lowvram.bench.unet import sd15
from lib_async_lowvram.large.pieces import pieces
from lib_async_lowvram.large.regions import parse
from lib_async_lowvram.large.spatial import CannotTile, cut, join
from lib_async_lowvram.large.tiled_denoiser import TiledDenoiser
from lib_async_lowvram.large.tiles import Tile

LATENT = torch.randn(2, 4, 24, 40, generator=torch.Generator().manual_seed(1))
TIMES = torch.tensor([3.0, 7.0])


def test_one_tile_is_the_same_call_bit_for_bit() -> None:
    unet = sd15(32)
    latent, context = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 768)
    seen = []

    def apply(x, t, cond):
        seen.append((x, t, cond))
        return unet(x, t, cond["c_crossattn"][0])

    cond = {"c_crossattn": [context]}
    made = pieces(16, 16, (64, 64), 8)
    with torch.no_grad():
        expected = unet(latent, TIMES, context)
        got = TiledDenoiser(made, 5)(apply, latent, TIMES, cond)
    assert torch.equal(got, expected)
    assert len(seen) == 1 and seen[0][0] is latent and seen[0][1] is TIMES and seen[0][2] is cond


@pytest.mark.parametrize("group", [1, 2, 3, 100])
def test_groups_give_the_same_picture(group: int) -> None:
    made = pieces(24, 40, (16, 16), 4)
    seen = []

    def apply(x, t, cond):
        seen.append((len(x), t.tolist(), len(cond["a"][0]), len(cond["b"])))
        return (x * t[:, None, None, None] + cond["a"][0]).to(torch.float16)

    mask = torch.randn(2, 4, 24, 40)
    tiled = TiledDenoiser(made, group)
    got = tiled(apply, LATENT, TIMES, {"a": [mask], "b": torch.ones(2, 77, 8), "c": "as it is"})
    assert got.dtype == torch.float16 and got.shape == LATENT.shape
    expected = (LATENT * TIMES[:, None, None, None] + mask).to(torch.float16)
    assert torch.equal(got, expected)  # every tile says the same of a cell: so does their mean
    assert tiled.calls == len(seen) == -(-len(made) // group)
    assert all(number == len(times) == a == b and times == TIMES.tolist() * (number // 2) for number, times, a, b in seen)


def test_regions_are_computed_under_their_prompts() -> None:
    regions, _ = parse([{"x": 0.5, "y": 0, "width": 0.5, "height": 1, "prompt": "a", "weight": 1}])
    made = pieces(24, 40, (16, 16), 4, regions)

    def apply(x, t, cond):
        return torch.zeros_like(x) + cond[:, :1, :1, None]

    asked = []

    def prompts(sources, cond):
        asked.append(list(sources))
        return {source: cond + source for source in sources}

    got = TiledDenoiser(made, 3)(apply, LATENT, TIMES, torch.zeros(2, 5, 8), prompts)
    assert asked == [[0, 1]]
    assert (got[..., :20] == 0).all() and (got[..., 24:] == 1).all()
    assert (got[..., 20] < got[..., 21]).all() and (got[..., 21] < 1).all()
    with pytest.raises(CannotTile, match="nobody knows"):
        TiledDenoiser(made, 3)(apply, LATENT, TIMES, torch.zeros(2, 5, 8))


def test_a_batch_that_fails_is_halved_and_only_it_is_repeated() -> None:
    made = pieces(24, 40, (16, 16), 4)
    sizes = []

    def apply(x, t, cond):
        sizes.append(len(x) // 2)
        if len(x) > 4:
            raise MemoryError("too many")
        return x * 2

    tiled = TiledDenoiser(made, 100, lambda error: isinstance(error, MemoryError))
    assert (tiled(apply, LATENT, TIMES, {}) - LATENT * 2).abs().max() < 2e-6
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1] and tiled.group == 1 and tiled.halved == 2
    sizes.clear()
    tiled(apply, LATENT, TIMES, {})
    assert sizes == [1] * 6

    def failing(x, t, cond):
        sizes.append(len(x) // 2)
        raise MemoryError("always")

    sizes.clear()
    tiled.group = 2
    with pytest.raises(MemoryError):
        tiled(failing, LATENT, TIMES, {})
    assert sizes == [2, 1]
    with pytest.raises(KeyError):
        TiledDenoiser(made, 4, lambda error: isinstance(error, MemoryError))(lambda x, t, cond: cond["no"], LATENT, TIMES, {})


def test_what_cannot_be_cut_is_named() -> None:
    tile = Tile(4, 8, 16, 16)
    numbers = torch.arange(2 * 3 * 24 * 40).reshape(2, 3, 24, 40)
    given = {"list": [numbers], "tuple": (None, 3), "dummy": torch.zeros(2, 5, 1, 1), "vector": torch.ones(2, 9), "one": torch.tensor(1.0)}
    got = cut(given, tile, LATENT)
    assert torch.equal(got["list"][0], numbers[..., 4:20, 8:24])
    assert got["tuple"] == (None, 3) and got["dummy"] is given["dummy"] and got["vector"] is given["vector"] and got["one"] is given["one"]
    for value, said in (
        (torch.zeros(2, 3, 192, 320), r"cond\['hint'\] of shape \(2, 3, 192, 320\) has neither"),
        (torch.zeros(2, 3, 5, 24, 40), "has neither"),
        (torch.zeros(3, 77, 8), r"is not for a batch of 2"),
    ):
        with pytest.raises(CannotTile, match=said):
            cut({"hint": value}, tile, LATENT)


def test_joining() -> None:
    a, b = torch.zeros(2, 3), torch.ones(2, 3)
    got = join([{"x": [a], "y": "same", "z": None}, {"x": [b], "y": "same", "z": None}])
    assert torch.equal(got["x"][0], torch.cat([a, b])) and got["y"] == "same" and got["z"] is None
    for values, said in (
        ([{"x": a}, {"y": a}], "several sets of keys"),
        ([[a], [a, b]], "several lengths"),
        ([a, torch.zeros(2, 4)], "several shapes"),
        ([a, None], "several kinds"),
        (["p", "q"], "differs"),
        ([torch.tensor(1), torch.tensor(1)], "one number"),
    ):
        with pytest.raises(CannotTile, match=said):
            join(values)


def test_a_model_that_makes_something_else() -> None:
    with pytest.raises(CannotTile, match="the model made"):
        TiledDenoiser(pieces(24, 40, (16, 16), 4), 2)(lambda x, t, cond: x[..., :8], LATENT, TIMES, {})
    for group, made in ((0, pieces(8, 8, (8, 8), 0)), (1, [])):
        with pytest.raises(ValueError, match="no picture"):
            TiledDenoiser(made, group)
