"""guidellm: a benchmark at two rates, by both APIs."""

import json
import os
import subprocess
from pathlib import Path
from sysconfig import get_path

import pytest

from tests.clients.job import MODEL, MODEL_FOLDER, URL

NUM_REQUESTS, NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS = 6, 64, 16


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_every_request_of_a_benchmark_is_answered_in_full(tmp_path: Path, path: str) -> None:
    report = tmp_path / "report.json"
    options = {
        "backend": f"kind=openai_http,target={URL},model={MODEL},request_format={path}",
        "tokenizer": f"kind=huggingface_auto,model={MODEL_FOLDER}",
        "data": f"kind=synthetic_text,prompt_tokens={NUM_PROMPT_TOKENS},"
        f"output_tokens={NUM_OUTPUT_TOKENS}",
        "constraint": f"kind=max_requests,count={NUM_REQUESTS}",
        "profile": "kind=concurrent,streams=2",
        "output": f"kind=json,path={report}",
    }
    command = [word for key, value in options.items() for word in (f"--{key}", value)]
    subprocess.run(
        [f"{get_path('scripts')}/guidellm", "run", *command, "--disable-console-interactive"],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=True,
    )

    [benchmark] = json.loads(report.read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert (requests["errored"], requests["incomplete"]) == ([], [])
    lengths = [request["output_tokens"] for request in requests["successful"]]
    assert set(lengths) == {NUM_OUTPUT_TOKENS}
    assert len(lengths) >= NUM_REQUESTS - 1  # on a busy machine guidellm may start one less
