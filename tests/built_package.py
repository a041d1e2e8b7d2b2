"""What must be in a wheel and in an sdist: `python tests/built_package.py FILE...`, as `.ci/package` runs it.

Exits with the list of what is wrong.
"""

import re
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

BASE = {"jax", "numpy", "optax"}
SITE = "https://github.com/repopt-jax/repopt_jax/"


def contents(path: Path) -> dict[str, bytes]:
    """The files of a wheel or an sdist; of an sdist below its folder."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    with tarfile.open(path) as archive:
        members = [member for member in archive.getmembers() if member.isfile()]
        return {member.name.partition("/")[2]: archive.extractfile(member).read() for member in members}


def problems(path: Path) -> list[str]:
    files = contents(path)
    metadata = next(files[n] for n in files if n == "PKG-INFO" or n.endswith(".dist-info/METADATA"))
    message = Parser().parsestr(metadata.decode())
    text = message.get_payload()
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    needs = [row for row in message.get_all("Requires-Dist", []) if "extra ==" not in row]
    wheel = path.suffix == ".whl"
    wanted = ["repopt_jax/py.typed", "repopt_jax/__main__.py", "repopt_jax/models/table.json"]
    wanted += ["repopt_jax/cli/completions.json"]
    wanted += ["repopt_jax/configs/digits.py"] if wheel else []
    entry = next((text for name, text in files.items() if name.endswith("entry_points.txt")), b"")
    if not wheel:
        wanted += ["configs/digits.py", "docs/method.md", "tests/conftest.py", "examples/with_linen.py"]
        wanted += ["README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "mkdocs.yml"]
    found = [f"{name} is missing" for name in wanted if name not in files]
    if wheel and b"repopt = repopt_jax.__main__:run" not in entry:
        found.append("it installs no program `repopt`")
    found += [f"{name} should not be in it" for name in files if "__pycache__" in name or "/runs/" in name]
    found += [f"{name} should not be in a wheel" for name in files if wheel and name.startswith("tests/")]
    found += [
        f"the description's link {link} works in the repository only" for link in links if "://" not in link
    ]
    if not any(link.startswith(f"{SITE}blob/main/docs/") for link in links):
        found.append("the description has no link to the documentation")
    if not re.search(r"!\[[^\]]*\]\(https://raw\.githubusercontent\.com/", text):
        found.append("the description has no picture")
    if {re.match(r"[\w-]+", row)[0] for row in needs} != BASE:
        found.append(f"it needs {needs}, and should need {sorted(BASE)}")
    if not {"Source, " + SITE.rstrip("/"), f"Changelog, {SITE}blob/main/CHANGELOG.md"} <= set(
        message.get_all("Project-URL", [])
    ):
        found.append(f"its addresses are {message.get_all('Project-URL')}")
    return [f"{path.name}: {one}" for one in found]


if __name__ == "__main__":
    wrong = [one for name in sys.argv[1:] for one in problems(Path(name))]
    sys.exit("\n".join(wrong) or None)
