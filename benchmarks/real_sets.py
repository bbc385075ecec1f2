"""What `keural data prepare` keeps and drops of the real sets: writes a recipe for all of them, runs the command, prints the table.

    python benchmarks/real_sets.py SETS OUT > table.md

SETS is the directory with the unpacked sets. The tokenizer is the small one of the recipe, which does not change what is kept.
Every set states its language, so the language gate and, in the stage `cleaned`, the filters of documents judge it. Evaluation sets
stand in as conversations: their answers are labels, numbers and code. Not in it: eval_ifeval and eval_mt_bench, which hold no
question with its answer in one row.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

TEXT, MARKDOWN = "text", "markdown"
UD = {"format": "text", "options": {"prefix": "# text = ", "split": "line"}}
PROSE: list[tuple[str, str, str, dict[str, Any]]] = [
    ("ko_petitions", TEXT, "ko_petitions/petitions_*", {"format": "jsonl", "options": {"field": "content"}}),
    ("ko_nsmc_raw", TEXT, "ko_nsmc_raw", {"options": {"field": "review"}}),
    ("ko_python_docs", "po", "ko_python_docs", {}),
    *(
        (f"ko_{name}", MARKDOWN, f"ko_{name}", {})
        for name in (
            "tensorflow_docs",
            "react_docs",
            "vue_docs",
            "rust_book",
            "d2l",
            "fastapi_docs",
            "opensource_guide",
            "typescript_docs",
            "hf_course",
            "cncf_glossary",
        )
    ),
    *((name, TEXT, f"{name}/*.conllu", UD) for name in ("ko_ud_text", "ko_ud_gsd_text", "ko_ud_ksl_text", "en_ud_ewt_text")),
    ("ko_literature", TEXT, "ko_literature", {}),
    ("en_gutenberg", TEXT, "en_gutenberg_*/*.txt", {"options": {"gutenberg": True}}),
    ("en_rust_book", MARKDOWN, "en_rust_book", {}),
    ("en_opensource_guide", MARKDOWN, "en_opensource_guide", {}),
    ("en_wikitext2", TEXT, "en_wikitext2/test.txt", {}),
    ("par_tatoeba", TEXT, "par_tatoeba/kor.txt", {"format": "tsv", "options": {"header": False, "field": [0, 1]}}),
    ("par_tatoeba_laser", TEXT, "par_tatoeba_laser/tatoeba.*", {"format": "text", "options": {"split": "line"}}),
    ("par_korean_parallel", TEXT, "par_korean_parallel/jhe-*", {"format": "text", "options": {"split": "line"}}),
    ("par_bible", TEXT, "par_bible/*.tsv", {"options": {"field": ["ko", "en"]}}),
]
SELF_INSTRUCT = {"options": {"input": "instances.0.input", "output": "instances.0.output"}}
INSTRUCTIONS: list[tuple[str, str, str, dict[str, Any]]] = [
    (
        "inst_en_flan_cot",
        "qa",
        "inst_en_flan_cot",
        {"options": {"header": False, "unescape": True, "question": 0, "answer": [2, 1]}},
    ),
    ("inst_en_gpteacher", "alpaca", "inst_en_gpteacher", {"options": {"output": "response"}}),
    ("inst_en_gsm8k_train", "qa", "inst_en_gsm8k_train", {}),
    ("inst_en_sharegpt_sample", "sharegpt", "inst_en_sharegpt_sample", {}),
    ("inst_en_selfinstruct_user", "alpaca", "inst_en_selfinstruct_user", SELF_INSTRUCT),
    ("inst_ko_chatbot", "qa", "inst_ko_chatbot", {"options": {"question": "Q", "answer": "A"}}),
    ("inst_ko_sae4k", "qa", "inst_ko_sae4k/*.txt", {"format": "tsv", "options": {"header": False, "question": 0, "answer": 1}}),
    ("inst_ko_kullm_user", "alpaca", "inst_ko_kullm_user", SELF_INSTRUCT),
    ("inst_ko_xpersona", "dialogue", "inst_ko_xpersona", {}),
    *(
        (f"inst_multi_chatterbot_{code}", "dialogue", f"inst_multi_chatterbot/{name}", {"options": {"rows": "conversations"}})
        for name, code in (("english", "en"), ("korean", "ko"))
    ),
    ("pref_llamafactory_kto", "messages", "pref_llamafactory_demo/kto_en_demo.json", {}),
    (
        "pref_square_ko",
        "kto",
        "pref_square_ko",
        {"options": {"prompt": "question", "completion": "response", "label": "acceptable?"}},
    ),
]


def _asked(question: Any, answer: str, **more: Any) -> dict[str, Any]:
    return {"options": {"question": question, "answer": answer, **more}}


EVALUATION: list[tuple[str, str, str, dict[str, Any]]] = [
    ("eval_gsm8k_test", "qa", "eval_gsm8k_test", {}),
    ("eval_mmlu_val", "qa", "eval_mmlu_val/*.json", {"format": "jsonl"} | _asked("input", "output")),
    ("eval_llm_adapters", "alpaca", "eval_llm_adapters", {}),
    ("eval_bbh", "qa", "eval_bbh", _asked("input", "target", unfold=["examples"])),
    ("eval_truthfulqa", "qa", "eval_truthfulqa/TruthfulQA.csv", _asked("Question", "Best Answer")),
    ("eval_humaneval", "qa", "eval_humaneval", _asked("prompt", "canonical_solution")),
    ("eval_kobest_boolq", "qa", "eval_kobest/BoolQ", _asked(["Text", "Question"], "Answer")),
    ("eval_kobest_copa", "qa", "eval_kobest/COPA", _asked(["sentence", "question", "1", "2"], "Answer")),
    ("eval_kobest_hellaswag", "qa", "eval_kobest/HellaSwag", _asked(["context", *(f"choice{n}" for n in range(1, 5))], "label")),
    ("eval_kobest_sentineg", "qa", "eval_kobest/SentiNeg", _asked("Text", "Label")),
    ("eval_kornlu_xnli", "qa", "eval_kornlu/xnli.dev.ko.tsv", _asked(["sentence1", "sentence2"], "gold_label")),
    ("eval_kornlu_sts", "qa", "eval_kornlu/sts-test.tsv", _asked(["sentence1", "sentence2"], "score")),
]
PANDALM = {"0": "tie", "1": "first", "2": "second"}
PAIRS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("pref_hh_rlhf", "hh_rlhf", "pref_hh_rlhf/harmless-base/test.jsonl.gz", {}),
    ("pref_rasbt_1100", "preference", "pref_rasbt_1100", {}),
    ("pref_llamafactory_demo", "preference", "pref_llamafactory_demo/dpo_en_demo.json", {}),
    ("pref_llmbar", "preference", "pref_llmbar", {"options": {"prompt": "input", "answers": ["output_1", "output_2"]}}),
    (
        "pref_pandalm",
        "preference",
        "pref_pandalm",
        {"options": {"answers": ["response1", "response2"], "label": "annotator1", "labels": PANDALM}},
    ),
]
NOT_CLEANED = ("par_", "ko_ud", "en_ud", "ko_nsmc", "en_gutenberg", "en_wikitext2")
"""Sets whose records are sentences, or whose lines end anywhere: no filter of documents lets them through."""
STAGES = {
    "prose": ("next_token", PROSE),
    "cleaned": ("next_token", [source for source in PROSE if not source[0].startswith(NOT_CLEANED)]),
    "instructions": ("sft", INSTRUCTIONS),
    "evaluation": ("sft", EVALUATION),
    "pairs": ("dpo", PAIRS),
}


def language_of(name: str) -> str | None:
    """The language of a set by its name; those of parallel texts have two."""
    korean = name.startswith(("ko_", "inst_ko", "eval_ko")) or name.endswith("_ko")
    return None if name.startswith("par_") else "ko" if korean else "en"


def write_recipe(directory: Path) -> None:
    """One stage per kind, every set a source of it."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = {"name": "ko", "adapter": "markdown", "path": "ko_rust_book"}
    recipe = {
        "name": "real-sets",
        "stages": list(STAGES),
        "tokenizer": {"vocab_size": 2000, "max_bytes": 1_000_000, "sources": [tokenizer]},
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for number, (name, (objective, sets)) in enumerate(STAGES.items()):
        sources = [
            {"name": set_, "adapter": adapter, "path": path, "max_drop": 1.0, "language": language_of(set_)} | more
            for set_, adapter, path, more in sets
        ]
        batch = {"batch_pairs": 1} if objective == "dpo" else {"batch_tokens": 4096}
        stage = {
            "name": name,
            "objective": objective,
            "init_from": "random" if number == 0 else list(STAGES)[number - 1],
            "data": {"sequence_length": 4096, "sources": sources} | ({"cleaning": {}} if name == "cleaned" else {}),
            "train": {"steps": 1, "lr": 1e-4, **batch},
        }
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(stage, allow_unicode=True))


