"""Run the tests of the C++ kernels on a module built with AddressSanitizer and UndefinedBehaviorSanitizer.

    make sanitize

The sanitized module takes the place of sui_fast._cpu before anything else imports it; it needs libasan loaded first
(LD_PRELOAD), which the Makefile sees to. Any finding ends the run with an error.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

FILES = ("test_cpp_removal.py", "test_cpp_forms.py", "test_cpp_sketch.py", "test_sums.py")


def main(folder: str) -> int:
    path = next(Path(folder).glob("_cpu*.so"))
    spec = importlib.util.spec_from_file_location("sui_fast._cpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["sui_fast._cpu"] = module
    import sui_fast

    sui_fast._cpu = module
    print(f"sanitized module for {module.instruction_set()}: {path.name}", flush=True)
    tests = [str(Path(__file__).parent / "ops" / name) for name in FILES]
    large = "not two_to_the_31"  # whose zeros nobody wrote would be written by the sanitizer
    return pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", large, *tests])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
