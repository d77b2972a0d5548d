"""What importing ckptd imports, and what is said of a library that is not there."""

import subprocess
import sys

import pytest


def python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True
    )
    return result.stdout


def test_ckptd_imports_neither_torch_nor_the_libraries():
    code = (
        "import sys, ckptd, ckptd.integrations\n"
        "print({'torch', 'transformers', 'lightning', 'accelerate'} & set(sys.modules))"
    )
    assert python(code) == "set()\n"


@pytest.mark.parametrize(
    ("module", "missing", "package"),
    [
        ("transformers", "transformers", "pip install 'transformers[torch]'"),
        ("transformers", "accelerate", "pip install 'transformers[torch]'"),
        ("lightning", "lightning", "pip install lightning"),
        ("accelerate", "accelerate", "pip install accelerate"),
    ],
)
def test_a_missing_library_is_named(module, missing, package):
    code = (
        "import sys\n"
        f"sys.modules[{missing!r}] = None\n"
        "try:\n"
        f"    import ckptd.integrations.{module}\n"
        "except ImportError as error:\n"
        "    print(error)"
    )
    assert package in python(code)
