"""The report: one file, no network, every point in it, and text that cannot break out of its data."""

import json
import re
from typing import Any

from hasten.measure.report import page, render


def measured(text: str, model: str, techniques: list[dict[str, Any]], value: float) -> dict[str, Any]:
    cost = dict.fromkeys(("seconds", "ttft", "tpot", "tokens", "forwards", "flops", "bytes", "peak_bytes"), 2.0)
    return {
        "recipe": {"model": model, "techniques": techniques}, "recipe_text": text, "task": "arith", "contended": False, "concurrency": 1,
        "quality": {"name": "accuracy", "value": value, "ci": [value - 0.1, value + 0.1], "n": 30},
        "cost": {**cost, "joules": None, "by_role": {}, "n": 4}, "machine": {"cpu": "some"},
    }  # fmt: skip


def document(text: str = "m") -> dict[str, Any]:
    base = measured(text, text, [], 0.5)
    vote = measured("m +vote", "m", [{"name": "vote", "options": {}}], float("nan"))
    return {
        "picked": base,
        "baseline": base,
        "measurements": [base, vote],
        "budget": {"seconds": 3.0},
        "why": "because",
        "command": "hasten pick",
    }


def data(html: str) -> dict[str, Any]:
    return json.loads(re.search(r"const D = (.*);\n", html)[1])  # type: ignore[index]


def test_every_recipe_is_a_point_with_its_labels() -> None:
    points = page(document())["points"]
    assert [(p["model"], p["strategy"], p["other"], p["exactness"]) for p in points] == [
        ("m", "one answer", "", "identical"), ("m", "vote", "", "approximate"),
    ]  # fmt: skip


def test_numbers_that_json_lacks_are_null() -> None:
    assert data(render(document()))["points"][1]["quality"]["value"] is None


def test_a_name_cannot_close_the_script() -> None:
    html = render(document("</script><b>"))
    assert html.count("</script>") == 1
    assert data(html)["picked"]["text"] == "</script><b>"
