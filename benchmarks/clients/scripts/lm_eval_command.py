"""lm-eval[api] transformers

Multiple choice with local-completions, text with local-chat-completions. NANOCHAT_EXPORT: hf_prepare.sh's folder.
--model local-completions --model_args base_url=http://127.0.0.1:8000/v1/completions,model=nanochat-d20-sft,tokenizer=...
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

url, model, export = (os.environ[name] for name in ("NANOCHAT_URL", "NANOCHAT_MODEL", "NANOCHAT_EXPORT"))
TASKS = {
    "choices": {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc"}]},
    "texts": {
        "output_type": "generate_until",
        "generation_kwargs": {"max_gen_toks": 10, "until": ["\n"]},
        "metric_list": [{"metric": "exact_match"}],
    },
}

with tempfile.TemporaryDirectory() as folder:
    documents = Path(folder, "documents.jsonl")
    words = ["sun", "sea", "cat", "tree"]
    rows = [
        {"question": f"The {word} is", "choices": ["hot", "wet and salty"], "answer": i % 2}
        for i, word in enumerate(words)
    ]
    documents.write_text("\n".join(map(json.dumps, rows)))
    shared = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(documents)}}, "test_split": "test"}
    for name, task in TASKS.items():
        target = "answer" if name == "choices" else "{{choices[0]}}"
        fields = {"task": name, **shared, "doc_to_text": "{{question}}", "doc_to_target": target, **task}
        Path(folder, f"{name}.yaml").write_text(json.dumps(fields))  # JSON is YAML

    def lm_eval(task: str, kind: str, path: str, *more: str) -> list[dict]:
        command = [str(Path(sys.executable).parent / "lm-eval"), "run", "--model", kind, "--tasks", task]
        command += ["--include_path", folder, "--log_samples", "--output_path", folder, *more]
        command += ["--model_args", f"base_url={url}{path},model={model},tokenizer={export},num_concurrent=4"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none", "HF_DATASETS_CACHE": folder}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
        (samples,) = Path(folder).rglob(f"samples_{task}_*.jsonl")
        return [json.loads(line) for line in samples.read_text().splitlines()]

    scored = lm_eval("choices", "local-completions", "/v1/completions")
    scores = [float(response[0][0]) for sample in scored for response in sample["resps"]]
    assert len(scores) == 8 and len(set(scores)) > 4 and all(score < 0 for score in scores), scores
    written = lm_eval("texts", "local-chat-completions", "/v1/chat/completions", "--apply_chat_template")
    assert all(sample["resps"][0][0] for sample in written)
