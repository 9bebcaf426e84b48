"""The job now running."""

from modules import devices


class State:
    def __init__(self):
        self.job = ""
        self.job_count = 0
        self.interrupted = False

    def begin(self, job="(unknown)"):
        self.job_count = -1
        self.interrupted = False
        self.job = job
        devices.torch_gc()

    def end(self):
        self.job = ""
        self.job_count = 0
        devices.torch_gc()

    def nextjob(self):
        pass
