"""Make the demo's general text from MMLU's validation questions and the Alpaca seed tasks.

    python demo/scripts/make_text.py DATA_FOLDER

`DATA_FOLDER` holds `mmlu_val.jsonl` (subject, question, choices, answer) and `alpaca_seed_tasks.jsonl`. Everything is
written in the form in which the mathematics is tested, so that a difference between the two is one of content.
"""

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

OUT = Path(__file__).parents[1] / "src/stethoscope_demo/data/general.jsonl"
DOCUMENT_CHARACTERS = 500  # with the overshoot about 680, which is what five mathematical problems make
DOCUMENTS = 440

# Whatever calculates, or speaks of calculating.
QUANTITATIVE = re.compile(
    "math|algebra|physics|chemistry|statistics|econom|account|engineering|computer|machine_learning|astronomy|logic"
)


def main() -> None:
    folder = Path(sys.argv[1])
    rng = random.Random(0)
    by_source: dict[str, list[str]] = {}
    for row in _rows(folder / "mmlu_val.jsonl"):
        if not QUANTITATIVE.search(row["subject"]):
            by_source.setdefault(f"mmlu_val/{row['subject']}", []).append(_question(row))
    seeds = [_instruction(row) for row in _rows(folder / "alpaca_seed_tasks.jsonl")]
    by_source["alpaca_seed_tasks"] = [text for text in seeds if not re.search(r"\d\s*[-+*/=^]\s*\d|equation", text)]

    documents = []
    for source in sorted(by_source):
        texts = [text for text in by_source[source] if len(text) <= 900]
        rng.shuffle(texts)
        documents += [{"text": text, "source": source} for text in _packed(texts)]
    rng.shuffle(documents)
    del documents[DOCUMENTS:]
    for index, document in enumerate(documents):
        document["split"] = ("calibration", "test")[index % 2]
    OUT.parent.mkdir(parents=True, exist_ok=True)
    with OUT.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    print(f"{len(documents)} documents, {OUT.stat().st_size / 1000:.0f} kB")


def _rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _question(row: dict[str, Any]) -> str:
    right = str(row["choices"]["ABCD".index(row["answer"])]).strip()
    return f"Problem:\n{row['question'].strip()}\n\nSolution: {right}"


def _instruction(row: dict[str, Any]) -> str:
    instance = row["instances"][0]
    given = f"\n{instance['input'].strip()}" if instance["input"].strip() else ""
    return f"Problem:\n{row['instruction'].strip()}{given}\n\nSolution: {instance['output'].strip()}"


def _packed(texts: list[str]) -> list[str]:
    """Joins texts into documents of about equal length; a short rest at the end stays a short document."""
    documents: list[str] = []
    current: list[str] = []
    for text in texts:
        current.append(text)
        if sum(map(len, current)) >= DOCUMENT_CHARACTERS:
            documents.append("\n\n".join(current))
            current = []
    if current:
        documents.append("\n\n".join(current))
    return documents


if __name__ == "__main__":
    main()
