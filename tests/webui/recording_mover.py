"""A mover that only writes down what it is asked, for tests of the integration's own decisions."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace


class RecordingMover:
    """`calls`: what was asked, in order. `fail_on`: the name of a call that raises."""

    def __init__(self, config, device):
        self.calls: list[tuple] = []
        self.networks: dict[str, object] = {}
        self.config, self.device = config, device
        self.on_demote = None
        self.known = object()
        self.pinned_bytes = 0
        self.host = None
        self.current_network: str | None = None
        self.in_pass = False
        self.fail_on: str | None = None
        self.streams = SimpleNamespace(
            onload_stream="onload",
            offload_stream="offload",
            record=lambda stream: stream,
            done=lambda event: False,
            synchronize=lambda event: self.calls.append(("synchronize", event)),
        )

    def _note(self, *call):
        self.calls.append(call)
        if self.fail_on == call[0]:
            raise RuntimeError("told to fail")

    def named(self, name):
        return [call for call in self.calls if call[0] == name]

    def attach(self, specs):
        self._note("attach", sorted(specs))
        self.networks.update(specs)
        return self

    def detach(self, names=None):
        self._note("detach", sorted(names))
        for name in names:
            del self.networks[name]

    def running(self, name):
        @contextmanager
        def run():
            self._note("running", name)
            yield

        return run()

    def prepare(self, name):
        self._note("prepare", name)

    def expect(self, name):
        self._note("expect", name)

    def drain(self, for_network=None):
        self._note(*(("drain",) if for_network is None else ("drain", for_network)))

    def shed(self, name):
        self._note("shed", name)
        return 0

    def configure(self, config):
        self._note("configure", config)
        self.config = config

    def close(self):
        self._note("close")

    def status(self):
        return {"state": "active", "networks": {name: {} for name in self.networks}, "pinned_bytes": self.pinned_bytes,
                "pinned_limit_bytes": 1 << 30}

    def timeline(self, previews=()):
        self._note("timeline")
        return {"network": None, "seconds": 0.0, "age_seconds": None, "spans": []}
