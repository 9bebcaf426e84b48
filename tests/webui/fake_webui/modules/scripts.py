"""The base class of scripts."""

AlwaysVisible = object()
scripts_data = []


class Script:
    create_group = True

    def title(self):
        raise NotImplementedError

    def show(self, is_img2img):
        return True

    def process_before_every_sampling(self, p, *args, **kwargs):
        pass
