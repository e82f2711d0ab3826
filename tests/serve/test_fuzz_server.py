"""All routes of a server under schemathesis: nothing that comes in is a fault of the server's.

A minute by default; `SDTRT_FUZZ_SECONDS` says how long.
"""

from __future__ import annotations

import json
import os
import time

import pytest
import requests

pytestmark = pytest.mark.slow
SECONDS = float(os.environ.get("SDTRT_FUZZ_SECONDS", "50"))
ROUNDS = 100_000  # more than there is time for
EXAMPLES = 5  # of a route, in a round


@pytest.mark.timeout(SECONDS + 240)
def test_nothing_that_comes_in_is_a_fault_of_the_servers(serving):
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis import GenerationMode

    schema = schemathesis.openapi.from_url(f"{serving.url}/openapi.json")
    operations = sorted((one.ok() for one in schema.get_all_operations()), key=lambda one: one.method != "post")
    until, answers = time.monotonic() + SECONDS, []

    def send(case):
        if time.monotonic() > until:
            return
        with requests.Session() as session:
            session.mount("http://", requests.adapters.HTTPAdapter(max_retries=0))
            answer = case.call(
                base_url=serving.url, session=session, timeout=180
            )  # a picture takes long on a busy machine
        assert answer.status_code != 500, case.as_curl_command()
        if answer.status_code >= 400:
            assert json.loads(answer.content)
        answers.append((case.operation.label, answer.status_code))

    quiet = settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    for number in range(ROUNDS):
        for operation in operations:
            if time.monotonic() > until:
                break
            mode = list(GenerationMode)[number % 2]
            try:
                quiet(given(operation.as_strategy(generation_mode=mode))(send))()
            except Exception as error:  # a route without parameters has nothing wrong to send
                if "Unsatisfiable" not in type(error).__name__:
                    raise
        if time.monotonic() > until:
            break
    assert [line for line in serving.lines() if '"bug"' in line] == []
    assert {label for label, _ in answers} >= {one.label for one in operations if one.method == "post"}
    assert requests.get(f"{serving.url}/readyz", timeout=30).text == "ready"
    print(f"{len(answers)} requests; statuses {sorted({status for _, status in answers})}")
