"""What training takes before anything is loaded: the recipe's own code, run on tensors that have shapes only."""

from .plan import RESPONSE_SHARE, Plan, advice, make_plans, parse_memory
from .shapes import shape_model

__all__ = ["RESPONSE_SHARE", "Plan", "advice", "make_plans", "parse_memory", "shape_model"]
