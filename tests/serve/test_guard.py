"""What stands before a server's routes: hosts, origins, keys, bodies; errors in each shape. No worker runs."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re

import pytest
from starlette.testclient import TestClient

from sdtrt.serve import application
from sdtrt.serve.catalog import Catalog
from sdtrt.serve.dispatch import Dispatcher
from sdtrt.serve.log import Log
from sdtrt.specs.serve import Limits, ServeSpec

KEY = "0123456789abcdef-key"
LIMITS = Limits(body_bytes=1000, body_s=0.05)


def application_of(tmp_path, log=None, **options):
    spec = ServeSpec(limits=LIMITS, **options)
    return application.build(Dispatcher(spec, Catalog.of(spec), tmp_path, Log(log or io.StringIO())))


@pytest.fixture
def client(tmp_path):
    return TestClient(application_of(tmp_path), "http://localhost:7860", raise_server_exceptions=False)


@pytest.fixture
def keyed(tmp_path):
    app = application_of(tmp_path, host="0.0.0.0", api_key=KEY)
    return TestClient(app, "http://some.where:7860", raise_server_exceptions=False)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "127.0.0.1:7860"}, 200),
        ({"host": "[::1]:7860"}, 200),
        ({"host": "evil.example"}, 421),
        ({"host": "127.0.0.1.evil.example"}, 421),
        ({"host": "localhost@evil.example"}, 421),
        ({"host": ""}, 421),
        ({"host": "[::1"}, 421),
        ({"origin": "http://localhost:7860"}, 200),
        ({"origin": "http://localhost:3000"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://["}, 403),
        ({"origin": "ftp://localhost:7860"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
    ],
)
def test_loopback_answers_to_its_own_names_and_to_no_page_elsewhere(client, headers, status):
    assert client.get("/v1/models", headers=headers).status_code == status


def test_pages_elsewhere_may_ask_where_they_are_named(tmp_path):
    app = application_of(tmp_path, origins=("https://mine.example",))
    client = TestClient(app, "http://localhost", raise_server_exceptions=False)
    allowed = client.get("/v1/models", headers={"origin": "https://mine.example"})
    assert allowed.headers["access-control-allow-origin"] == "https://mine.example"
    asked = {"origin": "https://mine.example", "access-control-request-method": "POST"}
    assert client.options("/api/v1/jobs", headers=asked).status_code == 200
    assert client.get("/v1/models", headers={"origin": "https://evil.example"}).status_code == 403


def test_without_cors_no_answer_lets_another_page_read_it(client):
    answer = client.get("/v1/models")
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")


def test_another_host_wants_the_key(keyed):
    basic = base64.b64encode(f"user:{KEY}".encode()).decode()
    for headers in ({"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}, {"authorization": f"Basic {basic}"}):
        assert keyed.get("/v1/models", headers=headers).status_code == 200
    wrong = ({}, {"authorization": "Bearer "}, {"x-api-key": KEY[:-1]}, {"authorization": "Basic !"})
    for headers in (*wrong, {"authorization": f"Bearer {KEY}ü".encode()}, {"x-api-key": KEY.encode() + b"\xff"}):
        for path in ("/v1/models", "/metrics", "/openapi.json", "/docs", "/api/v1/capabilities", "/nowhere"):
            assert keyed.get(path, headers=headers).status_code == 401
    assert (keyed.get("/healthz").text, keyed.get("/readyz").status_code) == ("ok", 503)


def test_a_body_has_an_end(client):
    large = b"x" * 1001
    for content in (large, iter([large])):  # with a length, and in chunks
        answer = client.post("/api/v1/jobs", content=content)
        assert answer.status_code == 413
        assert answer.json()["error"]["kind"] == "BodyTooLarge"
    for length in ("-1", "1e3", "²", "99999999999999999999"):
        answer = client.post("/api/v1/jobs", content=b"{}", headers={"content-length": length.encode("latin-1")})
        assert answer.status_code == 413


def test_a_slow_body_is_waited_for_no_longer_than_it_may(tmp_path):
    app, sent = application_of(tmp_path), []

    async def receive():
        await asyncio.sleep(0.03)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"localhost")]
    scope = {"type": "http", "method": "POST", "path": "/v1/images/generations", "headers": headers, "state": {}}
    asyncio.run(app({**scope, "query_string": b"", "client": ("1.2.3.4", 5)}, receive, send))
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["error"]["code"] == "BodyTooSlow"


def test_each_interface_tells_errors_in_its_own_shape(client):
    own = client.post("/api/v1/jobs", json={}).json()["error"]
    assert own == {"kind": "Malformed", "message": "prompt: Field required", "hint": "/docs says what it has to be"}
    openai = client.post("/v1/images/generations", content=b"{").json()["error"]
    assert (openai["type"], openai["code"], openai["param"]) == ("invalid_request_error", "Malformed", None)
    web_ui = client.post("/sdapi/v1/img2img", json={"init_images": []}).json()
    assert (web_ui["error"], web_ui["detail"]) == ("UsageError", "one picture is changed at a time, got 0")
    assert client.get("/nowhere").json()["error"]["kind"] == "NoRoute"
    assert client.delete("/v1/models").status_code == 405


@pytest.mark.parametrize(
    "path",
    ["/api/v1/images/..%2f..%2fetc%2fpasswd", "/api/v1/images/%00.png", "/v1/models/../../etc/passwd", "//etc/passwd"],
)
def test_no_path_of_the_disk_is_served(client, path):
    answer = client.get(path)
    assert answer.status_code == 404
    assert "root:" not in answer.text


def test_what_is_not_there_yet_is_said(client):
    assert client.get("/readyz").text == "not ready"
    answer = client.post("/api/v1/tokens", json={"texts": ["x"]})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


def test_the_page_of_the_api_loads_nothing_from_elsewhere(client):
    page = client.get("/docs")
    assert "/api/v1/jobs/{job_id}/events" in page.text
    assert not re.search(r"(src|href)=.https?:|<script", page.text)
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/images/edits", "/sdapi/v1/txt2img", "/healthz"} < paths.keys()


def test_the_log_has_a_line_of_json_for_each_request_and_no_prompt(tmp_path):
    log = io.StringIO()
    client = TestClient(application_of(tmp_path, log), "http://localhost", raise_server_exceptions=False)
    client.post("/api/v1/jobs", json={"prompt": "a secret", "steps": 0}, headers={"x-request-id": "mine-1"})
    answer = client.get("/healthz", headers={"x-request-id": "two\tlines"})
    first, second = (json.loads(line) for line in log.getvalue().splitlines())
    assert (first["request_id"], first["status"], first["path"]) == ("mine-1", 400, "/api/v1/jobs")
    assert second["request_id"] == answer.headers["x-request-id"] != "two\tlines"
    assert "secret" not in log.getvalue()


def test_a_bug_is_told_without_its_traceback(tmp_path, monkeypatch):
    log = io.StringIO()
    app = application_of(tmp_path, log)
    monkeypatch.setattr(Dispatcher, "submit", lambda *_: 1 // 0)
    client = TestClient(app, "http://localhost", raise_server_exceptions=False)
    answer = client.post("/v1/images/generations", json={"prompt": "x"})
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "division" not in answer.text
    assert "ZeroDivisionError" in log.getvalue()
