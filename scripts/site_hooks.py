"""What is done to the pages in docs/ on their way to the site, as hooks of MkDocs, named by mkdocs.yml.

The pages are read where the code is hosted as well, so that they hold ordinary links, formulas between dollar
signs and notebooks as they are. On the site

- a link that leaves docs/ leads to the file where the code is hosted, and a picture there is copied;
- a formula is MathML, which browsers typeset without a script or a font of their own;
- a notebook is a page, with the outputs that it holds (it is not run);
- `::: repopt_jax.NAME` becomes the reference of every public name of that subpackage, and
  `::: repopt_jax` the list of the names that can be imported from the package itself.

What does not exist is a warning, and warnings end a build (`strict` in mkdocs.yml).
"""

import ast
import base64
import html
import json
import logging
import posixpath
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = logging.getLogger("mkdocs.plugins.site_hooks")
BRANCH = "main"
FENCED = re.compile(r"(^ *```.*?^ *```[^\S\n]*$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)(\[[^\]]*\])\(([^)\s]+)\)")
FORMULA = re.compile(
    r'<(?P<tag>div|span) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
COMMAND = re.compile(r"\\[A-Za-z]+")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    root = _root(config)
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    config.repo_url = project["urls"]["Source"].rstrip("/")
    config.repo_name = config.repo_url.rpartition("/")[2]
    config.nav = _expanded(config.nav, Path(config.docs_dir))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        notebook = json.loads(file.content_string)
        page, pictures = notebook_page(notebook, posixpath.basename(file.src_uri))
        stem = file.src_uri.removesuffix(".ipynb")
        files.append(File.generated(config, f"{stem}.md", content=page))
        for name, content in pictures.items():
            files.append(File.generated(config, f"{posixpath.dirname(stem)}/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    root = _root(config)
    markdown = re.sub(
        r"^::: (repopt_jax[\w.]*)$", lambda found: reference(found[1], root), markdown, flags=re.MULTILINE
    )
    # A notebook's own file is offered by its page; every other link to it leads to the page.
    offered = f"({posixpath.basename(page.file.src_uri).removesuffix('.md')}.ipynb)"

    def link(found: re.Match[str]) -> str:
        picture, text, target = found.groups()
        if "://" in target or target.startswith(("#", "mailto:")) or f"({target})" == offered:
            return found[0]
        address, mark, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), address))
        if path.startswith("docs/"):
            return f"{picture}{text}({re.sub(r'[.]ipynb$', '.md', address)}{mark}{anchor})"
        if not (root / path).exists():
            log.warning("%s links to %s, which does not exist", page.file.src_uri, target)
            return found[0]
        if not picture:
            kind = "tree" if (root / path).is_dir() else "blob"
            return f"{text}({config.repo_url}/{kind}/{BRANCH}/{path}{mark}{anchor})"
        copy = f"repository/{path}"
        if files.get_file_from_path(copy) is None:
            files.append(File.generated(config, copy, content=(root / path).read_bytes()))
        here = posixpath.dirname(page.file.src_uri) or "."
        return f"{picture}{text}({posixpath.relpath(copy, here)})"

    return outside_code(markdown, lambda text: LINK.sub(link, text))


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    def formula(found: re.Match[str]) -> str:
        tex = html.unescape(found["tex"]).strip()
        try:
            typeset = mathml(tex, block=found["tag"] == "div")
        except ValueError as problem:
            log.warning("%s: %s", page.file.src_uri, problem)
            return found[0]
        return f'<div class="formula">{typeset}</div>' if found["tag"] == "div" else typeset

    return FORMULA.sub(formula, content)


def mathml(tex: str, block: bool) -> str:
    """Returns a formula in TeX as an element `<math>`.

    Raises:
      ValueError: the formula cannot be read, or holds a command that the converter does not know.
    """
    braces = re.sub(r"\\.|[^{}]", "", tex)  # without those that are shown, `\{`
    while "{}" in braces:
        braces = braces.replace("{}", "")
    if braces:  # the converter reads on
        raise ValueError(f"the formula {tex!r} has braces that do not match")
    try:
        typeset = convert(tex, display="block" if block else "inline")
    except Exception as problem:  # the converter has a class of its own for each mistake, and others
        raise ValueError(f"the formula {tex!r} cannot be read: {problem!r}") from problem
    if unknown := sorted(set(COMMAND.findall(typeset))):
        raise ValueError(f"the formula {tex!r} has commands that are not known: {', '.join(unknown)}")
    return typeset


