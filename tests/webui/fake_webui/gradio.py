"""Stands in for gradio: components are only ever named, never built."""


class Component:
    def __init__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs


class Slider(Component):
    pass


class Checkbox(Component):
    pass
