"""guidellm

Twelve requests, two at a time, through chat completions.
guidellm run --backend kind=openai_http,target=http://127.0.0.1:8000 --profile kind=concurrent,streams=2 --data ...
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as folder:
    prompts = Path(folder, "prompts.json")
    prompts.write_text(json.dumps([{"prompt": f"What is {i} plus {i}?"} for i in range(12)]))
    command = [str(Path(sys.executable).parent / "guidellm"), "run", "--disable-console-interactive"]
    command += [
        "--backend",
        f"kind=openai_http,target={os.environ['NANOCHAT_URL']},model={os.environ['NANOCHAT_MODEL']}",
    ]
    command += ["--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=12"]
    command += ["--data", f"kind=json_file,path={prompts}", "--output", f"kind=json,path={folder}/report.json"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    report = json.loads(Path(folder, "report.json").read_text())
    totals = report["benchmarks"][0]["metrics"]["request_totals"]
    assert totals["successful"] == 12 and not totals["errored"], totals
