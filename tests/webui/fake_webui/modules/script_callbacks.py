"""Callbacks by name; tests fire them."""

callbacks = {}


def _register(name):
    def register(callback, *, name=None):
        callbacks.setdefault(event, []).append(callback)

    event = name
    return register


on_app_started = _register("app_started")
on_ui_settings = _register("ui_settings")
on_script_unloaded = _register("script_unloaded")
on_before_ui = _register("before_ui")
on_cfg_denoiser = _register("cfg_denoiser")
on_model_loaded = _register("model_loaded")
on_before_reload = _register("before_reload")


def fire(event, *args):
    for callback in callbacks.get(event, []):
        callback(*args)
