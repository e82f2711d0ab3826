"""The page's files: their headers, what is in them and what may not be, and the route that reads a picture's settings.

No browser and no worker runs.
"""

from __future__ import annotations

import base64
import io
import json
import re
import tomllib
from fnmatch import fnmatch
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin
from starlette.testclient import TestClient

from sdtrt.serve import application, page_files
from sdtrt.serve.catalog import Catalog
from sdtrt.serve.dispatch import Dispatcher
from sdtrt.serve.log import Log
from sdtrt.specs import ModelSpec
from sdtrt.specs.serve import ServeSpec

KEY = "0123456789abcdef-key"
REPOSITORY = Path(__file__).resolve().parents[2]
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in page_files.FOLDER.iterdir()}
SCRIPTS = {name: text for name, text in TEXTS.items() if name.endswith(".js")}
HTML = TEXTS["index.html"]
MOST_BYTES = 100_000  # of the whole page
FIELDS = ("input", "select", "textarea")
CONTRAST, EDGE_CONTRAST = 4.5, 3.0  # WCAG 2.2: of text, and of what shows where a field is


def client_of(tmp_path, **options):
    spec = ServeSpec(models=(ModelSpec(), ModelSpec("owner/other")), loras=("owner/style",), **options)
    app = application.build(Dispatcher(spec, Catalog.of(spec), tmp_path, Log(io.StringIO())))
    return TestClient(app, "http://localhost:7860", raise_server_exceptions=False)


@pytest.fixture
def client(tmp_path):
    return client_of(tmp_path)


class Tags(HTMLParser):
    """The page's tags: each its name, its attributes, and the labels that it is in."""

    def __init__(self, text):
        super().__init__()
        self.found, self.labels = [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.labels += tag == "label"
        self.found.append((tag, dict(attributes), self.labels > 0))

    def handle_endtag(self, tag):
        self.labels -= tag == "label"


TAGS = Tags(HTML).found


def test_the_page_has_a_strict_policy_and_so_have_its_parts(client):
    for path in page_files.PATHS:
        answer = client.get(path)
        assert answer.status_code == 200
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["require-trusted-types-for"] == "'script'"
        assert (policy["frame-ancestors"], answer.headers["x-frame-options"]) == ("'none'", "DENY")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-opener-policy"] == "same-origin"
        assert answer.headers["content-type"].startswith(page_files.TYPES[Path(path).suffix or ".html"].split(";")[0])


def test_a_browser_keeps_the_files_and_asks_for_new_ones(client):
    first = client.get("/page/app.js")
    again = client.get("/page/app.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/page/app.js", headers={"if-none-match": '"other"'}).content == first.content
    for path in ("/page/", "/page/index.html", "/page/../native.py", "/page/%2e%2e/native.py", "/page/nothing.js"):
        assert client.get(path).status_code == 404


def test_the_page_comes_without_the_key_and_nothing_else_does(tmp_path):
    client = client_of(tmp_path, api_key=KEY)
    assert [client.get(path).status_code for path in page_files.PATHS] == [200] * len(page_files.PATHS)
    assert client.get("/api/v1/capabilities").status_code == 401
    assert client.post("/api/v1/settings", json={"image": ""}).status_code == 401
    assert client.get("/page/nothing.js").status_code == 401
    assert KEY not in "".join(TEXTS.values())


def test_a_page_elsewhere_may_lead_here_and_may_not_load_its_parts(client):
    elsewhere = {"sec-fetch-site": "cross-site"}
    assert client.get("/", headers=elsewhere).status_code == 200
    assert client.get("/page/app.js", headers=elsewhere).status_code == 403


def test_all_files_are_served_and_are_in_the_package():
    assert sorted(TEXTS) == sorted((page_files.FIRST, *page_files.PARTS))
    patterns = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["sdtrt"]
    assert all(any(fnmatch(f"serve/page/{name}", one) for one in patterns) for name in TEXTS)
    assert sum(map(len, TEXTS.values())) < MOST_BYTES


def test_nothing_in_the_page_is_inline_or_comes_from_elsewhere():
    for tag, attributes, _ in TAGS:
        assert not [name for name in attributes if name == "style" or name.startswith("on")]
        assert tag != "style"
        assert tag != "script" or "src" in attributes
        for name in ("src", "href"):
            assert attributes.get(name, "/").startswith(("/page/", "/docs", "#", "/")), attributes
            assert not attributes.get(name, "").startswith("//")
    for name, text in TEXTS.items():
        found = re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"]*", text)
        assert set(found) <= {"http://www.w3.org/2000/svg"}, name
    for text in SCRIPTS.values():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|\beval\b|document\.write|cssText", text)


def test_every_field_has_a_name():
    named = {attributes.get("for") for tag, attributes, _ in TAGS if tag == "label"}
    for tag, attributes, is_in_label in TAGS:
        if tag in FIELDS:
            assert is_in_label or attributes.get("id") in named or attributes.get("aria-label"), attributes
        if tag == "img":
            assert "alt" in attributes


def test_ids_are_there_once_and_those_of_the_scripts_are_there():
    ids = [attributes["id"] for _, attributes, _ in TAGS if "id" in attributes]
    assert len(ids) == len(set(ids))
    asked = {name for text in SCRIPTS.values() for name in re.findall(r"\$\(\"([\w-]+)\"\)", text)}
    assert asked <= set(ids)
    for tag, attributes, _ in TAGS:
        for name in ("for", "aria-describedby", "aria-labelledby"):
            assert tag == "output" or set(attributes.get(name, "").split()) <= set(ids), attributes


