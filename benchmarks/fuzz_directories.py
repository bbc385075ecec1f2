"""What the commands make of damaged directories: random flips, cuts, swaps and deletions, and what happened.

    python benchmarks/fuzz_directories.py [--count 1000] [--seed 1] [--only run,interrupted,model,store] [--out counts.json]

Makes a tiny run, the same run interrupted in a stage, a model directory and a store from rows of its own. Then, again and again:
one file of a copy is damaged, and the commands that read it run in a forked process. What may happen is: the result equals that of
the undamaged directory; or it is refused in one line with exit code 2; or it differs and a line says what was made again or is
missing. Anything else is a fault and is printed with the seed and number that make it again: a traceback, another exit code,
several lines of error, a difference that nothing speaks of.
"""

import argparse
import collections
import contextlib
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import yaml

import keural.convert.inspection
import keural.pipeline.run
import keural.serve.generate
from keural.cli.app import main as command

torch.set_num_threads(1)

KOREAN = "하늘 바다 나무 사람 학교 음식 아침 저녁 친구 노래 여행 책상 창문 거리 시장"
ENGLISH = "sky sea tree people school food morning evening friend song journey desk window street market"
SAID = re.compile(r"damaged|again|kept as|other settings|missing|left out|not used|set aside|was made|no record|not covered", re.I)
LIMIT = 120
"""Seconds for the commands of one damage."""
Outcome = tuple[int, str, str, dict[str, Any]]


def write_data(folder: Path) -> None:
    """Prose, chats, pairs and labelled answers of random words."""
    draw = random.Random(0)

    def sentence() -> str:
        words = draw.choice((KOREAN, ENGLISH)).split()
        return " ".join(draw.choice(words) for _ in range(draw.randint(2, 5)))

    folder.mkdir(parents=True)
    rows: dict[str, list[dict[str, Any]]] = {
        "prose": [{"text": ". ".join(sentence() for _ in range(5))} for _ in range(300)],
        "chats": [
            {"messages": [{"role": "user", "content": sentence()}, {"role": "assistant", "content": sentence()}]}
            for _ in range(120)
        ],
        "pairs": [{"prompt": sentence(), "chosen": sentence(), "rejected": sentence()} for _ in range(60)],
        "thumbs": [{"prompt": sentence(), "completion": sentence(), "label": draw.random() < 0.5} for _ in range(60)],
    }
    for name, listed in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in listed), "utf-8")


def write_recipe(folder: Path, data: Path, labels: bool = False) -> None:
    """Three stages of twelve steps; with `labels` a fourth that learns from labelled answers, from the same start as the third."""
    folder.mkdir(parents=True)
    prose = {"name": "prose", "adapter": "text", "path": "prose.jsonl", "language": "ko"}
    recipe = {
        "name": "tiny",
        "data": str(data),
        "model": {
            "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 16, "num_local_experts": 4, "sliding_window": 9, "max_position_embeddings": 128,
        },
        "tokenizer": {"vocab_size": 360, "sources": [prose]},
        "stages": ["base", "chat", "align", *(["judge"] if labels else [])],
        "evaluation": {"bits_per_byte": [{"name": "prose", "stage": "base", "max_bytes": 5000}]},
        "chat": {"max_new_tokens": 8, "samples": ["하늘 바다?"]},
    }  # fmt: skip
    train = {"lr": 1e-3, "steps": 12, "warmup_steps": 2, "save_every": 3}
    stages = [
        ("base", "next_token", "random", prose, 32, {"batch_tokens": 128}),
        ("chat", "sft", "base", {"name": "chats", "adapter": "messages", "path": "chats.jsonl"}, 128, {"batch_tokens": 256}),
        ("align", "dpo", "chat", {"name": "pairs", "adapter": "preference", "path": "pairs.jsonl"}, 128, {"batch_pairs": 4}),
        ("judge", "kto", "chat", {"name": "thumbs", "adapter": "kto", "path": "thumbs.jsonl"}, 128, {"batch_answers": 8}),
    ]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), "utf-8")
    for name, objective, start, source, length, batch in stages if labels else stages[:-1]:
        data_spec = {"sequence_length": length, "heldout_per_mille": 50, "sources": [source]}
        stage = {"name": name, "objective": objective, "init_from": start, "data": data_spec, "train": train | batch}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(stage, allow_unicode=True), "utf-8")


