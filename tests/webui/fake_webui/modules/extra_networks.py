"""`<kind:name:weight>` in a prompt, taken out of it."""

import re


def parse_prompt(prompt):
    found = {}
    for kind, rest in re.findall(r"<(\w+):([^>]+)>", prompt):
        found.setdefault(kind, []).append(rest)
    return re.sub(r"<(\w+):([^>]+)>", "", prompt), found
