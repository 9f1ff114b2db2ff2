"""Distillers: one file per family, each method a small class over a pure function."""

from raredistill.distill.logits import bkd, dist, dive, dkd, kd

__all__ = ["bkd", "dist", "dive", "dkd", "kd"]
