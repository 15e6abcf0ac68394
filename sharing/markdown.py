"""Foreign text, such as class names and commands, in the Markdown of a model card."""

import html
import re

# Where an empty comment keeps an address from becoming a link: renderers look for some in what escapes resolve to.
ADDRESS = re.compile(r"(?<=\w)(?=://)|(?<=www)(?=\.)|(?<=[\w.+-])(?=@\S)", re.IGNORECASE)
MARKER = "<!-- vit_simple:"  # how the marks of the generated text begin


def without_control_characters(line: str) -> str:
    """A line without control characters; the joiners of some scripts stay."""
    return "".join(char if char.isprintable() or char in "\u200c\u200d" else " " for char in line)


def markdown(text: str) -> str:
    """Text to show as it is, within a line: nothing in it is markup, and other scripts stay readable."""
    text = html.escape(without_control_characters(" ".join(str(text).split())), quote=False)
    text = re.sub(r"([\\`*\[\]#|~$]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", text)
    text = ADDRESS.sub("<!-- -->", text)
    return re.sub(r"^[-+=]|^\d(?=\d*[.)])", lambda match: f"&#{ord(match[0])};", text)


def fenced(text: str, language: str) -> str:
    """A block of code, in a fence longer than any in the text."""
    text = "\n".join(map(without_control_characters, text.split("\n"))).replace(MARKER, MARKER.replace("<!--", "<! --"))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
