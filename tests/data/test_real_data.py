"""The adapters on real sets, against the counts that their publishers and our own count of defects give."""

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks import decontamination
from keural.data.filtering.ngram_index import ContaminationIndex
from keural.data.readers.formats import Row, read_rows
from keural.data.records import Conversation, Document, Drop
from keural.data.sources import open_source, open_sources
from keural.recipe import SourceSpec

HEADERLESS = {"header": False, "question": 0, "answer": 1}


def read(real_data: Path, adapter: str, path: str, **settings: Any) -> tuple[list[Any], Counter[str]]:
    source = SourceSpec(name="real", adapter=adapter, path=path, **settings)
    found = list(open_source(source, real_data).read(seed=0))
    kept = [record for record in found if not isinstance(record, Drop)]
    return kept, Counter(record.reason for record in found if isinstance(record, Drop))


def test_hh_rlhf_defects(real_data: Path) -> None:
    kept, drops = read(real_data, "hh_rlhf", "pref_hh_rlhf/harmless-base/test.jsonl.gz")
    assert drops == {"role_marker_in_turn": 44, "not_alternating": 9, "empty_turn": 4}
    assert len(kept) == 2312 - 57
    turns = Counter(len(pair.prompt) + 1 for pair in kept)
    assert [size for size, _ in turns.most_common(4)] == [2, 6, 4, 8]


def test_hh_rlhf_defects_counted_without_the_adapter(real_data: Path) -> None:
    """The published count of 49 defective rows looks for role markers in the chosen side only; the rejected side has 8 more
    rows.
    """
    source = SourceSpec(name="hh", adapter="hh_rlhf", path="pref_hh_rlhf/harmless-base/test.jsonl.gz")
    ((file, format_name),) = open_source(source, real_data).files
    chosen_only, either = 0, 0
    for row in read_rows(file, format_name, {}):
        assert isinstance(row, Row)
        sides = [re.split(r"\n\n(Human|Assistant):", row.value[side])[1:] for side in ("chosen", "rejected")]
        marked = [any("Human:" in part or "Assistant:" in part for part in side[1::2]) for side in sides]
        alternating = all(role == ("Human", "Assistant")[n % 2] for side in sides for n, role in enumerate(side[::2]))
        empty = any(not part.strip() for side in sides for part in side[1::2])
        other = not alternating or empty or sides[0][:-1] != sides[1][:-1]
        chosen_only += marked[0] or other
        either += any(marked) or other
    assert (chosen_only, either) == (49, 57)


def test_hh_rlhf_defect_by_defect(real_data: Path) -> None:
    """The published counts, each by itself and on the side it was counted on: 40 role markers, 8 and 5 broken alternations, 4 empty
    last turns, 5 differing histories, 2 repeated prompts, no identical pair.
    """
    source = SourceSpec(name="hh", adapter="hh_rlhf", path="pref_hh_rlhf/harmless-base/test.jsonl.gz")
    ((file, format_name),) = open_source(source, real_data).files
    found: Counter[str] = Counter()
    prompts: Counter[tuple[str, ...]] = Counter()
    for row in read_rows(file, format_name, {}):
        assert isinstance(row, Row)
        sides = {side: re.split(r"\n\n(Human|Assistant):", row.value[side])[1:] for side in ("chosen", "rejected")}
        for side, parts in sides.items():
            found[f"marker_{side}"] += any("Human:" in part or "Assistant:" in part for part in parts[1::2])
            found[f"alternation_{side}"] += any(role != ("Human", "Assistant")[n % 2] for n, role in enumerate(parts[::2]))
            found[f"empty_last_{side}"] += not parts[-1].strip()
        found["history"] += sides["chosen"][:-1] != sides["rejected"][:-1]
        found["identical"] += sides["chosen"] == sides["rejected"]
        prompts[tuple(sides["chosen"][:-1])] += 1
    found["repeated_prompt"] = sum(count - 1 for count in prompts.values())
    published = {"marker_chosen": 40, "alternation_chosen": 8, "alternation_rejected": 5, "empty_last_chosen": 4, "history": 5}
    assert {name: found[name] for name in published} == published
    assert (found["identical"], found["repeated_prompt"]) == (0, 2)


