"""The table is complete: every technique's module has what the table promises, and unknown or broken ones are said so."""

import dataclasses
import subprocess
import sys

import pytest

from hasten import techniques
from hasten.recipe import Recipe, Use
from hasten.techniques import TECHNIQUES, Technique, exactness, make_options, module_of, options_of, why_not
from hasten.values import UserError


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_technique_is_what_the_table_says(name):
    module = module_of(name)
    assert dataclasses.is_dataclass(module.Options)
    assert module.Options.__dataclass_params__.frozen
    assert callable(module.build)
    options = options_of(name)
    assert len(options) <= 10
    assert [option.name for option in options if not option.doc] == []
    assert TECHNIQUES[name].summary


def test_documentation_is_found_in_comments_and_docstrings():
    assert options_of("ngram")[0] == techniques.Option("k", "int", 8, "tokens proposed at most")
    assert next(option for option in options_of("vote") if option.name == "n").doc == "samples drawn"


def test_a_recipe_is_as_exact_as_its_weakest_part():
    assert exactness(Recipe("m")) == "identical"
    assert exactness(Recipe.parse("m +ngram +prefix")) == "identical"
    assert exactness(Recipe.parse("m +ngram +vote")) == "approximate"


def test_why_not():
    assert why_not(Recipe.parse("m +ngram +vote")) is None
    assert "reward model" in why_not(Recipe.parse("m +best-of-n"))


def test_any_number_of_transforms_and_one_reuse_a_family(monkeypatch):
    for name, slot, family in (("prune", "transform", "any"), ("int8", "transform", "any"), ("cache", "reuse", "dlm")):
        monkeypatch.setitem(TECHNIQUES, name, Technique(name, slot, family, "identical", "", "", "hasten.lm.decode.plain"))
    text = "m +prune +int8 +prune +prefix +cache"
    assert str(Recipe.parse(text)) == text
    with pytest.raises(UserError, match="both dlm reuse"):
        Recipe.parse("m +cache +cache")


def test_options_are_made_from_plain_values():
    assert make_options("ngram", {"k": 6.0}).k == 6
    assert make_options("allowed", {"tokens": [1, 2]}).tokens == (1, 2)
    with pytest.raises(UserError, match="k='six' is not a whole number"):
        make_options("ngram", {"k": "six"})


def test_a_technique_whose_package_is_missing_does_not_hurt_the_others(monkeypatch):
    missing = Technique("ghost", "decode", "lm", "identical", "", "", "hasten.no_such_module")
    monkeypatch.setitem(TECHNIQUES, "ghost", missing)
    with pytest.raises(UserError, match="it needs is not installed"):
        Recipe.parse("m +ghost")
    assert Recipe.parse("m +ngram").uses == (Use("ngram"),)


def test_reading_a_recipe_does_not_import_torch():
    code = "import sys; from hasten.recipe import Recipe; Recipe.parse('m +ngram +vote'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
