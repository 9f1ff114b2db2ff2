"""From a study to a network in use: predict, refit, export."""
