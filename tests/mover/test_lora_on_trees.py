"""The built-in LoRA's behaviour on a managed network: every pass as the twin's, one write-back per changed unit per change.

Runs on the simulated device with a slow jittery link and poison, and under the recorder, which judges every order.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lib_async_lowvram import NetworkSpec, Region
from tests.lora_double import PATCHED, LoraDouble, Network
from tests.mover.chains import X, call, judged, on_thread
from tests.mover.zoo import EVERYTHING, Rig, Zoo, every_budget, every_device, rig

UNITS = 2 + 7 * 3
"""Of the zoo, once attention has its silent `out_proj`: what a LoRA on every layer changes."""


class Stop(BaseException):
    """As the WebUI's interrupt: post hooks do not run for it."""


@pytest.fixture
def lora() -> Iterator[LoraDouble]:
    with LoraDouble() as double:
        yield double


def start(lora: LoraDouble, made: Rig) -> Rig:
    lora.name_layers(made.net, made.twin)
    return made


def changed(counts: dict[str, int]) -> tuple[int, int]:
    return counts["write_backs"], counts["adopted"]


@every_device
@every_budget
def test_applied_changed_in_strength_joined_by_others_and_removed(lora: LoraDouble, device: str, budget: int) -> None:
    with rig(device, budget) as made:
        start(lora, made)
        one, stronger, other = Network("one"), Network("one", 0.5), Network("other", 2.0)
        for wanted in ([one], [stronger], [stronger, other], [other, one], []):
            lora.want(*wanted)
            before = lora.applied
            assert changed(made.counted()) == (UNITS, 0), wanted
            assert lora.applied == before + 2 * UNITS * len(wanted)
            assert changed(made.counted(2)) == (0, 0), wanted  # one write-back per change, none in later passes
            made.same_weights()
        assert made.mover.status()["refetches"] == 0
        original = Rig(made.streams, EVERYTHING, passes=0)
        for mine, theirs in zip(made.net.parameters(), original.twin.parameters(), strict=True):
            assert torch.equal(mine, theirs)
        original.mover.detach()


@every_device
@every_budget
def test_only_some_layers(lora: LoraDouble, device: str, budget: int) -> None:
    with rig(device, budget) as made:
        start(lora, made)
        lora.want(Network("one", layers=lambda name: name.endswith("attention") or name == "blocks.1.conv"))
        # Every module's backup is restored before anything is added, with the bytes it has: seen as a change where a backup was
        # there (everywhere but in the first change), as a version is all that can be seen.
        assert changed(made.counted()) == (UNITS, 0)
        assert changed(made.counted(2)) == (0, 0)


@every_device
@every_budget
def test_a_bias_added_changed_and_removed(lora: LoraDouble, device: str, budget: int) -> None:
    with rig(device, budget) as made:
        start(lora, made)
        without = [name for name, module in made.net.named_modules() if isinstance(module, PATCHED) and "out_proj" not in name
                   and getattr(module, "out_proj", module).bias is None]
        assert len(without) == 7  # the convolutions, the first linear leaves, and attention without biases
        for strength in (1.0, 0.5):
            lora.want(Network("biased", strength, biased=lambda name: True))
            assert changed(made.counted()) == (UNITS - 7, 7)
            assert changed(made.counted(2)) == (0, 0)
            lora.want()
            assert changed(made.counted()) == (UNITS - 7, 7)
            assert all(made.net.get_submodule(name).bias is None for name in without if "attention" not in name)
            assert made.net.blocks[1].attention.out_proj.bias is None
            assert changed(made.counted(2)) == (0, 0)


@every_device
@every_budget
def test_a_bias_added_by_the_lora_of_today_fails_as_it_does_in_stock(lora: LoraDouble, device: str, budget: int) -> None:
    # It finds no backup of the bias that it added itself. It raises in the middle of the next pass; removal still works.
    lora.objects_to_added_bias = True
    with rig(device, budget) as made:
        start(lora, made)
        lora.want(Network("biased", biased=lambda name: True))
        made.passes()
        for net in (made.net, made.twin):
            with pytest.raises(RuntimeError, match="no backup"), judged(made.streams):
                net(X)
        lora.want()
        made.passes(2)


@every_device
@every_budget
def test_functional_writes_nothing_but_takes_back_what_was_written(lora: LoraDouble, device: str, budget: int) -> None:
    with rig(device, budget) as made:
        start(lora, made)
        lora.functional = True
        lora.want(Network("one", layers=lambda name: "attention" not in name))
        assert changed(made.counted()) == (3, 0)  # attention has no functional way, and restores what it has just backed up
        assert changed(made.counted(2)) == (0, 0)
        lora.functional = False
        assert changed(made.counted()) == (UNITS - 3, 0)
        lora.functional = True
        assert changed(made.counted()) == (UNITS - 3, 0)
        assert changed(made.counted(2)) == (0, 0)


@every_device
@every_budget
def test_another_network_in_every_pass(lora: LoraDouble, device: str, budget: int) -> None:
    # As a prompt for hires with a LoRA of its own, or prompt editing at its worst.
    with rig(device, budget) as made:
        start(lora, made)
        for number in range(5):
            lora.want(Network("even") if number % 2 == 0 else Network("odd"))
            assert changed(made.counted()) == (UNITS, 0)


