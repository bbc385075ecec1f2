"""Every shape of rows that people have, each as one literal row with the adapter and the options that read it.

In: nothing. Out: `SHAPES`, which the reference prints and a test reads.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Shape:
    """One shape of rows."""

    name: str
    """What it is, in a few words."""
    adapter: str
    row: Any
    options: dict[str, Any] = field(default_factory=dict)


_ASKED = {"role": "user", "content": "목포에 바람이 부나요?"}
_ANSWERED = {"role": "assistant", "content": "초속 3미터로 붑니다."}
_WIND = {"name": "wind", "description": "바람의 세기", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
_CALL = {"id": "call-1", "type": "function", "function": {"name": "wind", "arguments": '{"city": "목포"}'}}

SHAPES = (
    Shape("turns with roles", "messages", {"messages": [_ASKED, _ANSWERED]}),
    Shape("the row is the list of turns", "messages", [_ASKED, _ANSWERED]),
    Shape(
        "turns under another name",
        "messages",
        {"dialog": [{"speaker": "나", "text": "안녕?"}, {"speaker": "봇", "text": "반가워요."}]},
        {"field": "dialog", "role": "speaker", "content": "text", "roles": {"나": "user", "봇": "assistant"}},
    ),
    Shape(
        "turns of speakers who have no role: who begins is the user",
        "messages",
        {"dialog": [{"speaker": "mina", "text": "안녕?"}, {"speaker": "june", "text": "반가워요."}]},
        {"field": "dialog", "role": "speaker", "content": "text", "roles": "in_order"},
    ),
    Shape(
        "turns as JSON text, as a column has them",
        "messages",
        {"messages": '[{"role": "user", "content": "안녕?"}, {"role": "assistant", "content": "반가워요."}]'},
    ),
    Shape(
        "turns as an object of lists, as columns of Parquet have them",
        "messages",
        {"messages": {"role": ["user", "assistant"], "content": ["안녕?", "반가워요."]}},
    ),
    Shape(
        "content in parts",
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "안녕?"}]}, _ANSWERED]},
    ),
    Shape(
        "tools, calls and results",
        "messages",
        {
            "messages": [
                _ASKED,
                {"role": "assistant", "content": None, "tool_calls": [_CALL]},
                {"role": "tool", "tool_call_id": "call-1", "content": '{"speed": 3}'},
                _ANSWERED,
            ],
            "tools": [{"type": "function", "function": _WIND}],
        },
    ),
    Shape(
        "reasoning beside an answer, kept without being trained",
        "messages",
        {"messages": [_ASKED, {**_ANSWERED, "reasoning_content": "기상청의 값은 3이다."}]},
        {"reasoning": "keep"},
    ),
    Shape(
        "reasoning inside an answer, trained with it",
        "messages",
        {"messages": [_ASKED, {"role": "assistant", "content": "<think>\n값은 3이다.\n</think>\n\n초속 3미터로 붑니다."}]},
        {"reasoning": "train"},
    ),
    Shape(
        "turns that say what is trained",
        "messages",
        {
            "messages": [
                _ASKED,
                {"role": "assistant", "content": "모릅니다.", "weight": 0},
                {"role": "user", "content": "다시 찾아 보세요."},
                {**_ANSWERED, "weight": 1},
            ]
        },
    ),
    Shape(
        "a flag of a name of its own",
        "messages",
        {"messages": [_ASKED, {**_ANSWERED, "mask": 0}]},
        {"flags": {"mask": False}},
    ),
    Shape(
        "the assistant greets first",
        "messages",
        {"messages": [{"role": "assistant", "content": "무엇을 도와 드릴까요?"}, _ASKED, _ANSWERED]},
        {"assistant_first": "keep"},
    ),
    Shape(
        "a system turn in the middle",
        "messages",
        {
            "messages": [
                _ASKED,
                _ANSWERED,
                {"role": "system", "content": "짧게 답하세요."},
                {"role": "user", "content": "파도는요?"},
                {"role": "assistant", "content": "1미터입니다."},
            ]
        },
        {"system_inside": "merge"},
    ),
    Shape(
        "several turns of one side in a row",
        "messages",
        {"messages": [{"role": "user", "content": "저기요"}, _ASKED, _ANSWERED]},
        {"consecutive": "merge"},
    ),
    Shape(
        "ShareGPT",
        "sharegpt",
        {"conversations": [{"from": "human", "value": "Name a tree."}, {"from": "gpt", "value": "An oak."}], "system": "Be brief."},
    ),
    Shape(
        "ShareGPT with tools",
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "목포에 바람이 부나요?"},
                {"from": "function_call", "value": '{"name": "wind", "arguments": {"city": "목포"}}'},
                {"from": "observation", "value": '{"speed": 3}'},
                {"from": "gpt", "value": "초속 3미터로 붑니다."},
            ],
            "tools": '[{"name": "wind", "description": "바람의 세기", "parameters": {}}]',
        },
    ),
    Shape(
        "roles of other names",
        "sharegpt",
        {"conversations": [{"from": "질문자", "value": "Name a tree."}, {"from": "전문가", "value": "An oak."}]},
        {"roles": {"질문자": "user", "전문가": "assistant"}},
    ),
    Shape("prompt and completion", "prompt_completion", {"prompt": "Name a tree.", "completion": "An oak."}),
    Shape("prompt and completion as turns", "prompt_completion", {"prompt": [_ASKED], "completion": [_ANSWERED]}),
    Shape("an answer that is good or not", "kto", {"prompt": "Name a tree.", "completion": "An oak.", "label": True}),
    Shape(
        "instruction, input and output, with what was said before",
        "alpaca",
        {
            "instruction": "Add them.",
            "input": "1, 2",
            "output": "3",
            "history": [["Name a tree.", "An oak."]],
            "system": "Be brief.",
        },
    ),
    Shape("question and answer", "qa", {"question": "Name a tree.", "answer": "An oak."}),
    Shape(
        "question and answer in columns of any name or number",
        "qa",
        {"질문": "나무 하나를 대세요.", "답변": "참나무."},
        {"question": "질문", "answer": "답변"},
    ),
    Shape(
        "question and answer, the answer inside a list",
        "qa",
        {"question": "Name a tree.", "answers": [{"text": "An oak.", "votes": 3}]},
        {"answer": "answers.0.text"},
    ),
    Shape(
        "two languages of a text",
        "qa",
        {"en": "An oak.", "ko": "참나무."},
        {"question": "en", "answer": "ko", "template": "한국어로 옮기세요: {question}"},
    ),
    Shape(
        "one question for all rows",
        "qa",
        {"review": "배송이 빨라요.", "label": "긍정"},
        {"prompt": "상품평의 감정은?", "answer": "label", "ignore": ["label"]},
    ),
    Shape(
        "answers that are true or false",
        "qa",
        {"question": "참나무는 나무인가요?", "answer": True},
        {"booleans": ["예", "아니요"]},
    ),
    Shape(
        "passage, question and answers",
        "squad",
        {"context": "The mill stands by the river.", "question": "Where is the mill?", "answers": {"text": ["by the river"]}},
    ),
    Shape(
        "the same nested, as files of SQuAD have it",
        "squad",
        {
            "data": [
                {
                    "title": "Mill",
                    "paragraphs": [
                        {
                            "context": "The mill stands by the river.",
                            "qas": [{"id": "1", "question": "Where is the mill?", "answers": [{"text": "by the river"}]}],
                        }
                    ],
                }
            ]
        },
    ),
    Shape("alternating texts", "dialogue", {"dialogue": ["Name a tree.", "An oak.", "Another.", "A birch."]}),
    Shape("pairs of texts", "dialogue", [["Name a tree.", "An oak."], ["Another.", "A birch."]]),
    Shape(
        "several conversations in one row",
        "qa",
        {
            "topic": "trees",
            "items": [{"question": "Name a tree.", "answer": "An oak."}, {"question": "Another.", "answer": "A birch."}],
        },
        {"unfold": ["items"]},
    ),
    Shape("chosen and rejected", "preference", {"prompt": "Name a tree.", "chosen": "An oak.", "rejected": "A rose."}),
    Shape(
        "chosen and rejected as turns",
        "preference",
        {
            "chosen": [{"role": "user", "content": "Name a tree."}, {"role": "assistant", "content": "An oak."}],
            "rejected": [{"role": "user", "content": "Name a tree."}, {"role": "assistant", "content": "A rose."}],
        },
    ),
    Shape(
        "two answers, and which of them is the better",
        "preference",
        {"prompt": "Name a tree.", "answer_a": "An oak.", "answer_b": "A rose.", "winner": "model_a"},
        {
            "answers": ["answer_a", "answer_b"],
            "label": "winner",
            "labels": {"model_a": "first", "model_b": "second", "tie": "tie"},
        },
    ),
    Shape(
        "two answers with a score each",
        "preference",
        {"prompt": "Name a tree.", "response_1": "A rose.", "response_2": "An oak.", "score_1": 2.5, "score_2": 9},
        {"answers": ["response_1", "response_2"], "scores": ["score_1", "score_2"]},
    ),
    Shape(
        "a list of answers with scores, all pairs of them",
        "preference",
        {"prompt": "Name a tree.", "responses": ["An oak.", "A rose.", "A spoon."], "scores": [9, 4, 1]},
        {"answers": "responses", "scores": "scores", "pairs": "all"},
    ),
    Shape(
        "a list of answers, the best first",
        "preference",
        {"prompt": "Name a tree.", "completions": ["An oak.", "A rose.", "A spoon."]},
        {"answers": "completions", "order": "best_first"},
    ),
    Shape(
        "several chosen and rejected answers",
        "preference",
        {"prompt": "Name a tree.", "chosen": ["An oak.", "A birch."], "rejected": ["A rose.", "A spoon."]},
        {"pairs": "all"},
    ),
    Shape(
        "two transcripts",
        "hh_rlhf",
        {"chosen": "\n\nHuman: Name a tree.\n\nAssistant: An oak.", "rejected": "\n\nHuman: Name a tree.\n\nAssistant: A rose."},
    ),
    Shape("running text", "text", {"text": "The mill stands by the river."}),
    Shape("running text under another name", "text", {"본문": "물레방아는 강가에 있다."}, {"field": "본문"}),
    Shape(
        "a title and a text",
        "text",
        {"title": "Mill", "body": "The mill stands by the river."},
        {"field": ["title", "body"]},
    ),
)
