"""Bridge from setuptools to CMake. All metadata is in pyproject.toml.

The extension is optional: whatever keeps it from being built (no compiler, no CMake, an unknown platform) becomes
setuptools' own CompileError, which an optional extension survives with a warning. PyTorch bodies take over then.
"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        configure = [
            *tool("cmake"),
            *("-S", str(ROOT)),
            *("-B", str(build)),
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DSUI_OUTPUT_DIRECTORY={target.parent}",
        ]
        if importlib.util.find_spec("pybind11"):
            import pybind11

            configure.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
        if importlib.util.find_spec("ninja"):
            import ninja

            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}"]
        shutil.rmtree(build, ignore_errors=True)  # a cache of an earlier compiler or build environment misleads CMake
        try:
            subprocess.run(configure, check=True)
            subprocess.run([*tool("cmake"), "--build", str(build), "--config", "Release"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"{ext.name} was not built ({error}); sui_fast will run its PyTorch bodies") from error


class WithSources(build_py):
    """Ships csrc inside the package: CUDA kernels are compiled at first use. An editable install finds ROOT/csrc."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for folder in ("include", "cuda"):
                if (ROOT / "csrc" / folder).is_dir():
                    target = Path(self.build_lib) / "sui_fast" / "csrc" / folder
                    shutil.copytree(ROOT / "csrc" / folder, target, dirs_exist_ok=True)


def tool(name: str) -> list[str]:
    """Command that starts a build tool: its Python package (works outside PATH too), else the program."""
    return [sys.executable, "-m", name] if importlib.util.find_spec(name) else [name]


setup(
    ext_modules=[Extension("sui_fast._cpu", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild, "build_py": WithSources},
)