def keural(*arguments: str | Path) -> tuple[int, str, str]:
    """Run the command in this process: exit code (-1 for a traceback), what it printed, and its errors."""
    sys.argv = ["keural", *map(str, arguments)]
    printed, errors, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        try:
            command()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        except BaseException:
            code = -1
            errors.write(traceback.format_exc())
    return code, printed.getvalue(), errors.getvalue()


def several(*commands: tuple[str | Path, ...]) -> tuple[int, str, str]:
    """Run commands until one fails."""
    printed, errors = "", ""
    for arguments in commands:
        code, out, err = keural(*arguments)
        printed, errors = printed + out, errors + err
        if code:
            return code, printed, errors
    return 0, printed, errors


def use_run(out: Path, recipe: Path) -> Outcome:
    """Run the recipe (again) into a run directory: weights, figures and samples."""
    code, printed, errors = keural("run", recipe, "--out", out)
    found: dict[str, Any] = {}
    if code == 0:
        found = {str(path.relative_to(out)): path.read_bytes().hex() for path in sorted(out.glob("[!.]*/model/model.safetensors"))}
        found = {name: value for name, value in found.items() if ".old" not in name}
        summary = json.loads((out / "summary.json").read_text("utf-8"))
        found |= {name: summary[name] for name in ("evaluation", "samples", "data")}
        found |= {stage["name"]: {k: v for k, v in stage.items() if k != "seconds"} for stage in summary["stages"]}
    return code, printed, errors, found


def use_model(directory: Path, recipe: Path) -> Outcome:
    """Look at a model directory, verified, answer with it, and export it."""
    exported = directory.with_name("exported")
    shutil.rmtree(exported, ignore_errors=True)
    answer = ("generate", directory, "--prompt", "하늘 바다?", "--temperature", "0", "--max-new-tokens", "8")
    code, printed, errors = several(
        ("inspect", directory, "--verify", "--json"), answer, ("export", directory, exported, "--format", "pt")
    )
    return code, printed, errors, {"printed": printed.replace(str(directory), "DIR")} if code == 0 else {}


def use_store(directory: Path, recipe: Path) -> Outcome:
    """Describe a store, and write it as Megatron reads it."""
    exported = directory.with_name("exported")
    shutil.rmtree(exported, ignore_errors=True)
    code, printed, errors = several(
        ("data", "stats", directory, "--json"), ("data", "export", directory, exported, "--format", "megatron")
    )
    found: dict[str, Any] = {}
    if code == 0:
        found = {path.name: path.read_bytes().hex() for path in sorted(exported.iterdir())} | {"printed": printed}
        found["printed"] = printed.replace(str(directory.parent), "DIR")
    return code, printed, errors, found


