"""Pipelines that a user has: engines in the place of what their modules compute, found, watched and taken out."""
