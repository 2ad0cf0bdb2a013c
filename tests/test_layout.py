"""The shape of the project: who may import whom, which folder names stay free, how big a file may get."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A folder may import what is listed and whatever those may import in turn.
ALLOWED = {
    "kernels": set(),
    "samplers": set(),
    "quant_formats": {"kernels"},
    "kv_quant": {"kernels"},
    "models": {"quant_formats"},
    "calibrate": {"models"},
    "serve": {"models", "kv_quant", "samplers"},
    "eval": {"serve"},
    "cli": {"eval", "calibrate"},
}
# Modules of ours at the root that everybody may import.
COMMON = {"errors", ""}


def reachable(folder: str) -> set[str]:
    direct = ALLOWED[folder]
    return direct.union(*(reachable(f) for f in direct)) | {folder}


def imports(path: Path) -> set[str]:
    """First component, below the package, of every import of ours in a file; absolute imports of bitsmith count too."""
    found = set()
    depth = len(path.relative_to(ROOT).parts) - 1
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level <= depth:
                found.add(path.relative_to(ROOT).parts[0])
            elif node.module:
                found.add(node.module.split(".")[0])
            else:
                found.update(alias.name for alias in node.names if alias.name != "__version__")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bitsmith":
            found.add(((node.module or "") + ".").split(".")[1])
        elif isinstance(node, ast.Import):
            found.update((a.name + ".").split(".")[1] for a in node.names if a.name.split(".")[0] == "bitsmith")
    return found


FILES = [p for folder in ALLOWED for p in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_import_contract(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    assert imports(path) - COMMON <= reachable(folder), f"{folder} may import only {sorted(reachable(folder))}"


def test_contract_sees_every_kind_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    file = tmp_path / "kernels" / "x.py"
    file.write_text(
        "from ..serve import a\nfrom .y import b\nimport bitsmith.eval.ppl\nfrom bitsmith.cli import m\nfrom .. import models\n"
    )
    assert imports(file) == {"serve", "kernels", "eval", "cli", "models"}


def test_scheduler_and_blocks_import_no_torch() -> None:
    code = "import sys, bitsmith.serve.scheduler, bitsmith.serve.blocks; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_samplers_import_torch_only() -> None:
    for path in (ROOT / "samplers").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            foreign = {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) - {"torch"}
            assert not foreign, f"{path} imports {foreign}"


def test_every_module_imports_without_triton_and_gpu() -> None:
    modules = [".".join(["bitsmith", *p.relative_to(ROOT).with_suffix("").parts]) for p in FILES]
    code = (
        "import sys, importlib\n"
        "sys.modules['triton'] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "import torch; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_top_level_folders_are_no_packages_of_their_own() -> None:
    assert not [str(p) for p in ROOT.glob("*/__init__.py")]


def test_a_distribution_called_kernels_is_not_shadowed(tmp_path: Path) -> None:
    """Hugging Face ships a PyPI package imported as `kernels`: from the checkout's root, that one must win."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("ORIGIN = 'hub'")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; assert kernels.ORIGIN == 'hub'; import bitsmith.kernels.spec"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_files_stay_small() -> None:
    long = {str(p.relative_to(ROOT)): n for p in FILES if (n := len(p.read_text().splitlines())) > 400}
    assert not long, f"files over 400 lines: {long}"


def test_functions_stay_short() -> None:
    long = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                if lines > 60:
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = lines
    assert not long, f"functions over 60 lines: {long}"