def damage(folder: Path, draw: random.Random) -> str:
    """Change one file below `folder`, small ones more often than by their size; says what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink() and path.stat().st_size)
    files = [path for path in files if path.name != ".lock"]
    small = [path for path in files if path.stat().st_size < 50_000]
    file = draw.choice(small if small and draw.random() < 0.7 else files)
    content, kind = bytearray(file.read_bytes()), draw.choice(("flip", "flip", "flip", "cut", "swap", "delete"))
    place = draw.randrange(len(content))
    if kind == "delete":
        file.unlink()
        return f"delete {file.relative_to(folder)}"
    if kind == "flip":
        content[place] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        content = content[:place]
    else:
        other = draw.randrange(len(content))
        content[place], content[other] = content[other], content[place]
    file.write_bytes(content)
    return f"{kind} {file.relative_to(folder)} at {place}"


def judge(outcome: Outcome, expected: dict[str, Any]) -> tuple[str, str]:
    """What a damage came to, and the line that tells of a fault."""
    code, printed, errors, found = outcome
    if code == -1 or "Traceback" in errors:
        return "FAULT traceback", errors.strip().splitlines()[-1]
    if code == 2:
        lines = [line for line in errors.splitlines() if line.startswith("keural: error: ")]
        return ("refused", "") if len(lines) == 1 else ("FAULT lines", errors[-300:])
    if code:
        return f"FAULT exit {code}", errors[-300:]
    said = bool(SAID.search(printed + errors))
    if found == expected:
        return ("equal, and said" if said else "equal"), ""
    changed = [name for name in expected | found if expected.get(name) != found.get(name)]
    return ("differs, and said", "") if said else ("FAULT silent difference", ", ".join(changed))


def forked(function: Callable[[], Outcome]) -> Outcome:
    """The outcome of a function run in a process of its own, which ends after `LIMIT` seconds."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_send, args=(sender, function))
    child.start()
    sender.close()
    try:
        outcome: Outcome = receiver.recv()
    except EOFError:
        outcome = (-1, "", "Traceback: the process died or did not end in time", {})
    child.join()
    return outcome


def _send(sender: Any, function: Callable[[], Outcome]) -> None:
    signal.alarm(LIMIT)
    sender.send(function())


STATES: dict[str, Callable[[Path, Path], Outcome]] = {
    "run": use_run, "interrupted": use_run, "model": use_model, "store": use_store,
}  # fmt: skip


def make_states(work: Path) -> None:
    """A finished run, one interrupted in `chat`, a model directory and a store, each below a directory of its own."""
    write_data(work / "data")
    write_recipe(work / "recipe", work / "data")
    whole = work / "run" / "state"
    code, _, errors = keural("run", work / "recipe", "--out", whole)
    assert code == 0, errors
    half = work / "interrupted" / "state"
    code, _, errors = keural("run", work / "recipe", "--out", half, "--until", "chat")
    assert code == 0, errors
    for name in ("done.json", "model", "checkpoints/step-00000012"):
        path = half / "chat" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    shutil.copytree(whole / "chat" / "model", work / "model" / "state")
    store = next(path for path in sorted((whole / "data").glob("*/train")) if not list(path.glob("*.loss")))
    shutil.copytree(store, work / "store" / "state")


def names(text: str) -> list[str]:
    """What `--only` names, with commas between."""
    found = text.split(",")
    if unknown := [name for name in found if name not in STATES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(STATES)}")
    return found


def main() -> None:
    """Damage and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="damages in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=names, default=list(STATES), help=f"of {', '.join(STATES)}")
    parser.add_argument("--out", type=Path, help="JSON file of the counts")
    options = parser.parse_args()
    chosen = options.only
    counts: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in chosen}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_states(work)
        expected = {}
        for name in chosen:
            copy = work / name / "whole"
            shutil.copytree(work / name / "state", copy, symlinks=True)
            outcome = forked(lambda name=name, copy=copy: STATES[name](copy, work / "recipe"))  # type: ignore[misc]
            assert outcome[0] == 0, outcome[2]
            expected[name] = outcome[3]
            shutil.rmtree(copy)
        for number in range(options.count):
            name = chosen[number % len(chosen)]
            copy, draw = work / name / "whole", random.Random(f"{options.seed}/{number}")
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(work / name / "state", copy, symlinks=True)
            done = damage(copy, draw)
            outcome = forked(lambda name=name, copy=copy: STATES[name](copy, work / "recipe"))  # type: ignore[misc]
            verdict, line = judge(outcome, expected[name])
            counts[name][verdict] += 1
            if verdict.startswith("FAULT"):
                print(f"{verdict}: seed {options.seed}, number {number}, {name}: {done}: {line}", flush=True)
    for name in chosen:
        print(name, json.dumps(dict(counts[name].most_common())))
    if options.out:
        options.out.write_text(json.dumps({name: dict(counts[name]) for name in chosen}, indent=1) + "\n")
    sys.exit(any(verdict.startswith("FAULT") for counter in counts.values() for verdict in counter))


if __name__ == "__main__":
    main()
