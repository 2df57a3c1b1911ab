"""hasten: what every inference-acceleration technique is worth on your model and machine, the best combination for a budget, and its service.

    lm = hasten.load("zoo:arith-m +ngram +vote(n=8)")
    [result] = lm.generate(["a = 7 ; b = a * 3 ; ? b :"])

The modules imported here import torch and transformers only when they are used, so `import hasten` costs next to nothing.
"""

from typing import TYPE_CHECKING, Any

import hasten.measure as _measuring  # noqa: F401  # the package first: the function below then keeps the name `hasten.measure`
from hasten.load import load
from hasten.recipe import Recipe
from hasten.usage import Usage
from hasten.values import Request, Result, Sampling, UserError

if TYPE_CHECKING:
    from hasten.measure.measure import measure
    from hasten.measure.pick import pick
else:

    def measure(recipes: Any, **options: Any) -> Any:
        """Measure recipes on a task; see `hasten.measure.measure.measure` for the options."""
        from hasten.measure.measure import measure as run

        return run(recipes, **options)

    def pick(source: Any = None, **options: Any) -> Any:
        """Measure combinations of techniques and pick the best within a budget; see `hasten.measure.pick.pick` for the options."""
        from hasten.measure.pick import pick as run

        return run(source, **options)


__version__ = "0.1.0"
__all__ = ["Recipe", "Request", "Result", "Sampling", "Usage", "UserError", "__version__", "load", "measure", "pick"]