def notebook_page(notebook: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """Returns a notebook as the text of a page, and the pictures that it shows, by file name.

    Of an output the picture is taken, or else its Markdown, or else its plain text.
    """
    blocks, pictures = [], {}
    for number, cell in enumerate(notebook["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            blocks.append(source)
        elif cell["cell_type"] == "code" and source.strip():
            blocks.append(_fenced("python", source))
        for index, output in enumerate(cell.get("outputs", ())):
            data = output.get("data", {})
            if "image/png" in data:
                picture = f"{name.removesuffix('.ipynb')}_{number}_{index}.png"
                pictures[picture] = base64.b64decode("".join(data["image/png"]))
                blocks.append(f"![Output of the cell above]({picture})")
            elif "text/markdown" in data:
                blocks.append("".join(data["text/markdown"]))
            else:
                lines = output.get("text") or data.get("text/plain") or output.get("traceback") or ()
                text = re.sub(r"\x1b\[[\d;]*m", "", "".join(lines)).rstrip()
                if text:
                    blocks.append(_fenced("text", text))
    first, *others = blocks
    offer = f"This page is a notebook: [{name}]({name})."
    return "\n\n".join([first, offer, *others]) + "\n", pictures


def reference(name: str, root: Path) -> str:
    """Returns what `::: name` stands for: a subpackage's public names, or the package's table of links."""
    tree = ast.parse((root / name.replace(".", "/") / "__init__.py").read_text())
    if name != "repopt_jax":
        return "\n\n".join(f"::: {path}" for path in public_names(tree).values())
    rows = []
    for home, names in home_of_names(tree).items():
        inside = public_names(ast.parse((root / name / home / "__init__.py").read_text()))
        links = ", ".join(f"[`{public}`][{inside[public]}]" for public in sorted(names))
        rows.append(f"| [{home}]({home}.md) | {links} |")
    return "\n".join(["| subpackage | names |", "|---|---|", *rows])


def public_names(tree: ast.Module) -> dict[str, str]:
    """Returns the public names of a subpackage and where each is defined, in the order of the alphabet.

    They are the names of `__all__`, or without one those that are imported as themselves (`X as X`). The path
    is that of the module which they come from: `surgery.fuse` is a module and a function.
    """
    origins, redundant = {}, []
    for node in (node for node in tree.body if isinstance(node, ast.ImportFrom)):
        for alias in node.names:
            origins[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            redundant += [alias.name] if alias.asname == alias.name else []
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            redundant = ast.literal_eval(node.value)
    return {name: origins[name] for name in sorted(redundant, key=str.casefold)}


def home_of_names(tree: ast.Module) -> dict[str, list[str]]:
    """Returns the names that type checkers see in `repopt_jax`, by the subpackage that they come from."""
    homes: dict[str, list[str]] = {}
    checked = [node for node in tree.body if isinstance(node, ast.If)]
    for node in (statement for block in checked for statement in block.body):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("repopt_jax."):
            home = (node.module or "").split(".")[1]
            # `paths` is a module, and no page of the reference has it.
            homes.setdefault(home, []).extend(a.name for a in node.names if a.name != "paths")
    return homes


def outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """Applies `change` to what is not between fences."""
    parts = FENCED.split(markdown)
    return "".join(part if index % 2 else change(part) for index, part in enumerate(parts))


def _expanded(nav: Any, docs: Path) -> Any:
    """Replaces an entry that is a pattern by the notebooks there are: no entry if there are none."""
    expanded = []
    for entry in nav:
        if isinstance(entry, dict):
            ((title, target),) = entry.items()
            if isinstance(target, str) and "*" in target:
                pages = sorted(path.relative_to(docs).with_suffix(".md") for path in docs.glob(target))
                expanded += [{title: [page.as_posix() for page in pages]}] if pages else []
                continue
            entry = {title: _expanded(target, docs) if isinstance(target, list) else target}
        expanded.append(entry)
    return expanded


def _fenced(language: str, text: str) -> str:
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return f"{fence}{language}\n{text}\n{fence}"


def _root(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).parent
