"""A server's life, compressed: one device, one mover, checkpoints that come and go, and everything that may happen to a pass.

Problem: races show once in a thousand pictures, in combinations nobody writes a test for. Here a job is a handful of passes of
three networks (text encoder, UNet, VAE), every pass is compared bit for bit with a twin nobody manages, and between, inside and
beside the passes events are drawn from a seed. The device is slow and jittery, poisons what is freed, and is wrapped by the
recorder, which judges all orderings as if every stream ran as late as it may.

Used by `test_soak` (a short one) and `__main__` (as long as wanted). Deterministic but for the threads' timing.
"""

from __future__ import annotations

import gc
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import nn

from lib_async_lowvram import AsyncModelMover, OffloadConfig
from lib_async_lowvram.device.recorder import RecordingStreams
from lib_async_lowvram.device.simulated import SimulatedStreams
from tests.lora_double import LoraDouble, Network
from tests.mover.chains import X, call, handed_over
from tests.soak.checkpoint import NAMES, Checkpoint
from tests.soak.previewer import Previewer

CAPACITY = 8 << 20


BROKEN = "the bus is broken"


class Interrupted(BaseException):
    """As the WebUI's interrupt: post hooks do not run for it."""


class Failed(Exception):
    """A layer's own error."""


class Server:
    """See the module. Attributes: happened: how often each event was. passes: compared with the twin's. log: events, newest last."""

    def __init__(self, seed: int, lora: LoraDouble) -> None:
        self.random = random.Random(seed)
        self.lora = lora
        self.happened: Counter[str] = Counter()
        self.passes = 0
        self.log: list[str] = []
        # Then the VAE's masters are written in every pass, with the bytes they hold already, while a preview may read them.
        self._always_write_back = self.random.random() < 0.1
        link = self.random.choice((2e7, 2e8, float("inf")))
        jitter = 0.0 if link == float("inf") else self.random.choice((0.0, 1e-4))
        self.device = SimulatedStreams(CAPACITY, link, 0.0, jitter, seed=seed)
        self.streams = RecordingStreams(self.device)
        self.mover = AsyncModelMover(self._config(), self.streams)
        self.mover.on_demote = self._demoted
        self.checkpoint = Checkpoint(seed, lora)
        self.mover.attach(self.checkpoint.specs())
        self.previewer: Previewer | None = None

    def _demoted(self, reason: str) -> None:
        raise AssertionError(f"gave way: {reason}")

    def _config(self) -> OffloadConfig:
        draw = self.random
        return OffloadConfig(
            budget_bytes=draw.choice((1, 8 << 10, 16 << 10, 24 << 10, 1 << 20)),
            lookahead_bytes=draw.choice((0, 0, 4 << 10)),
            pinned_limit_bytes=draw.choice((0, 0, 0, 20 << 10, 1)),
            small_leaf_bytes=draw.choice((0, 0, 512)),
            always_write_back=self._always_write_back,
            check_placement=True,
        )

    def _note(self, what: str, more: object = "") -> None:
        self.happened[what] += 1
        self.log.append(f"{what} {more}".strip())
        del self.log[:-200]

    # -- a job -----------------------------------------------------------------------------------------------------------
    def job(self) -> None:
        """Text, a few steps, the picture; with whatever happens."""
        draw = self.random
        self._note("job")
        work = self._on_this_thread if draw.random() < 0.8 else self._elsewhere
        try:
            work(self._job)
        finally:
            self._stop_previews()
            self.mover.drain()
        assert self.streams.allocated_bytes == 0, "device memory is held after a job"
        self.weights_are_the_twins()
        self.check()

    @staticmethod
    def _on_this_thread(work: Callable[[], None]) -> None:
        work()

    def _elsewhere(self, work: Callable[[], object]) -> None:
        """On another thread, while this one waits."""
        handed_over(work, self.streams)

    def _job(self) -> None:
        draw = self.random
        self._between()
        for _ in range(draw.randrange(1, 4)):
            if draw.random() < 0.6:
                self._expect("unet")
            self.one_pass("text")
        if draw.random() < 0.5:
            self.mover.prepare("unet")
            self._note("prepare")
        if draw.random() < 0.3 and not self._always_write_back:
            self._start_previews()
        for _ in range(draw.randrange(2, 8)):
            if draw.random() < 0.3:
                self._between_passes()
            if draw.random() < 0.2:
                self._expect("vae")
            self.one_pass("unet")
            if self.previewer is not None:
                self.previewer.submit()
        if draw.random() < 0.8:
            self.one_pass("vae")

    def _expect(self, name: str) -> None:
        self.mover.expect(name)
        self._note("expect", name)

    def one_pass(self, name: str) -> None:
        """A pass, perhaps cut short first, perhaps with something happening inside it; compared with the twin's."""
        net, twin, draw = self.checkpoint.nets[name], self.checkpoint.twins[name], self.random
        roll = draw.random()
        if roll < 0.10:
            self._cut_short(name, net)
        elif roll < 0.13:
            self._starve(name, net)
        elif roll < 0.16 and self.previewer is None:  # its frames would fail as well
            self._break_a_copy(name, net)
        elif roll < 0.25:
            self._inside(net, *draw.choice((("drain from a thread", lambda: self._elsewhere(self.mover.drain)), *self._looks())))
        elif roll < 0.28:
            self._note("gradients", name)
            with torch.enable_grad():
                got, expected = net(X), twin(X)
            assert torch.equal(got, expected), name
            del got, expected
        with torch.no_grad():
            expected = twin(X)
        assert torch.equal(call(net, self.streams), expected), name
        self.passes += 1

    def _looks(self) -> list[tuple[str, Callable[[], object]]]:
        return [
            ("status from a thread", lambda: self._elsewhere(self.mover.status)),
            ("configure from a thread", lambda: self._elsewhere(lambda: self.mover.configure(self._config()))),
            ("prepare from a thread", lambda: self._elsewhere(lambda: self.mover.prepare(self.random.choice(NAMES)))),
            ("expect from a thread", lambda: self._elsewhere(lambda: self.mover.expect(self.random.choice(NAMES)))),
            ("a slower link", lambda: self._link(2e6)),
            ("a faster link", lambda: self._link(1e9)),
        ]

    def _link(self, bandwidth: float) -> None:
        self.device.bandwidth = bandwidth

    def _inside(self, net: nn.Module, what: str, action: Callable[[], object]) -> None:
        """`action` in the middle of the next pass, once."""
        leaf = self.random.choice([module for module in net.modules() if next(module.children(), None) is None])
        self._note(what)

        def once(*_: object) -> None:
            handle.remove()
            action()

        handle = leaf.register_forward_pre_hook(once)

    def _cut_short(self, name: str, net: nn.Module) -> None:
        error = self.random.choice((Interrupted, Failed))
        self._note(f"cut short by {error.__name__}", name)

        def fail() -> None:
            raise error

        self._inside(net, "a leaf raises", fail)
        try:
            call(net, self.streams)
        except (Interrupted, Failed):
            return  # a leaf that this order leaves out raises in a later pass: never, its hook is gone by then
        self._forget_hooks(net)

    @staticmethod
    def _forget_hooks(net: nn.Module) -> None:
        for module in net.modules():
            for key in [key for key, hook in module._forward_pre_hooks.items() if hook.__name__ == "once"]:
                del module._forward_pre_hooks[key]

    def _starve(self, name: str, net: nn.Module) -> None:
        """Somebody else takes nearly all device memory for the time of one pass."""
        self._note("device memory taken", name)
        if self.random.random() < 0.5:
            self.mover.drain()
        hog = self.device.allocate(max(0, self.device.free_memory() - self.random.randrange(0, 16 << 10)) // 512 * 512)
        try:
            call(net, self.streams)
        except torch.cuda.OutOfMemoryError:
            self._note("out of memory", name)
            if self.random.random() < 0.5 and self.mover.shed(name):
                self._note("shed, and tried again", name)
                with suppress(torch.cuda.OutOfMemoryError):
                    call(net, self.streams)
        finally:
            self.device.free(hog)

    def _break_a_copy(self, name: str, net: nn.Module) -> None:
        """One copy of one pass fails on its way. That may be found later, so the network is left before it is whole again."""
        left = self.random.randrange(30)

        def fail(_: int) -> RuntimeError | None:
            nonlocal left
            left -= 1
            return RuntimeError(BROKEN) if left == -1 else None

        self.device.fail_copy = fail
        try:
            call(net, self.streams)
            self.mover.drain()
        except RuntimeError as error:
            assert str(error) == BROKEN
            self._note("a copy failed", name)
            self.mover.drain()
        finally:
            self.device.fail_copy = None

    # -- between passes and jobs -------------------------------------------------------------------------------------------
    def _between_passes(self) -> None:
        draw = self.random
        what = draw.choice(("budget", "order", "lora", "drain", "write", "replace", "dirty"))
        self._note(what)
        if what == "budget":
            self.mover.configure(self._config())
        elif what == "order":
            count = len(self.checkpoint.nets["unet"].blocks)
            order = [draw.randrange(count) for _ in range(draw.randrange(1, count + 2))] if draw.random() < 0.7 else list(range(count))
            self.checkpoint.both("unet", lambda net: setattr(net, "order", order))
        elif what == "lora":
            count = draw.randrange(3)
            self.lora.want(*(Network(draw.choice("ab"), draw.choice((0.5, 1.0)), biased=lambda name: "wide" in name) for _ in range(count)))
        elif what == "drain":
            self.mover.drain()
        else:
            self.mover.drain()  # the rule for whoever changes weights on the host
            # A preview shows what the VAE was when the job's previews began.
            self._change(draw.choice(NAMES if self.previewer is None else NAMES[:2]), what)

    def _change(self, name: str, what: str) -> None:
        place = self.random.randrange(1000)

        @torch.no_grad()
        def change(net: nn.Module) -> None:
            leaves = [module for module in net.modules() if isinstance(getattr(module, "weight", None), nn.Parameter)]
            leaf = leaves[place % len(leaves)]
            if what == "write":
                leaf.weight.mul_(0.5)
            elif what == "replace":
                leaf.weight = nn.Parameter(leaf.weight.detach() * 0.75, requires_grad=False)
            else:
                leaf.weight.data.mul_(0.5)
                self.mover.mark_dirty(leaf)

        self.checkpoint.both(name, change)

    def _between(self) -> None:
        """Before a job."""
        roll = self.random.random()
        if roll < 0.15:
            self._switch()
        elif roll < 0.25:
            self._load_in_place()
        elif roll < 0.30:
            self._note("a module put in")
            self.checkpoint.both("unet", lambda net: setattr(net.blocks[0], "adapter", nn.LayerNorm(8)))
        elif roll < 0.35:
            self._note("detached and attached again")
            self.mover.detach()
            self.mover.attach(self.checkpoint.specs())

    def _switch(self) -> None:
        """Another checkpoint: the old one is dropped."""
        self._note("switch")
        self.mover.detach()
        self.lora.want()
        self.checkpoint = Checkpoint(self.random.randrange(1 << 30), self.lora)
        gc.collect()
        self.mover.attach(self.checkpoint.specs())

    def _load_in_place(self) -> None:
        """Another checkpoint into the same modules, as WebUI does for one of the same kind."""
        self._note("load in place")
        self.mover.drain()
        self.lora.want()
        seed = self.random.randrange(1 << 30)

        def load(net: nn.Module) -> None:
            generator = torch.Generator().manual_seed(seed)
            state = net.state_dict()
            net.load_state_dict({name: torch.randn(value.shape, generator=generator) / 4 for name, value in state.items()})

        for name in NAMES:
            self.checkpoint.both(name, load)

    # -- previews ----------------------------------------------------------------------------------------------------------
    def _start_previews(self) -> None:
        self._note("previews")
        self.mover.drain()
        self.previewer = Previewer(self)

    def _stop_previews(self) -> None:
        previewer, self.previewer = self.previewer, None
        if previewer is not None:
            previewer.close()

    # -- verdict -----------------------------------------------------------------------------------------------------------
    def weights_are_the_twins(self) -> None:
        """After a drain, whoever reads the managed weights reads the twin's. Layers that LoRA will only reach in their next
        forward may differ: a pass was cut short or left them out."""
        for name in NAMES:
            mine, theirs = self.checkpoint.nets[name], self.checkpoint.twins[name]
            for (label, module), twin in zip(mine.named_modules(), theirs.modules(), strict=True):
                if getattr(module, "network_current_names", ()) != getattr(twin, "network_current_names", ()):
                    continue
                for key, value in module._parameters.items():
                    other = twin._parameters[key]
                    assert (value is None) == (other is None), f"{name}.{label}.{key}"
                    assert value is None or torch.equal(value, other), f"{name}.{label}.{key}"

    def check(self) -> None:
        """Nothing went wrong so far."""
        self.streams.check()
        status = self.mover.status()
        assert status["placement_faults"] == 0, status["last_error"]
        assert status["state"] in ("active", "learning"), status

    def close(self) -> None:
        """The server goes down."""
        self._stop_previews()
        self.mover.detach()
        assert self.streams.allocated_bytes == 0
        self.streams.check()
        self.device.close()
        for model in self.checkpoint.nets.values():
            self._forget_hooks(model)  # of leaves that the order left out
            assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
