"""Upscalers: each brings a model of its own, run by `do_upscale` on the device."""


class Upscaler:
    def do_upscale(self, img, selected_model):
        return img

    def upscale(self, img, scale, selected_model=None):
        return self.do_upscale(img, selected_model)
