"""How making a picture fails when it is nobody's bug: one line for the user. Standard library only."""

from __future__ import annotations


class CannotMake(Exception):
    """The picture cannot be made; the message is one line that says why, and what would help."""
