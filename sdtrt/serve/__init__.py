"""A warm server: jobs, one queue, workers that hold engines, and the HTTP interfaces that existing clients speak.

`server.run` starts it. Nothing is imported here: FastAPI is an extra, and torch is for the workers alone.
"""
