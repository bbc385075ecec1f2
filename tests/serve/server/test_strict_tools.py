"""The clients' own libraries, strict, over tools: what they read, what they collect from streams, and what they send back."""

import json
from typing import Any

import pytest
from anthropic import Anthropic, beta_tool
from openai import OpenAI

from keural.tokenizer import KeuralTokenizer, Message, ToolCall, render_prompt, with_calls
from tests.helpers.serving import Writing
from tests.helpers.tools import CALLS, HELLO, TOOLS

TEXT = f"잠시만요 👋🏽\n{CALLS}"
ARGUMENTS = ['{"city": "서울 </tool_call>"}', '{"who": "me", "old": true}']
CHAT_TOOLS: Any = [{"type": "function", "function": tool | {"strict": True}} for tool in TOOLS]
RESPONSES_TOOLS: Any = [{"type": "function", "strict": True, **tool} for tool in TOOLS]
MESSAGES_TOOLS: Any = [
    {"name": tool["name"], "description": tool["description"], "input_schema": tool["parameters"]} for tool in TOOLS
]
CALLED = Message(
    "assistant", with_calls("잠시만요 👋🏽", [ToolCall(tool["name"], text) for tool, text in zip(TOOLS, ARGUMENTS, strict=True)])
)
TURNS = [Message("user", "hello"), CALLED, Message("tool", "sunny"), Message("tool", "5")]


@pytest.fixture(scope="module")
def slots(tokenizer: KeuralTokenizer) -> Writing:
    return Writing(tokenizer, TEXT, context_length=1500)


def test_chats(client: OpenAI, slots: Writing, tokenizer: KeuralTokenizer) -> None:
    asked: Any = {"model": "tiny", "messages": HELLO, "tools": CHAT_TOOLS}
    whole = client.chat.completions.create(**asked).choices[0]
    with client.chat.completions.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]

    assert whole.finish_reason == final.finish_reason == "tool_calls"
    assert whole.message.content == final.message.content == "잠시만요 👋🏽"
    for found in (whole, final):
        calls: Any = found.message.tool_calls
        assert [call.function.arguments for call in calls] == ARGUMENTS
        assert [call.function.name for call in calls] == ["weather", "age"]
    assert kinds.count("tool_calls.function.arguments.done") == 2
    answered: Any = whole.message
    results = [{"role": "tool", "tool_call_id": call.id, "content": text}
               for call, text in zip(answered.tool_calls, ["sunny", "5"], strict=True)]  # fmt: skip
    for back in (answered, answered.model_dump()):
        client.chat.completions.create(**asked | {"messages": [*HELLO, back, *results]})
        assert slots.prompts[-1] == render_prompt(tokenizer, TURNS, TOOLS)


def test_responses(client: OpenAI, slots: Writing, tokenizer: KeuralTokenizer) -> None:
    asked: Any = {"model": "tiny", "input": HELLO, "tools": RESPONSES_TOOLS}
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()

    for found in (whole, final):
        assert (found.status, found.output_text) == ("completed", "잠시만요 👋🏽")
        assert [item.type for item in found.output] == ["message", "function_call", "function_call"]
        assert [item.arguments for item in found.output if item.type == "function_call"] == ARGUMENTS
    assert kinds.count("response.function_call_arguments.done") == 2
    for found, back in ((final, final.output), (whole, [item.model_dump() for item in whole.output])):
        calls = [item for item in found.output if item.type == "function_call"]
        results = [{"type": "function_call_output", "call_id": call.call_id, "output": text}
                   for call, text in zip(calls, ["sunny", "5"], strict=True)]  # fmt: skip
        client.responses.create(**asked | {"input": [*HELLO, *back, *results]})
        assert slots.prompts[-1] == render_prompt(tokenizer, TURNS, TOOLS)


def test_messages(claude: Anthropic, slots: Writing, tokenizer: KeuralTokenizer) -> None:
    asked: Any = {"model": "tiny", "max_tokens": 400, "messages": HELLO, "tools": MESSAGES_TOOLS}
    whole = claude.messages.create(**asked)
    with claude.messages.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()

    for found in (whole, final):
        assert found.stop_reason == "tool_use"
        assert [block.type for block in found.content] == ["text", "tool_use", "tool_use"]
        assert [block.input for block in found.content if block.type == "tool_use"] == [json.loads(text) for text in ARGUMENTS]
    assert kinds.count("content_block_stop") == 3
    calls = [block for block in final.content if block.type == "tool_use"]
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": text}
               for call, text in zip(calls, ["sunny", "5"], strict=True)]  # fmt: skip
    for back in ([block.model_dump() for block in final.content], final.content):
        more = [*HELLO, {"role": "assistant", "content": back}, {"role": "user", "content": results}]
        claude.messages.create(**asked | {"messages": more})
        assert slots.prompts[-1] == render_prompt(tokenizer, TURNS, TOOLS)
    assert claude.messages.count_tokens(model="tiny", messages=more, tools=MESSAGES_TOOLS).input_tokens == len(slots.prompts[-1])


@pytest.mark.parametrize("stream", [False, True])
def test_the_loop_of_tools_of_anthropics_client(claude: Anthropic, slots: Writing, stream: bool) -> None:
    """It asks for a conversation that the server holds, and goes on without where it hears that there is none."""

    @beta_tool
    def weather(city: str) -> str:
        """The weather."""
        return f"sunny in {city}"

    @beta_tool
    def age(who: str, old: bool) -> str:
        """Somebody's age."""
        return f"{who} {old}"

    asked: Any = {"model": "tiny", "max_tokens": 400, "messages": HELLO, "max_iterations": 2, "stream": stream}
    for turn in claude.beta.messages.tool_runner(**asked, tools=[weather, age]):
        message: Any = turn.get_final_message() if stream else turn
        assert message.stop_reason == "tool_use"

    assert slots.prompts[-1] != slots.prompts[-2]


@pytest.mark.parametrize("stream", [False, True])
def test_one_tool_that_must_be_called(client: OpenAI, claude: Anthropic, stream: bool) -> None:
    """Named, in every API; everything else about the answer is as the types have it."""
    chat: Any = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        tools=CHAT_TOOLS,
        tool_choice={"type": "function", "function": {"name": "weather"}},
        stream=stream,
    )
    response: Any = client.responses.create(
        model="tiny", input="x", tools=RESPONSES_TOOLS, tool_choice={"type": "function", "name": "weather"}, stream=stream
    )
    message: Any = claude.messages.create(
        model="tiny",
        max_tokens=99,
        messages=HELLO,
        tools=MESSAGES_TOOLS,
        tool_choice={"type": "tool", "name": "weather"},
        stream=stream,
    )
    if not stream:
        found = [chat.choices[0].message.tool_calls[0].function.name, response.output[0].name, message.content[0].name]
        assert response.tool_choice.name == "weather"
        assert [tool.name for tool in response.tools] == ["weather", "age"]
    else:
        deltas = [call for part in chat for call in part.choices[0].delta.tool_calls or ()]
        items = [event.item.name for event in response if event.type == "response.output_item.added"]
        blocks = [event.content_block.name for event in message if event.type == "content_block_start"]
        found = [deltas[0].function.name, *items, *blocks]
    assert found == ["weather"] * 3
