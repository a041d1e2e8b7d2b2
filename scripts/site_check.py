"""Checks a documentation site that `.ci/site` has built, as a reader's browser meets it.

    python scripts/site_check.py FOLDER [--pictures=FOLDER]

- No script, style sheet, font or picture comes from elsewhere: the site works from disk with no network.
- Every link within the site leads to a page that is there, and to a place on it that is there.
- No formula is left as it was typed, and the reference has every public name.
- In Chromium, where there is one: no page is wider than its window at 1280 and at 390 pixels, every picture
  is shown, and the search finds something in a site that is opened from disk.

All that is wrong is listed, and the exit status is 1. `--pictures` writes a picture of every page at both
widths.
"""

import argparse
import ast
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from site_hooks import public_names

ROOT = Path(__file__).resolve().parents[1]

WIDTHS = (1280, 390)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}
# Addresses of a `link` that no browser loads.
NOT_LOADED = {"canonical", "next", "prev", "alternate"}
SEARCHED_FOR = "multiplier"

# A window cannot be as narrow as a telephone; a frame can. One page after another, at each width.
FRAME = """<!doctype html><title>not finished</title><body style="margin:0"><script>
const pages = PAGES, widths = WIDTHS, found = [];
const shown = async (address, width) => {
  const frame = document.createElement("iframe");
  frame.style = `border:0;height:900px;width:${width}px`;
  const loaded = new Promise(done => { frame.onload = done; });
  frame.src = address;
  document.body.append(frame);
  await loaded;
  return frame;
};
const until = async (condition, milliseconds) => {
  for (let waited = 0; waited < milliseconds && !condition(); waited += 50)
    await new Promise(done => setTimeout(done, 50));
  return condition();
};
(async () => {
  for (const page of pages) for (const width of widths) {
    const frame = await shown(page, width);
    const inside = frame.contentDocument;
    const root = inside.documentElement;
    // What the page's script does to tables, it has done when it has put the first into a box.
    await until(() => !inside.querySelector(".md-typeset table:not([class])")
      || inside.querySelector(".md-typeset__table"), 2000);
    if (root.scrollWidth > width) {
      const wide = [...inside.querySelectorAll(".md-content *")].find(e =>
        e.getBoundingClientRect().right > width + 1
        && !e.closest("pre, .formula, .md-typeset__scrollwrap, .doc-signature, .highlight"));
      found.push(`${page} is ${root.scrollWidth} pixels wide in a window of ${width}` +
        (wide ? `: ${wide.outerHTML.slice(0, 100)}` : ""));
    }
    for (const image of inside.images)
      if (!image.naturalWidth) found.push(`${page} does not show ${image.src}`);
    frame.remove();
  }
  const frame = await shown(pages[0] + "?q=SEARCHED_FOR", 1280);
  if (!await until(() => frame.contentDocument.querySelector(".md-search-result__item"), 20000))
    found.push("the search finds nothing for SEARCHED_FOR");
})().catch(problem => { found.push(String(problem)); }).finally(() => {
  document.title = "finished";
  const result = document.createElement("pre");
  result.id = "found";
  result.textContent = JSON.stringify(found);
  document.body.replaceChildren(result);
});
</script></body>"""


class Document(HTMLParser):
    """The addresses that a page loads, those that it links to, and the places on it."""

    def __init__(self, text: str):
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def has(self, fragment: str) -> bool:
        return unquote(fragment) in self.places

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.places |= {given[name] for name in ("id", "name") if name in given}
        if tag in LOADED and LOADED[tag] in given and given.get("rel", "") not in NOT_LOADED:
            self.loads.append(given[LOADED[tag]])
        elif tag == "a" and "href" in given:
            self.links.append(given["href"])


