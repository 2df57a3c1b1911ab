"""An artifact is written whole or not at all, and refused where it does not fit."""

import json
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hasten import artifact
from hasten.values import UserError

FINGERPRINT = {"model": "abc", "settings": {"bits": 8, "groups": (1, 2)}, "data": "def"}


@given(
    st.dictionaries(st.from_regex(r"[a-z.]{1,8}", fullmatch=True), st.lists(st.integers(0, 4), max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_saved_is_loaded(tmp_path, shapes, info, dtype):
    arrays = {name: torch.arange(int(np.prod(shape))).reshape(shape).to(dtype) for name, shape in shapes.items()}
    artifact.save(tmp_path / "a", "profile", FINGERPRINT, arrays, info)
    found = artifact.load(tmp_path / "a", "profile", FINGERPRINT)
    assert found.info == info
    assert found.arrays.keys() == arrays.keys()
    assert all(torch.equal(found.arrays[name], arrays[name]) and found.arrays[name].dtype == dtype for name in arrays)
    assert os.listdir(tmp_path) == ["a"]


def test_views_of_one_storage_can_be_saved(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    found = artifact.save(tmp_path / "a", "k", {}, {"base": base, "turned": base.T})
    assert torch.equal(found.arrays["turned"], base.T)


@pytest.mark.parametrize(
    ("kind", "change", "sentence"),
    [
        ("trie", {}, "holds 'profile', and 'trie' is needed"),
        ("profile", {"model": "xyz"}, "was made for another model"),
        ("profile", {"settings": {"bits": 4}}, "was made for another settings"),
        ("profile", {"extra": 1}, "was made for another extra"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, kind, change, sentence):
    artifact.save(tmp_path / "a", "profile", FINGERPRINT, info={"x": 1})
    with pytest.raises(UserError, match=sentence):
        artifact.load(tmp_path / "a", kind, FINGERPRINT | change)


def test_damage_and_absence_are_noticed(tmp_path):
    artifact.save(tmp_path / "a", "profile", FINGERPRINT, info={"x": 1})
    (tmp_path / "a" / artifact.INFO).write_text('{"x": 2}')
    with pytest.raises(UserError, match=r"info\.json is missing or damaged"):
        artifact.load(tmp_path / "a", "profile", FINGERPRINT)
    (tmp_path / "a" / artifact.MANIFEST).write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        artifact.load(tmp_path / "a", "profile", FINGERPRINT)
    with pytest.raises(UserError, match="no artifact here"):
        artifact.load(tmp_path / "b", "profile", FINGERPRINT)


def test_a_reference_names_the_content(tmp_path):
    first = artifact.save(tmp_path / "a", "profile", FINGERPRINT, info=1)
    assert artifact.load(first.reference, "profile", FINGERPRINT).info == 1
    artifact.save(tmp_path / "a", "profile", FINGERPRINT, info=2)
    with pytest.raises(UserError, match="not the artifact the recipe names"):
        artifact.load(first.reference, "profile", FINGERPRINT)


def test_a_failed_save_leaves_the_old_one(tmp_path):
    artifact.save(tmp_path / "a", "profile", FINGERPRINT, info=1)
    with pytest.raises(TypeError):
        artifact.save(tmp_path / "a", "profile", FINGERPRINT, info=object())
    assert artifact.load(tmp_path / "a", "profile", FINGERPRINT).info == 1
    assert os.listdir(tmp_path) == ["a"]


def test_a_directory_that_is_no_artifact_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not an artifact"):
        artifact.save(tmp_path, "profile", FINGERPRINT)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_model_fingerprint_sees_configuration_and_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(artifact, "_WHOLE", 1 << 20)
    (tmp_path / "config.json").write_text(json.dumps({"layers": 1}))
    weights = bytearray(5 << 20)
    seen = set()
    for change in (None, 10, 2 << 20, (5 << 20) - 1):
        if change is not None:
            weights[change : change + (128 << 10)] = b"x" * len(weights[change : change + (128 << 10)])
        (tmp_path / "model.safetensors").write_bytes(weights)
        seen.add(artifact.model_fingerprint(tmp_path))
    assert len(seen) == 4
    (tmp_path / "config.json").write_text(json.dumps({"layers": 2}))
    assert artifact.model_fingerprint(tmp_path) not in seen
    with pytest.raises(UserError, match=r"no config\.json"):
        artifact.model_fingerprint(tmp_path / "none")
