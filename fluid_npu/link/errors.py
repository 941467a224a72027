"""What goes wrong with links."""


class LinkError(RuntimeError):
    """A link cannot be made here; the message names what is missing and the fix."""
