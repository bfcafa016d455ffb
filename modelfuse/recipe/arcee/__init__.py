"""mergekit's configurations, parsed to the method, models and parameters of each tensor."""
