"""The engine directory: entries, their keys, how they are published, trusted and pruned. It knows no backend."""
