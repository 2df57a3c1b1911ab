"""Recipes survive both spellings, and what is wrong with one is said in one sentence."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.recipe import Recipe, Use, load_recipe, read, save_recipe
from hasten.values import UserError

words = st.text(max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)
names = st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True)
uses = st.builds(Use, names, st.dictionaries(names, values, max_size=4))
recipes = st.builds(Recipe, words.filter(bool), st.lists(uses, max_size=4).map(tuple))


@settings(deadline=None)  # a busy machine is no error
@given(recipes)
def test_the_short_form_reads_back_as_itself(recipe):
    assert read(str(recipe)) == recipe


@settings(deadline=None)  # a busy machine is no error
@given(recipes)
def test_equal_recipes_hash_equal_whatever_the_order_of_options(recipe):
    turned = Recipe(recipe.model, tuple(Use(use.name, dict(reversed(use.options.items()))) for use in recipe.uses))
    assert turned == recipe
    assert hash(turned) == hash(recipe)
    assert turned.fingerprint == recipe.fingerprint


def test_slots_have_an_order_so_that_the_written_order_does_not_matter():
    assert str(Recipe.parse("m +vote +ngram +prefix")) == "m +prefix +ngram +vote"
    assert Recipe.parse("m +vote +ngram") == Recipe.parse("m +ngram +vote")


def test_different_recipes_have_different_fingerprints():
    texts = ["m", "n", "m +vote", "m +vote(n=4)", "m +vote(extract=line)", "m +ngram +vote"]
    assert len({Recipe.parse(text).fingerprint for text in texts}) == len(texts)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("zoo:arith-m", "zoo:arith-m"),
        (" zoo:arith-m  + ngram ( k = 6 )+vote ", "zoo:arith-m +ngram(k=6) +vote"),
        ("m +vote(n=16,temperature=1)", "m +vote(n=16,temperature=1.0)"),
        ("m +vote(n=8,temperature=0.8)", "m +vote"),
        ("m +allowed(text='a + b, (c)')", 'm +allowed(text="a + b, (c)")'),
        ("m +allowed(tokens=[3, 4])", "m +allowed(tokens=[3,4])"),
        ("m +allowed(tokens=3)", "m +allowed(tokens=[3])"),
        ('"my models/a+b" +plain()', '"my models/a+b" +plain'),
        ("http://host:8000/v1?a=b", "http://host:8000/v1?a=b"),
    ],
)
def test_the_canonical_form(text, shown):
    assert str(Recipe.parse(text)) == shown


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "expected a model at character 1, found the end"),
        ("m ngram", "expected '+' and a technique at character 3, found 'n'"),
        ("m +", "expected the name of a technique at character 4"),
        ("m +ngram(k=4", "expected ',' or ')' at character 13, found the end"),
        ("m +ngram(k)", "expected '=' at character 11"),
        ("m +vote(n=)", "expected a value at character 11, found ')'"),
        ("m +vote(n=1 top_p=1)", "expected ',' or ')' at character 13"),
        ("m +vote(n=1,n=2)", "'n' is given twice, the second time at character 13"),
        ("m +vot", "unknown technique 'vot'; did you mean 'vote'?"),
        ("m +vote(temprature=1)", "unknown option 'temprature'; did you mean 'temperature'?"),
        ("m +plain(k=1)", "unknown option 'k'; it has none"),
        ("m +ngram(k=four)", "k='four' is not a whole number"),
        ("m +vote(n=2.5)", "n=2.5 is not a whole number"),
        ("m +best-of-n(weighted=1)", "weighted=1 is not true or false"),
        ('m +allowed(tokens=[1,"a"])', "is not a list, each item a whole number"),
        ("m +vote(n=0)", "n=0"),
        ("m +vote(top_p=7)", "top_p=7.0: must lie between"),
        ("m +ngram +plain", "'ngram' and 'plain' are both decode techniques"),
        ("m +vote +best-of-n", "'vote' and 'best-of-n' are both strategy techniques"),
        ("m +prefix +prefix", "'prefix' and 'prefix' are both lm reuse techniques"),
    ],
)
def test_what_is_wrong_is_said(text, sentence):
    with pytest.raises(UserError) as error:
        Recipe.parse(text)
    assert sentence in str(error.value)


@pytest.mark.parametrize("document", [None, [], {}, {"model": 3}, {"model": "m", "uses": []}, {"model": "m", "techniques": ["vote"]}])
def test_what_is_not_a_recipe_is_refused(document):
    with pytest.raises(UserError, match="not a"):
        Recipe.from_json(document)


def test_files_hold_the_canonical_json(tmp_path):
    recipe = Recipe.parse("zoo:arith-m +vote(temperature=0.5,n=8)")
    file = tmp_path / "deep" / "recipe.json"
    save_recipe(recipe, file)
    assert json.loads(file.read_text()) == {"model": "zoo:arith-m", "techniques": [{"name": "vote", "options": {"temperature": 0.5}}]}
    assert load_recipe(file) == recipe == load_recipe("zoo:arith-m +vote(temperature=0.5)")
    assert [p.name for p in file.parent.iterdir()] == ["recipe.json"]


def test_files_that_hold_no_recipe(tmp_path):
    with pytest.raises(UserError, match="no such recipe file"):
        load_recipe(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"model": ')
    with pytest.raises(UserError, match="not a JSON file"):
        load_recipe(tmp_path / "bad.json")
