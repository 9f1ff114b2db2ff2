"""Preparation of raw data as one cohort on disk."""
