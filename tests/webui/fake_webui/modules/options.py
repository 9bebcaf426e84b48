"""Options as the host keeps them: values are whatever somebody stored."""


class OptionInfo:
    def __init__(self, default=None, label="", component=None, component_args=None, onchange=None, section=None):
        self.default, self.label, self.component, self.component_args = default, label, component, component_args
        self.onchange, self.section, self.category_id = onchange, section, None
        self.do_not_save = False
        self.comment_after = ""

    def info(self, info):
        self.comment_after += f"({info})"
        return self

    def needs_restart(self):
        self.comment_after += "(requires restart)"
        return self


class Options:
    def __init__(self):
        self.data = {}
        self.data_labels = {}

    def add_option(self, key, info):
        self.data_labels[key] = info
        self.data.setdefault(key, info.default)

    def __getattr__(self, key):
        data = self.__dict__.get("data", {})
        if key in data:
            return data[key]
        raise AttributeError(key)

    def set(self, key, value, is_api=False, run_callbacks=True):
        self.data[key] = value
        return True