@pytest.mark.parametrize(
    ("adapter", "path", "settings", "kept", "dropped"),
    [
        ("preference", "pref_rasbt_1100", {}, 1094, {"chosen_equals_rejected": 6}),
        ("preference", "pref_llamafactory_demo/dpo_en_demo.json", {}, 300, {}),
        ("preference", "pref_llmbar", {"options": {"prompt": "input", "answers": ["output_1", "output_2"]}}, 419, {}),
        ("alpaca", "inst_en_gpteacher", {"options": {"output": "response"}}, 1923, {}),
        ("alpaca", "inst_ko_kullm_user", {"options": {"input": "instances.0.input", "output": "instances.0.output"}}, 252, {}),
        ("qa", "inst_ko_chatbot", {"options": {"question": "Q", "answer": "A"}}, 11823, {}),
        ("qa", "inst_en_gsm8k_train", {}, 2491, {}),
        ("qa", "inst_ko_sae4k/*.txt", {"format": "tsv", "options": HEADERLESS}, 15419, {}),
        ("sharegpt", "inst_en_sharegpt_sample", {}, 500, {}),
        ("dialogue", "inst_ko_xpersona", {}, 599, {}),
        ("dialogue", "inst_multi_chatterbot", {"options": {"rows": "conversations"}}, 2479, {"missing_dialogue": 1}),
        ("text", "ko_petitions/petitions_*", {"format": "jsonl", "options": {"field": "content"}}, 1300, {"empty": 1}),
        ("text", "ko_nsmc_raw", {"options": {"field": "review"}}, 5554, {}),
        ("text", "ko_ud_text/*.conllu", {"format": "text", "options": {"prefix": "# text = ", "split": "line"}}, 4353, {}),
        ("markdown", "ko_cncf_glossary", {}, 119, {"empty": 2}),
        ("qa", "eval_kobest/BoolQ", {"options": {"question": ["Text", "Question"], "answer": "Answer"}}, 2104, {}),
        ("text", "eval_kobest/COPA", {"options": {"field": "sentence"}}, 4576, {}),
        ("text", "eval_kobest/HellaSwag", {"options": {"field": "context"}}, 1000, {}),
        ("text", "eval_kobest/SentiNeg", {"options": {"field": "Text"}}, 4446, {}),
        ("qa", "eval_truthfulqa/TruthfulQA.csv", {"options": {"question": "Question", "answer": "Best Answer"}}, 817, {}),
        ("text", "eval_humaneval", {"options": {"field": "prompt"}}, 164, {}),
    ],
)
def test_every_record_that_the_publishers_count_is_there(
    real_data: Path, adapter: str, path: str, settings: dict[str, Any], kept: int, dropped: dict[str, int]
) -> None:
    found, drops = read(real_data, adapter, path, **settings)
    assert (len(found), drops) == (kept, dropped)


def test_headerless_tables_with_written_out_line_ends(real_data: Path) -> None:
    options = {"header": False, "unescape": True, "question": 0, "answer": [2, 1]}
    found, drops = read(real_data, "qa", "inst_en_flan_cot", options=options)
    assert (len(found), drops) == (12985, {})
    assert isinstance(found[0], Conversation)
    assert found[0].messages[0].content.count("\n") == 6
    assert found[0].messages[1].content.endswith("\n(C)")


def test_catalogues_are_read_whole(real_data: Path) -> None:
    korean, drops = read(real_data, "po", "ko_python_docs")
    english, _ = read(real_data, "po", "ko_python_docs", options={"side": "en"})
    assert (len(korean), len(english), drops) == (68, 68, {})
    letters = Counter(bool(re.match("[가-힣]", letter)) for record in korean for letter in record.text if letter.isalpha())
    assert letters[True] / letters.total() > 0.45
    assert all(isinstance(record, Document) and 'msgstr "' not in record.text for record in korean)
    assert sum(record.text.count("\n\n") + 1 for record in english) >= 6800


def test_books_without_their_licence(real_data: Path) -> None:
    books, drops = read(real_data, "text", "en_gutenberg_*/*.txt", options={"gutenberg": True})
    assert (len(books), drops) == (6, {})
    assert not any(re.search("[*]{3} ?(START|END) OF|\r|gutenberg.org", book.text) for book in books)
    assert sum(len(book.text) for book in books) > 4_700_000


@pytest.mark.slow
def test_korean_prose_passes_the_korean_filters_and_rubbish_does_not(real_data: Path) -> None:
    pytest.importorskip("datatrove")
    from benchmarks import corpus_filters

    judge = corpus_filters.Ours()
    verdicts = [judge(text) for _, text in corpus_filters.real_documents(real_data)]
    assert len(verdicts) > 1_500
    assert verdicts.count("kept") / len(verdicts) >= 0.95
    generator = random.Random(1)
    for make in corpus_filters.RUBBISH.values():
        assert sum(judge(make(generator)) != "kept" for _ in range(100)) >= 95


@pytest.mark.slow
def test_planted_evaluation_items_are_found_and_clean_prose_is_not_flagged(real_data: Path) -> None:
    items = list(decontamination.evaluation_items(open_sources(decontamination.sources(), real_data)))
    index = ContaminationIndex(items)
    documents = decontamination.clean_documents(real_data)
    generator = random.Random(0)
    sample = items[::7]
    texts = [decontamination.changed(decontamination.as_text(item), generator) for _, item in sample]
    found = sum(
        index.find(f"{documents[place][1]}\n\n{text}\n\n{documents[-1 - place][1]}") is not None for place, text in enumerate(texts)
    )
    recognised = len(items) - index.too_short.total()
    assert found / len(texts) >= 0.99 * recognised / len(items)
    assert sum(index.find(text) is not None for _, text in documents) <= 0.001 * len(documents)
