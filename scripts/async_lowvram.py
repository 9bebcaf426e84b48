"""Where the WebUI finds the extension: registers callbacks, and nothing else.

The WebUI runs this file at start, again at every Reload UI, and its sources alone at "Reload custom script bodies". The
extension's folder is on `sys.path` only while it does so, hence the imports at the top; the library stays in `sys.modules`.
Nothing may be raised from here: whatever goes wrong is one line, a traceback through the host, and stock behaviour.
"""

import sys

from modules import errors, script_callbacks, scripts

LINE = "[Async LowVRAM]"
OLD = "the extension was updated while the WebUI ran: restart the WebUI (not only Reload UI)"

was_loaded = "lib_async_lowvram" in sys.modules
integration = None
panel = None
reason = ""
register_settings = None

try:
    from lib_async_lowvram.webui.start import start

    integration, reason = start()
except Exception as error:
    # New scripts with the library of before an update, most likely, where it was loaded already.
    reason = OLD if was_loaded else f"the extension failed to start ({type(error).__name__})"
    print(f"{LINE} standing down: {reason}; stock --lowvram is untouched")
    errors.report(f"{LINE} failed to start", exc_info=True)

try:
    from lib_async_lowvram.log import remember
    from lib_async_lowvram.webui import large_ui, plot
    from lib_async_lowvram.webui.panel import Panel
    from lib_async_lowvram.webui.routes import add_routes
    from lib_async_lowvram.webui.settings import register as register_settings

    panel = Panel(integration, reason, remember())
except Exception:
    errors.report(f"{LINE} has no settings and no panel", exc_info=True)


def prepare():
    """The UNet's first weights set out before sampling starts."""
    if integration is not None:
        integration.prepare()


def on_script_unloaded():
    """The UI is about to be loaded again, perhaps without us."""
    if integration is not None:
        integration.close()


def on_app_started(demo, app):
    """`demo` is None under --nowebui; the route needs only the app."""
    add_routes(app, panel)


if register_settings is not None:
    script_callbacks.on_ui_settings(register_settings)
if panel is not None:
    script_callbacks.on_app_started(on_app_started)
script_callbacks.on_script_unloaded(on_script_unloaded)

if not hasattr(scripts.Script, "process_before_every_sampling"):
    # WebUI before 1.9 tells nobody that sampling starts; its first step is the next best moment.
    script_callbacks.on_cfg_denoiser(lambda params: prepare())


class AsyncLowVRAMScript(scripts.Script):
    """Always on and without controls; here for the moments before a picture and before its sampling."""

    create_group = False

    def title(self):
        return "Async LowVRAM"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def process(self, p, *args):
        if integration is not None:
            integration.follow_switch()

    def process_before_every_sampling(self, p, *args, **kwargs):
        if panel is not None:
            panel.note(p)
        prepare()


class LargePicturesScript(scripts.Script):
    """The accordion; not there where the extension stands down."""

    def title(self):
        return "Large pictures"

    def show(self, is_img2img):
        return scripts.AlwaysVisible if integration is not None and panel is not None else False

    def ui(self, is_img2img):
        made, self.infotext_fields = large_ui.accordion(self.elem_id)
        return made

    def process(self, p, *args):
        integration.large.begin(p, args)

    def postprocess(self, p, processed, *args):
        integration.large.end()


if integration is not None and panel is not None:
    script_callbacks.on_before_ui(lambda: (plot.add_axes(scripts.scripts_data), large_ui.add_axes(scripts.scripts_data)))
