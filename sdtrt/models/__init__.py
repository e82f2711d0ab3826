"""From a name to a model: its configuration, its components and their weights."""
