"""hasten: what every inference-acceleration technique is worth on your model and machine, the best combination for a budget, and its service.

    lm = hasten.load("zoo:arith-m +ngram +vote(n=8)")
    [result] = lm.generate(["a = 7 ; b = a * 3 ; ? b :"])

The modules imported here import torch and transformers only when they are used, so `import hasten` costs next to nothing.
"""

from hasten.load import load
from hasten.recipe import Recipe
from hasten.usage import Usage
from hasten.values import Request, Result, Sampling, UserError

__version__ = "0.1.0"
__all__ = ["Recipe", "Request", "Result", "Sampling", "Usage", "UserError", "__version__", "load"]
