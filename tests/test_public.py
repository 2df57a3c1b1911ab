"""The public names exist, and importing hasten costs nothing."""

import subprocess
import sys
import time

import pytest

import hasten


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("name", hasten.__all__)
def test_every_public_name_is_there(name):
    assert getattr(hasten, name) is not None


def test_functions_keep_their_names_whatever_modules_are_imported():
    code = "import hasten, hasten.load, hasten.measure.stats, hasten.measure.tasks; print(callable(hasten.load), callable(hasten.measure))"
    assert run(code) == "True True"


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        hasten.lode  # noqa: B018


@pytest.mark.parametrize("code", ["import hasten", "import hasten.cli", "import hasten.recipe, hasten.techniques", "import hasten.zoo"])
def test_what_must_stay_light_imports_no_model_library(code):
    assert run(f"{code}; import sys; print({{'torch', 'transformers', 'numpy'}} & set(sys.modules))") == "set()"


def test_help_is_quick():
    """Beside an interpreter that imports typer and rich alone, `hasten --help` takes little more: it is not the place of slow imports."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "hasten", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    run("import typer, typer.core, rich.console, rich.table, rich.markdown")
    assert min(times) < max(0.5, 3 * (time.perf_counter() - start))  # the second bound is for a machine that is busy
