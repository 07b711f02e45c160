"""What pip makes of the source tree: with a compiler, without one, editable or not, and as a source archive.

Offline: every install goes into a virtual environment of its own that borrows the packages of this one.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not a source tree"),
]
pytestmark += [
    pytest.mark.skipif(importlib.util.find_spec(tool) is None, reason=f"{tool} is not installed")
    for tool in ("pip", "setuptools", "cmake", "pybind11")
]

PROBE = """
import torch, sui_fast
from sui_fast.ops import rational_removal
one = torch.ones(1, 1, 1, dtype=torch.float64)
row, pole = one[0], torch.tensor([-1.0], dtype=torch.complex128)
def removed():
    return rational_removal(one, row[0], row[0], 0 * row, 0 * one, row, pole, -pole, 0.0).item()
print(sui_fast.__file__)
print(removed())
"""
FORCED = PROBE + "with sui_fast.use_backend('cpu'): print(removed())"


def run(*command, with_errors=False, **environment) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_TARGET", "SUI_"))}
    done = subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, cwd=ROOT.anchor)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr * with_errors


def environment(folder: Path, hidden: str | None = None) -> Path:
    """Python of a fresh virtual environment that sees the packages of this one, but not sui_fast nor `hidden`."""
    borrowed = folder / "borrowed"
    borrowed.mkdir()
    for place in dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")):
        for entry in Path(place).iterdir():
            name = entry.name.lower()
            if not name.startswith(("sui_fast", "__editable__", hidden or "sui_fast")) and entry.suffix != ".pth":
                (borrowed / entry.name).symlink_to(entry)
    run(sys.executable, "-m", "venv", "--without-pip", str(folder / "venv"))
    python = folder / "venv" / "bin" / "python"
    site = run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site) / "borrowed.pth").write_text(f"{borrowed}\n")
    return python


def install(python: Path, *what: str, **variables: str) -> str:
    flags = ("--no-build-isolation", "--no-deps", "--no-index", "--ignore-installed", "-v")
    return run(str(python), "-m", "pip", "install", *flags, *what, with_errors=True, **variables)


@pytest.fixture
def source(tmp_path) -> Path:
    """Copy of the source tree, without what a build left behind."""
    target = tmp_path / "source"
    target.mkdir()
    for name in ("sui_fast", "csrc"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for entry in ROOT.iterdir():
        if entry.is_file():
            shutil.copy2(entry, target)
    return target


def test_plain_install_has_everything(tmp_path, source):
    python = environment(tmp_path)
    install(python, str(source))
    shutil.rmtree(source)
    where, automatic, forced = run(str(python), "-c", FORCED).split()
    package = Path(where).parent
    assert str(tmp_path / "venv") in where and automatic == forced
    assert (package / "py.typed").is_file()
    assert {path.name for path in (package / "csrc" / "include" / "sui").iterdir()} >= {"solve.h", "resolvent.h"}
    assert (python.parent / "sui-fast").is_file()


def test_editable_install_builds_in_place(tmp_path, source):
    python = environment(tmp_path)
    install(python, "-e", str(source))
    where, automatic, forced = run(str(python), "-c", FORCED).split()
    assert where == str(source / "sui_fast" / "__init__.py") and automatic == forced
    assert list((source / "sui_fast").glob("_cpu*.so"))


@pytest.mark.parametrize("missing", ["compiler", "cmake"])
@pytest.mark.parametrize("mode", ["plain", "editable"])
def test_install_survives_a_missing_tool(tmp_path, source, missing, mode):
    python = environment(tmp_path, hidden="cmake" if missing == "cmake" else None)
    variables = {"CXX": str(tmp_path / "no-such-compiler")} if missing == "compiler" else {"PATH": str(python.parent)}
    said = install(python, *["-e"] * (mode == "editable"), str(source), **variables)
    assert "PyTorch bodies" in said
    where, value = run(str(python), "-c", PROBE).split()
    assert float(value) == -0.5
    refused = subprocess.run([python, "-c", FORCED], capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode != 0 and "BackendError" in refused.stderr and "compiler" in refused.stderr


def test_source_archive_can_be_built_from(tmp_path, source):
    build = f"import os, setuptools.build_meta as b; os.chdir({str(source)!r}); print(b.build_sdist({str(tmp_path)!r}))"
    archive = run(sys.executable, "-c", build).split()[-1]
    with tarfile.open(tmp_path / archive) as files:
        names = {name.split("/", 1)[-1] for name in files.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources | {"CMakeLists.txt", "setup.py", "LICENSE", "constraints.txt", "sui_fast/py.typed"} <= names


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_help_lists_the_commands():
    said = run("make", "--no-print-directory", "-C", str(ROOT), "help")
    assert all(f"make {name} " in said for name in ("demo", "test", "lint", "bench", "clean"))