@every_device
@every_budget
@pytest.mark.parametrize("error", [Stop, ValueError])
@pytest.mark.parametrize("where", ["blocks.0.conv", "blocks.1.attention", "out"])
def test_restored_after_a_job_that_was_broken_off(
    lora: LoraDouble, device: str, budget: int, error: type[BaseException], where: str
) -> None:
    with rig(device, budget) as made:
        start(lora, made)
        lora.want(Network("one", biased=lambda name: True))

        def stop(*_: object) -> None:
            raise error

        for net in (made.net, made.twin):
            # After the leaf's own forward: its weights are written, its post hooks do not run for a BaseException.
            handle = net.get_submodule(where).register_forward_hook(stop)
            with pytest.raises(error), judged(made.streams):
                net(X)
            handle.remove()
        lora.want()
        made.passes(2)
        assert changed(made.counted(2)) == (0, 0)
        lora.want(Network("one"))
        made.passes(2)


@every_device
@every_budget
@pytest.mark.parametrize("passes", [0, 1])
def test_applied_in_the_learning_pass_or_right_after_it(lora: LoraDouble, device: str, budget: int, passes: int) -> None:
    with rig(device, budget, passes=0) as made:
        start(lora, made)
        made.passes(passes)
        lora.want(Network("one", biased=lambda name: name.endswith("conv")))
        assert changed(made.counted()) == (UNITS - 3 + (0 if passes else 3), 3)  # not joined yet: `out_proj` is a unit of its own
        assert changed(made.counted(3)) == (0, 0)
        lora.want()
        assert changed(made.counted()) == (UNITS - 3, 3)
        made.passes(2)


@every_device
@every_budget
def test_two_models_in_alternation(lora: LoraDouble, device: str, budget: int) -> None:
    # The refiner: another network takes the device, under the same LoRA's names for its own layers.
    with rig(device, budget) as made:
        start(lora, made)
        torch.manual_seed(9)
        state = Zoo().state_dict()
        refiner, twin = Zoo(), Zoo()
        for each in (refiner, twin):
            each.load_state_dict(state)
        lora.name_layers(refiner, twin)
        made.mover.attach({"refiner": refiner.spec()})

        def refine() -> None:
            with torch.no_grad():
                expected = twin(X)
            assert torch.equal(call(refiner, made.streams), expected)

        for wanted in ([], [], [Network("one")], [Network("other")], []):
            lora.want(*wanted)
            for _ in range(2):
                made.passes()
                refine()
        counts = {name: network["write_backs"] for name, network in made.mover.status()["networks"].items()}
        assert counts == {"net": 3 * UNITS, "refiner": 3 * UNITS}
        made.mover.drain()
        for mine, theirs in zip(refiner.parameters(), twin.parameters(), strict=True):
            assert torch.equal(mine, theirs)


@every_device
@every_budget
def test_a_model_switched_under_an_applied_network(lora: LoraDouble, device: str, budget: int) -> None:
    # Loading weights in place makes LoRA forget its backups; the next pass applies it to the new ones.
    with rig(device, budget) as made:
        start(lora, made)
        lora.want(Network("one"))
        made.passes(2)
        torch.manual_seed(9)
        state = Zoo().state_dict()
        made.mover.drain()
        made.both(lambda net: net.load_state_dict(state))
        assert changed(made.counted()) == (UNITS, 0)
        lora.want()
        made.passes(2)
        for name, value in state.items():
            assert torch.equal(made.net.state_dict()[name], value)


@every_device
@every_budget
def test_applied_in_passes_on_changing_threads(lora: LoraDouble, device: str, budget: int) -> None:
    with rig(device, budget) as made:
        start(lora, made)
        for wanted in ([Network("one")], [Network("other")], []):
            lora.want(*wanted)
            on_thread(made.passes)
            made.passes()
            made.same_weights()


@every_device
def test_a_leaf_that_fires_twice_is_changed_at_its_first_use(lora: LoraDouble, device: str) -> None:
    class Twice(Zoo):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.enter(x).reshape(-1, 4, 8)
            for block in [*self.blocks, self.blocks[0], *self.blocks[::-1]]:
                x = block(x)
            return self.out(x).sum(1)

    for budget in (1, EVERYTHING):
        with rig(device, budget, Twice) as made:
            start(lora, made)
            for wanted in ([Network("one", biased=lambda name: True)], [], [Network("one", 0.5)], []):
                lora.want(*wanted)
                counts = made.counted()
                assert counts["write_backs"] + counts["adopted"] == UNITS
                assert changed(made.counted(2)) == (0, 0)


@every_device
@every_budget
def test_text_encoder_layers_change_between_its_single_passes(lora: LoraDouble, device: str, budget: int) -> None:
    # An encoder runs one pass and gives the device to the UNet; what it wrote at its end must be true by then.
    with rig(device, budget) as made:
        start(lora, made)
        text, twin = Zoo(1), Zoo(1)
        twin.load_state_dict(text.state_dict())
        made.mover.attach({"text": NetworkSpec([Region(text)], text)})
        lora.name_layers(text, twin)
        for wanted in ([], [Network("one")], [Network("one")], [Network("one", 0.3)], []):
            lora.want(*wanted)
            with torch.no_grad():
                expected = twin(X)
            assert torch.equal(call(text, made.streams), expected)
            made.passes(2)
            for mine, theirs in zip(text.parameters(), twin.parameters(), strict=True):
                assert torch.equal(mine, theirs)
        assert made.mover.status()["networks"]["text"]["write_backs"] == 3 * 9