def test_every_module_is_loaded_ahead():
    loaded = {attributes["href"] for tag, attributes, _ in TAGS if attributes.get("rel") == "modulepreload"}
    asked = {f"/page/{name}" for text in SCRIPTS.values() for name in re.findall(r"from \"\./([\w.]+)\"", text)}
    assert loaded == asked


def luminance(colour):
    """Relative luminance (WCAG 2.2) of #rgb or #rrggbb."""
    digits = "".join(2 * one for one in colour[1:]) if len(colour) == 4 else colour[1:]
    levels = [int(first + second, 16) / 255 for first, second in zip(digits[::2], digits[1::2], strict=True)]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in levels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_words_stand_out_from_what_is_behind_them(theme):
    found = re.findall(r":root \{(.*?)\}", TEXTS["page.css"], re.S)[theme]
    colours = dict(re.findall(r"--([\w-]+): (#\w{3,6});", found))
    pairs = [(words, behind) for words in ("text", "soft") for behind in ("back", "panel", "well")]
    pairs += [("on-accent", "accent"), ("accent", "accent-soft"), ("accent", "panel"), ("bad", "bad-soft")]
    edges = [("edge", "panel"), ("accent", "back"), ("bad", "panel")]
    for most, some in ((CONTRAST, pairs), (EDGE_CONTRAST, edges)):
        for one, other in some:
            dark, light = sorted((luminance(colours[one]), luminance(colours[other])))
            assert (light + 0.05) / (dark + 0.05) >= most, (one, other)


# Settings ------------------------------------------------------------------------------------------------------------


def picture(parameters=None, details=None):
    """A PNG with texts, as base64."""
    info, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    if parameters is not None:
        info.add_text("parameters", parameters)
    if details is not None:
        info.add_text("sdtrt", json.dumps(details))
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=info)
    return base64.b64encode(buffer.getvalue()).decode()


def settings(client, image):
    answer = client.post("/api/v1/settings", json={"image": image})
    assert answer.status_code == 200, answer.text
    return answer.json()["settings"], answer.json()["left"]


def test_our_own_text_is_read_in_the_words_of_a_job(client):
    details = {
        "prompt": "a star", "negative_prompt": "blue", "seed": 2**53 + 1, "width": 64, "height": 72, "steps": 9,
        "guidance_scale": 5.5, "scheduler": {"name": "euler"}, "noise": {"sigmas": "karras"}, "strength": None,
        "quality": "fast", "edit": True, "clip_skip": "many",
        "model": {"name": "/srv/models/tiny.safetensors", "loras": [{"name": "style", "weight": 0.5}, {"name": "x"}]},
        "controlnets": [{"name": "/srv/secret/edges"}],
    }  # fmt: skip
    found, left = settings(client, picture("a star", details))
    loras = found.pop("loras", None)
    assert found == {
        "prompt": "a star", "negative_prompt": "blue", "seed": 2**53 + 1, "width": 64, "height": 72, "steps": 9,
        "guidance_scale": 5.5, "scheduler": "euler", "sigmas": "karras", "quality": "fast", "edit": True,
        "model": "tiny",
    }  # fmt: skip
    assert loras is None
    assert left == [
        "LoRA style: this server has no such LoRA", "LoRA x: this server has no such LoRA", "controlnets: give it again"
    ]  # fmt: skip


def test_a_web_uis_text_is_read_in_the_words_of_a_job(client):
    text = (
        "a (red:1.2) <lora:owner/style:0.7> star\nNegative prompt: blue\n"
        "Steps: 12, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 4, Size: 512x768, "
        "Model: elsewhere, Denoising strength: 0.6, Hires upscale: 2"
    )
    found, left = settings(client, picture(text))
    assert found == {
        "prompt": "a (red:1.2)  star", "negative_prompt": "blue", "prompt_syntax": "webui", "steps": 12,
        "guidance_scale": 6.5, "seed": 4, "strength": 0.6, "width": 512, "height": 768, "scheduler": "dpm++",
        "sigmas": "karras", "loras": [{"name": "owner/style", "weight": 0.7}],
    }  # fmt: skip
    assert left == ["Hires upscale: 2", "model elsewhere: this server has no such model"]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (picture(), "carries no text that says how it was made"),
        (picture("just words"), "text has no settings"),
        ("no base64!", "image is no base64"),
        (base64.b64encode(b"GIF89a").decode(), "image"),
        (picture("x, Steps: 1")[:-40], "image"),
    ],
    ids=["silent", "words", "no base64", "no picture", "cut"],
)
def test_what_says_nothing_is_refused_in_words(client, image, message):
    answer = client.post("/api/v1/settings", json={"image": image})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["hint"]


def test_odd_values_in_a_text_are_no_fault_of_the_servers(client):
    odd = [{"model": 3}, {"model": {"loras": 3, "name": ["x"]}}, {"seed": True}, {"scheduler": "x"}, {"prompt": None}]
    odd += [{"steps": 1e400}, {"model": {"loras": [3, {"name": "owner/style", "weight": "x"}]}}]
    for details in odd:
        found, _ = settings(client, picture("x", details))
        assert found in ({}, {"model": "tiny"})
    found, _ = settings(client, picture("x\nSteps: many, CFG scale: nan, Seed: 1e9, Size: 1x, Sampler: None"))
    assert found == {"prompt": "x", "negative_prompt": "", "prompt_syntax": "webui"}


def test_headings_and_fields_come_in_the_order_in_which_they_are_read():
    assert not [attributes for _, attributes, _ in TAGS if int(attributes.get("tabindex", "0")) > 0]
    levels = [int(tag[1]) for tag, _, _ in TAGS if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(below - above <= 1 for above, below in pairwise(levels))
