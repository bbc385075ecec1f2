"""Cleaning: what it keeps and drops, that every row is accounted for, that interruptions change nothing, that nothing raises."""

import contextlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("datatrove")

from keural.cli.data_stats import describe
from keural.data.cleaning import measures
from keural.data.cleaning.filters import QualityFilter, few_sentence_lines, no_sentences
from keural.data.cleaning.formatters import Formatter
from keural.data.cleaning.language import FastTextFilter, ScriptFilter
from keural.data.cleaning.run import clean
from keural.data.prepare import prepare
from keural.data.sources import open_sources
from keural.data.tokens.store import TokenStore
from keural.errors import UserError
from keural.files import FileHashes
from keural.recipe import CleaningSpec, DataSpec, ExecutorSpec, SourceSpec
from tests.helpers.processor import within

NOUNS = [
    "시장",
    "강아지",
    "기차",
    "편지",
    "정원",
    "할머니",
    "도서관",
    "바다",
    "연필",
    "학교",
    "구름",
    "시계",
    "사과",
    "노래",
    "의자",
    "창문",
]
VERBS = ["보았다", "만들었다", "기다렸다", "그렸다", "지나갔다", "고쳤다", "좋아했다", "떠올렸다", "옮겼다", "닫았다"]
PLACES = ["서울에서", "부산에서", "마을로", "길에서", "집으로", "언덕에서", "오후에", "아침에", "겨울에", "비가 오는 날에"]


