"""Pictures side by side."""


def image_grid(pictures):
    return ("grid", pictures)
