"""What the reference on the site changes in docstrings: an extension of Griffe, named by mkdocs.yml.

Docstrings are written for those who read the code: several arguments may share a line, and a formula is plain
text. Markdown wants a line for each, and takes `<g, P(g)>` for HTML.
"""

import re

import griffe

SHARED = re.compile(r"^( *)(\w+(?:, \w+)+): (.*(?:\n\1 {2,}\S.*)*)", re.MULTILINE)
SECTION = re.compile(
    r"^(Args|Attributes):\n((?: +.*\n?|\n(?= ))+)", re.MULTILINE
)  # its lines are further in than its name
TAG = re.compile(r"<(?=[A-Za-z/!])")
CODE = re.compile(r"(``?[^`]+``?)")


class Docstrings(griffe.Extension):
    """Changes every docstring after it is read and before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = for_markdown(obj.docstring.value)
        if isinstance(obj, griffe.Function):
            # The arguments of a function of several forms are those of its forms.
            known = {parameter.name for parameter in obj.parameters}
            for parameter in (p for form in obj.overloads or () for p in form.parameters):
                if parameter.name not in known:
                    known.add(parameter.name)
                    obj.parameters.add(parameter)


def for_markdown(docstring: str) -> str:
    """Returns a docstring with a line for each argument, and with `<` as text outside of code."""
    docstring = SECTION.sub(lambda section: f"{section[1]}:\n{one_name_each(section[2])}", docstring)
    lines = []
    for line in docstring.split("\n"):
        parts = CODE.split(line)
        lines.append("".join(p if i % 2 else TAG.sub("&lt;", p) for i, p in enumerate(parts)))
    # Text that a program follows ends in two colons, one of which is for another markup.
    return re.sub(r"::$", ":", "\n".join(lines), flags=re.MULTILINE)


def one_name_each(section: str) -> str:
    """Returns the lines of a section in which `a, b: text` has become `a: text` and `b: text`."""
    return SHARED.sub(
        lambda found: "\n".join(f"{found[1]}{name}: {found[3]}" for name in found[2].split(", ")), section
    )
