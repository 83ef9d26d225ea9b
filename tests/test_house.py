"""The house rules that a machine can watch."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = sorted(
    path for folder in ("finetune", "generate", "scripts", "eval") for path in (ROOT / folder).glob("*.py")
)
PACKAGE = sorted((ROOT / "lit_gpt").rglob("*.py"))
MAY_IMPORT = {  # what a room may import of the package; those not named see everything
    "args": set(),
    "attention": {"ops", "products"},
    "bnb": {"quantization", "sources"},
    "cache": set(),
    "cli": {"runtime"},
    "config": {"families", "files"},  # families inside from_name only
    "files": set(),
    "ops": set(),
    "optimizers": {"quantization"},
    "products": {"ops"},
    "prompts": set(),
    "report": {"files"},
    "resume": {"files", "report", "training"},
    "rope": set(),
    "runtime": {"attention", "model"},  # model for the type checker only; attention is what torch's compiler leaves out
    "quantization": {"products"},
    "sources": {"files"},
    "surgery": set(),
    "words": set(),
    "workers": set(),
    "tokenizer": {"files", "words"},
    "model": {"attention", "cache", "config", "ops", "products", "rope"},
    "lora": {"ops", "products", "quantization", "surgery"},
    "families": {"config", "families", "rope"},
    "generation": {"cache", "model", "recorded"},
    "recorded": {"cache", "model", "rope"},
    "training": {"args", "data", "report"},
    "data": {"checkpoint", "files", "model", "prompts", "tokenizer", "workers"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_scripts_stand_alone_and_are_short(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"finetune", "generate", "scripts", "eval"}
    limit = 130 if path.name == "make_quickstart_data.py" else 90  # that one is mostly lists of words
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.stem)
def test_rooms_import_in_one_direction(path: Path) -> None:
    room = "families" if path.parent.name == "families" else path.stem
    seen = {name.split(".")[1] for name in imports(path) if name.startswith("lit_gpt.")}
    rooms = {p.stem for p in PACKAGE} | {"families", "interop"}
    if room in MAY_IMPORT:
        assert (seen & rooms) <= MAY_IMPORT[room]
    assert not {name.split(".")[0] for name in imports(path)} & {"finetune", "generate", "scripts"}


@pytest.mark.parametrize("path", [*PACKAGE, *SCRIPTS], ids=lambda path: path.stem)
def test_nobody_edits_the_path_or_loads_code(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "jinja2" not in text.replace("jinja2.sandbox", "")  # templates come from strangers
    for word in ("sys.path", "strict=" + "False)", "weights_only=" + "False", "_load_from_state_dict"):
        assert word not in text.replace("zip(", "")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_help_answers_without_torch(path: Path) -> None:
    """The flags are known before anything heavy is imported; shown by making torch impossible to import."""
    blocked = "import sys; sys.modules['torch'] = None; import runpy; sys.argv = sys.argv[1:]; "
    code = blocked + "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, str(path), "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    wrong = subprocess.run(
        [sys.executable, "-c", code, str(path), "--no_such"], capture_output=True, text=True, cwd=ROOT
    )
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr


FLAGS = Path(__file__).parent / "assets" / "flags.txt"


def test_the_flags_are_the_frozen_ones() -> None:
    """A flag that comes or goes is a decision: run the tests with UPDATE_FLAGS=1 and look at the difference."""
    lines = []
    for path in SCRIPTS:
        done = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True, cwd=ROOT)
        words = {word.strip("[],") for word in done.stdout.split() if word.strip("[],").startswith("--")}
        flags = sorted(
            word for word in words if word[2:3].isalpha() and word.split("=")[0] not in ("--help", "--config")
        )
        lines.append(f"{path.parent.name}/{path.name}: {' '.join(flags)}")
    text = "\n".join(lines) + "\n"
    if os.environ.get("UPDATE_FLAGS"):
        FLAGS.write_text(text)
    assert text == FLAGS.read_text()


def test_the_readme_lists_the_families_of_the_package() -> None:
    """UPDATE_README=1 writes the table."""
    from lit_gpt.families import table

    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    start, rest = text.split("lit_gpt.families.table() -->\n", 1)
    _, end = rest.split("<!-- end of families", 1)
    expected = f"{start}lit_gpt.families.table() -->\n\n{table()}\n\n<!-- end of families{end}"
    if os.environ.get("UPDATE_README"):
        path.write_text(expected, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == expected


@pytest.mark.parametrize("path", [*sorted((ROOT / "tutorials").glob("*.md")), ROOT / "README.md"], ids=lambda p: p.name)
def test_links_and_scripts_that_the_guides_name_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (path.parent / link).exists(), link
    for script in re.findall(r"python ((?:scripts|finetune|generate|eval|benchmarks)/\w+\.py)", text):
        assert (ROOT / script).is_file() or script == "scripts/prepare_mydata.py", script
