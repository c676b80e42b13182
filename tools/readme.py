"""README.md from nbs/index.ipynb.

python tools/readme.py           write README.md
python tools/readme.py --check   exit 1 if README.md is not what the notebook renders to

Lines that begin with `#|` are stripped and cells with `#| hide` left out; `#| echo: false` keeps the output alone.
Links are written for the notebook's folder and are turned so that they work from the root. Pictures stored in
outputs are refused: no host shows them in a README, so save the picture as a file and link to it.
"""

import argparse
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Made from nbs/index.ipynb by `python tools/readme.py`; edit the notebook. -->\n\n"
LINK = re.compile(r"(\]\(|\b(?:src|href)=[\"'])([^)\s\"'#]+)")


class ReadmeError(Exception):
    "What in the notebook cannot stand in a README"


def directives(source: str) -> set[str]:
    "The directives of a cell, with one space between their words"
    lines = [line[2:] for line in source.splitlines() if line.startswith("#|")]
    return {" ".join(line.replace(":", " ").split()) for line in lines}


def prepared(notebook):
    "The notebook without hidden cells, directives and code that is not to be shown"
    cells = []
    for cell in notebook.cells:
        found = directives(cell.source)
        if found & {"hide", "include false"}:
            continue
        lines = [line for line in cell.source.splitlines() if not line.startswith("#|")]
        cell.source = "" if "echo false" in found else "\n".join(lines).strip("\n")
        if cell.cell_type == "code":
            outputs = cell.get("outputs", [])
            cell.outputs = [] if "output false" in found else outputs
            for output in cell.outputs:
                if any(kind.startswith("image/") for kind in output.get("data", {})):
                    raise ReadmeError(f"cell {cell.id} stores a picture; save and link a file")
        if cell.get("attachments"):
            raise ReadmeError(f"cell {cell.id} has an attachment; save and link a file")
        if cell.source or cell.get("outputs"):
            cells.append(cell)
    notebook.cells = cells
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def relinked(text: str, folder: Path, root: Path) -> str:
    "Relative links of a text in `folder`, made relative to `root`; a dead one is refused"

    def turn(match: re.Match) -> str:
        start, target = match.groups()
        if re.match(r"[a-z][a-z0-9+.-]*:", target) or target.startswith("/"):
            return match.group()
        path = (folder / target).resolve()
        if not path.exists():
            raise ReadmeError(f"the link {target} leads nowhere")
        return start + Path(os.path.relpath(path, root)).as_posix()

    return LINK.sub(turn, text)


def render(root: Path = ROOT) -> str:
    "The text of README.md"
    import nbformat
    from nbconvert import MarkdownExporter

    source = root / "nbs" / "index.ipynb"
    if not source.is_file():
        raise ReadmeError("nbs/index.ipynb is missing")
    notebook = prepared(nbformat.read(source, as_version=4))
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = relinked(cell.source, source.parent, root)
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    if resources.get("outputs"):
        raise ReadmeError("an output is a picture; save and link a file")
    text = re.sub(r"```python\n\s*```\n*", "", text)  # code that is not shown
    text = re.sub(r"\n{3,}", "\n\n", text)
    return NOTE + "\n".join(line.rstrip() for line in text.strip().split("\n")) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Make README.md from nbs/index.ipynb")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    try:
        text = render()
    except ReadmeError as e:
        print(f"README.md: {e}", file=sys.stderr)
        return 1
    if not check:
        readme.write_text(text, encoding="utf-8", newline="\n")
    elif not readme.is_file() or readme.read_text(encoding="utf-8") != text:
        print("README.md is not what nbs/index.ipynb says; python tools/readme.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
