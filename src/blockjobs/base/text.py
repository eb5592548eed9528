"""Text that strangers chose, made safe to be shown."""


def printable(text: str) -> str:
    """Text that came out of an image, safe for terminals, logs and messages: whatever is not printable is escaped."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
