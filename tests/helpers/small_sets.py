"""Small sets of tasks, in the publishers' forms, with sentences of our own."""

from pathlib import Path

COPA = [
    ("비가 많이 왔다.", "결과", "강물이 불었다.", "강물이 말랐다.", 1),
    ("고양이가 잤다.", "원인", "고양이가 피곤했다.", "고양이가 배고팠다.", 1),
    ("문이 열렸다.", "원인", "바람이 멎었다.", "누가 문을 밀었다.", 2),
    ("새가 노래했다.", "결과", "아이가 들었다.", "아이가 물이 되었다.", 1),
]


def write_copa(data: Path, count: int = 4) -> Path:
    """A KoBEST COPA test file, also for more rows than there are sentences."""
    file = data / "eval_kobest" / "COPA" / "test.tsv"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        f"{number}\t{premise} {number}\t{relation}\t{first}\t{second}\t{answer}"
        for number in range(count)
        for premise, relation, first, second, answer in [COPA[number % len(COPA)]]
    ]
    file.write_text("\n".join(["ID\tsentence\tquestion\t1\t2\tAnswer", *rows]) + "\n", encoding="utf-8")
    return file


def write_mmlu(data: Path, count: int = 6) -> Path:
    """MMLU prompts of two subjects, as JSON."""
    import json

    file = data / "eval_mmlu_val" / "zero_shot_mmlu_val.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        subject = ("world_history", "anatomy")[number % 2]
        head = f"The following are multiple choice questions (with answers) about  {subject.replace('_', ' ')}.\n\n"
        asked = f"{head}What is {number}?\nA. the cat\nB. two birds\nC. a house\nD. monday\nAnswer:"
        rows.append({"subject": subject, "input": asked, "output": "ABCD"[number % 4]})
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file
