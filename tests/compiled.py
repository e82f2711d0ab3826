"""Packages of PyTorch's Inductor, each compiled once in a test run, whichever test and process wants it first.

They are real ones, by the key of the engine that is built: with the same key, the compiler would make the same.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from exports import made_once
from filelock import FileLock

from sdtrt.backends.inductor import build

PROBING = "from torch._inductor.cpu_vec_isa import valid_vec_isa_list as probe; assert probe()"


@contextmanager
def probed_once(shared):
    """Within, builds find what the compiler can do of this processor's instructions, which each finds out anew else.

    That are six small compilations, whose results PyTorch looks for in its cache; a build has an empty one of its own.
    """
    private = build._environment

    def environment(work: Path) -> dict[str, str]:
        given = private(work)
        cache = "TORCHINDUCTOR_CACHE_DIR"

        def probe(draft: Path) -> None:
            subprocess.run([sys.executable, "-c", PROBING], env={**given, cache: str(draft)}, check=True)

        found = made_once(shared / "instructions", probe)
        shutil.copytree(found, given[cache], ignore=shutil.ignore_patterns("locks"))
        return given

    with mock.patch.object(build, "_environment", environment):
        yield


@contextmanager
def compiled_once(shared):
    """Within, a build of a key that any test's build had takes the package that this has made, and what it measured.

    Live pipelines' are apart from files': their packages are the same, and are checked with other weights.
    """
    compiled = build.build_package
    (shared / "packages").mkdir(exist_ok=True)

    def once(request, console):
        digest = request.folder.name.split("-")[0]
        assert len(digest) == 64, "the name of a draft begins with the digest of its key"
        kept = shared / "packages" / f"{digest}-{'files' if request.blueprint is None else 'live'}"
        with FileLock(f"{kept}.lock"):
            if kept.is_dir():
                shutil.copytree(kept / "files", request.folder, dirs_exist_ok=True)
                return json.loads((kept / "found.json").read_text())
            found = compiled(request, console)
            draft = kept.with_suffix(".draft")
            shutil.copytree(request.folder, draft / "files")
            (draft / "found.json").write_text(json.dumps(found))
            draft.rename(kept)
        return found

    with probed_once(shared), mock.patch.object(build, "build_package", once):
        yield
