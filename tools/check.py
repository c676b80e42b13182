"""What must hold in a checkout before it is committed: `make check`.

Every check is a function of the root folder that returns its faults, one line each. An empty list means that all is well.
nbdev-export and nbdev-clean change the working tree where it was not in order; the check names the files and leaves them changed.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from readme import ReadmeError, directives, render

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "instruct_ft"
HEAVY = ("torch", "transformers", "datasets", "peft", "evaluate", "matplotlib")
IMPORT_SECONDS = 0.2
NOTEBOOK_BYTES = 300 * 1024
ALL_NOTEBOOKS_BYTES = 8 * 1024 * 1024
HANDWRITTEN = ("__init__.py", "__main__.py", "_modidx.py")

CHECKS: list[tuple[str, str, Callable[[Path], list[str]]]] = []


def check(title: str, mend: str) -> Callable:
    "Register a check with what to do when it fails"

    def register(function: Callable[[Path], list[str]]) -> Callable[[Path], list[str]]:
        CHECKS.append((title, mend, function))
        return function

    return register


# --- reading the checkout ---------------------------------------------------------------------------


def notebooks(root: Path) -> list[Path]:
    "All notebooks that nbdev sees, by path"
    found = sorted((root / "nbs").rglob("*.ipynb"))
    return [p for p in found if not any(part[0] in "._" for part in p.relative_to(root).parts)]


def modules(root: Path) -> list[Path]:
    "All Python files of the package"
    return sorted(p for p in (root / PACKAGE).rglob("*.py") if "__pycache__" not in p.parts)


def cells(notebook: Path) -> list[dict]:
    "The cells of a notebook, each with its source as one text"
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in found]


def name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def files(root: Path) -> list[Path]:
    "Files that git has or would add; without git, all of the usual folders"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        found = [root / line for line in listed.stdout.split("\0") if line]
    else:
        folders = (PACKAGE, "nbs", "tests", "tools")
        found = [*root.glob("*"), *(p for f in folders for p in (root / f).rglob("*"))]
    return sorted({p for p in found if p.is_file() and "__pycache__" not in p.parts})


# --- running a tool ---------------------------------------------------------------------------------


def clean_environment() -> dict[str, str]:
    "The environment without what would change how the package or nbdev behave"
    drop = ("INSTRUCT_FT_", "PYTHONPATH", "IN_TEST")
    return {k: v for k, v in os.environ.items() if not k.startswith(drop)}


def run(command: Iterable[str | Path], cwd: Path) -> tuple[int, str]:
    "Exit status and output of a command"
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean_environment(),
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    return done.returncode, (done.stdout + done.stderr).strip()


def tool(command: str) -> Path:
    "A command of the environment that runs this file"
    return Path(sys.executable).parent / command


def complaints(command: Iterable[str | Path], cwd: Path) -> list[str]:
    "Lines of the output of a command that failed"
    status, output = run(command, cwd)
    return (output.splitlines() or [f"exit status {status}"]) if status else []


def changed_by(command: str, watched: Callable[[Path], list[Path]], root: Path) -> list[str]:
    "Files whose content a command changed"
    before = {p: p.read_bytes() for p in watched(root)}
    failed = complaints([tool(command)], root)
    after = {p: p.read_bytes() for p in watched(root)}
    paths = sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    return failed + [f"{command} changed {name(p, root)}" for p in paths]


# --- form -------------------------------------------------------------------------------------------


@check("ruff lint", "run .venv/bin/ruff check --fix . and mend the rest by hand")
def ruff_lint(root: Path) -> list[str]:
    return complaints([tool("ruff"), "check", "--quiet", "--output-format", "concise", "."], root)


@check("ruff format", "run .venv/bin/ruff format . and export again")
def ruff_format(root: Path) -> list[str]:
    written = [f"{PACKAGE}/__init__.py", f"{PACKAGE}/__main__.py"]
    status, output = run([tool("ruff"), "format", "--check", "--quiet", ".", *written], root)
    status, output = (
        run([tool("ruff"), "format", "--check", ".", *written], root) if status else (0, "")
    )
    return [line for line in output.splitlines() if "reformat" in line or "-->" in line]


@check(
    "export in sync", "edit the notebook, not the module; commit what nbdev-export has just written"
)
def export_in_sync(root: Path) -> list[str]:
    return changed_by("nbdev-export", modules, root)


@check("notebooks clean", "commit what nbdev-clean has just written")
def notebooks_clean(root: Path) -> list[str]:
    return changed_by("nbdev-clean", notebooks, root)


# --- notebooks and modules --------------------------------------------------------------------------


def exports(notebook: Path) -> tuple[list[str], bool, list[str]]:
    "Names after `default_exp`, whether a code cell is exported, and modules named by an export"
    homes, exported, others = [], False, []
    for cell in cells(notebook):
        for words in map(str.split, directives(cell["source"])):
            if words[0] == "default_exp":
                homes += words[1:]
            elif words[0] in ("export", "exports", "exporti") and cell["cell_type"] == "code":
                exported = True
                others += words[1:]
    return homes, exported, others


@check(
    "one notebook, one module",
    "give each notebook one default_exp of its own; delete modules without one",
)
def one_notebook_one_module(root: Path) -> list[str]:
    faults, owners = [], defaultdict(list)
    for notebook in notebooks(root):
        homes, exported, others = exports(notebook)
        where = name(notebook, root)
        if exported and not homes:
            faults.append(f"{where} exports without a default_exp: nothing is written")
        if len(homes) > 1:
            faults.append(f"{where} has {len(homes)} lines of default_exp")
        faults += [f"{where} exports into another notebook's module {other}" for other in others]
        for home in homes[:1]:
            owners[f"{PACKAGE}/{home.replace('.', '/')}.py"].append(where)
    for module, sources in owners.items():
        if len(sources) > 1:
            faults.append(f"{module} is exported by {' and '.join(sources)}: the last one wins")
    return faults + stale_modules(root, set(owners))


def stale_modules(root: Path, owned: set[str]) -> list[str]:
    "Modules without a notebook"
    faults = []
    for module in modules(root):
        where = name(module, root)
        if module.name in HANDWRITTEN or where in owned:
            continue
        text = module.read_text(encoding="utf-8")
        made = re.search(r"^# AUTOGENERATED.*File to edit: (\S+?)\.?$", text, re.MULTILINE)
        if made and not (module.parent / made[1]).resolve().is_file():
            faults.append(f"{where} is stale: its notebook {made[1]} is gone")
        else:
            faults.append(f"{where} comes from no notebook")
    return faults


def stem(notebook: Path) -> str:
    "Name of the page of a notebook: its number does not count"
    return re.sub(r"^\d+[a-zA-Z0-9]*_", "", notebook.stem)


@check("page names", "rename the notebook: a page is named after it without its number")
def page_names(root: Path) -> list[str]:
    pages = defaultdict(list)
    for notebook in notebooks(root):
        pages[notebook.parent, stem(notebook)].append(name(notebook, root))
    return [f"{' and '.join(found)} are one page" for found in pages.values() if len(found) > 1]


@check("sidebar", "give each notebook its line in nbs/_quarto.yml, in the order of the course")
def sidebar(root: Path) -> list[str]:
    text = (root / "nbs" / "_quarto.yml").read_text(encoding="utf-8")
    listed = re.findall(r"^ +- (\S+\.ipynb)$", text, re.MULTILINE)
    there = [name(p, root / "nbs") for p in notebooks(root)]
    faults = [f"nbs/{p} has no line in the sidebar" for p in there if p not in listed]
    return faults + [f"the sidebar lists {p}, which is missing" for p in listed if p not in there]


def imports_of(module: Path, package: Path) -> Iterator[str]:
    "Paths, inside the package, of the modules that a module imports"
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        if node.level:
            yield (
                module.parents[node.level - 1] / node.module.replace(".", "/")
            ).as_posix() + ".py"
        elif node.module.startswith(package.name + "."):
            yield (package.parent / node.module.replace(".", "/")).as_posix() + ".py"


@check(
    "order of chapters",
    "a chapter imports only those with a lower number: move the code or the notebook",
)
def order_of_chapters(root: Path) -> list[str]:
    number, faults = {}, []
    for notebook in notebooks(root):
        digits = re.match(r"\d+", notebook.stem)
        for home in exports(notebook)[0]:
            path = root / PACKAGE / (home.replace(".", "/") + ".py")
            number[path.as_posix()] = int(digits[0]) if digits else 0
    for module in modules(root):
        own = number.get(module.as_posix())
        for other in imports_of(module, root / PACKAGE):
            if own is not None and number.get(other, -1) > own:
                faults.append(
                    f"{name(module, root)} ({own}) imports {name(Path(other), root)} ({number[other]})"
                )
    return faults


# --- what notebooks store ---------------------------------------------------------------------------


@check("sizes of notebooks", "draw fewer or smaller pictures (72 dpi), print less")
def sizes(root: Path) -> list[str]:
    size = {name(p, root): p.stat().st_size for p in notebooks(root)}
    faults = [
        f"{p} has {n // 1024} KB, allowed are {NOTEBOOK_BYTES // 1024}"
        for p, n in size.items()
        if n > NOTEBOOK_BYTES
    ]
    if sum(size.values()) > ALL_NOTEBOOKS_BYTES:
        faults.append(
            f"all together have {sum(size.values()) // 1024} KB, allowed are {ALL_NOTEBOOKS_BYTES // 1024}"
        )
    return faults


def stored_faults(cell: dict) -> Iterator[str]:
    "What a cell has stored that must not be in git"
    if cell.get("execution_count") is not None:
        yield "an execution count"
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        text = "".join(output.get("text", [])) + "".join(data.get("text/plain", []))
        if output["output_type"] == "error" or "Traceback (most recent call last)" in text:
            yield "a traceback"
        if any("widget" in kind for kind in data):
            yield "a widget"
        if re.search(r"\d+%\||\d(it/s|s/it)\b|\r", text):
            yield "a progress bar"


@check(
    "stored outputs", "make outputs again with `make outputs`: nbdev-test --save, then nbdev-clean"
)
def stored_outputs(root: Path) -> list[str]:
    faults = []
    for notebook in notebooks(root):
        where = name(notebook, root)
        if "widgets" in json.loads(notebook.read_text(encoding="utf-8"))["metadata"]:
            faults.append(f"{where} stores widget state")
        for cell in cells(notebook):
            faults += [
                f"{where}, cell {cell.get('id')} stores {what}" for what in stored_faults(cell)
            ]
    return faults


def claims_in(notebook: Path) -> Iterator[tuple[str, str | None]]:
    "Id and text of the claims that a notebook writes to the ledger; text None where it is computed"
    for cell in cells(notebook):
        if cell["cell_type"] != "code" or "claim(" not in cell["source"]:
            continue
        lines = cell["source"].splitlines()
        try:
            tree = ast.parse("\n".join(line for line in lines if not line.startswith(("%", "!"))))
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or getattr(node.func, "id", "") != "claim":
                continue
            if any(keyword.arg == "ledger" for keyword in node.keywords):
                continue
            values = [a.value if isinstance(a, ast.Constant) else None for a in node.args[:2]]
            named = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            identity = values[0] if values else named.get("id")
            if isinstance(identity, str):
                yield identity, values[1] if len(values) > 1 else named.get("text")


def ledger(root: Path) -> list[dict]:
    "The claims written down by the last full run"
    path = root / "nbs" / "results" / "claims.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


@check(
    "ledger of claims",
    "run the notebook at scale full (`make outputs`); delete records that no notebook makes",
)
def ledger_of_claims(root: Path) -> list[str]:
    made = defaultdict(list)
    for notebook in notebooks(root):
        for identity, text in claims_in(notebook):
            made[identity].append((name(notebook, root), text))
    kept = {record["id"]: record["text"] for record in ledger(root)}
    faults = [
        f"{i} is claimed twice: {' and '.join(w for w, _ in at)}"
        for i, at in made.items()
        if len(at) > 1
    ]
    faults += [f"{i} ({made[i][0][0]}) is not in the ledger" for i in made if i not in kept]
    faults += [f"{i} is in the ledger, but no notebook claims it" for i in kept if i not in made]
    for identity in made.keys() & kept.keys():
        where, text = made[identity][0]
        if text is not None and text != kept[identity]:
            faults.append(f"{identity} ({where}) reads otherwise in the ledger")
    return faults


@check("README", "run .venv/bin/python tools/readme.py")
def readme(root: Path) -> list[str]:
    try:
        text = render(root)
    except ReadmeError as e:
        return [str(e)]
    path = root / "README.md"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        return ["README.md is not what nbs/index.ipynb renders to"]
    sentences = {
        record["id"]: record["text"].format(**record["measured"]) for record in ledger(root)
    }
    missing = [
        i
        for i, sentence in sentences.items()
        if " ".join(sentence.split()).replace("|", r"\|") not in text
    ]
    return [f"the table of claims has not {i}: run nbs/index.ipynb again" for i in missing]


def local_paths(root: Path) -> re.Pattern:
    "Matches paths that exist on one machine only"
    places = [re.escape(str(p)) + r"\b" for p in (root, Path.home()) if len(p.parts) > 1]
    places += [
        r"(?<![\w.-])/(?:home|Users|root)/\w",
        r"[A-Z]:\\{1,2}Users\b",
        r"/tmp/tmp\w{6}",
        r"/var/folders/\w",
    ]
    return re.compile("|".join(places))


@check(
    "no local paths",
    "write the path relative to the checkout, or take it from repo_root() or tmp_path",
)
def no_local_paths(root: Path) -> list[str]:
    pattern, faults = local_paths(root), []
    for path in files(root):
        data = path.read_bytes()
        if b"\0" in data[:8192]:
            continue
        for n, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
            if found := pattern.search(line):
                faults.append(f"{name(path, root)}, line {n}: {found[0]}")
    return faults


# --- the package ------------------------------------------------------------------------------------


@check(
    "import is light", "import the library inside the function that needs it, not in __init__.py"
)
def import_is_light(root: Path) -> list[str]:
    code = (
        f"import sys, time; sys.path.insert(0, {str(root)!r}); start = time.perf_counter(); import {PACKAGE};"
        f"print(time.perf_counter() - start, *[m for m in {HEAVY} if m in sys.modules])"
    )
    seconds, heavy = [], []
    for _ in range(3):
        status, output = run([sys.executable, "-c", code], root)
        if status:
            return [output.splitlines()[-1]]
        first, *heavy = output.split()
        seconds.append(float(first))
    faults = [f"import {PACKAGE} imports {module}" for module in heavy]
    if min(seconds) >= IMPORT_SECONDS:
        faults.append(f"import {PACKAGE} takes {min(seconds):.2f} s, allowed are {IMPORT_SECONDS}")
    return faults


def build_wheel(root: Path, work: Path) -> tuple[Path | None, list[str]]:
    "A wheel, built from a copy so that no old build folder gets into it"
    copy = work / "source"
    shutil.copytree(root / PACKAGE, copy / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    for extra in ("pyproject.toml", "README.md", "LICENSE"):
        if not (root / extra).is_file():
            return None, [f"{extra} is missing"]
        shutil.copy(root / extra, copy)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", work]
    faults = complaints([*build, copy], work)[-5:]
    return (None if faults else next(work.glob("*.whl"))), faults


def missing_in_wheel(wheel: Path, root: Path) -> list[str]:
    "Files of the package that a wheel has not"
    packed = set(zipfile.ZipFile(wheel).namelist())
    assets = [p for p in (root / PACKAGE / "assets").rglob("*") if p.is_file()]
    wanted = [name(p, root) for p in [*modules(root), *assets]]
    return [f"{p} is not in the wheel" for p in wanted if p not in packed]


def faults_when_installed(wheel: Path, work: Path) -> list[str]:
    "What fails when the wheel stands alone in a new environment, outside of the checkout"
    home = work / "empty"
    venv.create(home, with_pip=False)
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    faults = complaints([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], work)
    code = (
        f"import {PACKAGE}; from {PACKAGE}.settings import load_settings, repo_root;"
        "assert load_settings().seed == 42; assert repo_root() is None"
    )
    for command in (
        [python, "-c", code],
        [scripts / "instruct-ft", "--help"],
        [python, "-m", PACKAGE, "--help"],
    ):
        if not faults and (said := complaints(command, work)):
            shown = " ".join(Path(part).name for part in map(str, command))
            faults.append(f"{shown}: {said[-1]}")
    return faults


@check(
    "wheel",
    "see [tool.setuptools] in pyproject.toml; import libraries inside functions in the command line",
)
def wheel(root: Path) -> list[str]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        built, faults = build_wheel(root, work)
        if built is None:
            return ["the wheel does not build", *faults]
        return missing_in_wheel(built, root) or faults_when_installed(built, work)


def main() -> int:
    start, failed = time.perf_counter(), 0
    for title, mend, function in CHECKS:
        faults = function(ROOT)
        print(f"FAILED  {title}: {mend}" if faults else f"ok      {title}", flush=True)
        for fault in faults[:20]:
            print(f"          {fault}")
        if len(faults) > 20:
            print(f"          and {len(faults) - 20} more")
        failed += bool(faults)
    print(
        f"{len(CHECKS) - failed} of {len(CHECKS)} checks hold ({time.perf_counter() - start:.0f} s)"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
