"""The ARM products, without an ARM machine: tests/cpp/neon.cpp cross-compiled and run under an emulator."""

import shutil
import subprocess
from pathlib import Path

import pytest
from bitsmith.kernels import native

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
# Slow at run time and quick to compile, which is what the time goes to. Some arguments are for x86 alone.
WARNINGS = ("-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror")
FLAGS = ("-std=c++20", "-Og", "-fopenmp-simd", "-pthread", "-static", *WARNINGS)

pytestmark = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"needs {COMPILER} and {EMULATOR}"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("neon") / "neon"
    source = Path(__file__).parent / "cpp" / "neon.cpp"
    done = subprocess.run(
        [COMPILER, *FLAGS, "-o", str(built), str(source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return built


@pytest.mark.parametrize(("processor", "path"), [("cortex-a53", "neon"), ("cortex-a76", "neon-dotprod")])
def test_products(program: Path, processor: str, path: str) -> None:
    """Every width, odd shapes, one or two levels of scales, grids. `sdot` would end a Cortex-A53, which has none."""
    command = [EMULATOR, "-cpu", processor, str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    chosen, compared, error = done.stdout.split()
    assert native.PATHS[int(chosen)] == path
    assert int(compared) >= (640 if path == "neon-dotprod" else 426) and float(error) < 1e-6