def main(sets: Path, out: Path) -> None:
    """Run the command and print a row per set."""
    write_recipe(out / "recipe")
    command = [sys.executable, "-m", "keural", "data", "prepare", str(out / "recipe"), f"data={sets}", *sys.argv[3:]]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr or done.stdout)
    print("| set | adapter | rows | kept | dropped | by reason | kept and counted |\n|---|---|---|---|---|---|---|")
    for path in sorted(out.rglob("prepared.json"), key=lambda path: list(STAGES).index(_stage_of(path))):
        for row in json.loads(path.read_text())["table"]:
            name = row["source"] + (" (cleaned)" if _stage_of(path) == "cleaned" else "")
            dropped = row["rows"] - row["kept"]
            counts = f"{row['rows']:,} | {row['kept']:,} | {dropped:,}"
            print(f"| {name} | {row['adapter']} | {counts} | {_counted(row['drops'])} | {_counted(row['noted'])} |")


def _stage_of(path: Path) -> str:
    table = json.loads(path.read_text())
    names = [row["source"] for row in table["table"]]
    return next(
        name
        for name, (_, sets) in STAGES.items()
        if [set_[0] for set_ in sets] == names and (name == "cleaned") == (table["cleaned"] is not None)
    )


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in counts.items()) or "-"


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute())