def korean(seed: int, sentences: int = 20) -> str:
    generator = random.Random(seed)

    def sentence() -> str:
        first, second = generator.sample(NOUNS, 2)
        number = generator.randint(2, 99)
        return f"{generator.choice(PLACES)} {first}의 {second}을 {number}번 {generator.choice(VERBS)}."

    return "\n".join(" ".join(sentence() for _ in range(4)) for _ in range(sentences // 4))


def document(text: str, kind: str = "ko"):
    from datatrove.data import Document

    return Document(text=text, id="", metadata={"kind": kind, "place": 0, "where": "x"})


def verdict(text: str, kind: str = "ko") -> str:
    for each in (ScriptFilter(), QualityFilter()):
        result = each.filter(document(text, kind))
        if result is not True:
            return result[1]
    return "kept"


@pytest.fixture
def sources(tmp_path):
    """Writes sources of JSON lines, some files each; gives their specs."""

    def write(texts: dict[str, list[str]], files: int = 2, language: str | None = "ko") -> list[SourceSpec]:
        specs = []
        for name, rows in texts.items():
            (tmp_path / name).mkdir()
            for part in range(min(files, len(rows))):
                lines = [json.dumps({"text": text}, ensure_ascii=False) for text in rows[part::files]]
                (tmp_path / name / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            specs.append(SourceSpec(name=name, adapter="text", path=name, language=language, max_drop=1.0))
        return specs

    return write


def run(specs, tmp_path, **settings):
    """In this process, where the settings name no other executor: to start others for every step takes longer than the step."""
    settings = {"executor": ExecutorSpec(workers=1), **settings}
    return clean(CleaningSpec(**settings), open_sources(specs, tmp_path), tmp_path, tmp_path / "out", 0, FileHashes())


class TestFilters:
    def test_korean_prose_is_kept(self):
        assert verdict(korean(1)) == "kept"

    @pytest.mark.parametrize(
        ("written", "read"), [("utf-8", "cp949"), ("utf-8", "latin-1"), ("cp949", "latin-1"), ("cp949", "utf-8")]
    )
    def test_text_decoded_with_the_wrong_encoding_is_dropped(self, written, read):
        assert verdict(korean(2).encode(written).decode(read, "replace")) in {"language", "broken_encoding"}

    def test_keywords_are_dropped_even_with_full_stops(self):
        generator = random.Random(0)
        spam = " ".join(f"{keywords(generator)}." for _ in range(100))
        assert verdict(spam) in {"quality_enough_stop_words", "no_sentences"}
        assert no_sentences(spam)
        assert not no_sentences(korean(3))

    def test_menus_are_dropped(self):
        assert verdict(menu(120)) != "kept"
        assert few_sentence_lines(menu(120))
        assert not few_sentence_lines(korean(3))

    def test_repeated_lines_are_dropped(self):
        assert verdict("\n".join([korean(3, 4)] * 12)) == "repetition_dup_line_frac"

    def test_chat_of_single_jamo_is_dropped(self):
        assert verdict("\n".join(["ㅋㅋㅋㅋ", "ㅠㅠ", "진짜로 그랬다고 했다."] * 20)) == "jamo_lines"

    def test_lines_of_code_in_korean_prose_are_not_judged(self):
        code = "```python\n" + "\n".join(["    x = 1"] * 30) + "\n```"
        assert verdict(korean(4) + "\n\n" + code + "\n\n" + korean(5)) == "kept"

    def test_korean_is_not_english(self):
        assert verdict(korean(6), "en") == "language"

    @pytest.mark.parametrize(
        ("text", "reason"),
        [("x" * 2000, "code_long_line"), ("\n".join(["y = 1 " * 30] * 9), "code_mean_line"), ("{}[];;\n" * 50, "code_few_letters")],
    )
    def test_code_that_nobody_wrote_is_dropped(self, text, reason):
        assert verdict(text, "code") == reason

    def test_a_function_is_kept_as_code(self):
        assert verdict("def double(x):\n    return 2 * x\n" * 3, "code") == "kept"

    @pytest.mark.parametrize(
        "text", ["", " \n\t", "🙂" * 500, "a" * 200_000, "가" * 200_000, "\n" * 5000, "\udc80" * 50, "1 2 3 " * 500]
    )
    @pytest.mark.parametrize("kind", ["ko", "en", "code", "any"])
    def test_nothing_raises(self, text, kind):
        verdict(measures.normalize(text), kind)


class TestMeasures:
    def test_normalising_keeps_lines_and_indentation(self):
        assert measures.normalize("def f():\r\n\treturn 1\r\n    # 가\x00나  다\n") == "def f():\n\treturn 1\n    # 가나  다\n"

    def test_decomposed_hangul_is_composed(self):
        import unicodedata

        assert measures.normalize(unicodedata.normalize("NFD", "한국어")) == "한국어"

    def test_particles_are_words_of_their_own(self):
        assert measures.eojeol_words("학교에서 친구를 만났다.") == ["학교", "에서", "친구", "를", "만났", "다"]


class TestFormatters:
    def test_personal_data_is_replaced_and_other_numbers_are_not(self):
        text = "연락 010-1234-5678, 02-345-6789, 01012345678, 주민 850101-1234567, hong@site.co.kr, 국민은행 123456-78-901234 로."
        text += " 2024-11-24 제12-3456호"
        changed = Formatter(personal_data=True).format(text, "ko")
        for secret in ("1234-5678", "345-6789", "01012345678", "1234567", "hong@", "123456-78-901234"):
            assert secret not in changed
        assert "2024-11-24" in changed
        assert "제12-3456호" in changed

    def test_news_boilerplate_goes_and_text_about_copyright_stays(self):
        article = korean(7)
        tail = "\n홍길동 기자 hong@news.co.kr\n저작권자 ⓒ 어느신문, 무단 전재 및 재배포 금지"
        assert Formatter(personal_data=False).format(article + tail, "ko") == article
        essay = "무단 전재라는 말은 법에서 허락 없이 남의 글을 옮기는 일을 가리키는데, " * 4
        assert Formatter(personal_data=False).format(essay, "ko") == essay

    @pytest.mark.parametrize("text", ["a-" * 1_000_000, "1." * 1_000_000, "0" * 2_000_000, "계좌 " * 500_000, "가나다" * 500_000])
    def test_long_lines_take_no_longer_than_their_length(self, text):
        with within(15):
            assert Formatter(personal_data=True).format(text, "code") == text

    def test_code_keeps_every_character(self):
        code = "if x:\n\tprint('“a”  b')\n\n    # 무단 전재 금지\n"
        assert Formatter(personal_data=True).format(code, "code") == code


class TestRun:
    def test_400_documents_with_50_exact_and_50_near_copies_give_400(self, sources, tmp_path):
        texts = [korean(seed, 40) for seed in range(400)]
        near = [text.replace(".", " .", 1).replace("보았다", "보았었다", 1) for text in texts[50:100]]
        specs = sources({"a": texts, "b": texts[:50] + near})
        cleaned = run(specs, tmp_path, tasks=3, filters=False, executor=ExecutorSpec())
        kept = [document.text for spec in specs for document in cleaned.documents(spec.name)]
        assert len(kept) == 400
        rows = cleaned.summary.sources
        assert sum(row.drops.get("near_duplicate", 0) for row in rows.values()) == 100

    def test_the_first_in_the_order_of_the_recipe_stays_and_short_copies_go(self, sources, tmp_path):
        same, short = korean(1, 40), "짧은 글이다."
        specs = sources({"a": [korean(2), same, short], "b": [same, short, korean(3)]}, files=1)
        cleaned = run(specs, tmp_path, tasks=2, filters=False)
        assert same in {document.text for document in cleaned.documents("a")}
        assert [document.text for document in cleaned.documents("b")] == [korean(3)]

    def test_a_line_of_more_than_a_megabyte(self, sources, tmp_path):
        specs = [spec.model_copy(update={"text_kind": "any"}) for spec in sources({"a": ["낱말 하나 " * 80_000]}, files=1)]
        assert len(list(run(specs, tmp_path).documents("a"))) == 1

    def test_near_duplicates_agree_with_exact_jaccard_similarity(self, sources, tmp_path):
        texts = [korean(seed, 40) for seed in range(60)]
        generator, changed, similar = random.Random(1), [], []
        for text in texts:
            words = text.split(" ")
            for _ in range(generator.choice([1, 2, 60])):
                words[generator.randrange(len(words))] = f"낱말{generator.randrange(10**6)}"
            changed.append(" ".join(words))
            similar.append(jaccard(text, changed[-1]))
        specs = sources({"a": texts, "b": changed})
        cleaned = run(specs, tmp_path, tasks=2, filters=False)
        kept = {document.text for spec in specs for document in cleaned.documents(spec.name)}
        for text, other, similarity in zip(texts, changed, similar, strict=True):
            if similarity > 0.9:
                assert len({text, other} & kept) == 1
            if similarity < 0.4:
                assert {text, other} <= kept

    def test_every_row_is_accounted_for_with_examples(self, sources, tmp_path):
        specs = sources({"a": [korean(seed) for seed in range(8)] + [menu(99), "English only, every word of it. " * 20, ""]})
        cleaned = run(specs, tmp_path, tasks=4)
        row = cleaned.summary.sources["a"]
        assert row.rows == 11
        assert row.kept == len(list(cleaned.documents("a"))) == 8
        assert row.drops == {"language": 1, "empty": 1, "quality_line_punct_ratio": 1}
        assert cleaned.summary.examples["language"][0]["source"] == "a"
        assert not (cleaned.directory / "work").exists()
        assert "English only" in describe(cleaned.directory, [], None, as_json=False)

    def test_indentation_and_lines_of_code_survive(self, sources, tmp_path):
        code = "def f(x):\n\tif x:\n\t\treturn [\n            1,\n        ]\n\n\n    # end  of\tit\n"
        specs = [spec.model_copy(update={"text_kind": "code"}) for spec in sources({"code": [code]}, files=1, language=None)]
        assert [document.text for document in run(specs, tmp_path).documents("code")] == [code]

    def test_killed_and_started_again_gives_the_same_bytes(self, sources, tmp_path, monkeypatch):
        specs = sources({"a": [korean(seed) for seed in range(12)], "b": [korean(seed) for seed in range(6, 18)]})
        whole = run(specs, tmp_path / ".", tasks=4)
        expected = files_of(whole.directory / "documents")
        summary = (whole.directory / "cleaning.json").read_bytes()
        directory = tmp_path / "again"
        interrupted = QualityFilter.filter
        calls = []

        def killed(self, doc):
            calls.append(doc)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return interrupted(self, doc)

        monkeypatch.setattr(QualityFilter, "filter", killed)
        settings = CleaningSpec(tasks=4, executor=ExecutorSpec(workers=1))
        with pytest.raises(KeyboardInterrupt):
            clean(settings, open_sources(specs, tmp_path), tmp_path, directory, 0, FileHashes())
        monkeypatch.undo()
        again = clean(settings, open_sources(specs, tmp_path), tmp_path, directory, 0, FileHashes())
        assert files_of(again.directory / "documents") == expected
        assert (again.directory / "cleaning.json").read_bytes() == summary

    def test_other_settings_are_another_directory_and_other_workers_are_not(self, sources, tmp_path):
        specs = sources({"a": [korean(seed) for seed in range(4)]})
        first = run(specs, tmp_path, tasks=2).directory
        assert run(specs, tmp_path, tasks=2, executor=ExecutorSpec(workers=2)).directory == first
        assert run(specs, tmp_path, tasks=2, deduplicate=False).directory != first

    def test_prepare_trains_on_the_cleaned_documents_and_adds_up(self, sources, tmp_path, tokenizer):
        specs = sources({"a": [korean(seed) for seed in range(8)] + [korean(0), menu(99)]})
        spec = DataSpec(sources=specs, sequence_length=64, cleaning=CleaningSpec(tasks=2))
        prepared = prepare(spec, "next_token", tmp_path, tokenizer, tmp_path / "out", 0)
        (row,) = prepared.table
        assert row.rows == 10
        assert row.kept == 8
        assert row.drops == {"near_duplicate": 1, "quality_line_punct_ratio": 1}
        assert TokenStore.open(prepared.train).num_sequences == 8

    def test_nothing_left_is_counted(self, sources, tmp_path):
        cleaned = run(sources({"a": ["English only, every word of it. " * 9] * 3}), tmp_path)
        assert cleaned.summary.sources["a"].drops == {"language": 3}
        assert list(cleaned.documents("a")) == []

    def test_rows_beyond_a_limit_and_unreadable_ones_add_up(self, sources, tmp_path, tokenizer):
        (spec,) = sources({"a": [korean(seed) for seed in range(40)] + [""] * 10}, files=1)
        spec = spec.model_copy(update={"limit": 5, "max_drop": 0.3})
        data = DataSpec(sources=[spec], sequence_length=64, cleaning=CleaningSpec(tasks=2, filters=False))
        (row,) = prepare(data, "next_token", tmp_path, tokenizer, tmp_path / "out", 0).table
        assert (row.rows, row.kept, row.drops) == (50, 5, {"over_limit": 35, "empty": 10})

    def test_another_language_model_is_noticed(self, sources, tmp_path, tokenizer, monkeypatch):
        monkeypatch.setattr(FastTextFilter, "probability", lambda self, text, language: float(self._path.read_text()))
        specs = sources({"a": [korean(seed) for seed in range(4)]})
        data = DataSpec(sources=specs, sequence_length=64, cleaning=CleaningSpec(tasks=1, language_id="fasttext", model="lid.bin"))
        (tmp_path / "lid.bin").write_text("1.0")
        assert prepare(data, "next_token", tmp_path, tokenizer, tmp_path / "out", 0).table[0].kept == 4
        (tmp_path / "lid.bin").write_text("0.0")
        with pytest.raises(UserError, match="none of its 4 rows is used; most often language"):
            prepare(data, "next_token", tmp_path, tokenizer, tmp_path / "out", 0)

    def test_neither_seed_nor_licence_change_documents_that_are_read(self, sources, tmp_path):
        specs = sources({"a": [korean(0)]})
        first = run(specs, tmp_path, tasks=1).directory
        others = [specs[0].model_copy(update={"license": "MIT"})]
        assert (
            clean(CleaningSpec(tasks=1), open_sources(others, tmp_path), tmp_path, tmp_path / "out", 7, FileHashes()).directory
            == first
        )

    def test_a_late_row_of_another_schema_is_counted(self, tmp_path):
        rows = [{"title": "글", "text": korean(seed)} for seed in range(4)] + [{"text": korean(9)}]
        (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        spec = SourceSpec(name="a", adapter="wikipedia_ko", path="a.jsonl")
        assert run([spec], tmp_path).summary.sources["a"].drops == {"wrong_schema": 1}


class TestRefusals:
    def test_a_source_of_unknown_kind(self, sources, tmp_path):
        specs = sources({"a": [korean(0)]}, language="fr")
        with pytest.raises(UserError, match="text_kind: ko, en, code or any"):
            run(specs, tmp_path)

    def test_a_missing_language_model(self, sources, tmp_path):
        with pytest.raises(UserError, match=r"glot\.bin: no such file; fetch GlotLID"):
            run(sources({"a": [korean(0)]}), tmp_path, language_id="fasttext", model="glot.bin")

    def test_rows_that_are_not_the_adapters(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"id": 1}\n')
        spec = SourceSpec(name="a", adapter="fineweb", path="a.jsonl", language="en")
        with pytest.raises(UserError, match=r"source 'a'.*key"):
            run([spec], tmp_path)

    def test_slurm_without_sbatch(self, sources, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(UserError, match="sbatch"):
            run(sources({"a": [korean(0)]}), tmp_path, executor=ExecutorSpec(kind="slurm", partition="cpu"))

    def test_ray_that_is_not_installed(self, sources, tmp_path, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match="pip install ray"):
            run(sources({"a": [korean(0)]}), tmp_path, executor=ExecutorSpec(kind="ray"))

    @pytest.mark.parametrize("settings", [{"time": "1:00\ncurl x | sh"}, {"sbatch": {"account": "a\ntouch x"}}], ids=str)
    def test_slurm_settings_that_would_be_commands_of_the_jobs_script(self, sources, tmp_path, monkeypatch, settings):
        monkeypatch.setattr("shutil.which", lambda name: name)
        with pytest.raises(UserError, match="is not one line of text"):
            run(sources({"a": [korean(0)]}), tmp_path, executor=ExecutorSpec(kind="slurm", partition="cpu", **settings))

    def test_slurm_in_a_directory_whose_name_a_shell_would_run(self, sources, tmp_path, monkeypatch):
        monkeypatch.setattr("shutil.which", lambda name: name)
        (tmp_path / "$(touch x)").mkdir()
        specs = sources({"a": [korean(0)]})
        executor = ExecutorSpec(kind="slurm", partition="cpu")
        with pytest.raises(UserError, match="characters that a shell takes for commands"):
            clean(
                CleaningSpec(tasks=1, executor=executor),
                open_sources(specs, tmp_path),
                tmp_path,
                tmp_path / "$(touch x)",
                0,
                FileHashes(),
            )

    @pytest.mark.parametrize("settings", [{"kind": "slurm"}, {"kind": "local", "partition": "x"}, {"kind": "ray", "qos": "y"}])
    def test_executor_settings_that_would_do_nothing(self, settings):
        with pytest.raises(ValueError, match="executor kind"):
            ExecutorSpec(**settings)


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


READERS = {"read": ("signatures", "keep"), "signatures": ("buckets",), "pairs": ("clusters",), "remove": ("keep",)}
"""The steps that read what lies in a part of the work directory."""


@pytest.mark.slow
def test_a_pickle_in_any_file_of_an_interrupted_cleaning_is_not_run(sources, tmp_path, monkeypatch):
    specs = sources({"a": [korean(seed) for seed in range(4)] + [korean(0)]})

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("keural.data.cleaning.run.CleaningFile.write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(specs, tmp_path, tasks=2)
    (work,) = (tmp_path / "out").glob("*/work")
    (work / "logs" / "read" / "executor.pik").touch()
    shutil.copytree(work, tmp_path / "kept")
    files = sorted(path.relative_to(work) for path in work.rglob("*") if path.is_file())
    assert {file.parts[0] for file in files} >= {"logs", *READERS}
    for file in files:
        (work / file).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
        for step in READERS.get(file.parts[0], ()):
            shutil.rmtree(work / "logs" / step / "completions")
        with contextlib.suppress(Exception):  # what is made of the file is another claim
            run(specs, tmp_path, tasks=2)
        assert not (tmp_path / "ran").exists(), file
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "kept", work)


@pytest.mark.parametrize("changed", [False, True])
def test_a_slurm_job_does_not_read_a_pickle_that_was_changed_after_its_submission(tmp_path, monkeypatch, changed):
    """Slurm keeps the script of a job from its submission; here a shell runs it, and `srun` only says that it was called."""
    from keural.data.cleaning.slurm import CheckedSlurmExecutor

    tools, called, kept = tmp_path / "tools", tmp_path / "called", tmp_path / "kept"
    tools.mkdir()
    (tools / "sbatch").write_text(f'#!/bin/sh\nfor s; do :; done; [ -e {kept} ] || cp "$s" {kept}\necho "Submitted batch job 1"\n')
    (tools / "srun").write_text(f"#!/bin/sh\ntouch {called}\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    CheckedSlurmExecutor([print], tasks=1, time="1", partition="cpu", logging_dir=str(tmp_path / "logs")).run()
    if changed:
        (tmp_path / "logs" / "executor.pik").write_bytes(b"other")
    done = subprocess.run(["bash", kept], capture_output=True, check=False)
    assert (called.exists(), done.returncode == 0) == (not changed, not changed)


@pytest.mark.slow
def test_slurm_gets_a_chain_of_jobs_and_their_work_is_taken_up(sources, tmp_path, monkeypatch):
    """A stand-in for sbatch keeps the scripts; what the jobs would do is then done by what they would load."""
    log, tools = tmp_path / "sbatch.log", tmp_path / "tools"
    tools.mkdir()
    count = 'n=$(($(grep -c ^ARGS "$LOG" 2>/dev/null) + 1))'
    keep = '{ echo "ARGS $*"; for s; do :; done; cat "$s"; } >> "$LOG"'
    (tools / "sbatch").write_text(f'#!/bin/sh\n{count}\n{keep}\necho "Submitted batch job $n"\n')
    (tools / "squeue").write_text('#!/bin/sh\n[ -e "$LOG.busy" ] && echo 3\nexit 0\n')
    (tools / "scontrol").write_text("#!/bin/sh\necho localhost\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(log))
    specs = sources({"a": [korean(seed) for seed in range(4)]})
    slurm = ExecutorSpec(kind="slurm", partition="cpu", time="01:00:00", mem_per_cpu_gb=3, sbatch={"account": "lab"})
    with pytest.raises(UserError, match=r"submitted to Slurm .*run this command again"):
        run(specs, tmp_path, tasks=2, executor=slurm)
    scripts = log.read_text()
    for directive in (
        "--partition=cpu",
        "--time=01:00:00",
        "--mem-per-cpu=3G",
        "--array=0-1",
        "--account=lab",
        "--job-name=keural-keep",
    ):
        assert f"#SBATCH {directive}" in scripts
    assert scripts.count("--dependency=afterok:") >= 4
    log.with_name("sbatch.log.busy").touch()
    with pytest.raises(UserError, match="at work on Slurm"):
        run(specs, tmp_path, tasks=2, executor=slurm)
    log.with_name("sbatch.log.busy").unlink()
    (logs,) = (tmp_path / "out").glob("*/work/logs")
    for step, tasks in (("read", 2), ("signatures", 2), ("buckets", 14), ("clusters", 1), ("keep", 2)):
        for task in range(tasks):
            environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(task), "SLURM_NODELIST": "localhost"}
            command = [sys.executable, "-m", "datatrove.tools.launch_pickled_pipeline", logs / step / "executor.pik"]
            subprocess.run(command, env=environment, check=True, capture_output=True)
    assert len(list(run(specs, tmp_path, tasks=2, executor=slurm).documents("a"))) == 4


@pytest.mark.slow
def test_ray_gives_the_same_bytes(sources, tmp_path):
    pytest.importorskip("ray")
    specs = sources({"a": [korean(seed) for seed in range(8)] + [korean(0)]})
    here = run(specs, tmp_path, tasks=3).directory
    spec = CleaningSpec(tasks=3, executor=ExecutorSpec(kind="ray", workers=2, mem_per_cpu_gb=1))
    there = clean(spec, open_sources(specs, tmp_path), tmp_path, tmp_path / "ray", 0, FileHashes()).directory
    assert files_of(here) == files_of(there)


def test_a_fasttext_model_decides_where_one_is_given(sources, tmp_path):
    lines = [f"__label__kor_Hang {korean(seed, 4)}".replace("\n", " ") for seed in range(60)]
    lines += [f"__label__eng_Latn the {word} of the house and the garden {seed}" for seed in range(60) for word in ("door", "tree")]
    (tmp_path / "train.txt").write_text("\n".join(lines), encoding="utf-8")
    # beside PyTorch the training of this build of fastText comes to NaN; reading a model does not suffer
    training = "import fasttext, sys; fasttext.train_supervised(sys.argv[1], **eval(sys.argv[3])).save_model(sys.argv[2])"
    settings = {"epoch": 20, "lr": 0.2, "dim": 8, "minn": 2, "maxn": 4, "bucket": 20000, "thread": 1, "verbose": 0}
    subprocess.run([sys.executable, "-c", training, tmp_path / "train.txt", tmp_path / "lid.bin", repr(settings)], check=True)
    assert FastTextFilter(tmp_path / "lid.bin").probability(korean(99), "ko") > 0.9
    specs = sources({"a": [korean(seed) for seed in range(4)] + ["the door of the house and the garden " * 20]})
    cleaned = run(specs, tmp_path, language_id="fasttext", model="lid.bin")
    assert cleaned.summary.sources["a"].drops == {"language": 1}


def menu(items: int) -> str:
    """Words that link to the parts of a shop, each once."""
    generator = random.Random(items)
    return " | ".join(keywords(generator) for _ in range(items))


def keywords(generator: random.Random) -> str:
    """What somebody might search for."""
    where = generator.choice(["서울", "강남", "홍대", "부산", "분당", "일산", "수원", "대전", "전주", "춘천", "울산", "목동"])
    what = generator.choice(
        ["맛집", "호텔", "중고차", "대출", "학원", "원룸", "보험", "꽃집", "가방", "운동화", "미용실", "세탁소"]
    )
    return f"{where} {what} {generator.choice(['추천', '가격', '예약', '상담', '할인', '정보', '검색', '방문', '견적'])}"


def jaccard(first: str, second: str) -> float:
    """Similarity of two texts' sets of 5-grams of words, as MinHash estimates it."""
    from datatrove.utils.text import ngrams, simplify_text

    one, other = ({tuple(gram) for gram in ngrams(measures.eojeol_words(simplify_text(text)), 5)} for text in (first, second))
    return len(one & other) / len(one | other)


def files_of(directory) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
