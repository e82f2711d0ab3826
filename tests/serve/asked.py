"""What tests of the server ask it, and how they look at its pictures."""

from __future__ import annotations

import io

import numpy as np
import requests
from PIL import Image


def job_over(server, body, seconds=120):
    """A job that is over: its events have ended."""
    answer = requests.post(f"{server.url}/api/v1/jobs", json=body, timeout=30)
    assert answer.status_code == 202, answer.text
    place = server.url + answer.headers["location"]
    with requests.get(f"{place}/events", stream=True, timeout=seconds) as stream:
        list(stream.iter_lines())
    return requests.get(place, timeout=30).json()


def pixels(data):
    """A picture's pixels `[H,W,3]`, as numbers that can be subtracted."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
