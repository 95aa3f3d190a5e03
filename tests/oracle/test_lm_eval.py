"""lm-eval's harness and transformers' pipeline score and write with the split model as with the uncut one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import pipeline

from isthmus.silo.join import load_tokenizer
from tests.oracle.conftest import BuildTwins
from tests.oracle.twins import Twins

pytestmark = pytest.mark.filterwarnings("ignore")
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "perplexity": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "writing": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["w9"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture
def twins(twins_of: BuildTwins) -> Twins:
    return twins_of("llama", (2, 1))


def write_tasks(folder: Path) -> None:
    def words(start: int, count: int) -> str:
        return " ".join(f"w{10 + (start + 3 * number) % 80}" for number in range(count))

    rows = [
        {"question": words(n, 5 + 3 * n), "choices": [" " + words(n + i, 2 + i) for i in range(3)], "answer": n % 3}
        for n in range(6)
    ]
    (folder / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, body in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/rows.json}}}}\n"
        (folder / f"{name}.yaml").write_text(head + "test_split: test" + body)


def scores(model: Any, tokenizer: Any, folder: Path) -> dict[str, Any]:
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = evaluator.simple_evaluate(
        harness, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    samples = {name: [sample["filtered_resps"] for sample in found["samples"][name]] for name in TASKS}
    return {"results": found["results"], "samples": samples}


def test_scores_are_equal(twins: Twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_tasks(tmp_path)
    tokenizer = load_tokenizer(Path(twins.split.config._name_or_path))
    split, whole = (scores(model, tokenizer, tmp_path) for model in twins.both)
    assert split["samples"]["writing"] == whole["samples"]["writing"]
    for name in TASKS:
        for metric, value in whole["results"][name].items():
            if isinstance(value, float):
                assert split["results"][name][metric] == pytest.approx(value, rel=1e-5), (name, metric)


def test_pipeline_writes_the_same(twins: Twins) -> None:
    tokenizer = load_tokenizer(Path(twins.split.config._name_or_path))
    prompts = ["w10 w11 w12", "w40 w50 w60 w70 w80"]
    texts = []
    for model in (twins.split, twins.whole.merge_and_unload()):
        write = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        torch.manual_seed(0)
        texts.append(write(prompts, max_new_tokens=8, do_sample=True, top_k=20, batch_size=2))
    assert texts[0] == texts[1]
