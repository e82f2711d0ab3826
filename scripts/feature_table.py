"""Write the table of features in docs/features.md from what the tests say of themselves.

    python scripts/feature_table.py            # rewrite the table
    python scripts/feature_table.py --check    # exit 1 where the page and the tests disagree

A test says which cells of the table it proves by a mark, with words that this script reads without running anything:

    @pytest.mark.feature("ControlNet", "sd1 sdxl", "onnxruntime")
    @pytest.mark.feature("ControlNet", "sd1 sd2 sdxl", "tensorrt86", error="no engine whose unet has inputs for")
    @pytest.mark.feature("FreeU", "sd1", "onnxruntime", pytorch="FreeU")

The first one says that it works. `error` says that it is refused, and with which words; `pytorch` that PyTorch runs it,
and what is said of that. Those words stand in the test, too, which is how it finds them: a mark alone proves nothing.
The mark may be of a function, of a case (`marks=` of one) or of a file (`pytestmark`).

To add a feature: a line in `FEATURES`, a mark at each test that proves a cell of it, and this script.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path("docs") / "features.md"
BLOCK = re.compile(r"(<!-- features -->\n).*?(<!-- /features -->)", re.DOTALL)
KINDS = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "XL"}
BACKENDS = {
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "inductor": "Inductor",
    "tensorrt": "TensorRT 10, 11",
    "tensorrt86": "TensorRT 8.6",
}
# What people ask for, in the order of the table.
FEATURES = (
    "Text to image",
    "Image to image",
    "Inpainting",
    "Inpainting models (9 channels)",
    "ControlNet",
    "ControlNet, several",
    "ControlNet, `--controlnet`",
    "ControlNet unions (in PyTorch, beside an engine)",
    "T2I-Adapter",
    "T2I-Adapter, `--t2i-adapter`",
    "IP-Adapter, on a live pipeline",
    "IP-Adapter, `--ip-adapter`",
    "IP-Adapter for faces (FaceID), `--ip-embeds`",
    "IP-Adapter, masks (`ip_adapter_masks`)",
    "Edits by instruct-pix2pix models (`--edit`)",
    "LoRA, on a live pipeline",
    "LoRA, `--lora`",
    "Textual inversion",
    "Weighted and long prompts (`--prompt-syntax webui`)",
    "`clip_skip`",
    "SDXL's size, crop and score conditioning",
    "SDXL's refiner, on live pipelines",
    "SDXL's refiner, `--refiner`",
    "A second, larger pass (`--upscale`)",
    "Latent consistency models",
    "Without guidance: one row an image (Turbo, Lightning)",
    "Guidance in a part of a run (`guidance_interval`)",
    "Schedulers by diffusers' and web UIs' names, sigmas, eta",
    "Calls: batches, embeddings, callbacks, `interrupt`",
    "`encode_prompt` apart, in a pipeline without a UNet",
    "Saving and loading, `from_pipe`",
    "A picture anew (`--from FILE`)",
    "Deep caching (`cache_interval`, `--cache-interval`)",
    "VAE tiling and slicing",
    "`--vae-tiling` (tiles in PyTorch)",
    "VAEs of other classes and factors",
    "Tiny VAEs",
    "Previews (`preview`, `--preview`)",
    "FreeU (`enable_freeu`)",
    "Fused projections (`fuse_qkv_projections`)",
    "Attention processors (`set_attn_processor`, slicing)",
    "Hooks on layers",
    "Changed weights",
    "Another dtype (`.to(torch.bfloat16)`)",
    "Layerwise casting",
    "Offloading (by group, model, layer)",
    "Arguments that engines have no input for",
    "Gradients",
)
ERROR, PYTORCH = "error", "pytorch"


class Wrong(Exception):  # noqa: N818 (the word is the error)
    """A mark that says nothing which this script understands; its text says where."""


@dataclass(frozen=True)
class Mark:
    """What a test says that it proves.

    Args:
        place: file and line.
        outcome: None where it works; else `error` or `pytorch`.
        words: of the error, or of what is said where PyTorch runs it.
    """

    place: str
    feature: str
    kinds: tuple[str, ...]
    backends: tuple[str, ...]
    outcome: str | None = None
    words: str = ""


def read_marks(tests: Path) -> list[Mark]:
    """All marks of all tests. Raises `Wrong` for one that can't be."""
    found: list[Mark] = []
    for path in sorted(tests.rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if "mark.feature(" in text:
            own = [_read(call, f"{path.name}:{call.lineno}") for call in _calls(ast.parse(text))]
            _check_words(own, text)
            found += own
    return found


def _check_words(marks: Sequence[Mark], text: str) -> None:
    """Raise `Wrong` where a file has no words that its marks say it looks for, but in the marks themselves."""
    claims = Counter(mark.words for mark in marks if mark.words)
    for words, count in claims.items():
        if text.count(words) <= count:
            place = next(mark.place for mark in marks if mark.words == words)
            raise Wrong(f"{place}: no test in this file looks for {words!r}")


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.feature":
            yield node


def _read(call: ast.Call, place: str) -> Mark:
    try:
        feature, kinds, backends = (ast.literal_eval(one) for one in call.args)
        outcomes = {str(one.arg): ast.literal_eval(one.value) for one in call.keywords}
    except ValueError as error:
        raise Wrong(f"{place}: a feature takes its name, kinds and backends, as plain strings") from error
    mark = Mark(place, feature, tuple(kinds.split()), tuple(backends.split()), *next(iter(outcomes.items()), ()))
    for what, own, known in (
        ("feature", (feature,), FEATURES),
        ("kind", mark.kinds, KINDS),
        ("backend", mark.backends, BACKENDS),
        ("outcome", tuple(outcomes), (ERROR, PYTORCH)),
    ):
        if unknown := [one for one in own if one not in known]:
            raise Wrong(f"{place}: unknown {what} {unknown[0]!r}; known: {', '.join(known)}")
    return mark


def table(marks: Iterable[Mark]) -> str:
    """The Markdown table, and what the numbers in it stand for."""
    notes: list[str] = []
    cells: dict[tuple[str, str], list[Mark]] = defaultdict(list)
    for mark in marks:
        for backend in mark.backends:
            cells[mark.feature, backend].append(mark)
    lines = [["feature", *BACKENDS.values()], ["---"] * (1 + len(BACKENDS))]
    for feature in FEATURES:
        lines.append([feature, *(_cell(cells[feature, backend], notes) for backend in BACKENDS)])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text + "\n" * bool(notes) + "".join(f"{number}. {note}\n" for number, note in enumerate(notes, 1))


def _cell(marks: Sequence[Mark], notes: list[str]) -> str:
    """What is known of a feature in a backend: the kinds of models by what happens, with the number of a note."""
    outcomes: Mapping[tuple[str | None, str], set[str]] = defaultdict(set)
    for mark in marks:
        outcomes[mark.outcome, mark.words].update(mark.kinds)
    words = []
    for (outcome, said), kinds in sorted(outcomes.items(), key=lambda one: (one[0][0] or "", one[0][1])):
        names = ", ".join(name for kind, name in KINDS.items() if kind in kinds)
        if outcome is None:
            words.append(f"works: {names}")
            continue
        note = f"{'An error' if outcome == ERROR else 'PyTorch runs it'}: `{said}`."
        if note not in notes:
            notes.append(note)
        mark_of = "refused" if outcome == ERROR else "PyTorch"
        words.append(f"{mark_of}: {names} ({notes.index(note) + 1})")
    return "; ".join(words) or "–"


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the page's table, or check it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where the page is out of date")
    parser.add_argument("--root", type=Path, default=ROOT)
    options = parser.parse_args(arguments)
    page = options.root / PAGE
    before = page.read_text(encoding="utf-8")
    try:
        marks = read_marks(options.root / "tests")
    except Wrong as error:
        print(error, file=sys.stderr)
        return 1
    if unproven := [one for one in FEATURES if one not in {mark.feature for mark in marks}]:
        print(f"no test proves {', '.join(unproven)}", file=sys.stderr)
        return 1
    after = BLOCK.sub(lambda found: f"{found[1]}\n{table(marks)}\n{found[2]}", before)
    if options.check and before != after:
        print(f"{PAGE} is not what the tests say: run python scripts/feature_table.py", file=sys.stderr)
        return 1
    if before != after:
        page.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
