"""Evaluation items planted in prose: how many are found, how much clean prose is flagged, how fast.

    python benchmarks/decontamination.py DATA_DIR [--every 1]

DATA_DIR holds the eval_*, ko_* and en_* sets. Every item (passage, question, choices, first answer, line by line) is put between
two clean paragraphs, as it is and changed: case swapped, punctuation removed, words broken over lines, and half the spaces after
Hangul gone. Clean documents are the paragraphs of at least 200 characters of the ko_* and en_* sets. Beside it, datatrove's
n-gram filter on the same texts, with 13-grams of words split at white space, of questions and answers together.
"""

import argparse
import json
import random
import re
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from keural.data.filtering.decontamination import evaluation_items
from keural.data.filtering.ngram_index import ContaminationIndex
from keural.data.records import EvaluationItem
from keural.data.sources import open_sources
from keural.recipe import SourceSpec

SETS = {
    "kobest_boolq": "eval_kobest/BoolQ",
    "kobest_copa": "eval_kobest/COPA",
    "kobest_hellaswag": "eval_kobest/HellaSwag",
    "kobest_sentineg": "eval_kobest/SentiNeg",
    "kornlu_nli": "eval_kornlu/xnli.dev.ko.tsv",
    "kornlu_sts": "eval_kornlu/sts-test.tsv",
    "gsm8k": "eval_gsm8k_test/test.jsonl",
    "mmlu_prompts": "eval_mmlu_val/zero_shot_mmlu_val.json",
    "numbered_choices": "eval_llm_adapters",
    "truthfulqa": "eval_truthfulqa/TruthfulQA.csv",
    "truthfulqa_mc": "eval_truthfulqa/mc_task.json",
    "ifeval": "eval_ifeval",
    "humaneval": "eval_humaneval",
    "bbh": "eval_bbh",
    "mt_bench": "eval_mt_bench/question.jsonl",
}


def sources() -> list[SourceSpec]:
    """The sets as sources of a recipe."""
    options = {"bbh": {"rows": "examples"}}
    formats = {"mmlu_prompts": "jsonl"}
    return [
        SourceSpec(name=name, adapter=name, path=path, options=options.get(name, {}), format=formats.get(name))
        for name, path in SETS.items()
    ]


def as_text(item: EvaluationItem) -> str:
    """The item as it may stand in a document."""
    return "\n".join(filter(None, (item.passage, item.question, *item.choices, *item.answers[:1])))


def changed(text: str, rng: random.Random) -> str:
    """Other case, no punctuation, other line breaks, fewer spaces in Korean."""
    text = re.sub(r"[^\w\s]", "", text.swapcase())
    text = re.sub(r"(?<=[가-힣]) ", lambda _: rng.choice((" ", "")), text)
    return re.sub(r"\s", lambda _: rng.choice((" ", "  ", "\n")), text)


def clean_documents(data: Path) -> list[tuple[str, str]]:
    """Place and text of every paragraph, or text of a JSON row, of at least 200 characters."""
    found = []
    for path in sorted(path for kind in ("ko_*", "en_*") for folder in data.glob(kind) for path in folder.rglob("*")):
        if path.is_file() and path.name not in ("SOURCE", "LICENSE"):
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            where = path.relative_to(data).as_posix()
            found += [(where, part) for part in _parts(path, text) if len(part) >= 200]
    return found


def _parts(path: Path, text: str) -> list[str]:
    if path.suffix == ".jsonl":
        return [part for line in text.splitlines() if line.strip() for part in _strings(json.loads(line))]
    return _strings(json.loads(text)) if path.suffix == ".json" else re.split(r"\n\s*\n", text)


def _strings(value: object) -> list[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []


def datatrove_filter(items: list[tuple[str, EvaluationItem]]):
    """datatrove's filter with an index of its own hashes; whether it flags a text."""
    from datatrove.data import Document
    from datatrove.pipeline.decont import n_grams

    n_grams.load_word_tokenizer = lambda language: SimpleNamespace(word_tokenize=str.split)
    config = n_grams.NGramsDecontConfig(n_grams=13, find_query_ngrams=True)
    peer = n_grams.NGramsDecontFilter("/tmp", config=config)
    maker = SimpleNamespace(tokenizer=peer.tokenizer, config=config, hash_func=peer.hash_func)
    peer._index_hashes = {
        hashed: name
        for name, item in items
        for hashed in n_grams.NGramsDecontIndexer.compute_hashes(
            maker, " ".join((*item.choices, *item.answers[:1])), f"{item.passage} {item.question}"
        )
    }
    return lambda text: peer.filter(Document(text=text, id="")) is not True


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--every", type=int, default=1, help="plant every n-th item")
    arguments = parser.parse_args()
    items = list(evaluation_items(open_sources(sources(), arguments.data)))
    started = time.process_time()
    index = ContaminationIndex(items)
    print(
        f"index: {len(items):,} items, {index.num_ngrams:,} n-grams, {index.num_bytes / index.num_ngrams:.0f} bytes each,", end=" "
    )
    print(f"{time.process_time() - started:.1f} s\n")
    unseen: list[tuple[str, str, str]] = []
    peer = datatrove_filter(items)
    documents = clean_documents(arguments.data)
    rng = random.Random(0)
    planted: Counter[str] = Counter()
    found: Counter[tuple[str, str]] = Counter()
    for name, item in items[:: arguments.every]:
        planted[name] += 1
        text = as_text(item)
        for variant, written in (("as is", text), ("changed", changed(text, rng))):
            (_, before), (_, after) = rng.sample(documents, 2)
            document = f"{before}\n\n{written}\n\n{after}"
            hit = index.find(document)
            found[name, variant] += hit is not None
            if hit is None:
                unseen.append((variant, item.where, text[:60]))
            found[name, f"datatrove {variant}"] += peer(document)
    columns = ("as is", "changed", "datatrove as is", "datatrove changed")
    print("| set | items | too short | planted | as is | changed | datatrove as is | datatrove changed |")
    print("|---|---|---|---|---|---|---|---|")
    for name in SETS:
        counts = " | ".join(str(found[name, column]) for column in columns)
        print(f"| {name} | {index.items[name]} | {index.too_short[name]} | {planted[name]} | {counts} |")
    totals = " | ".join(str(sum(found[name, column] for name in SETS)) for column in columns)
    print(f"| all | {len(items)} | {index.too_short.total()} | {planted.total()} | {totals} |\n")
    for name in SETS:
        print(name, [entry for entry in unseen if entry[1].startswith(SETS[name])][:6])
    for label, find in (("keural", lambda text: index.find(text) is not None), ("datatrove", peer)):
        started = time.process_time()
        flagged = [(where, index.find(text), text[:80]) for where, text in documents if find(text)]
        seconds = time.process_time() - started
        size = sum(len(text.encode()) for _, text in documents)
        count = f"{len(flagged)} of {len(documents):,} clean documents flagged"
        print(f"{label}: {count}, {size / 1e6 / seconds:.1f} MB/s; {flagged[:10]}")


if __name__ == "__main__":
    main()
