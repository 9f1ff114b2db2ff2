"""Raw data becomes one cohort on disk."""
