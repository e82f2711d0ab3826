"""The README's program does what the page says, as it stands there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]


def program_of(section: str) -> str:
    """The first Python block of a section of the README."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    _, title, rest = text.partition(f"\n## {section}\n")
    assert title, f"README.md has no section {section!r}"
    _, fence, block = rest.partition("\n## ")[0].partition("```python\n")
    assert fence, f"{section!r} has no Python block"
    return block.partition("```")[0]


def test_the_program_makes_an_image(tmp_path, engine_dir):
    """Its engines are those of the working folder: here the tests' shared ones."""
    engine_dir.mkdir(exist_ok=True)
    (tmp_path / "engines").symlink_to(engine_dir)
    program = program_of("In a program") + 'image.save("image.png")\n'
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert Image.open(tmp_path / "image.png").size == (128, 128)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engines", "image.png"]
