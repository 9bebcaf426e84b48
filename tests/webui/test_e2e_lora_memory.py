"""What a LoRA costs in main memory: masters and LoRA's own backups together no more than under stock.

Set up as `test_e2e_lora`, but run it alone and on servers just started: LoRA keeps its backups for as long as the weights stay
loaded, and memory that a process has used before and given back to its allocator hides what is taken anew. On servers that
have made backups before, this skips.

The process of a simulated device holds the device's memory, too, but the device is empty between jobs. With `probe_extension` in
both servers, pages that only the allocator keeps are given back before they are counted, and the whole is compared; without it,
only what grew.
"""

from __future__ import annotations

import urllib.error

import pytest
from lora_fixtures import NEEDS_SERVERS

pytestmark = NEEDS_SERVERS

pytest.importorskip("PIL")

from lora_pair import job, tag  # noqa: E402

ONE = "e2e-one"
MIB = 1 << 20
SLACK = 32 * MIB
OWN = 64 * MIB
"""The extension's code, its tables, and the threads of a simulated device."""


def held(server):
    """(bytes of main memory the process holds, whether free pages are not among them)."""
    try:
        return server.get("/webui-probe")["VmRSS"], True
    except urllib.error.HTTPError:
        return server.resident_memory(), False


def test_host_memory(servers):
    """Before, during and after: the backups of all layers with a name are in memory once, as under stock, and masters do not grow."""
    servers.streamed = False  # the automatic budget: everything is resident
    for number in range(3):
        servers.run(f"before a LoRA, {number}", job(prompt=servers.unheard_of(number)), managed=False)
    marks = {}
    for moment, networks in (("before", ""), ("during", tag(ONE)), ("again", tag(ONE)), ("after", "")):
        servers.run(f"{moment}", job(networks), managed=moment != "before")
        status = servers.ours.status()
        (ours, trimmed), (stock, _) = (held(server) for server in servers.both())
        marks[moment] = (ours, stock, status["host_bytes"], status["pinned_bytes"])
    for moment, (ours, stock, masters, pinned) in marks.items():
        sizes = zip(("ours", "stock", "masters", "pinned"), (ours, stock, masters, pinned), strict=True)
        print(f"{moment}: {', '.join(f'{name} {size / MIB:.1f} MB' for name, size in sizes)}")
    assert not trimmed or all(ours <= stock + OWN for ours, stock, _, _ in marks.values())
    for moment in ("during", "again", "after"):
        ours, stock = (marks[moment][server] - marks["before"][server] for server in (0, 1))
        print(f"{moment}: grew by {ours / MIB:.1f} MB, stock by {stock / MIB:.1f} MB")
        if stock < marks[moment][2] // 2:
            pytest.skip("stock made few new backups: these servers have made them before, start them anew")
        assert ours <= stock + SLACK
        assert marks[moment][2:] == marks["before"][2:]
