"""Shared state of the process: options, command line, the present job."""

from types import SimpleNamespace

from modules.options import OptionInfo, Options  # noqa: F401

cmd_opts = SimpleNamespace(lowvram=True, medvram=False, medvram_sdxl=False, device_id=None, use_cpu=["all"])
opts = Options()
parallel_processing_allowed = True
state = None  # set by the fixture, as the host does while it starts
