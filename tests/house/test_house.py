"""The rules of the house: who imports whom, sizes, names, and that the distribution is whole."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Package to what it may import of ours, and what it never imports, however indirectly.
MAY_IMPORT = {
    "engine": set(),
    "workers": {"engine"},
    "cluster": {"workers", "engine"},
    "router": {"cluster", "engine"},
    "deploy": {"router", "cluster", "workers", "engine", "manta"},
    "manta": {"deploy", "router", "cluster", "workers", "engine"},
}
NEVER_IMPORTS = {
    "engine": {"torch", "ray", "fastapi"},
    "workers": {"ray", "fastapi"},
    "cluster": {"fastapi"},
    "router": {"torch"},
}
PACKAGES = [name for name in MAY_IMPORT if (ROOT / name).is_dir()]
SOURCES = [file for name in PACKAGES for file in sorted((ROOT / name).rglob("*.py"))]
TEXT_SUFFIXES = {".py", ".cpp", ".toml", ".sh", ".md", ".yaml", ".yml"}
MOST_LINES = 620


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> set[str]:
    """The top-level names that a file imports anywhere, in functions and for types too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)}: imports are absolute"
            assert node.module is not None
            found.add(node.module.split(".")[0])
    return found


def tracked() -> list[Path]:
    """Our own files of text: what git tracks or would, or all that is no build output."""
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listing.returncode == 0:
        files = [ROOT / line for line in listing.stdout.splitlines()]
    else:  # no git, or a copy without its history
        files = [f for f in ROOT.rglob("*") if not f.relative_to(ROOT).parts[0].startswith(".")]
    return [f for f in files if f.suffix in TEXT_SUFFIXES and f.is_file()]


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_imports_go_down_the_house(file: Path) -> None:
    package = file.relative_to(ROOT).parts[0]
    found = imports(file)
    ours = found & MAY_IMPORT.keys() - {package}
    assert ours <= MAY_IMPORT[package], f"{package} may not import {ours - MAY_IMPORT[package]}"
    assert not found & NEVER_IMPORTS.get(package, set())
    assert "tests" not in found and "tools" not in found


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that a fresh Python has after ``statement``."""
    program = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in done.stdout.split()}


def test_the_engine_loads_neither_torch_nor_ray() -> None:
    modules = [module_of(file) for file in SOURCES if module_of(file).split(".")[0] == "engine"]
    assert "engine.engine" in modules and "engine.collector" in modules
    loaded = loaded_by("import " + ", ".join(modules))
    assert not loaded & {"torch", "ray", "fastapi", "workers", "cluster", "manta", "transformers"}


def test_the_router_loads_neither_torch_nor_ray() -> None:
    modules = [module_of(file) for file in SOURCES if module_of(file).split(".")[0] == "router"]
    assert "router.app" in modules
    loaded = loaded_by("import " + ", ".join(modules))
    assert not loaded & {"torch", "ray", "workers", "transformers"}


def test_manta_and_the_command_line_load_little_at_first() -> None:
    heavy = {"torch", "ray", "transformers", "numpy"}
    assert not loaded_by("import manta") & heavy
    assert not loaded_by("from manta import SamplingParams, RequestOutput") & heavy
    assert not loaded_by("import deploy.cli") & heavy


def test_no_file_is_too_long() -> None:
    files = [file for file in tracked() if file.suffix in {".py", ".cpp", ".sh"}]
    assert len(files) > len(SOURCES)
    long = {name_of(f): n for f in files if (n := len(f.read_text().splitlines())) > MOST_LINES}
    assert not long


def test_the_tests_have_no_packages_and_no_folder_of_a_packages_name() -> None:
    folders = [f for f in (ROOT / "tests").rglob("*") if f.is_dir() and f.name != "__pycache__"]
    assert not [name_of(f) for f in folders if f.name in MAY_IMPORT]
    assert not [name_of(f) for f in (ROOT / "tests").rglob("__init__.py")]


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_what_is_public_has_a_docstring(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module has none"
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    public = [n for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")]
    assert not [node.name for node in public if not ast.get_docstring(node)]


def test_the_distribution_has_every_package() -> None:
    listed = SETTINGS["tool"]["setuptools"]["packages"]
    there = {module_of(file) for file in SOURCES if file.name == "__init__.py"}
    assert sorted(listed) == sorted(there)
    folders = {".".join(file.relative_to(ROOT).parts[:-1]) for file in SOURCES}
    assert folders == there, "a folder without __init__.py"
    checked = SETTINGS["tool"]["mypy"]["packages"]
    assert sorted(checked) == sorted(PACKAGES)
    for script in SETTINGS["project"]["scripts"].values():
        module, function = script.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_the_distribution_has_every_file_that_is_no_python() -> None:
    listed = {
        file
        for package, patterns in SETTINGS["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
        for file in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    there = {
        file
        for name in PACKAGES
        for file in (ROOT / name).rglob("*")
        if file.is_file() and file.suffix not in {".py", ".pyc"}
    }
    assert there <= listed, there - listed


def test_versions_agree() -> None:
    import manta

    assert manta.__version__ == SETTINGS["project"]["version"]


def test_every_public_name_can_be_imported() -> None:
    import manta

    assert sorted(manta.__all__) == dir(manta)
    for name in manta.__all__:
        value = getattr(manta, name)
        if name != "__version__":
            assert callable(value) and value.__doc__
    errors = {
        name for name, value in vars(importlib.import_module("engine.errors")).items()
        if inspect.isclass(value)
    }  # fmt: skip
    assert errors <= set(manta.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'LLMS'"):
        _ = manta.LLMS
    # What a type checker sees is what there is.
    source = (ROOT / "manta/__init__.py").read_text()
    block = re.search(r"if TYPE_CHECKING:\n((?:    .*\n)+)", source)
    assert block is not None
    seen = set(re.findall(r"import (\w+) as \1", block[1]))
    assert seen | {"__version__"} == set(manta.__all__)


@pytest.mark.parametrize("name", ["engine", "workers", "cluster", "deploy"])
def test_manta_names_an_impostor(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    program = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import manta"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"ImportError: manta needs its own package '{name}' from {ROOT}")
    assert f"but found {tmp_path / name}" in error
