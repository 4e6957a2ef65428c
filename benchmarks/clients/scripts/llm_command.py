"""llm

Prompt, system prompt, options, schema, a conversation continued, streamed and not.
extra-openai-models.yaml: {model_id: nanochat, model_name: nanochat-d20-sft, api_base: "http://127.0.0.1:8000/v1"}
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as folder:
    entry = {
        "model_id": "nanochat",
        "model_name": os.environ["NANOCHAT_MODEL"],
        "api_base": os.environ["NANOCHAT_URL"] + "/v1",
        "supports_schema": True,
    }
    Path(folder, "extra-openai-models.yaml").write_text(json.dumps([entry]))

    def llm(*arguments: str) -> str:
        command = [str(Path(sys.executable).parent / "llm"), *arguments]
        environment = {**os.environ, "LLM_USER_PATH": folder}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert llm("-m", "nanochat", "Who are you?")
    assert llm("-m", "nanochat", "-s", "Answer briefly.", "-o", "temperature", "0", "Who are you?", "--no-stream")
    assert llm("-c", "And again?")
    json.loads(llm("-m", "nanochat", "--schema", "name, age int", "-o", "max_tokens", "200", "A dog"))
