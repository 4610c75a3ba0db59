"""How the two packages depend on each other, and what their programs need."""

import ast
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
COSYVOICE = REPOSITORY / "CosyVoice"


def imported(path: Path) -> set[str]:
    """Top-level names of the packages that a module imports, wherever it does."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_cosyvoice_needs_nothing_of_taste():
    modules = sorted((COSYVOICE / "cosyvoice").rglob("*.py"))
    assert len(modules) > 40
    assert [path for path in modules if "taste" in imported(path)] == []


def test_cosyvoice_works_from_its_own_folder_alone(tmp_path):
    code = "from cosyvoice.cli.cosyvoice import CosyVoice; from cosyvoice.utils.file_utils import load_wav, write_wav"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(COSYVOICE)}, check=True)


def test_taste_takes_the_cosyvoice_beside_it_whatever_else_is_installed(tmp_path):
    (tmp_path / "cosyvoice").mkdir()
    (tmp_path / "cosyvoice" / "__init__.py").touch()
    code = "import taste, cosyvoice.utils.model_dir as found; print(found.__file__)"
    path = f"{tmp_path}:{COSYVOICE}:{REPOSITORY}"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": path}, check=True, capture_output=True, text=True
    )
    assert Path(found.stdout.strip()).is_relative_to(COSYVOICE)