def problems(site: Path) -> list[str]:
    """Returns what is wrong in the files of a site, a line for each."""
    documents = {path: Document(path.read_text()) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, document in documents.items():
        page = path.relative_to(site)
        if path.name == "404.html":  # its addresses are for a server
            continue
        for address in document.loads:
            if urlsplit(address).scheme or address.startswith("//"):
                found += [] if address.startswith("data:") else [f"{page} loads {address}"]
            elif not _target(path, address).exists():
                found.append(f"{page} loads {address}, which does not exist")
        for address in document.links:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = _target(path, address)
            if not target.exists():
                found.append(f"{page} links to {address}, which does not exist")
            elif parts.fragment and target in documents and not documents[target].has(parts.fragment):
                found.append(f"{page} links to {address}: no such place on that page")
        if 'class="arithmatex"' in path.read_text():
            found.append(f"{page} has a formula that is not typeset")
    found += [f"{page} lacks {name}" for page, name in missing_names(site, documents)]
    for path in sorted(site.rglob("*.css")):
        for address in re.findall(r"(?:url\(|@import )[\"']?((?:https?:)?//[^\"')]+)", path.read_text()):
            found.append(f"{path.relative_to(site)} loads {address}")
    return found


def missing_names(site: Path, documents: Mapping[Path, Document]) -> list[tuple[Path, str]]:
    """Returns the public names of a subpackage that its page of the reference lacks."""
    found = []
    for path in sorted(site.glob("api/*.html")):
        package = ROOT / "repopt_jax" / path.stem / "__init__.py"
        names = public_names(ast.parse(package.read_text())) if package.exists() else {}
        lacks = [name for name in names.values() if name not in documents[path].places]
        found += [(path.relative_to(site), name) for name in lacks]
    return found


def problems_in_browser(site: Path, browser: str) -> list[str]:
    """Returns what is wrong where Chromium shows the site, a line for each."""
    pages = [path.as_uri() for path in _pages(site)]
    program = FRAME.replace("PAGES", json.dumps(pages)).replace("WIDTHS", json.dumps(WIDTHS))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        page = Path(folder) / "frame.html"
        page.write_text(program.replace("SEARCHED_FOR", SEARCHED_FOR))
        command = [*_headless(browser, folder), "--timeout=100000", "--virtual-time-budget=100000"]
        done = subprocess.run(
            [*command, "--window-size=1400,1000", "--dump-dom", page.as_uri()],
            capture_output=True,
            text=True,
            timeout=110,
        )
    result = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    if result is None:
        return [f"{browser} did not finish: {done.stderr[-2000:]}"]
    found = json.loads(result[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    return [line.replace(site.as_uri() + "/", "") for line in found]


def write_pictures(site: Path, browser: str, folder: Path) -> None:
    """Writes a picture of the upper part of every page, at each width, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    frame = '<body style="margin:0"><iframe src="{}" style="border:0;width:{}px;height:{}px"></iframe>'
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        page = Path(temporary) / "frame.html"
        for path in _pages(site):
            for width, height in zip(WIDTHS, (2600, 4200)):
                page.write_text(frame.format(path.as_uri(), width, height))
                name = "_".join(path.relative_to(site).with_suffix("").parts)
                picture = folder / f"{name}_{width}.png"
                size = f"--window-size={max(width, 520)},{height}"
                command = [*_headless(browser, temporary), size, f"--screenshot={picture}", page.as_uri()]
                subprocess.run(command, capture_output=True, check=True, timeout=60)


def _headless(browser: str, folder: str) -> list[str]:
    return [
        *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *("--allow-file-access-from-files", f"--user-data-dir={folder}/profile"),
    ]


def _pages(site: Path) -> list[Path]:
    found = sorted(path for path in site.rglob("*.html") if path.name != "404.html")
    return sorted(found, key=lambda path: path != site / "index.html")  # the start first


def _target(page: Path, address: str) -> Path:
    path = unquote(urlsplit(address).path)
    target = (page.parent / path).resolve() if path else page
    return target / "index.html" if target.is_dir() else target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("site", type=Path, help="the folder that was built")
    parser.add_argument("--pictures", type=Path, help="a folder for pictures of all pages")
    options = parser.parse_args()
    site = options.site.resolve()
    if not (site / "index.html").exists():
        parser.error(f"{site} holds no index.html")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    found = problems(site)
    if browser is None:
        print("no Chromium: widths of pages and the search are not checked")
    else:
        found += problems_in_browser(site, browser)
        if options.pictures is not None:
            write_pictures(site, browser, options.pictures)
    for line in found:
        print(line)
    print(f"{len(_pages(site))} pages, {len(found)} problems")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
