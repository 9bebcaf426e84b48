"""Shared state of the process: options, command line, the present job."""

from types import SimpleNamespace

from modules.options import OptionInfo, Options  # noqa: F401

cmd_opts = SimpleNamespace(lowvram=True, medvram=False, medvram_sdxl=False, device_id=None, use_cpu=["all"])
opts = Options()
opts.data.update(
    live_previews_enable=True,
    show_progress_every_n_steps=1,
    show_progress_grid=True,
    show_progress_type="Approx NN",
    live_preview_allow_lowvram_full=False,
    batch_cond_uncond=True,
    use_old_scheduling=False,
)
parallel_processing_allowed = False
state = None  # set by the fixture, as the host does while it starts
