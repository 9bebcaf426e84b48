"""The job now running."""

from modules import devices, shared


class State:
    def __init__(self):
        self.job = ""
        self.job_count = 0
        self.interrupted = False
        self._reset_previews()

    def _reset_previews(self):
        self.job_no = 0
        self.sampling_step = self.sampling_steps = 0
        self.current_latent = None
        self.current_image = None
        self.current_image_sampling_step = 0
        self.id_live_preview = 0

    def begin(self, job="(unknown)"):
        self._reset_previews()
        self.job_count = -1
        self.interrupted = False
        self.job = job
        devices.torch_gc()

    def end(self):
        self.job = ""
        self.job_count = 0
        devices.torch_gc()

    def nextjob(self):
        if shared.opts.live_previews_enable and shared.opts.show_progress_every_n_steps == -1:
            self.do_set_current_image()
        self.job_no += 1
        self.sampling_step = 0
        self.current_image_sampling_step = 0

    def do_set_current_image(self):
        if self.current_latent is not None:
            self.assign_current_image(("inline", float(self.current_latent.flatten()[0])))

    def assign_current_image(self, image):
        self.current_image = image
        self.id_live_preview += 1
