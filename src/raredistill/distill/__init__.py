"""Distillers: one file per family, each method a small class over a pure function."""

from raredistill.distill.consistent import pckd
from raredistill.distill.contract import Facts, Method, Shape
from raredistill.distill.features import attention_transfer, contrastive, cosine_distance, hint, relational
from raredistill.distill.imbalance import ltkd, two_heads, xerm
from raredistill.distill.logits import bkd, dist, dive, dkd, kd, standardised_kd
from raredistill.outputs import Outputs

__all__ = [
    "Facts", "Method", "Outputs", "Shape",
    "attention_transfer", "bkd", "contrastive", "cosine_distance", "dist", "dive", "dkd", "hint", "kd", "ltkd", "pckd", "relational",
    "standardised_kd", "two_heads", "xerm",
]  # fmt: skip
