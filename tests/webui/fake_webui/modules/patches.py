"""Named replacement of functions, once per key."""

from collections import defaultdict

originals = defaultdict(dict)


def patch(key, obj, field, replacement):
    mine = originals[key]
    if (obj, field) in mine:
        raise RuntimeError(f"{field} already patched by {key}")
    mine[obj, field] = before = getattr(obj, field)
    setattr(obj, field, replacement)
    return before


def undo(key, obj, field):
    mine = originals[key]
    if (obj, field) not in mine:
        raise RuntimeError(f"{field} not patched by {key}")
    setattr(obj, field, mine.pop((obj, field)))


def original(key, obj, field):
    return originals[key].get((obj, field))
