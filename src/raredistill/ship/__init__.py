"""From a study to a network that is used: predict, refit, export."""
